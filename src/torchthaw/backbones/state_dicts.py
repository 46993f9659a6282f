"""Files of weights: read without running their code, unwrapped, with the names that torchvision uses now."""

import pickle
import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from torchthaw.errors import WeightsError, did_you_mean

_SHOWN = 4


def read_state_dict(path: Path) -> Any:
    """Reads a `.safetensors` file, or a `.pth` or `.pt` file without running any code that it may hold.

    Raises:
        WeightsError: If it is missing, truncated, or holds more than tensors.
    """
    if not path.is_file():
        neighbours = [file.name for file in path.parent.iterdir()] if path.parent.is_dir() else []
        raise WeightsError(f"There is no file {path}.{did_you_mean(path.name, neighbours)}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        damaged = "" if zipfile.is_zipfile(path) else "it is damaged or no file of weights at all, or "
        raise WeightsError(
            f"Cannot read {path}: {damaged}it holds more than tensors, such as a whole pickled model, which is refused "
            "because unpickling can run code. If you trust its origin, convert it once: model = torch.load("
            f"{str(path)!r}, weights_only=False); torch.save(model.state_dict(), 'weights.pth')."
        ) from error
    except (SafetensorError, RuntimeError, EOFError, OSError) as error:
        size = path.stat().st_size
        raise WeightsError(
            f"Cannot read {path} ({size} bytes): it is truncated or no file of weights ({first_line(error)}). "
            "Copy or download it again."
        ) from error


def unwrap(content: Any, path: Path) -> dict[str, torch.Tensor]:
    """Takes a state_dict out of a checkpoint's wrapper and its names out of the prefixes of wrapping modules."""
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not content:
        raise WeightsError(f"{path} holds a {type(content).__name__} and not a state_dict (names and tensors).")
    wrong = [f"{name} ({type(value).__name__})" for name, value in content.items() if not torch.is_tensor(value)]
    if wrong:
        raise WeightsError(
            f"{path} is not a state_dict: it holds {listed(wrong)}. Save the state_dict alone: "
            "torch.save(model.state_dict(), ...)."
        )
    state_dict = {
        str(name): tensor.float() if tensor.is_floating_point() else tensor for name, tensor in content.items()
    }
    for prefix in ("module.", "backbone."):
        if all(name.startswith(prefix) for name in state_dict):
            state_dict = {name.removeprefix(prefix): tensor for name, tensor in state_dict.items()}
    return state_dict


def rename_old_keys(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Renames what torchvision's published DenseNet files call `denselayer1.norm.1` to `denselayer1.norm1`."""
    pattern = re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.([12]\.)")
    return {pattern.sub(r"\1\2", name): tensor for name, tensor in state_dict.items()}


def listed(names: Iterable[object]) -> str:
    """Returns the first few names, and how many more there are."""
    shown = list(map(str, names))
    more = f" and {len(shown) - _SHOWN} more" if len(shown) > _SHOWN else ""
    return ", ".join(shown[:_SHOWN]) + more


def first_line(error: Exception) -> str:
    """Returns what an error says, without the lines that follow the first."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
