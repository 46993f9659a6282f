"""Loading what torchthaw saved, and making new folders of it."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch

from torchthaw.backbones.anatomy import family_of
from torchthaw.backbones.image_processing import TorchvisionImageProcessor
from torchthaw.backbones.modeling import TorchvisionForImageClassification
from torchthaw.errors import SharingError


def load_saved(source: str | Path) -> tuple[TorchvisionForImageClassification, TorchvisionImageProcessor]:
    """Loads a model, in eval mode on the CPU, and its processor, from a folder or Hub repository that torchthaw saved.

    Weights that were saved in 16 bits are loaded as float32, which has all their values.

    Raises:
        SharingError: there is no such model, or weights are not finite.
    """
    folder = Path(source)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise SharingError(f"{source} holds no config.json, so it is no saved model; pass the output folder of a run")
    try:
        model = TorchvisionForImageClassification.from_pretrained(source, dtype=torch.float32)
        processor = TorchvisionImageProcessor.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise SharingError(f"no model could be loaded from {str(source)!r}: {error}") from error
    broken = [name for name, tensor in model.state_dict().items() if not tensor.isfinite().all()]
    if broken:
        raise SharingError(f"{source} has weights that are not finite, in {', '.join(broken[:3])}; pass another model")
    return model.eval(), processor


@contextmanager
def new_folder(output: str | Path) -> Iterator[Path]:
    """Gives an empty folder to write to, which becomes `output` when the block ends without an error.

    Raises:
        SharingError: `output` exists and is not an empty folder.
    """
    target = Path(output)
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise SharingError(f"{target} exists, and torchthaw never overwrites anything; pass another --output")
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield scratch
        if target.exists():
            target.rmdir()
        # Made for this user alone, as temporary folders are; the result is an ordinary one.
        scratch.chmod(0o777 & ~_umask())
        scratch.rename(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def describe_input(model: TorchvisionForImageClassification, processor: TorchvisionImageProcessor) -> dict[str, Any]:
    """Returns what somebody needs to use exported weights: architecture, class names, preprocessing.

    Where scores are calibrated, also the temperature.
    """
    return {
        "architecture": model.config.architecture,
        "classes": model.config.class_names,
        "problem_type": model.config.problem_type or "single_label_classification",
        **({} if model.config.temperature == 1 else {"temperature": model.config.temperature}),
        "preprocessing": {
            "mode": "RGB, upright (EXIF orientation applied)",
            "resize": processor.size if processor.do_resize else None,
            "interpolation": {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}[
                processor.resample
            ],
            "antialias": processor.antialias,
            "center_crop": processor.crop_size if processor.do_center_crop else None,
            "scale": processor.rescale_factor if processor.do_rescale else None,
            "mean": processor.image_mean if processor.do_normalize else None,
            "std": processor.image_std if processor.do_normalize else None,
        },
    }


@contextmanager
def without_temperature(model: TorchvisionForImageClassification) -> Iterator[str | None]:
    """Lets a model give plain logits while the block runs.

    Yields:
        What somebody has to do who uses its weights in a network that knows of no temperature; None if it has none.
    """
    temperature, model.config.temperature = model.config.temperature, 1.0
    advice = (
        f"the scores are calibrated, but not by these weights alone: divide the logits by {temperature!r} before the "
        "softmax. Predictions are the same without."
    )
    try:
        yield None if temperature == 1 else advice
    finally:
        model.config.temperature = temperature


def image_shape(model: TorchvisionForImageClassification, processor: TorchvisionImageProcessor) -> tuple[int, int]:
    """Returns height and width of the images that the model gets from its processor, in pixels.

    Raises:
        SharingError: the network takes images of another size only.
    """
    side = model.config.image_size or 224
    height = width = side
    if processor.do_center_crop:
        height, width = processor.crop_size["height"], processor.crop_size["width"]
    elif processor.do_resize and "height" in processor.size:
        height, width = processor.size["height"], processor.size["width"]
    if family_of(model.config.architecture).fixed_size and (height, width) != (side, side):
        raise SharingError(
            f"the {model.config.architecture} takes images of {side} x {side} pixels, and its image processor makes "
            f"{height} x {width}; correct the sizes in preprocessor_config.json"
        )
    return height, width


def write_json(file: Path, document: Any) -> None:
    """Writes a JSON file."""
    file.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
