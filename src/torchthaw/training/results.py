"""What a run leaves for people: figures of the saved weights, plots, predictions, and the model card."""

import hashlib
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
from PIL import Image
from torch import nn
from transformers import TrainerCallback
from transformers.integrations.integration_utils import CodeCarbonCallback

from torchthaw._version import __version__
from torchthaw.backbones.modeling import TorchvisionForImageClassification
from torchthaw.data.images import decode_image
from torchthaw.data.views import ImageView
from torchthaw.evaluation.augmented_predictions import predict_augmented
from torchthaw.evaluation.files import replacing
from torchthaw.evaluation.measuring import measure_split
from torchthaw.evaluation.multilabel_measuring import measure_label_sets
from torchthaw.evaluation.plots import plot_curves, plot_learning_rates
from torchthaw.evaluation.temperature import TemperatureScaling, scaled
from torchthaw.sharing.fresh_process import check_saved_folder
from torchthaw.training.augmented_figures import AugmentedFigures
from torchthaw.training.records import StageRecord
from torchthaw.training.timing import peak_memory_mb

RESULTS_FILE = "results.json"
_ASIDE = ".results.json.earlier"
AUDIT_FILE = "audit.json"
WEIGHTS_FILE = "model.safetensors"
# Enough to see that another preprocessing or class order is at work, in a second or two.
_IMAGES_TO_CHECK = 16
_PACKAGES = ("torch", "torchvision", "transformers", "datasets", "accelerate", "scikit-learn", "pillow")


class Bar(Protocol):
    """What shows how far something is."""

    def update(self, done: int) -> None:
        """Shows that so many images are done."""


# Takes a text and a number of images, gives a context in which a bar is shown.
ProgressBars = Callable[[str, int], AbstractContextManager[Bar]]


class _NoBar:
    def update(self, done: int) -> None:
        pass


def no_progress(_text: str, _total: int) -> AbstractContextManager[Bar]:
    """Shows nothing."""
    return nullcontext(_NoBar())


def measure_views(
    model: TorchvisionForImageClassification,
    views: Mapping[str, Any],
    folder: Path,
    *,
    batch_size: int,
    num_workers: int,
    collate_fn: Callable[..., Any],
    progress: ProgressBars = no_progress,
    scaling: TemperatureScaling | None = None,
    augmented: AugmentedFigures | None = None,
    outputs: dict[str, tuple[np.ndarray, np.ndarray]] | None = None,
) -> dict[str, Any]:
    """Measures the weights that the model has on each split; writes predictions and plots.

    Args:
        model: The model, where it is.
        views: Evaluation views by split; what gives tensors only has no file of predictions.
        folder: Gets `predictions/` and `plots/`.
        batch_size: Images at once.
        num_workers: Processes that decode images besides the main one.
        collate_fn: Makes a batch of samples.
        progress: Shows a bar.
        scaling: Is fitted and applied to the logits, which are those of a model without a temperature.
        augmented: Measures test-time augmentation too, from the same look at the images.
        outputs: Gets logits and labels by split, if given.

    Returns:
        The figures by split.
    """
    figures = {}
    for split, view in views.items():
        with progress(f"evaluating {split}", len(view)) as bar:
            every, labels = predict_augmented(
                model, view, "none" if augmented is None else augmented.method, batch_size=batch_size,
                num_workers=num_workers, on_progress=bar.update, collate_fn=collate_fn,
            )  # fmt: skip
        logits = every[0]
        if scaling is not None:
            logits = scaling(split, logits, labels)
            every = scaled(every, scaling.temperature)
        if outputs is not None:
            outputs[split] = logits, labels
        known = view.dataset.column_names if isinstance(view, ImageView) else []
        paths, groups = (view.dataset[name][:] if name in known else None for name in ("path", "group"))
        if augmented is not None:
            # Whether to use it is for validation images to decide, not for those of the test.
            augmented.measure(split, every, labels, groups, compared=split == "validation")
        measure = measure_split
        if model.config.several_labels:
            measure = partial(measure_label_sets, thresholds=model.config.thresholds)
        figures[split] = measure(split, logits, labels, model.config.class_names, folder, paths=paths, groups=groups)
    return figures


def draw_training(log_history: list[dict[str, Any]], records: list[StageRecord], folder: Path) -> None:
    """Draws the curves and learning rates of a run into `plots/` below a folder."""
    borders = []
    start = 0
    for record in records:
        end = start + record.epochs
        borders.append({"name": record.name, "start_epoch": start, "end_epoch": end, "accepted": record.accepted})
        start = end
    plot_curves(log_history, borders, folder / "plots" / "curves.png")
    plot_learning_rates(log_history, borders, folder / "plots" / "learning_rates.png")


def prove_saved(folder: Path, model: TorchvisionForImageClassification, view: Any) -> dict[str, Any] | None:
    """Loads a saved folder in a new process without torchthaw and compares it on the first images of a view.

    Returns:
        See `check_saved_folder`; None for what gives tensors, not images.

    Raises:
        SavedModelError: it does not load there, or gives something else.
    """
    if not isinstance(view, ImageView):
        return None
    images: list[Image.Image] = []
    for row in view.dataset.select(range(min(_IMAGES_TO_CHECK, len(view)))):
        images.append(decode_image(row["image"]))
    pixels = view.processor(images, return_tensors="pt")["pixel_values"]
    device, was_training = next(model.parameters()).device, model.training
    # The new process works on the CPU, which rounds in another way than a GPU.
    model.cpu().eval()
    with torch.inference_mode():
        logits = model(pixel_values=pixels).logits.float().numpy()
    cast(nn.Module, model).to(device).train(was_training)
    return check_saved_folder(folder, images, logits.astype(np.float64), model.config.class_names)


def describe_model(folder: Path, model: TorchvisionForImageClassification, plan: str) -> dict[str, Any]:
    """Returns what identifies a saved model: digest of its weights, parameters, image size, name of the plan."""
    return {
        "sha256": _sha256(folder / WEIGHTS_FILE),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "image_size": model.config.image_size,
        "plan": plan,
    }


def describe_environment() -> dict[str, Any]:
    """Returns date, hardware, peak memory of this process (in MiB; of the GPU where there is one) and versions."""
    cuda = torch.cuda.is_available()
    python = ".".join(str(part) for part in sys.version_info[:3])
    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "hardware": {
            "device": torch.cuda.get_device_name() if cuda else ("mps" if torch.backends.mps.is_available() else "cpu"),
            "cores": os.cpu_count(),
            "platform": platform.system(),
        },
        "peak_memory_mb": peak_memory_mb(),
        "versions": {
            "torchthaw": __version__,
            "python": python,
            **{name: metadata.version(name) for name in _PACKAGES},
        },
    }


def measured_emissions(callbacks: Iterable[TrainerCallback]) -> dict[str, float]:
    """Returns the CO2 equivalent of training in kg as `emissions_kg`, where codecarbon has measured it."""
    trackers = [callback.tracker for callback in callbacks if isinstance(callback, CodeCarbonCallback)]
    found = [tracker.final_emissions for tracker in trackers if tracker is not None]
    return {"emissions_kg": found[0]} if found and found[0] is not None else {}


def write_results(folder: Path, results: Mapping[str, Any]) -> None:
    """Writes `results.json`, complete or not at all."""
    with replacing(folder / RESULTS_FILE) as temporary:
        temporary.write_text(json.dumps(results, indent=2), encoding="utf-8")
    (folder / _ASIDE).unlink(missing_ok=True)


def set_results_aside(folder: Path) -> dict[str, Any]:
    """Takes `results.json` out of a folder that is no longer complete, until `write_results` writes another one.

    Returns:
        What it held, or what it held before an earlier attempt that came to no end; of the two, what knows of more
        looks at the test images.
    """
    aside = folder / _ASIDE
    found = [results for results in (read_results(folder), _read(aside)) if results]
    earlier: dict[str, Any] = max(found, key=lambda results: results.get("test_reads", 0), default={})
    if earlier:
        with replacing(aside) as temporary:
            temporary.write_text(json.dumps(earlier), encoding="utf-8")
    (folder / RESULTS_FILE).unlink(missing_ok=True)
    return earlier


def read_results(folder: Path) -> dict[str, Any] | None:
    """Returns what `results.json` holds; None if there is none."""
    return _read(folder / RESULTS_FILE)


def _read(file: Path) -> dict[str, Any] | None:
    return cast(dict[str, Any], json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else None


def read_audit(folder: Path) -> dict[str, Any] | None:
    """Returns what `audit.json` holds, as the audit of a run leaves it; None if there is none."""
    file = folder / AUDIT_FILE
    return cast(dict[str, Any], json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else None


def _sha256(file: Path) -> str:
    state = hashlib.sha256()
    with file.open("rb") as content:
        while chunk := content.read(2**20):
            state.update(chunk)
    return state.hexdigest()
