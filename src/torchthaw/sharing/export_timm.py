"""Export to timm, for the architectures that timm builds with the same layers under the same names."""

import importlib
import importlib.util
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from torchthaw.backbones.image_processing import TorchvisionImageProcessor
from torchthaw.backbones.modeling import TorchvisionForImageClassification
from torchthaw.errors import SavedModelError, SharingError
from torchthaw.sharing.saved_models import image_shape, load_saved, new_folder, write_json

WEIGHTS_FILE = "model.safetensors"
# torchvision's name -> timm's.
SAME_KEYS = {
    "densenet121": "densenet121",
    "densenet161": "densenet161",
    "densenet169": "densenet169",
    "densenet201": "densenet201",
    "inception_v3": "inception_v3",
    "resnet18": "resnet18",
    "resnet34": "resnet34",
    "resnet50": "resnet50",
    "resnet101": "resnet101",
    "resnet152": "resnet152",
    "resnext50_32x4d": "resnext50_32x4d",
    "resnext101_32x8d": "resnext101_32x8d",
    "resnext101_64x4d": "resnext101_64x4d",
    "wide_resnet50_2": "wide_resnet50_2",
    "wide_resnet101_2": "wide_resnet101_2",
}
_INTERPOLATION = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}
# torch runs the same operations in both, but may choose another algorithm for a convolution.
TOLERANCE = 1e-5


def export_timm(source: str | Path, output: str | Path) -> dict[str, Any]:
    """Writes a saved model for timm, and checks that timm's model gives the same logits.

    Args:
        source: A folder or Hub repository that torchthaw saved.
        output: A folder to make, as timm keeps models on the Hub: `config.json` and `model.safetensors`.

    Returns:
        `files`, `largest_difference` of the logits, and `load`, the lines of Python.

    Raises:
        SharingError: there is no such model, timm has none with the same names, timm is missing, or `output` exists.
        SavedModelError: timm's model gives other logits; nothing is written.
    """
    model, processor = load_saved(source)
    architecture = model.config.architecture
    if architecture not in SAME_KEYS:
        raise SharingError(
            f"timm has no {architecture} with torchvision's layer names; those that can be exported are "
            f"{', '.join(SAME_KEYS)}. For {architecture}, write --to onnx or --to torchvision."
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
    weights = {
        name: tensor.contiguous()
        for name, tensor in model.backbone.state_dict().items()
        if not name.startswith("AuxLogits.")
    }
    with new_folder(output) as folder:
        save_file(weights, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        write_json(folder / "config.json", _config(model, processor))
        other = timm.create_model(
            SAME_KEYS[architecture], num_classes=model.config.num_labels, checkpoint_path=str(folder / WEIGHTS_FILE)
        ).eval()
        images = torch.randn(2, 3, *image_shape(model, processor), generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            expected = model(pixel_values=images).logits
            difference = float((other(images) - expected).abs().max())
        if not difference <= TOLERANCE * max(1.0, float(expected.abs().max())):
            raise SavedModelError(
                f"timm's {SAME_KEYS[architecture]} gives logits that differ by up to {difference:.3g} from those of "
                f"{source}; nothing was written"
            )
    file = str(Path(output) / WEIGHTS_FILE)
    options = f"num_classes={model.config.num_labels}, checkpoint_path={file!r}"
    load = ["import timm", f"model = timm.create_model({SAME_KEYS[architecture]!r}, {options}).eval()"]
    files = [str(Path(output) / "config.json"), file]
    return {"files": files, "largest_difference": difference, "load": load}


def _config(model: TorchvisionForImageClassification, processor: TorchvisionImageProcessor) -> dict[str, Any]:
    height, width = image_shape(model, processor)
    before_crop = min(processor.size.values()) if processor.do_resize else height
    keeps_shape = "shortest_edge" in processor.size
    return {
        "architecture": SAME_KEYS[model.config.architecture],
        "num_classes": model.config.num_labels,
        "label_names": model.config.class_names,
        "pretrained_cfg": {
            "input_size": [3, height, width],
            "fixed_input_size": False,
            "interpolation": _INTERPOLATION.get(processor.resample, "bilinear"),
            "crop_pct": round(height / before_crop, 6) if processor.do_center_crop else 1.0,
            "crop_mode": "center" if keeps_shape else "squash",
            "mean": processor.image_mean if processor.do_normalize else [0.0, 0.0, 0.0],
            "std": processor.image_std if processor.do_normalize else [1.0, 1.0, 1.0],
            "num_classes": model.config.num_labels,
        },
    }
