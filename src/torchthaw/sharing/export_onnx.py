"""Export to ONNX, checked with onnxruntime before it is handed over."""

import contextlib
import importlib.util
import json
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from torchthaw._version import __version__
from torchthaw.backbones.image_processing import TorchvisionImageProcessor
from torchthaw.backbones.modeling import TorchvisionForImageClassification
from torchthaw.errors import SavedModelError, SharingError
from torchthaw.sharing.saved_models import describe_input, image_shape, load_saved, new_folder

MODEL_FILE = "model.onnx"
# Relative to the largest logit: float32 sums in another order, over some hundred layers.
TOLERANCE = 1e-4
_BATCH_SIZES = (1, 3)


class _Exported(nn.Module):
    """What becomes the graph: images to logits, with the processor's arithmetic before them if asked for."""

    mean: Tensor
    std: Tensor

    def __init__(
        self, model: TorchvisionForImageClassification, processor: TorchvisionImageProcessor, *, preprocessing: bool
    ) -> None:
        super().__init__()
        self.network = model.backbone
        self.preprocessing = preprocessing
        self.temperature = model.config.temperature
        self.scale = float(processor.rescale_factor) if processor.do_rescale else 1.0
        mean, std = (processor.image_mean, processor.image_std) if processor.do_normalize else ([0.0] * 3, [1.0] * 3)
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        if self.preprocessing:
            # (batch, height, width, 3) of 8 bits, as images come from a decoder.
            images = images.permute(0, 3, 1, 2).to(torch.float32) * self.scale
            images = (images - self.mean) / self.std
        logits = self.network(images)
        logits = logits if isinstance(logits, Tensor) else logits[0]
        return logits if self.temperature == 1 else logits / self.temperature


def export_onnx(
    source: str | Path, output: str | Path, *, preprocessing: bool = False, opset: int | None = None
) -> dict[str, Any]:
    """Writes a saved model as ONNX, and compares it with torch in onnxruntime for batches of 1 and 3 images.

    The input `pixel_values` is (batch, 3, height, width) in float32, as the image processor makes it; with
    `preprocessing` the input `images` is (batch, height, width, 3) in uint8: RGB images that were resized and cropped
    already, which ONNX cannot do as PIL does. The output `logits` is (batch, classes); their softmax are the scores:
    the temperature of calibrated ones is in the graph. The batch may have any size. Class names, preprocessing and
    versions are in the file's metadata.

    Args:
        source: A folder or Hub repository that torchthaw saved.
        output: A folder to make, with `model.onnx`; weights above 2 GB go into a file beside it.
        preprocessing: Whether to scale and normalise in the graph.
        opset: Version of ONNX's operators; None takes the exporter's own.

    Returns:
        `files`, `input`, `output`, `opset`, and `largest_difference` of any two logits with `largest_logit`.

    Raises:
        SharingError: there is no such model, `output` exists, a package is missing, the exporter gives up, or
            onnxruntime cannot run what it wrote.
        SavedModelError: onnxruntime gives other logits; nothing is written.
    """
    _check_packages()
    model, processor = load_saved(source)
    exported = _Exported(model, processor, preprocessing=preprocessing).eval()
    height, width = image_shape(model, processor)
    name = "images" if preprocessing else "pixel_values"
    description = {**describe_input(model, processor), "preprocessing_included": preprocessing}
    with new_folder(output) as folder:
        file = folder / MODEL_FILE
        opset = _export(exported, _images(2, height, width, uint8=preprocessing), name, file, opset, description)
        try:
            difference, scale = _compare(exported, file, name, height, width, uint8=preprocessing)
        except Exception as error:
            raise SharingError(
                f"onnxruntime cannot run {model.config.architecture} in opset {opset}: {_reason(error)}; pass a "
                "smaller --opset, or update onnxruntime"
            ) from error
        if not difference <= TOLERANCE * scale:
            raise SavedModelError(
                f"onnxruntime gives logits for {model.config.architecture} that differ by up to {difference:.3g} from "
                f"torch's, the largest of which is {scale:.3g}; nothing was written"
            )
        files = sorted(str(Path(output) / written.name) for written in folder.iterdir())
    layout = ["batch", height, width, 3] if preprocessing else ["batch", 3, height, width]
    return {
        "files": files,
        "input": {"name": name, "shape": layout, "type": "uint8" if preprocessing else "float32"},
        "output": {"name": "logits", "shape": ["batch", model.config.num_labels], "type": "float32"},
        "opset": opset,
        "largest_difference": difference,
        "largest_logit": scale,
    }


def _check_packages() -> None:
    missing = [name for name in ("onnx", "onnxruntime", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise SharingError(f"export to ONNX needs {', '.join(missing)}; install with: pip install 'torchthaw[onnx]'")


def _images(batch: int, height: int, width: int, *, uint8: bool) -> Tensor:
    random = torch.Generator().manual_seed(batch)
    if uint8:
        return torch.randint(0, 256, (batch, height, width, 3), dtype=torch.uint8, generator=random)
    return torch.randn(batch, 3, height, width, generator=random)


def _export(
    exported: nn.Module, images: Tensor, name: str, file: Path, opset: int | None, description: dict[str, Any]
) -> int:
    architecture = description["architecture"]
    try:
        with _quietly():
            program = torch.onnx.export(
                exported,
                (images,),
                input_names=[name],
                output_names=["logits"],
                dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
                opset_version=opset,
                dynamo=True,
                verbose=False,
            )
            assert program is not None
            properties = {
                key: value if isinstance(value, str) else json.dumps(value) for key, value in description.items()
            }
            program.model.metadata_props.update({**properties, "torchthaw": __version__})
            program.save(str(file))
    except Exception as error:
        raise SharingError(
            f"{architecture} could not be exported to ONNX with torch {torch.__version__} and onnxscript "
            f"{version('onnxscript')}: {_reason(error)}; try --to torchvision, or other versions of the two"
        ) from error
    made = int(program.model.opset_imports[""])
    if opset is not None and made != opset:
        raise SharingError(f"{architecture} cannot be written in opset {opset}, only in {made}; leave the opset out")
    return made


def _reason(error: BaseException) -> str:
    """Returns the first line of what went wrong at the bottom: the exporter wraps errors into its own."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def _compare(
    exported: nn.Module, file: Path, name: str, height: int, width: int, *, uint8: bool
) -> tuple[float, float]:
    """Returns the largest difference between onnxruntime's and torch's logits, and the largest of torch's."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    differences, sizes = [], []
    for batch in _BATCH_SIZES:
        images = _images(batch, height, width, uint8=uint8)
        with torch.inference_mode():
            expected = exported(images).numpy()
        (found,) = session.run(None, {name: images.numpy()})
        differences.append(float(np.abs(found - expected).max()) if found.shape == expected.shape else np.inf)
        sizes.append(float(np.abs(expected).max()))
    return max(differences), max(sizes)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Keeps what the exporter tells its developers off the terminal."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
    sys.stdout.flush()
