"""Pretrained weights: from torchvision's downloads, files, saved models, or the small network in the package."""

import dataclasses
import http.client
import logging
import math
import pickle
import sys
import urllib.parse
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from os import PathLike
from pathlib import Path

import torch
from huggingface_hub.utils.tqdm import are_progress_bars_disabled
from safetensors import SafetensorError
from torch import nn
from torchvision.models import WeightsEnum, get_model_weights
from torchvision.models.vision_transformer import interpolate_embeddings

from torchthaw.backbones.anatomy import family_of, list_architectures, patch_size
from torchthaw.backbones.configuration import names_by_id
from torchthaw.backbones.modeling import TorchvisionForImageClassification
from torchthaw.backbones.network import align_memory, with_version
from torchthaw.backbones.state_dicts import first_line, listed, read_state_dict, rename_old_keys, unwrap
from torchthaw.errors import WeightsError, did_you_mean

logger = logging.getLogger(__name__)

BUILTIN = "builtin"
BUILTIN_ARCHITECTURE = "shufflenet_v2_x0_5"
BUILTIN_FOLDER = Path(__file__).parent / "builtin"

_FILE_SUFFIXES = (".pth", ".pt", ".safetensors")


@dataclass(frozen=True)
class PretrainedWeights:
    """A torchvision state_dict and what is known of it.

    Attributes:
        architecture: torchvision's name of the network.
        state_dict: Tensors under torchvision's names.
        categories: Class names in the order of the logits, if known.
        transform_input: Whether GoogLeNet or Inception v3 must rescale its input for these weights.
        description: Where they come from, for messages.
        origin: Name of the weights, file, folder or repository, for the record that travels with a model.
        image_size: Side of the images in pixels that the weights were saved or published with, if known.
    """

    architecture: str
    state_dict: dict[str, torch.Tensor]
    categories: tuple[str, ...] | None
    transform_input: bool
    description: str
    origin: str
    image_size: int | None = None

    @property
    def num_labels(self) -> int:
        """Number of outputs of the final layer."""
        return len(self.state_dict[f"{family_of(self.architecture).final_layer}.weight"])

    def head_fits(self, id2label: Sequence[str] | Mapping[int, str]) -> bool:
        """Whether the final layer can stay for these class names: the same names, or if unknown, the same number."""
        names = tuple(names_by_id(id2label).values())
        return names == self.categories if self.categories is not None else len(names) == self.num_labels


@dataclass(frozen=True)
class BackboneInfo:
    """What torchvision publishes about an architecture.

    Attributes:
        name: torchvision's name of the architecture.
        family: Its family.
        parameters: Number of parameters in millions, with the head for 1000 classes.
        accuracy: Best published top-1 accuracy on ImageNet-1K in percent.
        weights: Name of the weights with that accuracy.
        image_size: Side of the images in pixels at that accuracy.
    """

    name: str
    family: str
    parameters: float
    accuracy: float
    weights: str
    image_size: int


def describe_backbones() -> list[BackboneInfo]:
    """Returns what torchvision publishes about each architecture; downloads and builds nothing."""
    return [_describe(name) for name in list_architectures()]


def _describe(architecture: str) -> BackboneInfo:
    def accuracy(member: WeightsEnum) -> float:
        return float(member.meta["_metrics"]["ImageNet-1K"]["acc@1"])

    best = max(get_model_weights(architecture), key=accuracy)
    return BackboneInfo(
        name=architecture,
        family=family_of(architecture).name,
        parameters=best.meta["num_params"] / 1e6,
        accuracy=accuracy(best),
        weights=best.name,
        image_size=best.transforms().crop_size[0],
    )


def resolve_weights(architecture: str, weights: str | PathLike[str] | WeightsEnum) -> PretrainedWeights:
    """Finds pretrained weights and reads them.

    Args:
        architecture: torchvision's name of the network.
        weights: As in `from_torchvision`, except None.

    Raises:
        WeightsError: If they are unknown, unreachable, unreadable, or of another architecture.
    """
    source = locate(architecture, weights)
    if isinstance(source, WeightsEnum):
        return _from_enum(architecture, source)
    if isinstance(source, Path) and not source.is_dir():
        return _from_file(architecture, source)
    return _from_saved(architecture, source)


def locate(architecture: str, weights: str | PathLike[str] | WeightsEnum) -> WeightsEnum | Path | str:
    """Returns where weights are: torchvision's enum member, a file, the folder of a model, or a Hub repository (text).

    Raises:
        WeightsError: If torchvision has no weights of that name, or the built-in ones are of another architecture.
    """
    family_of(architecture)
    if isinstance(weights, WeightsEnum):
        return find_member(architecture, weights)
    if weights == BUILTIN:
        return builtin_folder(architecture)
    path = Path(weights)
    if path.exists() or path.suffix in _FILE_SUFFIXES:
        return path
    return str(weights) if "/" in str(weights) else find_member(architecture, weights)


def find_member(architecture: str, weights: object) -> WeightsEnum:
    """Returns the member of torchvision's weights enum of that architecture, by name or checked.

    Raises:
        WeightsError: If the architecture has no such weights.
    """
    members = get_model_weights(architecture)
    if isinstance(weights, WeightsEnum):
        if isinstance(weights, members):
            return weights
        raise WeightsError(
            f"{weights} are weights of another architecture than {architecture}. Write one of: {_names(architecture)}."
        )
    name = str(weights).removeprefix(f"{members.__name__}.")
    if name not in members.__members__:
        raise WeightsError(
            f"torchvision has no weights {weights!r} for {architecture}."
            f"{did_you_mean(name.upper(), members.__members__)} Its weights are: {_names(architecture)}. "
            "Other choices: a .pth, .pt or .safetensors file, a folder or Hub repository (user/name) that torchthaw "
            f"saved, {BUILTIN!r}, or None for random weights."
        )
    return members[name]


def _names(architecture: str) -> str:
    return ", ".join(get_model_weights(architecture).__members__)


def _from_enum(architecture: str, member: WeightsEnum) -> PretrainedWeights:
    shows_bar = sys.stderr.isatty() and not are_progress_bars_disabled("torchthaw")
    try:
        state_dict = member.get_state_dict(progress=shows_bar, check_hash=True, map_location="cpu", weights_only=True)
    except (OSError, http.client.HTTPException) as error:
        raise WeightsError(_no_download(member, error)) from error
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise WeightsError(
            f"The download of {member} is damaged: {first_line(error)}. Delete "
            f"{_cache_folder() / _file_name(member)} if it exists, and try again."
        ) from error
    return PretrainedWeights(
        architecture=architecture,
        state_dict=rename_old_keys(state_dict),
        categories=tuple(member.meta["categories"]),
        transform_input=bool(family_of(architecture).auxiliary),
        description=f"torchvision's {member}",
        origin=str(member),
    )


def _no_download(member: WeightsEnum, error: Exception) -> str:
    return (
        f"Cannot download {member} from {member.url}: {error}. Ways on: "
        f"(1) download that file where there is a network, and put it at {_cache_folder() / _file_name(member)}; "
        "(2) pass a local file, weights='path/to/file.pth'; "
        f"(3) pass weights={BUILTIN!r} with architecture {BUILTIN_ARCHITECTURE!r}, which needs no network, or a folder "
        "that torchthaw saved. (weights=None starts from random weights.)"
    )


def _cache_folder() -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints"


def _file_name(member: WeightsEnum) -> str:
    return Path(urllib.parse.urlparse(member.url).path).name


def builtin_folder(architecture: str) -> Path:
    """Returns the folder of the network that is part of the package.

    Raises:
        WeightsError: If another architecture is asked for, or this installation lacks the folder.
    """
    if architecture != BUILTIN_ARCHITECTURE:
        raise WeightsError(
            f"The built-in weights are those of {BUILTIN_ARCHITECTURE}, not {architecture}. Write "
            f"from_torchvision({BUILTIN_ARCHITECTURE!r}, weights={BUILTIN!r}), or choose other weights."
        )
    if not (BUILTIN_FOLDER / "model.safetensors").is_file():
        raise WeightsError(
            f"This installation of torchthaw has no built-in weights: {BUILTIN_FOLDER} is missing or incomplete. "
            "Install torchthaw from its wheel, or choose other weights."
        )
    return BUILTIN_FOLDER


def _from_saved(architecture: str, source: str | Path) -> PretrainedWeights:
    description = f"the {'folder' if isinstance(source, Path) else 'Hub repository'} {source}"
    try:
        model = TorchvisionForImageClassification.from_pretrained(source)
    except (OSError, SafetensorError) as error:
        raise WeightsError(
            f"Cannot load {description}: {first_line(error)} Pass a folder or Hub repository (user/name) that "
            "torchthaw saved, a file, or one of torchvision's names: "
            f"{_names(architecture)}."
        ) from error
    config = model.config
    if config.architecture != architecture:
        raise WeightsError(
            f"{description} holds a {config.architecture}, not a {architecture}. Write from_torchvision("
            f"{config.architecture!r}, ...), or choose other weights for {architecture}."
        )
    if config.temperature != 1:
        _say_uncalibrated(description, config.temperature)
    return PretrainedWeights(
        architecture=architecture,
        state_dict=model.backbone.state_dict(),
        categories=tuple(names_by_id(config.id2label).values()),
        transform_input=config.transform_input,
        description=description,
        origin=source.name if isinstance(source, Path) else source,
        image_size=config.image_size,
    )


@lru_cache
def _say_uncalibrated(description: str, temperature: float) -> None:
    """Says once that only weights are taken."""
    logger.warning(
        "The scores of %s were calibrated, with a temperature of %g. Only its weights are taken: scores of the new "
        "model are not calibrated.",
        description,
        temperature,
    )


def _from_file(architecture: str, path: Path) -> PretrainedWeights:
    state_dict = rename_old_keys(unwrap(read_state_dict(path), path))
    final = f"{family_of(architecture).final_layer}.weight"
    if final not in state_dict:
        raise WeightsError(
            f"{path} holds no weights of {architecture}: it has no tensor {final!r}. Its first tensors are "
            f"{listed(state_dict)}. Choose the architecture that the file belongs to."
        )
    return PretrainedWeights(
        architecture=architecture,
        state_dict=state_dict,
        categories=None,
        transform_input=bool(family_of(architecture).auxiliary),
        description=f"the file {path}",
        # The folders above are of this machine only.
        origin=path.name,
    )


def resize_positions(pretrained: PretrainedWeights, image_size: int | None) -> PretrainedWeights:
    """Interpolates ViT's position embeddings to another image size; other weights fit any size.

    Args:
        pretrained: The weights.
        image_size: Side of the images in pixels; None keeps the size of the weights.
    """
    positions = pretrained.state_dict.get("encoder.pos_embedding")
    if family_of(pretrained.architecture).name != "vit" or positions is None:
        return dataclasses.replace(pretrained, image_size=image_size or pretrained.image_size)
    patch = patch_size(pretrained.architecture)
    size = image_size or math.isqrt(positions.shape[1] - 1) * patch
    state_dict = interpolate_embeddings(size, patch, OrderedDict(pretrained.state_dict))
    return dataclasses.replace(pretrained, state_dict=dict(state_dict), image_size=size)


def load_into(network: nn.Module, pretrained: PretrainedWeights) -> None:
    """Gives a torchvision network the weights; its own tensors may be on the `meta` device.

    Tensors of the final layer and of auxiliary heads are left out where the network was built without these.

    Raises:
        WeightsError: If names or shapes differ.
    """
    family = family_of(pretrained.architecture)
    expected = network.state_dict()
    optional = (family.final_layer, *(path.rsplit(".", 1)[0] for path in family.auxiliary))
    absent = tuple(f"{path}." for path in optional if not any(name.startswith(f"{path}.") for name in expected))
    given = {name: tensor for name, tensor in pretrained.state_dict.items() if not name.startswith(absent)}
    mismatched = [
        f"{name} {tuple(tensor.shape)} instead of {tuple(expected[name].shape)}"
        for name, tensor in given.items()
        if name in expected and tensor.shape != expected[name].shape
    ]
    if mismatched:
        missing, unexpected = sorted(expected.keys() - given), sorted(given.keys() - expected)
    else:
        missing, unexpected = network.load_state_dict(with_version(given, network), strict=False, assign=True)
    differences = [
        f"{kind}: {listed(names)}"
        for kind, names in (("other shapes", mismatched), ("missing", missing), ("unexpected", unexpected))
        if names
    ]
    if differences:
        raise WeightsError(
            f"{pretrained.description} does not fit {pretrained.architecture}. {'; '.join(differences)}. Choose the "
            "architecture that the weights belong to."
        )
    align_memory(network)
