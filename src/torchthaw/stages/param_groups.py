"""Optimizer groups: one learning rate per layer group, weight decay by the kind of parameter."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from torchthaw.errors import PlanError
from torchthaw.stages.freezing import Group
from torchthaw.stages.plan import Stage
from torchthaw.stages.rates import HEAD

_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.LocalResponseNorm, nn.RMSNorm)
# Parameters of more than one dimension that stand for positions or tokens rather than for a linear map.
POSITION_NAMES = ("class_token", "pos_embedding", "relative_position_bias_table", "cpb_mlp", "logit_scale")
_SCALE_NAMES = ("layer_scale",)


def is_decayed(name: str, parameter: nn.Parameter, module: nn.Module) -> bool:
    """Whether weight decay applies: to weights of linear maps and convolutions only.

    Never decayed are the parameters of norm layers whatever their name, biases and everything else of at most one
    dimension, position embeddings and biases, class tokens, and layer scale.

    Args:
        name: Full dotted name of the parameter.
        parameter: The parameter.
        module: The module that owns it.
    """
    if isinstance(module, _NORMS) or parameter.ndim <= 1:
        return False
    parts = name.split(".")
    return not any(part in POSITION_NAMES + _SCALE_NAMES for part in parts)


def param_groups(
    model: nn.Module, groups: Mapping[str, Group], stage: Stage, *, l2_sp: float | None = None
) -> list[dict[str, Any]]:
    """Returns the optimizer groups of a stage, from the input to the head, decayed weights before the rest.

    Args:
        model: The model whose parameters the groups hold; only those that require a gradient are taken.
        groups: The model's layer groups, input to output.
        stage: Gives each group its peak learning rate, and the weight decay.
        l2_sp: Strength of the pull towards the weights that the run began with (see `PullToStart`), which takes the
            place of weight decay in all groups but the head; None for none. Adapters (`lora`), whose decay is such a
            pull, are decayed instead.

    Returns:
        Groups as torch optimizers take them, each with `name` (such as `layer4/decay`), `layer_group`, `params`,
        `lr` and `weight_decay`, and `l2_sp` where weights are pulled. Every trainable parameter is in exactly one.

    Raises:
        PlanError: the stage leaves a live layer group without a rate, or nothing trains.
    """
    rates = stage.learning_rates(list(groups))
    owners = {id(p): module for module in model.modules() for p in module.parameters(recurse=False)}
    result: list[dict[str, Any]] = []
    for group_name, rate in rates.items():
        trainable = [(name, p) for name, p in groups[group_name].parameters.items() if p.requires_grad]
        for kind in ("decay", "no_decay"):
            chosen = [p for name, p in trainable if is_decayed(name, p, owners[id(p)]) == (kind == "decay")]
            pulled = l2_sp is not None and stage.adapters is None and kind == "decay" and group_name != HEAD
            decay = (stage.weight_decay or 0.0) if kind == "decay" and not pulled else 0.0
            if chosen:
                result.append(
                    {
                        "name": f"{group_name}/{kind}",
                        "layer_group": group_name,
                        "params": chosen,
                        "lr": rate,
                        "weight_decay": decay,
                        **({"l2_sp": l2_sp} if pulled else {}),
                    }
                )
    if not result:
        raise PlanError(f"stage {stage.name!r} has no trainable parameter; unfreeze head, a number of groups, or all")
    _check_complete(model, result)
    return result


def _check_complete(model: nn.Module, groups: Sequence[Mapping[str, Any]]) -> None:
    listed = [id(p) for group in groups for p in group["params"]]
    assert len(listed) == len(set(listed)), "a parameter is in two optimizer groups"
    missing = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in set(listed)]
    assert not missing, f"trainable but in no optimizer group: {missing}"
