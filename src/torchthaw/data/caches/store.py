"""A store of arrays on disk within a budget: an entry is made once, and read by any number of processes."""

import errno
import logging
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import numpy as np
from filelock import FileLock

from torchthaw._version import __version__
from torchthaw.data.caches.entries import (
    Layout,
    Shapes,
    StoredArrays,
    allocate,
    created,
    delete_if_unused,
    is_unused,
    layout_of,
    mapped_for_writing,
    opened,
    save,
)
from torchthaw.data.caches.location import default_cache_folder

logger = logging.getLogger(__name__)

DEFAULT_BUDGET_GB = 10.0
_GB = 1_000_000_000
# Checkpoints and logs need space too: of the disk, so much is left free.
_LEFT_FREE = 0.02
_LEFT_FREE_AT_MOST = 1 * _GB
_LOCK_TIMEOUT = 60.0
_WAIT = 0.05

Fill = Callable[[dict[str, "np.memmap[Any, Any]"]], None]


class ArrayStore:
    """Arrays on disk by key, memory-mapped, within a budget.

    An entry is written to a temporary file and renamed when it is complete, so that no reader sees a half one, whatever
    dies when. All files together, temporary ones included, stay within the budget: the entries that were used longest
    ago are deleted for a new one, but none that a living process has mapped. Several processes may share a folder.

    Where something cannot be kept (it does not fit the budget, the disk is full, the folder cannot be written), the
    store says so once for each reason, and the caller goes on without.

    Args:
        folder: Folder of the entries; nothing else should be in it. By default `arrays` in `default_cache_folder()`.
        budget_gb: What all entries of the folder may take, in GB of 10^9 bytes.
    """

    def __init__(self, folder: Path | str | None = None, budget_gb: float = DEFAULT_BUDGET_GB) -> None:
        self.folder = default_cache_folder() / "arrays" if folder is None else Path(folder)
        self.budget_bytes = int(budget_gb * _GB)
        self._warned: set[str] = set()

    def open_or_make(
        self, key: Mapping[str, Any], arrays: Shapes, fill: Fill, *, wait: bool = False
    ) -> StoredArrays | None:
        """Returns the arrays of a key, made on the first call.

        Args:
            key: JSON values on which the content depends; the versions of torchthaw, torch, torchvision and Pillow are
                added.
            arrays: Shape and numpy's name of the dtype of each array.
            fill: Writes the arrays, which are zero before. What it raises passes through, and leaves nothing behind.
            wait: Whether to wait while another process makes the same entry, rather than to make it as well. Not for a
                `fill` that itself waits for other processes.

        Returns:
            Read-only arrays, which can be pickled to other processes of this machine; None if they cannot be kept.
        """
        layout = layout_of({"key": dict(key), "versions": _versions()}, arrays)
        try:
            while (found := opened(self.folder / layout.name, layout)) is None:
                part = self._reserved(layout, wait)
                if part is not None:
                    break
                time.sleep(_WAIT)
            else:
                return found
            allocated = self._allocated(part, layout)
        except OSError as error:
            self._warn_of(error)
            return None
        try:
            fill(allocated)
        except BaseException:
            self._discard(part)
            raise
        try:
            return self._published(part, allocated, layout)
        except OSError as error:
            self._discard(part)
            self._warn_of(error)
            return None

    def find(self, key: Mapping[str, Any], arrays: Shapes) -> StoredArrays | None:
        """Returns the arrays of a key if they have been made; arguments as above."""
        layout = layout_of({"key": dict(key), "versions": _versions()}, arrays)
        try:
            return opened(self.folder / layout.name, layout)
        except OSError:
            return None

    def room(self) -> int:
        """Returns how many bytes a further entry may have, if all that are not in use give way; header included."""
        try:
            with self._locked():
                used = self._used()
                free = sum(size for path, size in used.items() if is_unused(path))
                return max(0, min(self.budget_bytes - sum(used.values()), self._spare_disk()) + free)
        except OSError:
            return 0

    def warn(self, reason: str, text: str) -> None:
        """Logs a warning, once for each reason."""
        if reason not in self._warned:
            self._warned.add(reason)
            logger.warning("%s", text)

    def _reserved(self, layout: Layout, wait: bool) -> IO[bytes] | None:
        """Creates the temporary file of an entry and has its size counted; None if another process made it, or does."""
        self.folder.mkdir(parents=True, exist_ok=True)
        stem = Path(layout.name).stem
        with self._locked():
            # What a process that died has left.
            making = [path for path in self.folder.glob("*.part") if not delete_if_unused(path)]
            if wait and any(path.name.startswith(stem) for path in making):
                return None
            entry = self.folder / layout.name
            if opened(entry, layout) is not None:
                return None
            delete_if_unused(entry)
            self._make_room(layout.size)
            return created(self.folder / f"{stem}.{secrets.token_hex(8)}.part", layout.size)

    def _allocated(self, part: IO[bytes], layout: Layout) -> dict[str, "np.memmap[Any, Any]"]:
        try:
            allocate(part, layout.size)
            return mapped_for_writing(part, layout)
        except BaseException:
            self._discard(part)
            raise

    def _published(
        self, part: IO[bytes], arrays: dict[str, "np.memmap[Any, Any]"], layout: Layout
    ) -> StoredArrays | None:
        save(part, arrays)
        entry = self.folder / layout.name
        with self._locked():
            # Windows renames no file that is open or mapped.
            arrays.clear()
            part.close()
            found = opened(entry, layout)
            if found is not None:
                Path(part.name).unlink()
                return found
            Path(part.name).replace(entry)
            return opened(entry, layout)

    def _discard(self, part: IO[bytes]) -> None:
        part.close()
        with suppress(OSError):
            Path(part.name).unlink()

    def _make_room(self, size: int) -> None:
        """Deletes the entries that were used longest ago until another one fits, or none if it cannot."""
        if size > self.budget_bytes:
            raise _NoRoomError(f"{_in_gb(size)} are more than the {_in_gb(self.budget_bytes)} that all caches may take")
        used = self._used()
        over_budget = sum(used.values()) + size - self.budget_bytes
        missing = max(over_budget, size - self._spare_disk())
        for path in _enough(used, missing):
            if delete_if_unused(path):
                missing -= used[path]
        if missing > 0 and over_budget > 0:
            raise _NoRoomError(
                f"{_in_gb(size)} do not fit beside what is in use of the {_in_gb(self.budget_bytes)} that all caches "
                "may take"
            )
        if missing > 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _used(self) -> dict[Path, int]:
        """Returns the size of each file, the one that was used longest ago first."""
        found = []
        for path in [*self.folder.glob("*.safetensors"), *self.folder.glob("*.part")]:
            with suppress(FileNotFoundError):
                status = path.stat()
                found.append((status.st_mtime_ns, path, status.st_size))
        return {path: size for _, path, size in sorted(found)}

    def _spare_disk(self) -> int:
        disk = shutil.disk_usage(self.folder)
        return disk.free - min(int(_LEFT_FREE * disk.total), _LEFT_FREE_AT_MOST)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Keeps other processes from counting, deleting and naming files meanwhile."""
        try:
            lock = FileLock(self.folder / ".lock", timeout=_LOCK_TIMEOUT)
            lock.acquire()
        except NotImplementedError as error:
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK)) from error
        try:
            yield
        finally:
            lock.release()

    def _warn_of(self, error: OSError) -> None:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        if isinstance(error, _NoRoomError):
            reason, text = "room", str(error)
        elif full:
            reason, text = "disk", f"the disk of {self.folder} is full ({error.strerror})"
        else:
            reason, text = "folder", f"the folder {self.folder} cannot be used ({error.strerror or error})"
        self.warn(reason, f"Not cached: {text}. The run goes on without, and takes longer.")


class _NoRoomError(OSError):
    """The budget does not suffice."""


def _enough(used: Mapping[Path, int], missing: int) -> list[Path]:
    """Returns the first entries that are not in use and make up for what is missing, or none if all do not."""
    chosen = []
    for path, size in used.items():
        if missing <= 0:
            break
        if path.suffix != ".part" and is_unused(path):
            chosen.append(path)
            missing -= size
    return chosen if missing <= 0 else []


def _in_gb(size: int) -> str:
    return f"{size / _GB:.3g} GB"


def _versions() -> dict[str, str]:
    packages = {name: version(name) for name in ("torch", "torchvision", "pillow")}
    return {"torchthaw": __version__} | packages
