"""The low-rank adapters of a stage (LoRA, Hu et al. 2022): which weights get one, and how they begin.

peft draws the matrices. Its own layers would not do here: those in Swin's attention are never called, so that they
learn nothing, and those of `nn.MultiheadAttention` add the product to W and subtract it again in each step, which
leaves W rounded. Adapters on weights (`low_rank`) have their price: the gradient of the whole W is computed on the way
to those of A and B, so that a step takes as long as one that trains W. The memory for the optimizer's state shrinks to
that of A and B.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from torchthaw.errors import PlanError, did_you_mean
from torchthaw.stages.freezing import Group
from torchthaw.stages.lora import LoraSettings
from torchthaw.stages.low_rank import LowRank, Place, put_on, take_off_adapters, weight_at
from torchthaw.stages.param_groups import POSITION_NAMES
from torchthaw.stages.rates import HEAD
from torchthaw.stages.stage import Stage

_MOST_EXAMPLES = 8


def weights_to_adapt(groups: Mapping[str, Group], stage: Stage) -> dict[str, Place]:
    """Returns the weights that get an adapter, by dotted name.

    They are the weights of `nn.Linear` and the joint projection of `nn.MultiheadAttention` in the layer groups that the
    stage names: without the head, which trains as a whole, and without the small networks that make position biases,
    unless `targets` name them.

    Args:
        groups: The model's layer groups.
        stage: A stage with `lora`.

    Raises:
        PlanError: there is none, a target matches none, or the rank is no less than that of a weight.
    """
    settings = stage.adapters
    assert settings is not None
    live = stage.live_groups(list(groups))
    known = {name: place for group in live if group != HEAD for name, place in _linear_maps(groups[group])}
    if not known:
        raise PlanError(
            f"stage {stage.name!r} has lora, but there is no linear layer in what it unfreezes ({', '.join(live)}); "
            "write unfreeze: all, or leave lora out"
        )
    targets = {name: _target(name) for name in known}
    for pattern in settings.targets:
        if not any(LoraSettings(1, 1, (pattern,)).adapts(target) for target in targets.values()):
            parts = sorted({part for target in targets.values() for part in target.split(".") if not part.isdigit()})
            raise PlanError(
                f"stage {stage.name!r}: lora has the target {pattern!r}, which matches no linear layer."
                f"{did_you_mean(pattern, parts)} There are, for example, {', '.join(_examples(targets.values()))}."
            )
    chosen = {
        name: known[name]
        for name, target in targets.items()
        if settings.adapts(target) and (settings.targets or not set(target.split(".")) & set(POSITION_NAMES))
    }
    least = min(chosen, key=lambda name: min(weight_at(chosen[name]).shape))
    outputs, inputs = weight_at(chosen[least]).shape
    if settings.rank >= min(outputs, inputs):
        raise PlanError(
            f"stage {stage.name!r}: the rank of lora is {settings.rank}, but {least} is a matrix of {outputs} x "
            f"{inputs}, of rank {min(outputs, inputs)} at most; write a lower one, such as 8, or leave lora out"
        )
    return chosen


def _linear_maps(group: Group) -> Iterator[tuple[str, Place]]:
    owned = {id(parameter): name for name, parameter in group.parameters.items()}
    for module in (part for root in group.modules.values() for part in root.modules()):
        attribute = "in_proj_weight" if isinstance(module, nn.MultiheadAttention) else "weight"
        weight = module._parameters.get(attribute)
        if isinstance(module, nn.Linear | nn.MultiheadAttention) and id(weight) in owned:
            yield owned[id(weight)], (module, attribute)


def _target(name: str) -> str:
    """Returns what the targets of `lora` are matched with: a weight's dotted name without `weight`."""
    return name.removesuffix(".weight").removesuffix("_weight")


def _examples(targets: Iterable[str]) -> list[str]:
    """Returns the last parts of names, which repeat from block to block."""
    return list(dict.fromkeys(".".join(target.split(".")[-2:]) for target in targets))[:_MOST_EXAMPLES]


def add_adapters(groups: Mapping[str, Group], stage: Stage, *, seed: int) -> None:
    """Puts the adapters of a stage onto a model, in its layers, so that they belong to the layer groups of those.

    A stage without `lora` changes nothing. B is 0, so that the network computes what it did; A depends on the seed
    alone, and is the same on each device and in each process. Both are in float32 where the weight's type is smaller.

    Args:
        groups: The model's layer groups; it has no adapters.
        stage: The stage.
        seed: Decides A.

    Raises:
        PlanError: peft is not installed, or the stage does not fit the model.
    """
    if stage.adapters is None:
        return
    places = weights_to_adapt(groups, stage)
    shapes = [tuple(weight_at(place).shape) for place in places.values()]
    for place, (a, b, scale) in zip(places.values(), _drawn(shapes, stage.adapters, stage.name, seed), strict=True):
        weight = weight_at(place)
        dtype = torch.promote_types(weight.dtype, torch.float32)
        put_on(place, LowRank(a.to(weight.device, dtype), b.to(weight.device, dtype), scale))


def _drawn(
    shapes: Iterable[tuple[int, ...]], settings: LoraSettings, stage: str, seed: int
) -> list[tuple[torch.Tensor, torch.Tensor, float]]:
    """Returns A, B and the scale of each weight as peft injects them."""
    check_peft(stage)
    from peft import LoraConfig, inject_adapter_in_model  # only here, since it imports much

    # Their weights are neither read nor written, so that they take no memory.
    layers = [nn.utils.skip_init(nn.Linear, inputs, outputs, bias=False) for outputs, inputs in shapes]
    stand_in = nn.ModuleDict({str(number): layer for number, layer in enumerate(layers)})
    alpha: Any = settings.alpha  # peft writes int, and divides it by the rank
    config = LoraConfig(r=settings.rank, lora_alpha=alpha, target_modules=list(stand_in))
    # The run's random numbers stay what they are.
    with torch.device("cpu"), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        inject_adapter_in_model(config, stand_in, "stage")
    drawn: Iterable[Any] = stand_in.values()
    return [
        (layer.lora_A["stage"].weight.detach(), layer.lora_B["stage"].weight.detach(), layer.scaling["stage"])
        for layer in drawn
    ]


def check_peft(stage: str) -> None:
    """Checks that peft is there.

    Raises:
        PlanError: it is not; the message says how to install it.
    """
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise PlanError(
            f"stage {stage!r} has lora, which needs peft ({error}); install it with: pip install 'torchthaw[lora]'"
        ) from error


@contextmanager
def with_adapters(model: Any, stage: Stage) -> Iterator[None]:
    """Lets a model have the adapters of a stage while this lasts; its weights stay as they are."""
    add_adapters(model.layer_groups(), stage, seed=0)
    try:
        yield
    finally:
        take_off_adapters(model)
