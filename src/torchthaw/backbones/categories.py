"""The classes of pretrained weights: what the outputs of the head that they come with stand for."""

from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from torchvision.models import WeightsEnum, get_model_weights

from torchthaw.backbones.anatomy import family_of
from torchthaw.backbones.configuration import TorchvisionConfig
from torchthaw.backbones.state_dicts import first_line, read_state_dict, rename_old_keys, unwrap
from torchthaw.backbones.weights import locate
from torchthaw.errors import WeightsError

IMAGENET_CLASSES = 1000


@dataclass(frozen=True)
class Categories:
    """Classes of pretrained weights.

    Attributes:
        number: Number of outputs.
        names: Class names in the order of the outputs; None where they are not known.
        imagenet: Whether they are the classes of ImageNet-1K, in torchvision's order.
        description: What the weights are called, for messages.
    """

    number: int
    names: tuple[str, ...] | None
    imagenet: bool
    description: str


def categories_of(architecture: str, weights: str | PathLike[str] | WeightsEnum) -> Categories:
    """Finds the classes of pretrained weights, without a download of torchvision's.

    torchvision's weights, and what torchthaw saved, have class names. A file has none: with 1000 outputs it is taken
    for one of ImageNet-1K in torchvision's order, else its classes are known by number only.

    Raises:
        WeightsError: The weights are unknown, unreadable or of another architecture, or give an image several labels.
    """
    source = locate(architecture, weights)
    if isinstance(source, WeightsEnum):
        names = tuple(source.meta["categories"])
        return Categories(len(names), names, names == _imagenet(architecture), f"torchvision's {source}")
    if isinstance(source, Path) and not source.is_dir():
        return _of_file(architecture, source)
    description = f"the {'folder' if isinstance(source, Path) else 'Hub repository'} {source}"
    try:
        config = TorchvisionConfig.from_pretrained(source)
    except OSError as error:
        raise WeightsError(f"Cannot read the classes of {description}: {first_line(error)}") from error
    if config.architecture != architecture:
        raise WeightsError(f"{description} holds a {config.architecture}, not a {architecture}.")
    if config.several_labels:
        raise WeightsError(f"{description} gives an image several labels, so that it has no class to be right with.")
    names = tuple(config.class_names)
    return Categories(len(names), names, names == _imagenet(architecture), description)


def _of_file(architecture: str, path: Path) -> Categories:
    final = f"{family_of(architecture).final_layer}.weight"
    state_dict = rename_old_keys(unwrap(read_state_dict(path), path))
    if final not in state_dict:
        raise WeightsError(f"{path} holds no weights of {architecture}: it has no tensor {final!r}.")
    number = len(state_dict[final])
    is_imagenet = number == IMAGENET_CLASSES
    return Categories(number, _imagenet(architecture) if is_imagenet else None, is_imagenet, f"the file {path.name}")


def _imagenet(architecture: str) -> tuple[str, ...]:
    return tuple(get_model_weights(architecture).DEFAULT.meta["categories"])
