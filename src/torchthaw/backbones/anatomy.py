"""Anatomy of torchvision's classifiers by their names: family, layer groups, image sizes."""

import difflib
import functools
from collections.abc import Iterable

import torchvision
from torch import nn

from .families import CLASSIFIER, FAMILIES, HEAD, Family


def closest(word: object, candidates: Iterable[str]) -> str:
    """Returns `" Did you mean 'a' or 'b'?"` with the closest candidates, or an empty string when none is close."""
    matches = difflib.get_close_matches(str(word), list(candidates), n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(repr(match) for match in matches)}?" if matches else ""


def _find_family(architecture: str) -> Family | None:
    return next((family for family in FAMILIES if architecture.startswith(family.prefixes)), None)


@functools.cache
def list_architectures() -> tuple[str, ...]:
    """Returns the names of torchvision's classification models, in alphabetical order."""
    return tuple(name for name in torchvision.models.list_models(module=torchvision.models) if _find_family(name))


def family_of(architecture: str) -> Family:
    """Returns the family of an architecture.

    Raises:
        ValueError: If torchvision has no classification model of that name.
    """
    if architecture not in list_architectures():
        raise ValueError(
            f"Unknown architecture {architecture!r}: torchvision has no classification model of that name."
            f"{closest(architecture, list_architectures())} All names: {', '.join(list_architectures())}."
        )
    family = _find_family(architecture)
    assert family is not None, architecture
    return family


def uses_transformer_recipe(architecture: str) -> bool:
    """Whether the architecture is trained as transformers are: AdamW, small learning rates, more regularisation."""
    return family_of(architecture).transformer_recipe


def patch_size(architecture: str) -> int:
    """Returns the side of a ViT's patches in pixels, which its name ends with."""
    return int(architecture.rsplit("_", 1)[1])


def check_image_size(architecture: str, image_size: int) -> None:
    """Checks that the network can take square images of `image_size` pixels.

    Raises:
        ValueError: If the size is no positive integer, too small, or not a multiple of the patches or windows.
    """
    family = family_of(architecture)
    if not isinstance(image_size, int) or isinstance(image_size, bool) or image_size < 1:
        raise ValueError(f"image_size must be a whole number of pixels, such as 224, not {image_size!r}.")
    multiple = family.multiple or patch_size(architecture)
    if image_size % multiple:
        near = max(multiple, round(image_size / multiple) * multiple)
        raise ValueError(
            f"{architecture} takes images whose side is a multiple of {multiple} pixels (its patches or windows), "
            f"and image_size is {image_size}. Write image_size={near}."
        )
    minimum = smallest_image(architecture)
    if image_size < minimum:
        raise ValueError(
            f"{architecture} needs images of at least {minimum} pixels, and image_size is {image_size}. "
            f"Write image_size={minimum} or more: small images can be enlarged to it."
        )


def smallest_image(architecture: str) -> int:
    """Returns the side in pixels of the smallest square image that a network takes."""
    family = family_of(architecture)
    if family.fixed_size:
        return family.multiple or patch_size(architecture)
    if family.minimum is not None:
        return family.minimum
    return min(min(weights.meta["min_size"]) for weights in torchvision.models.get_model_weights(architecture))


def group_paths(architecture: str, net: nn.Module) -> dict[str, tuple[str, ...]]:
    """Returns the layer groups of a torchvision network: name to paths of modules and root parameters.

    Args:
        architecture: torchvision's name of it.
        net: The network, on any device; only its structure is read.

    Returns:
        Groups in forward order, each with its paths in forward order. The last one is `head`. Auxiliary heads that
        the network was built without are left out.
    """
    family = family_of(architecture)
    groups = dict(family.stages)
    if family.by_resolution:
        runs = _runs_of_one_resolution(net.get_submodule(family.by_resolution))
        for index, run in enumerate(runs):
            name = f"{family.repeated}{index}" if index else "stem"
            groups[name] = tuple(f"{family.by_resolution}.{child}" for child in run)
    if family.by_child:
        for index, (child, _) in enumerate(net.get_submodule(family.by_child).named_children()):
            groups[f"{family.repeated}{index}"] = (f"{family.by_child}.{child}",)
    last = list(groups)[-1]
    groups[last] += family.tail
    if family.classifier:
        groups[CLASSIFIER] = family.classifier
    groups[HEAD] = tuple(path for path in family.head if getattr(net, path, "nested") is not None)
    return groups


def _runs_of_one_resolution(sequential: nn.Module) -> list[list[str]]:
    """Cuts the children of a Sequential into runs: before a child with a stride, after a pooling layer."""
    runs: list[list[str]] = [[]]
    for name, child in sequential.named_children():
        pooling = _is_pooling(child)
        if runs[-1] and not pooling and _has_stride(child):
            runs.append([])
        runs[-1].append(name)
        if pooling:
            runs.append([])
    return [run for run in runs if run]


def _is_pooling(module: nn.Module) -> bool:
    return isinstance(module, nn.MaxPool2d | nn.AvgPool2d)


def _has_stride(module: nn.Module) -> bool:
    return any(
        _is_pooling(layer) or (isinstance(layer, nn.Conv2d) and max(layer.stride) > 1) for layer in module.modules()
    )
