"""How many processes shall read images beside the one that trains; results never depend on it."""

import multiprocessing
import os
import statistics
import time
from collections.abc import Sized
from typing import Any

import torch

from torchthaw.data.streams import ImageStream
from torchthaw.data.views import ImageView

# More processes rarely read faster than one accelerator computes, and each takes memory.
_MOST = 16
_SAMPLES = 5
# Where a sample takes less, moving it between processes costs about as much as it saves.
_WORTH_A_PROCESS = 0.0015
_WORTH_ALL_CORES = 0.010
# Seconds of reading in an epoch below which starting processes takes longer; a spawned one imports torch again.
_WORTH_STARTING = {"fork": 1.0, "forkserver": 20.0, "spawn": 20.0}


def suggest_workers(view: Any, device: torch.device | str) -> int:
    """Returns the number of worker processes for a data loader, by the time that a few samples take.

    On a CPU training needs the cores itself: no workers where samples come from a cache or are small, one or two where
    they take milliseconds, one for each core where they are large photos. For an accelerator one for each core, up to
    16, unless an epoch is read faster than workers start. In a `DataLoader` 0 stands for the main process.

    Args:
        view: What the loader reads: a view, a stream, or anything else, for which 0 is returned.
        device: Where the model is.
    """
    cores = available_cores()
    on_cpu = torch.device(device).type == "cpu"
    if isinstance(view, ImageStream):
        # A worker waits for the network meanwhile; several share the shards.
        shards = int(getattr(view.dataset, "num_shards", 1))
        return min(1 if on_cpu else cores, shards, _MOST)
    if not isinstance(view, ImageView) or not isinstance(view, Sized) or not len(view):
        return 0
    seconds = _seconds_per_sample(view)
    if seconds * len(view) < _WORTH_STARTING[multiprocessing.get_start_method()]:
        return 0
    if not on_cpu:
        return min(cores, _MOST)
    if seconds < _WORTH_A_PROCESS or cores == 1:
        return 0
    return min(cores, _MOST) if seconds > _WORTH_ALL_CORES else min(max(1, cores // 4), 2)


def available_cores() -> int:
    """Returns the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _seconds_per_sample(view: ImageView) -> float:
    rows = sorted({number * (len(view) - 1) // (_SAMPLES - 1) for number in range(_SAMPLES)})
    times = []
    for row in [rows[0], *rows]:
        start = time.perf_counter()
        # What is broken is reported where it is drawn.
        try:
            view[row]
        except Exception:  # noqa: BLE001
            continue
        times.append(time.perf_counter() - start)
    # The first one also loads the decoder.
    return statistics.median(times[1:]) if len(times) > 1 else 0.0
