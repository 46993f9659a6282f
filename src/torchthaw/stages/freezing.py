"""Makes a model ready for a stage: which parameters train, which modules stay in eval mode."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from torchthaw.errors import PlanError
from torchthaw.stages.low_rank import LowRank
from torchthaw.stages.plan import HEAD, BatchNormPolicy, Stage

# Below either, fine-tuning does better with the pretrained statistics. With 10,500 and 20,000 images of CIFAR-10 those
# of the batches cost 0.06 of macro F1; beyond that nothing was measured.
SMALL_DATA_IMAGES = 25_000
SMALL_BATCH = 32


class Group(Protocol):
    """A layer group: full names of its top-level modules and of its parameters, with the objects."""

    @property
    def modules(self) -> Mapping[str, nn.Module]: ...

    @property
    def parameters(self) -> Mapping[str, nn.Parameter]: ...


class GroupedModel(Protocol):
    """What a model offers to be trained in stages."""

    def layer_groups(self) -> Mapping[str, Group]: ...

    def hold_in_eval(self, names: Iterable[str]) -> None: ...


@dataclass(frozen=True)
class Frozen:
    """What a stage keeps as it is.

    Attributes:
        groups: Layer groups of which nothing trains.
        live: The others.
        batch_norm: BatchNorm policy of the live groups.
        parameters: Number of scalars of the model.
        trainable_parameters: Number of those that train.
    """

    groups: tuple[str, ...]
    live: tuple[str, ...]
    batch_norm: BatchNormPolicy
    parameters: int
    trainable_parameters: int


def resolve_batch_norm(policy: BatchNormPolicy, *, num_images: int | None, batch_size: int) -> BatchNormPolicy:
    """Returns the policy for live groups: `auto` becomes `eval` for small data or batches, else `train`.

    Args:
        policy: A stage's `batch_norm`.
        num_images: Number of training images; None when it is unknown (streaming), which counts as large.
        batch_size: Images per device and step, over which BatchNorm would take its statistics.
    """
    if policy != "auto":
        return policy
    small_data = num_images is not None and num_images < SMALL_DATA_IMAGES
    return "eval" if small_data or batch_size < SMALL_BATCH else "train"


def freeze_for_stage(model: GroupedModel, stage: Stage, batch_norm: BatchNormPolicy) -> Frozen:
    """Sets `requires_grad` of every parameter, and the modules that `model.train()` leaves in eval mode.

    Frozen groups stay in eval mode as a whole: their BatchNorm statistics, dropout and stochastic depth are those of
    inference; with the stage's `frozen_dropout`, only their BatchNorm modules do. In live groups the BatchNorm policy
    decides. In a stage with `lora`, what trains of a live group before the head are its adapters alone, which
    `add_adapters` has put there; a group without any is frozen.

    Raises:
        PlanError: nothing would be left to train.
    """
    assert batch_norm != "auto", "resolve_batch_norm comes first"
    groups = model.layer_groups()
    live = stage.live_groups(list(groups))
    adapters = {name: _adapter_parameters(group) for name, group in groups.items() if stage.adapters and name != HEAD}
    live = tuple(name for name in live if adapters.get(name, True))
    held: list[str] = []
    for name, group in groups.items():
        for parameter in group.parameters.values():
            parameter.requires_grad_(name in live and (name not in adapters or id(parameter) in adapters[name]))
        if name not in live:
            held.extend((module for module, _ in batch_norms(group)) if stage.frozen_dropout else group.modules)
            continue
        for module_name, norm in batch_norms(group):
            if batch_norm == "eval":
                held.append(module_name)
            if batch_norm in ("eval", "freeze_affine"):
                for parameter in norm.parameters(recurse=False):
                    parameter.requires_grad_(False)
    model.hold_in_eval(held)
    sizes = [(p.numel(), p.requires_grad) for group in groups.values() for p in group.parameters.values()]
    trainable = sum(size for size, trains in sizes if trains)
    if not trainable:
        raise PlanError(
            f"stage {stage.name!r} unfreezes {', '.join(live)}, where nothing can train under "
            f"batch_norm: {batch_norm}; unfreeze another group or write batch_norm: train"
        )
    return Frozen(
        groups=tuple(name for name in groups if name not in live),
        live=live,
        batch_norm=batch_norm,
        parameters=sum(size for size, _ in sizes),
        trainable_parameters=trainable,
    )


def _adapter_parameters(group: Group) -> set[int]:
    modules = (module for root in group.modules.values() for module in root.modules())
    return {id(p) for module in modules if isinstance(module, LowRank) for p in module.parameters()}


def batch_norms(group: Group) -> list[tuple[str, _BatchNorm]]:
    """Returns the BatchNorm modules of a layer group with their full names."""
    return [
        (f"{prefix}.{name}" if name else prefix, module)
        for prefix, root in group.modules.items()
        for name, module in root.named_modules()
        if isinstance(module, _BatchNorm)
    ]
