"""From a recipe to splits that can be trained on: loaded, audited, cut."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from datasets import DatasetDict, concatenate_datasets

from torchthaw.auditing import MOST_IMAGES_FOR_FEATURES, backbone_features, examine, refuse_failed, show
from torchthaw.console import Reporter
from torchthaw.data.audit.audit import Examined, judge
from torchthaw.data.audit.report import AuditReport
from torchthaw.data.bad_images import BadImage, find_bad_images, leave_out
from torchthaw.data.builtin import BUILTIN_PREFIX, load_builtin_dataset
from torchthaw.data.hub_datasets import loaded_revision
from torchthaw.data.label_sets import class_names_of, has_label_sets, label_counts
from torchthaw.data.label_sets import describe as describe_sets
from torchthaw.data.loading import load_image_dataset
from torchthaw.data.split_list import apply_split_list
from torchthaw.data.splitting import describe_split, split_dataset, split_unit
from torchthaw.errors import DataError, RecipeError
from torchthaw.evaluation.multilabel import DEFAULT_METRIC
from torchthaw.recipe import DataRecipe, Recipe
from torchthaw.training import processes
from torchthaw.training.imbalance import IMBALANCE_FOR_MACRO_F1
from torchthaw.user_errors import as_user_error


@dataclass(frozen=True)
class PreparedData:
    """Splits ready for training, and where they came from.

    Attributes:
        splits: Images by split.
        class_names: In the order of the logits.
        bad_images: What was left out.
        origins: For each split its `origin` (`given`, `cut off`, `the rest`), and the `share` that was asked for.
        split_by: What was kept apart: `image`, `group` or `time`.
        split_method: The same in words.
        together: Paths of images that are copies of each other, where these are kept together.
        audit: What the audit found; None if it was off.
        revision: Commit of a data set on the Hub, as far as it is known.
    """

    splits: DatasetDict
    class_names: list[str]
    bad_images: list[BadImage]
    origins: dict[str, dict[str, Any]]
    split_by: str
    split_method: str
    together: Sequence[Sequence[str]] = ()
    audit: AuditReport | None = None
    revision: str | None = None

    @property
    def several_labels(self) -> bool:
        """Whether images may have several labels."""
        return has_label_sets(self.splits["train"])


def prepare_data(
    recipe: Recipe, *, reporter: Reporter, needs_validation: bool = True, features: bool = True
) -> PreparedData:
    """Loads, audits and splits the images of a recipe.

    Unless the audit is off, every image is looked at once; where neither groups nor times are known, images that are
    copies of each other, exactly or nearly, are kept in one split.

    Args:
        recipe: The recipe.
        reporter: Where messages go.
        needs_validation: Whether to cut off validation images where none are given; without the need, given ones are
            training images.
        features: Whether the audit may load the pretrained backbone, to look for suspicious labels.

    Raises:
        DataError: the data cannot be read or does not fit, or fails its audit, which is strict.
    """
    data = recipe.data
    loaded = load_data(recipe.image_source(), problem_type=recipe.problem_type)
    if has_label_sets(loaded["train"]):
        sets, names = loaded["train"].select_columns(["label"])[:]["label"], class_names_of(loaded["train"])
        reporter.say(f"{describe_sets(sets, len(names))}")
    revision = loaded_revision(loaded)
    listed = loaded if data.splits is None else apply_split_list(loaded, data.splits)
    if not needs_validation:
        listed = _join_validation(listed)
    looked = _look(listed, reporter) if recipe.audit != "off" else _check(listed, reporter)
    splits = DatasetDict(leave_out(listed, looked.bad, on_bad=data.on_bad_image))
    bad = [image for found in looked.bad.values() for image in found]
    if bad:
        reporter.say(f"Left out {len(bad)} unreadable images: {', '.join(image.path for image in bad[:5])} ...")
    given = set(splits)
    # Said in so many words, by image means by image.
    together = looked.clusters if data.split_by == "auto" and split_unit(splits) == "image" else []
    validation = data.validation if needs_validation else 0
    cut = split_dataset(
        splits, validation=validation, test=data.test, seed=recipe.seed, by=data.split_by, together=together
    )
    if needs_validation and "validation" not in cut:
        raise DataError("there are no validation images; write data: {validation: 0.15} to cut some off for training")
    report = processes.on_main(lambda: looked.report(recipe, splits, cut, reporter, features))
    if report is not None:
        show(report, reporter)
        if recipe.audit == "strict":
            refuse_failed(report)
    unit, method = describe_split(splits, by=data.split_by, seed=recipe.seed, together=together)
    return PreparedData(
        splits=cut,
        class_names=class_names_of(cut["train"]),
        bad_images=bad,
        origins=_origins(given, cut, {"validation": validation, "test": data.test}),
        split_by=unit,
        split_method=method,
        together=together,
        audit=report,
        revision=revision,
    )


@dataclass(frozen=True)
class _Looked:
    """What is known of all images before they are split.

    Attributes:
        bad: Images that cannot be decoded, by split.
        clusters: Paths of images that are copies of each other.
        report: Makes the audit's report, in the first process.
    """

    bad: dict[str, list[BadImage]]
    clusters: list[list[str]] = field(default_factory=list)
    report: Callable[..., AuditReport | None] = lambda *_: None


def _check(splits: DatasetDict, reporter: Reporter) -> _Looked:
    """Decodes every image, and nothing more."""
    return _Looked({name: find_bad_images(images, progress=reporter.draws) for name, images in splits.items()})


def _look(splits: DatasetDict, reporter: Reporter) -> _Looked:
    """Looks at every image for the audit, in the first process."""
    examined: list[Examined] = []

    def look() -> tuple[dict[str, list[BadImage]], list[list[str]]]:
        examined.append(examine(splits, reporter))
        return examined[0].scan.bad, examined[0].clusters

    bad, clusters = processes.on_main(look)
    return _Looked(bad, clusters, lambda *args: _judge(examined[0], *args))


def _judge(
    examined: Examined, recipe: Recipe, whole: DatasetDict, cut: DatasetDict, reporter: Reporter, look_closer: bool
) -> AuditReport:
    """Judges the split that training will use."""
    images = examined.scan.images
    where = {path: split for split, rows in cut.items() for path in rows.select_columns(["path"])[:]["path"]}
    features, not_checked = None, {}
    if has_label_sets(cut["train"]):
        look_closer = False
    if not look_closer:
        not_checked["suspicious labels"] = "that takes the backbone's weights"
    elif recipe.weights is None:
        not_checked["suspicious labels"] = "that takes pretrained weights"
    elif len(images) > MOST_IMAGES_FOR_FEATURES:
        not_checked["suspicious labels"] = (
            f"before training only up to {MOST_IMAGES_FOR_FEATURES:,} images are looked at with the backbone; "
            f"torchthaw audit DATA --backbone {recipe.backbone} looks at all"
        )
    else:
        with as_user_error():
            features, seconds = backbone_features(
                whole,
                reporter,
                backbone=recipe.backbone,
                weights=recipe.weights,
                image_size=recipe.image_size,
                batch_size=recipe.images_per_step(),
                num_workers=None if recipe.num_workers == "auto" else recipe.num_workers,
            )
        examined.seconds["features"] = seconds
    return judge(
        examined,
        [where[image.path] for image in images],
        features=features,
        dropped=recipe.data.on_bad_image == "drop",
        seed=recipe.seed,
        not_checked=not_checked,
    )


def _origins(given: set[str], splits: Collection[str], shares: dict[str, float | int]) -> dict[str, dict[str, Any]]:
    origins: dict[str, dict[str, Any]] = {}
    for split in splits:
        if split not in given:
            origins[split] = {"origin": "cut off", "share": shares[split]}
        else:
            rest = split == "train" and len(given) < len(splits)
            origins[split] = {"origin": "the rest" if rest else "given", "share": None}
    return origins


def load_data(
    recipe: DataRecipe, *, class_names: Sequence[str] | None = None, problem_type: str = "auto"
) -> DatasetDict:
    """Loads the splits that a recipe's data section names.

    Args:
        recipe: The section.
        class_names: Classes of a trained model, by whose order labels are numbered; None takes the data's.
        problem_type: As for `load_image_dataset`.
    """
    if recipe.path is not None and recipe.path.startswith(BUILTIN_PREFIX):
        if problem_type == "multi_label" or recipe.labels or recipe.label_separator:
            raise DataError(
                f"{recipe.path} has one label per image; leave out problem_type, labels and label_separator"
            )
        return load_builtin_dataset(recipe.path.removeprefix(BUILTIN_PREFIX))
    source = recipe.path or recipe.name
    assert source is not None
    return load_image_dataset(
        source,
        name=recipe.config,
        revision=recipe.revision,
        image_column=recipe.image_column,
        label_column=recipe.label_column,
        class_names=class_names,
        group=recipe.group,
        time=recipe.time,
        problem_type=problem_type,
        labels=recipe.labels,
        label_separator=recipe.label_separator,
    )


def selection_metric(recipe: Recipe, data: PreparedData) -> str:
    """Returns what chooses the best weights: macro F1 or accuracy, or mAP where images may have several labels.

    Raises:
        RecipeError: the recipe asks for something that goes with several labels per image, and there is one.
    """
    if not data.several_labels:
        asked = [f"metric: {recipe.metric}"] * (recipe.metric in ("map", "micro_f1"))
        asked += [f"thresholds: {recipe.thresholds}"] * (recipe.thresholds != 0.5)
        if asked:
            raise RecipeError(
                f"{' and '.join(asked)} {'go' if len(asked) > 1 else 'goes'} with several labels per image, and the "
                "data has one; write metric: macro_f1 without thresholds, or problem_type: multi_label for text such "
                "as cat|dog"
            )
    elif recipe.calibrate != "none":
        raise RecipeError(
            f"calibrate is {recipe.calibrate!r}, which is for one label per image, but images may have several labels; "
            "leave it out"
        )
    if recipe.metric != "auto":
        return recipe.metric
    if data.several_labels:
        return DEFAULT_METRIC
    counts = label_counts(data.splits["train"])
    return "macro_f1" if counts.max() >= IMBALANCE_FOR_MACRO_F1 * max(1, counts.min()) else "accuracy"


def _join_validation(splits: DatasetDict) -> DatasetDict:
    parts = [splits[split] for split in ("train", "validation") if split in splits]
    rest = {split: images for split, images in splits.items() if split not in ("train", "validation")}
    return DatasetDict(train=concatenate_datasets(parts), **rest)
