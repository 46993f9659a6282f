"""Anatomy of torchvision's classifiers: one table of families with layer groups, final layers and traits.

Paths are torchvision's own dotted names, relative to the torchvision network.
"""

import difflib
import functools
from collections.abc import Iterable
from dataclasses import dataclass

import torchvision
from torch import nn

HEAD = "head"
"""Name of the last layer group."""

CLASSIFIER = "classifier"
"""Name of the group of pretrained hidden layers between the feature map and the head, in the families that have any."""

Group = tuple[str, tuple[str, ...]]


@dataclass(frozen=True)
class Family:
    """How the networks of one family are built.

    Attributes:
        name: Name of the family.
        prefixes: What the names of its architectures start with.
        final_layer: Path of the layer that gives the logits.
        feature_map: Path of the module whose output is the last feature map (or sequence of tokens).
        head: Paths of the group `head` in forward order, auxiliary heads first.
        stages: Feature groups that are the same in each variant: name and paths, in forward order.
        by_resolution: Path of an `nn.Sequential` whose children form groups by resolution (instead of `stages`).
        by_child: Path of a container of which each child is a group of its own (after `stages`).
        repeated: What the repeated groups are called: `stage` gives stage1, stage2 ...
        tail: Paths that close the last feature group.
        classifier: Paths of the pretrained hidden layers of the classifier, with the pooling before them.
        blocks: Class names of the repeated building blocks.
        auxiliary: Paths of the final layers of the auxiliary heads.
        auxiliary_weight: Weight of each auxiliary loss, from the paper of the architecture.
        auxiliary_minimum: Smallest image size in pixels that the auxiliary heads can take.
        dropout: Name of torchvision's dropout argument.
        stochastic_depth: Whether the blocks have stochastic depth.
        fixed_size: Whether one network takes one image size only.
        multiple: What the image size must be a multiple of; 0 stands for the patch size in the architecture's name.
        minimum: Smallest image size where torchvision's `min_size` of the weights is not a limit of the network.
        transformer_recipe: Whether the family is trained with a transformer's recipe (AdamW, small rates).
    """

    name: str
    prefixes: tuple[str, ...]
    final_layer: str
    feature_map: str
    head: tuple[str, ...]
    stages: tuple[Group, ...] = ()
    by_resolution: str | None = None
    by_child: str | None = None
    repeated: str = "stage"
    tail: tuple[str, ...] = ()
    classifier: tuple[str, ...] = ()
    blocks: tuple[str, ...] = ()
    auxiliary: tuple[str, ...] = ()
    auxiliary_weight: float = 0.0
    auxiliary_minimum: int = 1
    dropout: str | None = None
    stochastic_depth: bool = False
    fixed_size: bool = False
    multiple: int = 1
    minimum: int | None = None
    transformer_recipe: bool = False


def _layers(container: str, first: int, last: int) -> tuple[str, ...]:
    return tuple(f"{container}.{index}" for index in range(first, last + 1))


FAMILIES = (
    Family(
        name="alexnet",
        prefixes=("alexnet",),
        by_resolution="features",
        feature_map="features",
        classifier=("avgpool", *_layers("classifier", 0, 5)),
        head=("classifier.6",),
        final_layer="classifier.6",
        dropout="dropout",
    ),
    Family(
        name="convnext",
        prefixes=("convnext",),
        stages=(
            ("stem", ("features.0",)),
            ("stage1", ("features.1",)),
            ("stage2", ("features.2", "features.3")),
            ("stage3", ("features.4", "features.5")),
            ("stage4", ("features.6", "features.7", "avgpool", "classifier.0")),
        ),
        feature_map="features",
        head=("classifier.1", "classifier.2"),
        final_layer="classifier.2",
        blocks=("CNBlock",),
        stochastic_depth=True,
        transformer_recipe=True,
    ),
    Family(
        name="densenet",
        prefixes=("densenet",),
        by_resolution="features",
        repeated="block",
        feature_map="features",
        head=("classifier",),
        final_layer="classifier",
        blocks=("_DenseLayer", "_Transition"),
        dropout="drop_rate",
    ),
    Family(
        name="efficientnet",
        prefixes=("efficientnet",),
        by_resolution="features",
        feature_map="features",
        head=("avgpool", "classifier.0", "classifier.1"),
        final_layer="classifier.1",
        blocks=("MBConv", "FusedMBConv"),
        dropout="dropout",
        stochastic_depth=True,
    ),
    Family(
        name="googlenet",
        prefixes=("googlenet",),
        stages=(
            ("stem", ("conv1", "maxpool1", "conv2", "conv3", "maxpool2")),
            ("stage1", ("inception3a", "inception3b")),
            ("stage2", ("maxpool3", *(f"inception4{letter}" for letter in "abcde"))),
            ("stage3", ("maxpool4", "inception5a", "inception5b")),
        ),
        feature_map="inception5b",
        head=("aux1", "aux2", "avgpool", "dropout", "fc"),
        final_layer="fc",
        auxiliary=("aux1.fc2", "aux2.fc2"),
        auxiliary_weight=0.3,
        blocks=("Inception",),
        dropout="dropout",
    ),
    Family(
        name="inception",
        prefixes=("inception",),
        stages=(
            (
                "stem",
                (
                    "Conv2d_1a_3x3",
                    "Conv2d_2a_3x3",
                    "Conv2d_2b_3x3",
                    "maxpool1",
                    "Conv2d_3b_1x1",
                    "Conv2d_4a_3x3",
                    "maxpool2",
                ),
            ),
            ("stage1", tuple(f"Mixed_5{letter}" for letter in "bcd")),
            ("stage2", tuple(f"Mixed_6{letter}" for letter in "abcde")),
            ("stage3", tuple(f"Mixed_7{letter}" for letter in "abc")),
        ),
        feature_map="Mixed_7c",
        head=("AuxLogits", "avgpool", "dropout", "fc"),
        final_layer="fc",
        auxiliary=("AuxLogits.fc",),
        auxiliary_weight=0.4,
        auxiliary_minimum=299,
        blocks=("InceptionA", "InceptionB", "InceptionC", "InceptionD", "InceptionE"),
        dropout="dropout",
    ),
    Family(
        name="maxvit",
        prefixes=("maxvit",),
        stages=(
            ("stem", ("stem",)),
            ("stage1", ("blocks.0",)),
            ("stage2", ("blocks.1",)),
            ("stage3", ("blocks.2",)),
            ("stage4", ("blocks.3",)),
        ),
        feature_map="blocks.3",
        classifier=_layers("classifier", 0, 4),
        head=("classifier.5",),
        final_layer="classifier.5",
        blocks=("MaxVitLayer",),
        dropout="mlp_dropout",
        stochastic_depth=True,
        fixed_size=True,
        multiple=224,
        transformer_recipe=True,
    ),
    Family(
        name="mnasnet",
        prefixes=("mnasnet",),
        by_resolution="layers",
        feature_map="layers",
        head=("classifier.0", "classifier.1"),
        final_layer="classifier.1",
        blocks=("_InvertedResidual",),
        dropout="dropout",
    ),
    Family(
        name="mobilenet_v2",
        prefixes=("mobilenet_v2",),
        by_resolution="features",
        feature_map="features",
        head=("classifier.0", "classifier.1"),
        final_layer="classifier.1",
        blocks=("InvertedResidual",),
        dropout="dropout",
    ),
    Family(
        name="mobilenet_v3",
        prefixes=("mobilenet_v3",),
        by_resolution="features",
        feature_map="features",
        classifier=("avgpool", "classifier.0", "classifier.1"),
        head=("classifier.2", "classifier.3"),
        final_layer="classifier.3",
        blocks=("InvertedResidual",),
        dropout="dropout",
    ),
    Family(
        name="regnet",
        prefixes=("regnet",),
        stages=(("stem", ("stem",)), *((f"stage{i}", (f"trunk_output.block{i}",)) for i in range(1, 5))),
        feature_map="trunk_output",
        head=("avgpool", "fc"),
        final_layer="fc",
        blocks=("ResBottleneckBlock",),
    ),
    Family(
        name="resnet",
        prefixes=("resnet", "resnext", "wide_resnet"),
        stages=(
            ("stem", ("conv1", "bn1", "relu", "maxpool")),
            *((f"layer{i}", (f"layer{i}",)) for i in range(1, 5)),
        ),
        feature_map="layer4",
        head=("avgpool", "fc"),
        final_layer="fc",
        blocks=("BasicBlock", "Bottleneck"),
    ),
    Family(
        name="shufflenet",
        prefixes=("shufflenet",),
        stages=(
            ("stem", ("conv1", "maxpool")),
            ("stage2", ("stage2",)),
            ("stage3", ("stage3",)),
            ("stage4", ("stage4", "conv5")),
        ),
        feature_map="conv5",
        head=("fc",),
        final_layer="fc",
        blocks=("InvertedResidual",),
    ),
    Family(
        name="squeezenet",
        prefixes=("squeezenet",),
        by_resolution="features",
        feature_map="features",
        head=_layers("classifier", 0, 3),
        final_layer="classifier.1",
        blocks=("Fire",),
        dropout="dropout",
    ),
    Family(
        name="swin",
        prefixes=("swin",),
        stages=(
            ("stem", ("features.0",)),
            ("stage1", ("features.1",)),
            ("stage2", ("features.2", "features.3")),
            ("stage3", ("features.4", "features.5")),
            ("stage4", ("features.6", "features.7", "norm", "permute")),
        ),
        feature_map="permute",
        head=("avgpool", "flatten", "head"),
        final_layer="head",
        blocks=("SwinTransformerBlock", "SwinTransformerBlockV2"),
        dropout="dropout",
        stochastic_depth=True,
        minimum=32,
        transformer_recipe=True,
    ),
    Family(
        name="vgg",
        prefixes=("vgg",),
        by_resolution="features",
        feature_map="features",
        classifier=("avgpool", *_layers("classifier", 0, 4)),
        head=("classifier.5", "classifier.6"),
        final_layer="classifier.6",
        dropout="dropout",
    ),
    Family(
        name="vit",
        prefixes=("vit",),
        stages=(("stem", ("class_token", "encoder.pos_embedding", "conv_proj", "encoder.dropout")),),
        by_child="encoder.layers",
        repeated="block",
        tail=("encoder.ln",),
        feature_map="encoder",
        head=("heads.head",),
        final_layer="heads.head",
        blocks=("EncoderBlock",),
        dropout="dropout",
        fixed_size=True,
        multiple=0,
        transformer_recipe=True,
    ),
)


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
