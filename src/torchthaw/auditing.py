"""The audit as commands run it: with progress bars, a backbone's features, and findings on the terminal."""

import time
from collections.abc import Mapping
from typing import cast

import numpy as np
from datasets import Dataset, concatenate_datasets
from rich.text import Text
from torch import nn

from torchthaw.backbones.image_processing import TorchvisionImageProcessor
from torchthaw.backbones.modeling import TorchvisionModel
from torchthaw.console import Reporter, printable
from torchthaw.data.audit.audit import Examined, examine_dataset
from torchthaw.data.audit.report import AuditReport
from torchthaw.data.views import ImageView
from torchthaw.data.workers import suggest_workers
from torchthaw.errors import DataError
from torchthaw.evaluation.features import pooled_features
from torchthaw.evaluation.inference import best_device

# Before training, features of more images would take longer than they are worth.
MOST_IMAGES_FOR_FEATURES = 5_000
_COLORS = {"pass": "green", "warn": "yellow", "fail": "red"}
_PATHS_SHOWN = 3


def examine(splits: Mapping[str, Dataset], reporter: Reporter) -> Examined:
    """Looks at every image once, and for copies, with progress bars.

    Raises:
        DataError: no image can be decoded.
    """
    with reporter.progress("looking at the images", 1) as bar:
        return examine_dataset(
            splits, progress=lambda step, done, total: bar.update(done, total=total, description=step.lower())
        )


def backbone_features(
    splits: Mapping[str, Dataset],
    reporter: Reporter,
    *,
    backbone: str,
    weights: str,
    image_size: int | None = None,
    batch_size: int = 32,
    num_workers: int | None = None,
) -> tuple[np.ndarray, float]:
    """Computes what a pretrained backbone sees in all images, split after split.

    Returns:
        Features of shape (images, features), and the seconds that it took.

    Raises:
        ThawError: the backbone is unknown, or its weights cannot be had.
    """
    started = time.perf_counter()
    model = TorchvisionModel.from_torchvision(backbone, weights=weights, image_size=image_size)
    cast(nn.Module, model).to(best_device()).requires_grad_(False)
    processor = TorchvisionImageProcessor.from_torchvision(backbone, weights=weights, image_size=image_size)
    view = ImageView(concatenate_datasets(list(splits.values())), processor)
    with reporter.progress("looking for suspicious labels", len(view)) as bar:
        workers = suggest_workers(view, best_device()) if num_workers is None else num_workers
        features = pooled_features(model, view, batch_size=batch_size, num_workers=workers, on_progress=bar.update)
    return features, time.perf_counter() - started


def show(report: AuditReport, reporter: Reporter, *, full: bool = False) -> None:
    """Prints what an audit found.

    Args:
        report: The report.
        reporter: Where to.
        full: Whether to name also what is only told, what was not looked at, and examples of each finding.
    """
    findings = [finding for finding in report.findings if full or finding.verdict != "pass"]
    sizes = ", ".join(f"{number} {split}" for split, number in report.num_images.items())
    seconds = sum(report.seconds.values())
    color = _COLORS[report.verdict]
    reporter.say(Text.assemble(f"audit of {sizes} images: ", (report.verdict, f"bold {color}"), f" ({seconds:.1f} s)"))
    for finding in findings:
        color = _COLORS[finding.verdict]
        told = f" {finding.name}: {printable(finding.summary)}."
        reporter.say(Text.assemble("  ", (finding.verdict, color), told))
        if full:
            for item in finding.items[:_PATHS_SHOWN]:
                reporter.say(f"         {printable(_short(item))}")
            if len(finding.items) > _PATHS_SHOWN:
                reporter.say(f"         ... and {len(finding.items) - _PATHS_SHOWN} more")
        if finding.advice:
            reporter.say(f"       {printable(finding.advice)}")
    if full:
        for what, why in report.not_checked.items():
            reporter.say(f"  not looked at: {what} ({printable(why)})")


def refuse_failed(report: AuditReport) -> None:
    """Stops a run whose data failed its audit.

    Raises:
        DataError: a finding fails.
    """
    failed = [finding for finding in report.findings if finding.verdict == "fail"]
    if failed:
        raise DataError(
            "The data fails its audit, and audit: strict does not train on it:\n"
            + "\n".join(f"  - {finding.name}: {finding.summary}. {finding.advice or ''}" for finding in failed)
            + "\nMend the data; or write audit: warn, and the findings will stand in the model card."
        )


def _short(item: Mapping[str, object]) -> str:
    """Writes an item of a finding in one line."""
    images = item.get("images")
    if isinstance(images, list):
        return " = ".join(f"{image['split']}: {image['path']} ({image['label']})" for image in images[:3])
    return ", ".join(f"{key} {value}" for key, value in item.items())
