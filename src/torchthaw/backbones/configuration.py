"""Configuration of a torchvision classifier within transformers."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedConfig

from .anatomy import check_image_size, family_of

# Where a saved folder has the code that loads it where torchthaw is not installed.
AUTO_MAP = {
    "AutoConfig": "configuration.TorchvisionConfig",
    "AutoModel": "modeling.TorchvisionModel",
    "AutoModelForImageClassification": "modeling.TorchvisionForImageClassification",
}


class TorchvisionConfig(PreTrainedConfig):
    """Which torchvision network a model wraps, and what its classes are called.

    Args:
        architecture: torchvision's name of the network, such as `resnet50`.
        image_size: Side of the square input images in pixels. None stands for torchvision's own (224 for ViT and
            MaxViT, whose networks take one size only); the other families take any size and only keep the number.
        dropout: Dropout probability instead of torchvision's own, in the families that have dropout.
        stochastic_depth: Probability to skip the last block, instead of torchvision's own, in the families with
            stochastic depth; for earlier blocks it falls linearly, as in torchvision.
        aux_logits: Whether GoogLeNet and Inception v3 get their auxiliary heads, which add to the training loss.
        transform_input: Whether GoogLeNet and Inception v3 convert images normalised with ImageNet's mean and
            standard deviation to the scale [-1, 1] that their published weights were trained with.
        pretrained_weights: What the network was initialised with before it was trained, for the record only.
        temperature: What a classifier divides its logits by in eval mode, so that their softmax is calibrated; 1 leaves
            them alone. In train mode it has no effect.
        id2label: Class names in the order of the logits, as a sequence or as a mapping from 0, 1, 2 ... to names.
        num_labels: Number of classes, which then are called `class_0`, `class_1` ...; needs no `id2label`.
            Without both there are 1000 classes, as torchvision builds it.
        thresholds: Where an image may have several labels: the probability of each class from which on an image is said
            to be of it, in the order of the logits; None stands for 0.5. Other class names take them away.
        **kwargs: Further fields of `PreTrainedConfig`. `problem_type` may be `multi_label_classification`.

    Raises:
        ValueError: If the architecture is unknown, an option does not exist in it or is out of range, or the class
            names are not distinct or not numbered from 0.
    """

    model_type = "torchthaw"
    # Makes `save_pretrained` copy this file, and those that it imports, beside the configuration.
    _auto_class = "AutoConfig"

    architecture: str = "resnet50"
    image_size: int | None = None
    dropout: float | None = None
    stochastic_depth: float | None = None
    aux_logits: bool = False
    transform_input: bool = False
    pretrained_weights: str | None = None
    temperature: float = 1.0
    thresholds: list[float] | None = None

    def __init__(
        self,
        architecture: str = "resnet50",
        image_size: int | None = None,
        dropout: float | None = None,
        stochastic_depth: float | None = None,
        aux_logits: bool = False,
        transform_input: bool = False,
        pretrained_weights: str | None = None,
        temperature: float = 1.0,
        id2label: Sequence[str] | Mapping[int, str] | Mapping[str, str] | None = None,
        num_labels: int | None = None,
        thresholds: Sequence[float] | None = None,
        **kwargs: Any,
    ) -> None:
        family = family_of(architecture)
        if image_size is not None:
            check_image_size(architecture, image_size)
        _check_probability("dropout", dropout, architecture, family.dropout is not None)
        _check_probability("stochastic_depth", stochastic_depth, architecture, family.stochastic_depth)
        for option, value in {"aux_logits": aux_logits, "transform_input": transform_input}.items():
            if value and not family.auxiliary:
                raise ValueError(
                    f"{option}=True is for googlenet and inception_v3 only; {architecture} has no such option."
                )
        if aux_logits and image_size is not None and image_size < family.auxiliary_minimum:
            raise ValueError(
                f"The auxiliary head of {architecture} needs images of at least {family.auxiliary_minimum} pixels, and "
                f"image_size is {image_size}. Leave aux_logits out, or write a larger image_size."
            )
        if isinstance(temperature, bool) or not isinstance(temperature, int | float) or not 0 < temperature < math.inf:
            raise ValueError(f"temperature must be a positive number, and 1 for none; it is {temperature!r}.")
        kwargs.pop("label2id", None)
        # One from the Hub names the repository that it came from; what is saved next has its own code.
        kwargs.pop("auto_map", None)
        names = (
            _default_names(1000 if num_labels is None else num_labels) if id2label is None else names_by_id(id2label)
        )
        if num_labels is not None and num_labels != len(names):
            raise ValueError(
                f"num_labels is {num_labels}, but id2label names {len(names)} classes. Leave num_labels out."
            )
        super().__init__(id2label=names, **kwargs)
        self.auto_map = dict(AUTO_MAP)
        self.architecture = architecture
        self.image_size = image_size
        self.dropout = dropout
        self.stochastic_depth = stochastic_depth
        self.aux_logits = aux_logits
        self.transform_input = transform_input
        self.pretrained_weights = pretrained_weights
        self.temperature = float(temperature)
        self.thresholds = thresholds  # type: ignore[assignment]  # a list is made of it

    def __setattr__(self, key: str, value: Any) -> None:
        if key == "problem_type":
            _check_problem_type(value)
        elif key == "thresholds" and value is not None:
            value = _checked_thresholds(value, self.num_labels)
        elif key == "id2label":
            value = names_by_id(value)
            super().__setattr__("label2id", {name: index for index, name in value.items()})
            if value != self.__dict__.get("id2label"):
                super().__setattr__("thresholds", None)
        super().__setattr__(key, value)

    @property
    def num_labels(self) -> int:
        """Number of classes. Setting another number renames the classes to `class_0`, `class_1` ..."""
        return len(names_by_id(self.id2label))

    @num_labels.setter
    def num_labels(self, num_labels: int) -> None:
        if num_labels != self.num_labels:
            self.id2label = _default_names(num_labels)

    @property
    def class_names(self) -> list[str]:
        """Names of the classes in the order of the logits."""
        return list(names_by_id(self.id2label).values())

    @property
    def several_labels(self) -> bool:
        """Whether an image may have several labels."""
        return bool(self.problem_type == "multi_label_classification")

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Builds a configuration from its stored fields; those in `kwargs` replace them, and are checked as well."""
        config_dict = dict(config_dict)
        kwargs.pop("label2id", None)
        if kwargs.get("id2label") is not None or kwargs.get("num_labels") not in (None, _count(config_dict)):
            config_dict.pop("id2label", None)
        own = ("id2label", "num_labels", *cls.__annotations__)
        config_dict |= {key: kwargs[key] for key in own if kwargs.get(key) is not None}
        kwargs = {key: value for key, value in kwargs.items() if key not in own}
        return super().from_dict(config_dict, **kwargs)


def names_by_id(names: Sequence[str] | Mapping[int, str] | Mapping[str, str] | None) -> dict[int, str]:
    """Returns class names as a mapping from 0, 1, 2 ... in order; keys may be strings, as in JSON.

    Raises:
        ValueError: If there is no name, the ids are not 0, 1, 2 ..., a name is no text, or two names are the same.
    """
    if isinstance(names, str) or not isinstance(names, Mapping | Sequence):
        raise ValueError(f"id2label must be a list of class names or a mapping from ids to names, not {names!r}.")
    pairs = names.items() if isinstance(names, Mapping) else enumerate(names)
    try:
        by_id = dict(sorted((int(key), name) for key, name in pairs))
    except (TypeError, ValueError):
        raise ValueError(f"The keys of id2label must be the ids 0, 1, 2 ..., not {list(names)[:5]}.") from None
    if list(by_id) != list(range(len(by_id))) or not by_id:
        raise ValueError(
            f"id2label must number at least one class as 0, 1, 2 ... without gaps; its ids are {list(by_id)[:10]}."
        )
    wrong = next((name for name in by_id.values() if not isinstance(name, str)), None)
    if wrong is not None:
        raise ValueError(f"Class names must be text, and id2label holds {wrong!r}. Write {str(wrong)!r}.")
    seen: dict[str, int] = {}
    for index, name in by_id.items():
        if seen.setdefault(name, index) != index:
            raise ValueError(
                f"id2label names the classes {seen[name]} and {index} both {name!r}. Names must be distinct."
            )
    return by_id


def _default_names(number: int) -> dict[int, str]:
    if not isinstance(number, int) or isinstance(number, bool) or number < 1:
        raise ValueError(f"num_labels must be a whole number of at least 1, not {number!r}.")
    return {index: f"class_{index}" for index in range(number)}


def _count(config_dict: Mapping[str, Any]) -> int | None:
    names = config_dict.get("id2label")
    return None if names is None else len(names)


def _check_problem_type(value: Any) -> None:
    if value == "regression":
        raise ValueError(
            "problem_type='regression', to estimate a number, is not image classification, and torchthaw does nothing "
            "else. Leave it out and make classes of the numbers, such as ranges; or write "
            "problem_type='multi_label_classification' for images with several labels."
        )
    if value not in (None, "single_label_classification", "multi_label_classification"):
        raise ValueError(
            f"problem_type={value!r} is unknown. Leave it out, or write 'multi_label_classification' for images with "
            "several labels."
        )


def _checked_thresholds(values: Sequence[float], num_labels: int) -> list[float]:
    thresholds = [float(value) for value in values]
    if len(thresholds) != num_labels or not all(0 <= value <= 1 for value in thresholds):
        raise ValueError(
            f"thresholds must be a probability for each of the {num_labels} classes, not {list(values)[:10]}."
        )
    return thresholds


def _check_probability(option: str, value: float | None, architecture: str, available: bool) -> None:
    if value is None:
        return
    if not available:
        raise ValueError(
            f"{architecture} has no {option.replace('_', ' ')}, so {option}={value} cannot work. Leave it out."
        )
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise ValueError(f"{option} must be a probability from 0 up to, not including, 1; it is {value!r}.")
