"""`torchthaw audit`: what is wrong with a data set, without training, and a cleaned list of its splits."""

from pathlib import Path
from typing import Any

from datasets import DatasetDict

from torchthaw.auditing import backbone_features, examine, show
from torchthaw.console import Reporter, hide_loading_bars
from torchthaw.data.audit.audit import judge
from torchthaw.data.audit.cleaning import cleaned_splits
from torchthaw.data.bad_images import without
from torchthaw.data.split_list import DROP, apply_split_list, write_split_list
from torchthaw.data.splitting import split_dataset
from torchthaw.data_preparation import load_data
from torchthaw.errors import DataError
from torchthaw.recipe import DataRecipe
from torchthaw.user_errors import as_user_error


def audit_data(
    recipe: DataRecipe,
    *,
    seed: int,
    reporter: Reporter,
    backbone: str | None = None,
    weights: str = "DEFAULT",
    fix: Path | None = None,
) -> dict[str, Any]:
    """Audits a data set, with its own splits, or cut as it would be for training.

    Args:
        recipe: Where the images are; shares of `validation` and `test` that are not 0 are cut off.
        seed: Of the choice of images.
        reporter: Where findings go.
        backbone: Whose features are used to look for suspicious labels; None does not look.
        weights: Of the backbone.
        fix: Gets a cleaned list of splits.

    Returns:
        The content of `audit.json`.

    Raises:
        DataError: the data cannot be read, or `fix` exists.
    """
    hide_loading_bars()
    if fix is not None and fix.exists():
        raise DataError(f"{fix} exists, and nothing is overwritten; write another name after --fix")
    loaded = load_data(recipe)
    listed = loaded if recipe.splits is None else apply_split_list(loaded, recipe.splits)
    examined = examine(listed, reporter)
    readable = DatasetDict(without(listed, examined.scan.bad))
    features = None
    if backbone is not None:
        with as_user_error():
            features, seconds = backbone_features(readable, reporter, backbone=backbone, weights=weights)
        examined.seconds["features"] = seconds
    together = examined.clusters if recipe.split_by == "auto" else []
    cut = split_dataset(
        readable, validation=recipe.validation, test=recipe.test, seed=seed, by=recipe.split_by, together=together
    )
    where = {path: split for split, rows in cut.items() for path in rows.select_columns(["path"])[:]["path"]}
    splits = [where[image.path] for image in examined.scan.images]
    not_checked = {} if backbone else {"suspicious labels": "name a pretrained network with --backbone"}
    report = judge(examined, splits, features=features, seed=seed, not_checked=not_checked)
    show(report, reporter, full=True)
    document = report.to_dict()
    if fix is not None:
        rows = cleaned_splits(examined, splits)
        write_split_list(fix, rows)
        dropped = sum(row.split == DROP for row in rows)
        document["fixed"] = {"file": str(fix), "images": len(rows), "dropped": dropped}
        reporter.say(
            f"wrote {fix}: {len(rows) - dropped} of {len(rows)} images are kept; train with --set data.splits={fix}"
        )
    return document
