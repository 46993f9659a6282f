"""Averages of weights: over the course of training (EMA, SWA), and between sets of weights.

`torch.optim.swa_utils` has the arithmetic. Its `AveragedModel` copies a whole model with all that was put on it; here
only what a stage can change is averaged, and the average takes its place in the model itself while it is validated.
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import get_ema_multi_avg_fn, get_swa_multi_avg_fn

from torchthaw.stages.snapshots import Snapshot, all_tensors, put_back

Tensors = Mapping[str, torch.Tensor]
# Where a tensor of the model is: the parameters or buffers of its module, and its name there.
_Place = tuple[dict[str, Any], str]
# An average, and the place of that of which it is one.
_Pair = tuple[torch.Tensor, dict[str, Any], str]


def ema_decay(update: int, highest: float) -> float:
    """Returns the decay of an exponential moving average at an update: it rises from 2/11 to `highest`.

    With (1 + n) / (10 + n) the average reaches back over about a tenth of the n updates so far, so that a short stage
    is not held at its first weights; this is how TensorFlow's `ExponentialMovingAverage` warms up (`num_updates`).

    Args:
        update: Number of the update, from 1 on.
        highest: The decay that is not exceeded.
    """
    return min(highest, (1 + update) / (10 + update))


@dataclass
class WeightAverage:
    """The running average of what a stage can change: trainable parameters, and statistics of live BatchNorm.

    `ema` is the exponential moving average of the weights after every step (Polyak and Juditsky, 1992, SIAM J. Control
    Optim. 30; for networks Tarvainen and Valpola, NeurIPS 2017), statistics included; it starts at the weights of
    the stage's start. `swa` is the equal mean of the weights that it is given (Izmailov et al., UAI 2018); statistics
    are those of the last weights, until they are measured anew. Whole numbers are those of the last weights.

    Attributes:
        kind: `ema` or `swa`.
        decay: Highest decay of `ema`.
        updates: How many weights have come in.
        averages: The averages by name, on the model's device.
        replaced: The weights that training goes on from, while averages stand in the model; else empty.
    """

    kind: str
    decay: float
    updates: int = 0
    averages: Snapshot = field(default_factory=dict)
    replaced: Snapshot = field(default_factory=dict)
    _averaged: dict[torch.dtype, list[_Pair]] = field(default_factory=dict, init=False, repr=False)
    _copied: list[_Pair] = field(default_factory=list, init=False, repr=False)

    def begin(self, model: nn.Module, names: Collection[str]) -> None:
        """Starts at a model's weights; where there are `replaced` ones, goes on, and puts these back.

        Args:
            model: The model; where there are replaced weights, with the averages in it.
            names: What the stage can change.
        """
        tensors = all_tensors(model)
        self.averages = {name: tensors[name].detach().clone() for name in names}
        put_back(model, self.replaced)
        self.replaced = {}
        # Found once: a walk through all modules in each step would cost more than the average itself. By module, since
        # wrapping a model for training may give it tensors of their own place in memory.
        places = _places(model)
        copied = _statistics(model) if self.kind == "swa" else set()
        self._averaged, self._copied = {}, []
        for name, average in self.averages.items():
            pair = (average, *places[name])
            if average.is_floating_point() and name not in copied:
                self._averaged.setdefault(average.dtype, []).append(pair)
            else:
                self._copied.append(pair)

    @torch.no_grad()
    def update(self) -> None:
        """Takes the model's weights into the average."""
        self.updates += 1
        if self.kind == "ema":
            mean = get_ema_multi_avg_fn(ema_decay(self.updates, self.decay))
        else:
            mean = get_swa_multi_avg_fn()
        for pairs in self._averaged.values():
            averages = [average for average, _, _ in pairs]
            mean(averages, [tensors[key] for _, tensors, key in pairs], self.updates - 1)
        for average, tensors, key in self._copied:
            average.copy_(tensors[key])

    @contextmanager
    def in_model(self, model: nn.Module) -> Iterator[None]:
        """Lets the averages stand in the model; before the first update, and within itself, changes nothing."""
        if not self.updates or self.replaced:
            yield
            return
        tensors = all_tensors(model)
        self.replaced = {name: tensors[name].detach().clone() for name in self.averages}
        put_back(model, self.averages)
        try:
            yield
        finally:
            put_back(model, self.replaced)
            self.replaced = {}

    def measure_statistics(self, model: nn.Module, passes: Iterator[int]) -> None:
        """Measures the statistics of live BatchNorm under the averages; see `measure_batch_norm`."""
        with self.in_model(model):
            measure_batch_norm(model, passes)
            tensors = all_tensors(model)
            for name in _statistics(model) & self.averages.keys():
                self.averages[name].copy_(tensors[name])

    def finish(self, model: nn.Module) -> None:
        """Leaves the averages in the model."""
        if self.updates:
            put_back(model, self.averages)


@torch.no_grad()
def measure_batch_norm(model: nn.Module, passes: Iterator[int]) -> None:
    """Measures the statistics of BatchNorm modules in training mode anew, for weights that no training step has seen.

    Mean and variance are those over all images, from the moments of the batches, as Wu and Johnson (2021, "Rethinking
    Batch in BatchNorm") do it; `torch.optim.swa_utils.update_bn` averages variances, and starts frozen modules anew
    too. Everything else is in eval mode meanwhile.

    Args:
        model: In training mode, as it is again afterwards.
        passes: Runs a batch of images through the model each time it is advanced, and gives their number.
    """
    norms = live_batch_norms(model)
    kept = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    statistics = [_statistics_of(norm) for norm in norms]
    means = [torch.zeros_like(mean, dtype=torch.float64) for mean, _ in statistics]
    squares = [torch.zeros_like(mean) for mean in means]
    images = 0
    model.eval()
    for norm in norms:
        norm.train()
        # The statistics are those of the last batch.
        norm.momentum = 1.0
        norm.num_batches_tracked = None
    try:
        for number in passes:
            images += number
            for (mean, variance), total, square in zip(statistics, means, squares, strict=True):
                total.add_(mean.double(), alpha=number)
                square.add_(variance.double() + mean.double() ** 2, alpha=number)
    finally:
        for norm, (momentum, batches) in zip(norms, kept, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, batches
        model.train()
    for (mean, variance), total, square in zip(statistics, means, squares, strict=True):
        mean.copy_(total / images)
        variance.copy_(square / images - (total / images) ** 2)


def live_batch_norms(model: nn.Module) -> list[_BatchNorm]:
    """Returns the BatchNorm modules whose statistics training changes, of a model in training mode."""
    modules = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    return [module for module in modules if module.training and module.running_mean is not None]


def _statistics_of(norm: _BatchNorm) -> tuple[torch.Tensor, torch.Tensor]:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return norm.running_mean, norm.running_var


def _statistics(model: nn.Module) -> set[str]:
    return {
        f"{path}.{name}"
        for path, module in model.named_modules()
        if isinstance(module, _BatchNorm)
        for name, _ in module.named_buffers(recurse=False)
    }


def _places(model: nn.Module) -> dict[str, _Place]:
    return {
        f"{path}.{key}" if path else key: (tensors, key)
        for path, module in model.named_modules()
        for tensors in (module._parameters, module._buffers)
        for key in tensors
    }


def average_weights(states: Sequence[Tensors], shares: Sequence[float]) -> dict[str, torch.Tensor]:
    """Returns the weighted mean of state_dicts, tensor by tensor, computed in float64.

    Statistics of BatchNorm are averaged like weights. Whole numbers, such as BatchNorm's count of batches, are the
    first state's.

    Args:
        states: With the same names and shapes.
        shares: One for each state; they sum to 1.
    """
    assert abs(sum(shares) - 1) < 1e-9, shares
    average: dict[str, torch.Tensor] = {}
    for name, first in states[0].items():
        if first.is_floating_point():
            total = sum(share * state[name].double() for state, share in zip(states, shares, strict=True))
            average[name] = torch.as_tensor(total).to(first.dtype)
        else:
            average[name] = first.clone()
    return average


def interpolate(
    before: Tensors, after: Tensors, alphas: Sequence[float], score: Callable[[float, dict[str, torch.Tensor]], float]
) -> tuple[float, dict[float, float]]:
    """Scores the weights on the way from one state to another, in the order of the shares.

    Args:
        before: Where the way begins, at share 0.
        after: Where it ends, at share 1.
        alphas: Shares of `after`.
        score: Measures the weights of a share; higher is better, and NaN is never best.

    Returns:
        The share with the highest score, of equal ones the largest, and the score of each.
    """
    scores = {
        alpha: score(alpha, average_weights([after, before], [alpha, 1 - alpha])) for alpha in sorted(set(alphas))
    }
    best = max(scores, key=lambda alpha: (-math.inf if math.isnan(scores[alpha]) else scores[alpha], alpha))
    return best, scores
