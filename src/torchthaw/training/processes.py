"""What the processes of a distributed run tell each other; with one process, all of it works without a process group.

Every function but `is_distributed` and `is_main` must be called by all processes, in the same order.
"""

import atexit
import gc
import os
import pickle
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import nn

from torchthaw import errors
from torchthaw.errors import ThawError, TrainingError
from torchthaw.evaluation.inference import best_device
from torchthaw.stages.proof import digest

T = TypeVar("T")

_NAMED = 5


def join() -> None:
    """Meets the other processes, if `torchrun` or `accelerate launch` started several."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        with _stdout_kept_free():
            # Without being told, accelerate leaves processes on CPUs to themselves.
            PartialState(cpu=best_device().type == "cpu")
        leave_at_exit()


def leave_at_exit() -> None:
    """Lets this process leave the others before Python ends: gloo's threads would abort it then, after all is done."""
    if is_distributed() and "nccl" not in dist.get_backend_config():
        # Once, however often it is asked for.
        atexit.unregister(_leave)
        atexit.register(_leave)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
        # Its threads end with the last reference, which a wrapped model has, and trainers refer to themselves.
        gc.collect()


@contextmanager
def _stdout_kept_free() -> Iterator[None]:
    """Sends what is printed to stdout to stderr, below Python too: gloo of torch 2.8 tells there who has connected."""
    sys.stdout.flush()
    stdout = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(stdout, 1)
        os.close(stdout)


def is_distributed() -> bool:
    """Whether there are several processes."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def place() -> tuple[int, int]:
    """Returns the number of this process, from 0 on, and the number of processes."""
    return (dist.get_rank(), dist.get_world_size()) if is_distributed() else (0, 1)


def is_main() -> bool:
    """Whether this process is the first one, which writes files and decides."""
    return not is_distributed() or dist.get_rank() == 0


def wait() -> None:
    """Waits until all processes are here."""
    if is_distributed():
        dist.barrier()


def share(value: T) -> T:
    """Returns the first process's value in every process; it can be pickled, and what the others pass is ignored."""
    return on_main(lambda: value)


def gather(value: T) -> list[T]:
    """Returns the values of all processes, by rank, in every process."""
    if not is_distributed():
        return [value]
    values: list[T | None] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values  # type: ignore[return-value]


def any_process(flag: bool) -> bool:
    """Whether the flag is set in any process."""
    return bool(anywhere(torch.tensor(flag)))


def anywhere(flag: torch.Tensor) -> torch.Tensor:
    """Returns whether a flag, a boolean scalar, is set in any process, as a tensor that nobody has waited for yet.

    Cheap enough for every step.
    """
    if not is_distributed():
        return flag
    highest = flag.to(_device(), torch.uint8)
    dist.all_reduce(highest, op=dist.ReduceOp.MAX)
    return highest.to(flag.device, torch.bool)


def share_buffers(module: nn.Module) -> None:
    """Gives every process the first one's buffers, in place: running statistics of BatchNorm, for example."""
    # Together, since every broadcast costs a round trip.
    _share_tensors(module.buffers())


def share_state(module: nn.Module) -> None:
    """Gives every process the first one's parameters and buffers, in place."""
    for parameter in module.parameters():
        _share_tensors([parameter])
    share_buffers(module)


def _share_tensors(tensors: Iterable[torch.Tensor]) -> None:
    tensors = [tensor for tensor in tensors if tensor.numel() > 0]
    if not is_distributed() or not tensors:
        return
    # As bytes, since no backend takes all types.
    parts = [tensor.detach().contiguous().view(-1).view(torch.uint8).to(_device()) for tensor in tensors]
    joined = torch.cat(parts)
    dist.broadcast(joined, src=0)
    with torch.no_grad():
        for tensor, part in zip(tensors, joined.split([len(part) for part in parts]), strict=True):
            # Cloned, since a part may start at an address that the type cannot be read from.
            tensor.copy_(part.clone().view(tensor.dtype).view(tensor.shape))


def check_same_names(names: Collection[str], what: str) -> None:
    """Checks that all processes have the same names.

    Args:
        names: The names, in any order.
        what: What they are the names of, for the message: "what trains in stage 'head'".

    Raises:
        TrainingError: some processes lack some; raised in every process, with up to five names.
    """
    everywhere = [set(part) for part in gather(list(names))]
    first = everywhere[0]
    odd = sorted(first.union(*everywhere) - first.intersection(*everywhere))
    if odd:
        shown = ", ".join(odd[:_NAMED]) + (" ..." if len(odd) > _NAMED else "")
        raise TrainingError(
            f"{what} is not the same in all {len(everywhere)} processes: {shown}. Something sets requires_grad in "
            "some processes only: look for callbacks that ask for the rank, or that depend on what differs by process."
        )


def check_equal_on_all(tensors: Mapping[str, torch.Tensor], where: str) -> None:
    """Checks that all processes have the same tensors, bit for bit.

    Args:
        tensors: The tensors by name.
        where: The place in the run, for the message: "at the end of stage 'head'".

    Raises:
        TrainingError: some differ; raised in every process, with up to five names and the ranks that differ from the
            first process.
    """
    if not is_distributed():
        return
    everywhere = gather({name: digest(tensor) for name, tensor in tensors.items()})
    first = everywhere[0]
    names = dict.fromkeys(name for digests in everywhere for name in digests)
    different = {}
    for name in names:
        ranks = [rank for rank, digests in enumerate(everywhere) if digests.get(name) != first.get(name)]
        if ranks:
            different[name] = ranks
    if different:
        shown = ", ".join(
            f"{name} (rank {', '.join(map(str, ranks))})" for name, ranks in list(different.items())[:_NAMED]
        )
        raise TrainingError(
            f"{where}, {len(different)} of {len(names)} tensors are not the same in all {len(everywhere)} processes: "
            f"{shown}{' ...' if len(different) > _NAMED else ''}. Something changed the model in some processes only: "
            "look for callbacks or hooks that write weights, or for a model built from another seed in each process."
        )


def on_main(function: Callable[[], T]) -> T:
    """Runs a function in the first process, and returns its result in every process.

    The function must not wait for other processes itself.

    Args:
        function: Takes nothing; its result can be pickled.

    Raises:
        ThawError: the function raised one; every process raises one of this kind with the same message.
        RuntimeError: it raised anything else, or its result cannot be pickled; the first process raises the error
            itself, the others this one with its kind and message.
    """
    if not is_distributed():
        return function()
    if not is_main():
        return _take(_broadcast(None))
    try:
        value = function()
        # Here, so that a result that cannot be pickled does not leave the other processes waiting.
        outcome = _Outcome(result=pickle.dumps(value))
    except Exception as error:
        _broadcast(_failure(error))
        raise
    _broadcast(outcome)
    return value


class _Outcome(NamedTuple):
    """What the first process's function came to: a result, or an error of torchthaw or of another kind."""

    result: bytes | None = None
    thaw_error: str | None = None
    message: str = ""


def _broadcast(outcome: _Outcome | None) -> _Outcome:
    box = [outcome]
    dist.broadcast_object_list(box, src=0)
    assert box[0] is not None
    return box[0]


def _failure(error: Exception) -> _Outcome:
    if isinstance(error, ThawError):
        # By name, as an error's own class may take other arguments than a message.
        name = next(kind.__name__ for kind in type(error).__mro__ if kind.__module__ == errors.__name__)
        return _Outcome(thaw_error=name, message=str(error))
    return _Outcome(message=f"the first process failed with {type(error).__name__}: {error}")


def _take(outcome: _Outcome) -> Any:
    if outcome.result is not None:
        return pickle.loads(outcome.result)
    raise (RuntimeError if outcome.thaw_error is None else getattr(errors, outcome.thaw_error))(outcome.message)


def _device() -> torch.device:
    """Where tensors must be to be sent: the CPU if a backend of the process group takes them from there."""
    kinds = [part.split(":")[0] for part in dist.get_backend_config().split(",")]
    return torch.device("cpu" if "cpu" in kinds else kinds[0])
