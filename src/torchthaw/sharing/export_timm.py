"""Export to timm, for the architectures that timm builds with the same layers."""

import contextlib
import importlib
import importlib.util
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from torchthaw.backbones.image_processing import TorchvisionImageProcessor
from torchthaw.backbones.modeling import TorchvisionForImageClassification
from torchthaw.errors import SavedModelError, SharingError
from torchthaw.sharing.saved_models import image_shape, load_saved, new_folder, without_temperature, write_json
from torchthaw.sharing.timm_names import TIMM_NAMES, renamed_for_timm, timm_arguments

WEIGHTS_FILE = "model.safetensors"
_INTERPOLATION = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}
# Relative to the largest logit: torch runs the same operations in both, but may choose another algorithm.
TOLERANCE = 1e-5


def export_timm(source: str | Path, output: str | Path) -> dict[str, Any]:
    """Writes a saved model for timm, and checks that timm's model gives the same logits.

    Args:
        source: A folder or Hub repository that torchthaw saved.
        output: A folder to make, as timm keeps models on the Hub: `config.json` and `model.safetensors`.

    The temperature of calibrated scores cannot go with it.

    Returns:
        `files`, `architecture` (timm's name), `largest_difference` of the logits, and `load`, the lines of Python;
        `note`, also in `config.json`, says what to do about a temperature.

    Raises:
        SharingError: there is no such model, timm has none with the same layers, timm is missing, or `output` exists.
        SavedModelError: timm's model gives other logits; nothing is written.
    """
    model, processor = load_saved(source)
    architecture = model.config.architecture
    if architecture not in TIMM_NAMES:
        raise SharingError(
            f"timm has no {architecture} with torchvision's layers; those that can be exported are "
            f"{', '.join(TIMM_NAMES)}. For {architecture}, write --to onnx or --to torchvision."
        )
    if model.config.transform_input:
        # For weights that were trained on images between -1 and 1; timm has no such step.
        raise SharingError(
            f"{source} converts its input to the scale from -1 to 1, which timm's {architecture} does not; "
            "write --to onnx or --to torchvision"
        )
    if importlib.util.find_spec("timm") is None:
        raise SharingError("export to timm needs timm; install it with: pip install timm")
    timm = importlib.import_module("timm")
    name = TIMM_NAMES[architecture]
    height, width = image_shape(model, processor)
    arguments = timm_arguments(architecture, height, width)
    options = {"num_classes": model.config.num_labels, **arguments}
    with without_temperature(model) as advice, new_folder(output) as folder:
        note = {} if advice is None else {"note": advice}
        with _named_errors(name, timm.__version__):
            empty = timm.create_model(name, **options).state_dict()
        weights = renamed_for_timm(model.backbone.state_dict(), empty)
        if weights is None:
            raise SharingError(f"{name} of timm {timm.__version__} has other layers than torchvision's {architecture}")
        save_file(weights, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        config = _config(model, processor, timm.get_pretrained_cfg(name).to_dict(), arguments)
        write_json(folder / "config.json", {**config, **note})
        with _named_errors(name, timm.__version__):
            other = timm.create_model(name, **options, checkpoint_path=str(folder / WEIGHTS_FILE)).eval()
        images = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            expected = model(pixel_values=images).logits
            with _named_errors(name, timm.__version__):
                difference = float((other(images) - expected).abs().max())
        if not difference <= TOLERANCE * float(expected.abs().max()):
            raise SavedModelError(
                f"timm's {name} gives logits that differ by up to {difference:.3g} from those of {source} for images "
                f"of {height} x {width} pixels; nothing was written. Write --to onnx or --to torchvision."
            )
    file = str(Path(output) / WEIGHTS_FILE)
    written = ", ".join(f"{key}={value!r}" for key, value in {**options, "checkpoint_path": file}.items())
    load = ["import timm", f"model = timm.create_model({name!r}, {written}).eval()"]
    files = [str(Path(output) / "config.json"), file]
    return {"files": files, "architecture": name, "largest_difference": difference, "load": load, **note}


@contextlib.contextmanager
def _named_errors(name: str, version: str) -> Any:
    """Turns whatever timm raises into one message."""
    try:
        yield
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise SharingError(f"timm {version} cannot use the weights as its {name}: {reason[:300]}") from error


def _config(
    model: TorchvisionForImageClassification,
    processor: TorchvisionImageProcessor,
    own: dict[str, Any],
    arguments: dict[str, Any],
) -> dict[str, Any]:
    height, width = image_shape(model, processor)
    before_crop = min(processor.size.values()) if processor.do_resize else height
    keeps_shape = "shortest_edge" in processor.size
    # timm resizes to floor(height / crop_pct): rounded down, the quotient is at least what it shall be.
    share = math.floor(height / before_crop * 1e6) / 1e6 if processor.do_center_crop else 1.0
    return {
        "architecture": TIMM_NAMES[model.config.architecture],
        "num_classes": model.config.num_labels,
        "label_names": model.config.class_names,
        **({"model_args": arguments} if arguments else {}),
        "pretrained_cfg": {
            # Which layers are replaced for other classes or channels: timm asks for their names.
            **{key: own[key] for key in ("first_conv", "classifier", "fixed_input_size") if key in own},
            "input_size": [3, height, width],
            "interpolation": _INTERPOLATION.get(processor.resample, "bilinear"),
            "crop_pct": share,
            "crop_mode": "center" if keeps_shape else "squash",
            "mean": processor.image_mean if processor.do_normalize else [0.0, 0.0, 0.0],
            "std": processor.image_std if processor.do_normalize else [1.0, 1.0, 1.0],
            "num_classes": model.config.num_labels,
        },
    }
