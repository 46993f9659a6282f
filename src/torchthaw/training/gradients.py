"""Gradients of a step: clipped, and refused when they are not finite."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from torchthaw.errors import TrainingError


class NonFiniteError(TrainingError):
    """A loss or gradient is NaN or infinite; the weights are those before the step."""


def gradient_norms(parameters: Sequence[nn.Parameter]) -> torch.Tensor:
    """Returns the L2 norm of each parameter's gradient, shape (parameters,); nothing waits for the device.

    Args:
        parameters: All with a gradient.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    if len({(gradient.device, gradient.dtype) for gradient in gradients}) == 1:
        # What `torch.nn.utils.get_total_norm` does with them, so that the norm of these norms is its result.
        return torch.stack(torch._foreach_norm(gradients))
    return torch.stack([torch.linalg.vector_norm(gradient).to(gradients[0].device) for gradient in gradients])


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales gradients to a norm of at most `max_norm`, as `torch.nn.utils.clip_grad_norm_` does; finite ones only.

    Args:
        parameters: Their gradients are clipped together.
        max_norm: The largest L2 norm; infinity only measures.

    Returns:
        The norm before clipping, a scalar, and that of each parameter with a gradient, shape (parameters,). If it is
        not finite, the gradients are as they were.
    """
    with_gradient = [p for p in parameters if p.grad is not None]
    norms = gradient_norms(with_gradient)
    norm = torch.linalg.vector_norm(norms)
    if math.isfinite(max_norm):
        # Decided on the device, since asking would wait for it. A norm of 0 clips nothing.
        finite_norm = torch.where(torch.isfinite(norm), norm, torch.zeros_like(norm))
        torch.nn.utils.clip_grads_with_norm_(with_gradient, max_norm, finite_norm)
    return norm, norms


def broken_parameters(parameters: Sequence[nn.Parameter], norms: torch.Tensor) -> list[nn.Parameter]:
    """Returns the parameters whose gradients are not finite, or too large for their norm to be.

    Args:
        parameters: All with a gradient.
        norms: What `gradient_norms` gives for them.
    """
    finite = torch.isfinite(norms).tolist()
    return [parameter for parameter, is_finite in zip(parameters, finite, strict=True) if not is_finite]


def broken_rows(inputs: Mapping[str, Any]) -> list[int]:
    """Returns the rows of a batch whose images hold values that are not finite."""
    pixels = inputs.get("pixel_values")
    if not isinstance(pixels, torch.Tensor):
        return []
    rows: list[int] = (~torch.isfinite(pixels).flatten(1).all(1)).nonzero().flatten().tolist()
    return rows


def explain_non_finite(
    *,
    what: str,
    stage: str,
    step: int,
    optimizer_groups: Sequence[Mapping[str, Any]],
    broken: Sequence[nn.Parameter],
    inputs: Mapping[str, Any],
) -> str:
    """Says where a step broke: the layer group with its learning rate, and what is known of the batch.

    Args:
        what: What is not finite, such as "the loss became nan".
        stage: Name of the stage.
        step: Number of the step in the run, from 1 on.
        optimizer_groups: Groups of the optimizer, from the input to the head.
        broken: The parameters whose gradients are not finite; the group of them that is nearest to the head is named.
        inputs: The batch.
    """
    of_broken = {id(parameter) for parameter in broken}
    group = next((g for g in reversed(optimizer_groups) if of_broken & {id(p) for p in g["params"]}), None)
    rates = {g["layer_group"]: float(g["lr"]) for g in optimizer_groups}
    where = (
        f"the gradient breaks in layer group {group['layer_group']!r} (learning rate {float(group['lr']):.3g})"
        if group
        else f"at learning rates up to {max(rates.values()):.3g}"
    )
    rows = broken_rows(inputs)
    if rows:
        cause = f"the batch holds images with values that are not finite (rows {rows[:5]}): mend these images"
    else:
        pixels = inputs.get("pixel_values")
        labels = inputs.get("labels")
        shown = f", labels {labels.tolist()[:8]}" if isinstance(labels, torch.Tensor) and labels.ndim == 1 else ""
        cause = (
            f"the batch itself is finite ({len(pixels) if pixels is not None else '?'} images{shown}): write a lower "
            "learning_rate for this stage (a tenth, say), on_nan: retry, or turn mixed precision off"
        )
    return f"{what} in stage {stage!r} at step {step}; {where}; {cause}"
