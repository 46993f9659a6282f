"""Gradient checkpointing of torchvision's blocks, with BatchNorm statistics counted once."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .anatomy import family_of, group_paths


@contextlib.contextmanager
def recomputed_blocks(
    net: nn.Module, architecture: str, checkpoint_function: Callable[..., Any], every: int
) -> Iterator[None]:
    """While this lasts, the blocks of a network do not store their activations but recompute them in backward.

    Args:
        net: The torchvision network.
        architecture: torchvision's name of it.
        checkpoint_function: Calls a function so that its activations are recomputed.
        every: Takes every so-manyth block only, in the families that have blocks.
    """
    family = family_of(architecture)
    if family.blocks:
        blocks = [module for module in net.modules() if type(module).__name__ in family.blocks]
        forwards: dict[nn.Module, Callable[..., Any]] = {
            block: _recomputed(block.forward, block, checkpoint_function) for block in blocks[::every]
        }
    else:
        assert family.by_resolution is not None
        container = net.get_submodule(family.by_resolution)
        runs = [
            nn.Sequential(*(net.get_submodule(path) for path in paths))
            for paths in group_paths(architecture, net).values()
            if paths[0].startswith(f"{family.by_resolution}.")
        ]
        forwards = {container: _in_turn([_recomputed(run.forward, run, checkpoint_function) for run in runs])}
    own = {block: vars(block)["forward"] for block in forwards if "forward" in vars(block)}
    try:
        for block, forward in forwards.items():
            block.forward = forward
        yield
    finally:
        for block in forwards:
            del block.forward
            vars(block).update({"forward": own[block]} if block in own else {})


def _recomputed(
    forward: Callable[..., Any], block: nn.Module, checkpoint_function: Callable[..., Any]
) -> Callable[..., Any]:
    """Returns a block's forward that does not store activations but recomputes them in backward."""

    def run(*arguments: Any) -> Any:
        # DenseNet goes on appending to the list that it passes to its layers.
        copies = [list(argument) if isinstance(argument, list) else argument for argument in arguments]
        return checkpoint_function(forward, *copies, context_fn=partial(_recomputation_contexts, block))

    return run


def _in_turn(functions: Sequence[Callable[[Any], Any]]) -> Callable[[Any], Any]:
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
