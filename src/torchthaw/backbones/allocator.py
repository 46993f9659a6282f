"""Memory of large tensors on the CPU, kept instead of given back to the system and fetched anew for every layer."""

import ctypes
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

# From glibc's malloc.h, with the values that it starts from.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
_DEFAULT_TRIM_THRESHOLD, _DEFAULT_MMAP_MAX = 128 * 1024, 65536
# Also of more than fits into the C int that mallopt takes.
_NEVER = -1
# Who sets these has chosen.
_SETTINGS = ("MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")

_nested = 0


@contextmanager
def tensors_kept_in_memory() -> Iterator[None]:
    """While this lasts, glibc keeps the memory of freed tensors for the next ones; afterwards the system gets it back.

    By default every tensor of more than some MB is mapped when it is made and unmapped when it is freed, and the system
    clears each of its pages anew, which takes up to half of the time of a convolutional network on a CPU. Where the C
    library is another one, or the environment sets its allocator (`MALLOC_MMAP_MAX_=65536`, for example), this does
    nothing. What glibc cannot be told to do again is to adapt its thresholds to the program by itself.
    """
    global _nested
    mallopt = None if any(name in os.environ for name in _SETTINGS) else _mallopt()
    if mallopt is None:
        yield
        return
    _nested += 1
    try:
        mallopt(_MMAP_MAX, 0)
        mallopt(_TRIM_THRESHOLD, _NEVER)
        yield
    finally:
        _nested -= 1
        if not _nested:
            mallopt(_MMAP_MAX, _DEFAULT_MMAP_MAX)
            mallopt(_TRIM_THRESHOLD, _DEFAULT_TRIM_THRESHOLD)
            ctypes.CDLL(None).malloc_trim(0)


@cache
def _mallopt() -> "ctypes._NamedFuncPointer | None":
    if platform.libc_ver()[0] != "glibc":
        return None
    return getattr(ctypes.CDLL(None), "mallopt", None)
