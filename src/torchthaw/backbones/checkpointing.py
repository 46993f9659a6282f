"""Gradient checkpointing of torchvision's blocks, with BatchNorm statistics counted once."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def recomputed(
    forward: Callable[..., Any], block: nn.Module, checkpoint_function: Callable[..., Any]
) -> Callable[..., Any]:
    """Returns a block's forward that does not store activations but recomputes them in backward."""

    def run(*arguments: Any) -> Any:
        # DenseNet goes on appending to the list that it passes to its layers.
        copies = [list(argument) if isinstance(argument, list) else argument for argument in arguments]
        return checkpoint_function(forward, *copies, context_fn=partial(_recomputation_contexts, block))

    return run


def in_turn(functions: Sequence[Callable[[Any], Any]]) -> Callable[[Any], Any]:
    """Returns the functions one after another as one."""

    def run(value: Any) -> Any:
        for function in functions:
            value = function(value)
        return value

    return run


def _recomputation_contexts(block: nn.Module) -> tuple[Any, Any]:
    return contextlib.nullcontext(), _scratch_statistics(block)


@contextlib.contextmanager
def _scratch_statistics(block: nn.Module) -> Iterator[None]:
    """While this lasts, BatchNorm layers update copies of their statistics, so that recomputation does not count."""
    layers = [layer for layer in block.modules() if isinstance(layer, _BatchNorm) and layer.training]
    buffers = [dict(layer.named_buffers(recurse=False)) for layer in layers]
    for layer, own in zip(layers, buffers, strict=True):
        layer._buffers.update({name: buffer.clone() for name, buffer in own.items()})
    try:
        yield
    finally:
        for layer, own in zip(layers, buffers, strict=True):
            layer._buffers.update(own)
