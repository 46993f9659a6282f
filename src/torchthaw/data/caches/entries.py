"""One entry of the store: a safetensors file of a layout that is known beforehand, mapped into memory.

Whoever has an entry mapped holds a shared lock on its file for as long as the mapping lives, forked children included,
and a process that dies loses it. So an entry that can be locked alone is used by nobody. Windows needs no lock: it
refuses to delete a file that is mapped.
"""

import errno
import hashlib
import json
import math
import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

if sys.platform != "win32":
    import fcntl

Shapes = Mapping[str, tuple[tuple[int, ...], str]]

_ALIGNMENT = 64
_CHUNK = 1 << 22
# numpy's kind and size of an element -> safetensors' name.
_DTYPES = {
    "b1": "BOOL", "u1": "U8", "i1": "I8", "u2": "U16", "i2": "I16", "u4": "U32", "i4": "I32", "u8": "U64", "i8": "I64",
    "f2": "F16", "f4": "F32", "f8": "F64",
}  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """What the file of an entry looks like; the same key and arrays give the same layout.

    Attributes:
        name: Name of the file, a digest of the header.
        header: The first bytes of the file.
        places: For each array its first byte, shape and dtype.
        size: Size of the file in bytes.
    """

    name: str
    header: bytes
    places: dict[str, tuple[int, tuple[int, ...], np.dtype[Any]]]
    size: int


def layout_of(key: Mapping[str, Any], arrays: Shapes) -> Layout:
    """Lays out a safetensors file.

    Args:
        key: JSON values that say what the arrays hold.
        arrays: Shape and numpy's name of the dtype of each array.

    Raises:
        TypeError: A dtype has no counterpart in safetensors, or the key is not JSON.
    """
    dtypes = {name: np.dtype(dtype) for name, (_, dtype) in arrays.items()}
    tensors: dict[str, Any] = {}
    end = 0
    # Large elements first, so that every array begins at a multiple of its element.
    for name in sorted(arrays, key=lambda name: (-dtypes[name].itemsize, name)):
        shape, dtype = tuple(map(int, arrays[name][0])), dtypes[name]
        kind = f"{dtype.kind}{dtype.itemsize}"
        if kind not in _DTYPES or not dtype.isnative:
            raise TypeError(f"the array {name!r} has the dtype {dtype}, which safetensors has no name for")
        start, end = end, end + math.prod(shape) * dtype.itemsize
        tensors[name] = {"dtype": _DTYPES[kind], "shape": list(shape), "data_offsets": [start, end]}
    about = {"__metadata__": {"key": json.dumps(key, sort_keys=True)}}
    text = json.dumps(about | tensors).encode()
    text += b" " * (-(len(text) + 8) % _ALIGNMENT)
    header = len(text).to_bytes(8, "little") + text
    places = {
        name: (len(header) + entry["data_offsets"][0], tuple(entry["shape"]), dtypes[name])
        for name, entry in tensors.items()
    }
    digest = hashlib.blake2b(header, digest_size=20).hexdigest()
    return Layout(f"{digest}.safetensors", header, places, len(header) + end)


class StoredArrays(dict[str, "np.memmap[Any, Any]"]):
    """Read-only arrays of an entry by name; pickled as the place of the file, to be mapped again where it is unpickled.

    Raises:
        FileNotFoundError: On unpickling, the entry has been deleted since.
    """

    def __init__(self, path: Path, layout: Layout, arrays: Mapping[str, "np.memmap[Any, Any]"]) -> None:
        super().__init__(arrays)
        self.path = path
        self.layout = layout

    def __reduce__(self) -> Any:
        return _reopened, (self.path, self.layout)


def opened(path: Path, layout: Layout) -> StoredArrays | None:
    """Maps an entry for reading, and notes that it was used; None if it is not there, or damaged."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return None
    with file:
        if not _lock(file, alone=False) or _deleted(file):
            return None
        if os.fstat(file.fileno()).st_size != layout.size or file.read(len(layout.header)) != layout.header:
            return None
        with suppress(OSError):
            os.utime(path)
        return StoredArrays(path, layout, _mapped(file, layout, "r"))


def created(path: Path, size: int) -> IO[bytes]:
    """Creates a file of a size that takes no space on disk yet, in use for as long as it is open or mapped."""
    file = path.open("x+b")
    _lock(file, alone=False)
    file.truncate(size)
    return file


def allocate(file: IO[bytes], size: int) -> None:
    """Takes the space on disk, as writing to a mapped file for which there is none kills the process.

    Raises:
        OSError: The disk or the user's share of it is full, or files may not be that large.
    """
    if hasattr(os, "posix_fallocate"):
        try:
            return os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
                raise
    file.seek(0)
    for start in range(0, size, _CHUNK):
        file.write(bytes(min(_CHUNK, size - start)))
    file.flush()
    return None


def mapped_for_writing(file: IO[bytes], layout: Layout) -> dict[str, "np.memmap[Any, Any]"]:
    """Writes the header and maps the arrays, which are zero."""
    file.seek(0)
    file.write(layout.header)
    file.flush()
    return _mapped(file, layout, "r+")


def save(file: IO[bytes], arrays: Mapping[str, "np.memmap[Any, Any]"]) -> None:
    """Waits until what was written is on the disk: a file that is complete by its name alone would be read as zeros."""
    for array in arrays.values():
        # One without elements is no part of the file.
        if array.size:
            array.flush()
    os.fsync(file.fileno())


def delete_if_unused(path: Path) -> bool:
    """Deletes a file that no living process has open; returns whether it is gone."""
    try:
        if sys.platform == "win32":
            path.unlink()
            return True
        with path.open("r+b") as file:
            if not _lock(file, alone=True):
                return False
            path.unlink()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True


def is_unused(path: Path) -> bool:
    """Whether no living process has a file open; on Windows only its deletion shows."""
    if sys.platform == "win32":
        return True
    try:
        with path.open("r+b") as file:
            return _lock(file, alone=True)
    except OSError:
        return False


def _mapped(file: IO[bytes], layout: Layout, mode: Any) -> dict[str, "np.memmap[Any, Any]"]:
    # One mapping for all; it keeps a copy of the file's descriptor, and with it the lock.
    whole = np.memmap(file, dtype=np.uint8, mode=mode, shape=(layout.size,))
    return {
        name: whole[start : start + math.prod(shape) * dtype.itemsize].view(dtype).reshape(shape)  # type: ignore[misc]
        for name, (start, shape, dtype) in layout.places.items()
    }


def _lock(file: IO[bytes], *, alone: bool) -> bool:
    """Takes a lock that lasts until every copy of the descriptor is closed; returns False if others are in the way."""
    if sys.platform == "win32":
        return True
    try:
        fcntl.flock(file, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        # A file system without locks: nothing can be said, so nothing is deleted.
        return not alone
    return True


def _deleted(file: IO[bytes]) -> bool:
    return sys.platform != "win32" and os.fstat(file.fileno()).st_nlink == 0


def _reopened(path: Path, layout: Layout) -> StoredArrays:
    found = opened(path, layout)
    if found is None:
        raise FileNotFoundError(errno.ENOENT, "the cache entry was deleted", str(path))
    return found
