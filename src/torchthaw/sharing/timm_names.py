"""Which of timm's architectures are torchvision's, and which of their tensors belong together."""

import re
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping
from typing import Any

from torch import Tensor

_EPS = {"bn_eps": 1e-3}
# torchvision's name -> timm's, for those that give the same logits (a test goes over all of them).
TIMM_NAMES = {
    **{
        name: name
        for name in (
            *("convnext_tiny", "convnext_small", "convnext_base", "convnext_large"),
            *("densenet121", "densenet161", "densenet169", "densenet201"),
            *(f"efficientnet_b{size}" for size in range(8)),
            "inception_v3",
            *("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"),
            *("resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d"),
            *(f"vgg{layers}{norm}" for layers in (11, 13, 16, 19) for norm in ("", "_bn")),
            *("wide_resnet50_2", "wide_resnet101_2"),
        )
    },
    "efficientnet_v2_s": "efficientnetv2_s",
    "efficientnet_v2_m": "efficientnetv2_m",
    "efficientnet_v2_l": "efficientnetv2_l",
    "mnasnet0_5": "mnasnet_050",
    "mnasnet0_75": "mnasnet_075",
    "mnasnet1_0": "mnasnet_100",
    "mobilenet_v2": "mobilenetv2_100",
    "mobilenet_v3_large": "mobilenetv3_large_100",
    "mobilenet_v3_small": "mobilenetv3_small_100",
    "regnet_x_400mf": "regnetx_004_tv",
    "regnet_x_800mf": "regnetx_008",
    "regnet_x_1_6gf": "regnetx_016",
    "regnet_x_3_2gf": "regnetx_032",
    "regnet_x_8gf": "regnetx_080",
    "regnet_x_16gf": "regnetx_160",
    "regnet_x_32gf": "regnetx_320",
    "regnet_y_400mf": "regnety_004",
    "regnet_y_800mf": "regnety_008_tv",
    "regnet_y_1_6gf": "regnety_016",
    "regnet_y_3_2gf": "regnety_032",
    "regnet_y_8gf": "regnety_080_tv",
    "regnet_y_16gf": "regnety_160",
    "regnet_y_32gf": "regnety_320",
    "swin_t": "swin_tiny_patch4_window7_224",
    "swin_s": "swin_small_patch4_window7_224",
    "swin_b": "swin_base_patch4_window7_224",
    "vit_b_16": "vit_base_patch16_224",
    "vit_b_32": "vit_base_patch32_224",
    "vit_l_16": "vit_large_patch16_224",
    "vit_l_32": "vit_large_patch32_224",
}
# What timm's builder is told beside the number of classes, where its own choice is another.
_ARGUMENTS: dict[str, dict[str, Any]] = {
    **{f"efficientnet_b{size}": _EPS for size in (5, 6, 7)},
    **{f"efficientnet_v2_{size}": _EPS for size in "sml"},
    **{f"mobilenet_v3_{size}": _EPS for size in ("large", "small")},
}
_KINDS = ("running_mean", "running_var", "num_batches_tracked", "bias")


def timm_arguments(architecture: str, height: int, width: int) -> dict[str, Any]:
    """Returns what timm's builder is told beside the number of classes."""
    if architecture.startswith(("vit", "swin")):
        return {"img_size": [height, width]}
    return dict(_ARGUMENTS.get(architecture, {}))


def renamed_for_timm(tensors: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """Returns tensors under timm's names and in its shapes, or None if the two networks differ.

    Where the names are the same they stay. Else tensors of the same kind and size go to each other in the order in
    which both networks define their layers; shapes may differ as those of a linear layer and of the convolution over
    its whole input do.

    Args:
        tensors: state_dict of torchvision's network.
        theirs: state_dict of timm's network, for its names and shapes.
    """
    # timm leaves out auxiliary heads, which only training uses, and computes the table of positions.
    needed = {
        name: tensor
        for name, tensor in tensors.items()
        if not name.startswith("AuxLogits.") and not name.endswith("relative_position_index")
    }
    if needed.keys() == theirs.keys():
        pairs = {name: name for name in theirs}
    else:
        ours, others = _by_kind(needed, _shortcuts_last(needed)), _by_kind(theirs, theirs)
        if {kind: len(names) for kind, names in ours.items()} != {kind: len(names) for kind, names in others.items()}:
            return None
        pairs = {other: name for kind, names in others.items() for other, name in zip(names, ours[kind], strict=True)}
    if any(needed[pairs[name]].numel() != tensor.numel() for name, tensor in theirs.items()):
        return None
    return {name: needed[pairs[name]].reshape(tensor.shape).contiguous() for name, tensor in theirs.items()}


def _by_kind(tensors: Mapping[str, Tensor], names: Iterable[str]) -> dict[Hashable, list[str]]:
    groups: dict[Hashable, list[str]] = defaultdict(list)
    for name in names:
        tensor = tensors[name]
        kind = next((kind for kind in _KINDS if name.endswith(kind)), None)
        first = next((side for side in tensor.shape if side != 1), 1)
        groups[kind, first, tensor.numel()].append(name)
    return groups


def _shortcuts_last(names: Iterable[str]) -> list[str]:
    """Sorts names as timm's RegNet defines its layers: the shortcut of a block (`proj`) after the block (`f`)."""
    blocks: dict[str, int] = {}
    keys = {}
    for name in names:
        parts = re.split(r"\.(proj|f)\.", name, maxsplit=1)
        keys[name] = (blocks.setdefault(parts[0], len(blocks)), "proj" in parts[1:2])
    return sorted(keys, key=keys.__getitem__)
