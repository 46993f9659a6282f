"""Decoded images kept on disk, at the resolution that a view needs."""

import copy
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import features
from rich.console import Console
from rich.progress import track

from torchthaw.data.caches.digests import ImageFacts, digest_of, image_facts
from torchthaw.data.caches.entries import Layout, Shapes, StoredArrays, layout_of, opened
from torchthaw.data.caches.store import ArrayStore
from torchthaw.data.images import decode_bytes, read_bytes
from torchthaw.data.transforms import ImageTransform
from torchthaw.data.views import ImageView

# Another number where the same image is prepared in another way.
_FORMAT = 1
_CHUNK = 16
_CODECS = ("jpg", "jpg_2000", "zlib", "libtiff", "webp", "avif")


def with_cached_images(
    view: ImageView, store: ArrayStore | None, *, share: float = 1.0, progress: bool = False
) -> ImageView:
    """Returns a view that reads prepared pictures from a store, filled on the first call; samples are the same.

    For evaluation that is the crop in 8 bits, for training the picture at its working resolution (see
    `TrainTransform`). Images that cannot be decoded, and those for which the budget has no room, are left to be decoded
    when they are drawn. Entries are found again by the content of the images, whatever their names and order.

    Args:
        view: A view; its epoch is shared with the one that is returned.
        store: Where pictures are kept; None for nowhere.
        share: How much of the store's budget they may take.
        progress: Show a progress bar on stderr while images are decoded.
    """
    transform = view.transform
    if store is None or not transform.key or not len(view):
        return view
    facts = image_facts(view.dataset)
    rows = {fact.digest: row for row, fact in enumerate(facts)}
    slots = [_Slot(digest, row, _capacity(facts[row], transform)) for digest, row in sorted(rows.items())]
    slots = [slot for slot in slots if slot.capacity]
    everything = _Entry(slots, transform.key)
    entry = _within_budget(everything, store, share)
    arrays = store.open_or_make(entry.key, entry.shapes, lambda new: _fill(new, entry, view, progress), wait=True)
    if arrays is None:
        return view
    if entry is not everything:
        store.warn(
            "some images",
            f"Not cached: {len(slots) - len(entry.slots)} of {len(slots)} images do not fit into what caches may take. "
            "They are decoded again in every epoch.",
        )
    slot_of = {slot.digest: number for number, slot in enumerate(entry.slots)}
    numbers = np.array([slot_of.get(fact.digest, -1) for fact in facts], dtype=np.int64)
    cached = copy.copy(view)
    cached.kept = CachedPictures(arrays, numbers)
    return cached


class CachedPictures:
    """Prepared pictures by row, read from a mapped file; in another process the file is mapped again.

    Args:
        arrays: The entry of the store.
        slots: For each row the number of its picture, -1 for none.
    """

    def __init__(self, arrays: StoredArrays, slots: npt.NDArray[np.int64]) -> None:
        self._path, self._layout, self._slots = arrays.path, arrays.layout, slots
        self._take(arrays)

    def _take(self, arrays: StoredArrays | None) -> None:
        if arrays is None:
            # Deleted meanwhile, by hand: the images are decoded again.
            self._slots = np.full_like(self._slots, -1)
            return
        # Plain arrays, of which slices are cheaper.
        self._pixels, self._starts, self._sizes = (
            arrays[name].view(np.ndarray) for name in ("pixels", "starts", "sizes")
        )

    def pixels(self, row: int) -> npt.NDArray[np.uint8] | None:
        """Returns the prepared picture of a row, (height, width, 3), not to be written to; None if there is none."""
        slot = self._slots[row]
        if slot < 0:
            return None
        height, width = map(int, self._sizes[slot])
        if not height:
            return None
        start = int(self._starts[slot])
        return self._pixels[start : start + height * width * 3].reshape(height, width, 3)

    def __getstate__(self) -> tuple[Any, Layout, npt.NDArray[np.int64]]:
        return self._path, self._layout, self._slots

    def __setstate__(self, state: tuple[Any, Layout, npt.NDArray[np.int64]]) -> None:
        self._path, self._layout, self._slots = state
        self._take(opened(self._path, self._layout))


@dataclass(frozen=True)
class _Slot:
    """The place of a picture: what identifies it, a row that has it, and the bytes that it takes at most."""

    digest: str
    row: int
    capacity: int


@dataclass(frozen=True)
class _Entry:
    slots: Sequence[_Slot]
    prepared: Mapping[str, Any]

    @property
    def key(self) -> dict[str, Any]:
        return {
            "kind": "pictures",
            "format": _FORMAT,
            "images": digest_of("\n".join(slot.digest for slot in self.slots).encode()),
            "prepared": self.prepared,
            "codecs": {codec: features.version(codec) for codec in _CODECS},
        }

    @property
    def starts(self) -> npt.NDArray[np.int64]:
        ends = np.cumsum([0, *(slot.capacity for slot in self.slots)], dtype=np.int64)
        return ends[:-1]

    @property
    def shapes(self) -> Shapes:
        count = len(self.slots)
        total = sum(slot.capacity for slot in self.slots)
        return {"pixels": ((total,), "uint8"), "starts": ((count,), "int64"), "sizes": ((count, 2), "int32")}


def _within_budget(entry: _Entry, store: ArrayStore, share: float) -> _Entry:
    """Returns the entry with as many pictures as there is room for, or as were kept before."""
    if _size(entry) <= share * store.budget_bytes and (
        store.find(entry.key, entry.shapes) is not None or _size(entry) <= store.room()
    ):
        return entry
    most = _first_of(entry, int(share * store.budget_bytes))
    if store.find(most.key, most.shapes) is not None:
        return most
    smaller = _first_of(entry, min(int(share * store.budget_bytes), store.room()))
    # Where nothing fits at all, the store says why.
    return smaller if smaller.slots else entry


def _first_of(entry: _Entry, size: int) -> _Entry:
    left = size - _size(_Entry([], entry.prepared))
    each = np.cumsum([slot.capacity + 16 for slot in entry.slots])
    return _Entry(entry.slots[: int(np.searchsorted(each, left - 128, side="right"))], entry.prepared)


def _size(entry: _Entry) -> int:
    return layout_of({"key": entry.key}, entry.shapes).size + 1024


def _capacity(facts: ImageFacts, transform: ImageTransform) -> int:
    if facts.header is None:
        return 0
    size = transform.prepared_size(*facts.header.decoded_size(transform.working_size))
    return 0 if size is None else 3 * size[0] * size[1]


def _fill(arrays: Mapping[str, Any], entry: _Entry, view: ImageView, progress: bool) -> None:
    arrays["starts"][:] = starts = entry.starts
    chunks = [range(start, min(start + _CHUNK, len(starts))) for start in range(0, len(starts), _CHUNK)]

    def fill_some(numbers: range) -> None:
        for number in numbers:
            slot = entry.slots[number]
            pixels = _prepared(slot, view)
            if pixels is not None and pixels.size <= slot.capacity:
                arrays["pixels"][starts[number] : starts[number] + pixels.size] = pixels.reshape(-1)
                arrays["sizes"][number] = pixels.shape[:2]

    _in_threads(fill_some, chunks, progress)


def _prepared(slot: _Slot, view: ImageView) -> npt.NDArray[np.uint8] | None:
    """Returns a picture as it is kept; None for what is left to fail, with its name, when it is drawn."""
    try:
        data = read_bytes(view.value(slot.row))
        if digest_of(data) != slot.digest:
            return None
        return np.asarray(view.transform.prepared(decode_bytes(data, view.transform.working_size)))
    except Exception:  # noqa: BLE001
        return None


def _in_threads(function: Callable[[range], None], chunks: Sequence[range], progress: bool) -> None:
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        done: Iterable[None] = pool.map(function, chunks)
        if progress:
            done = track(done, "Decoding images", len(chunks), console=Console(stderr=True))
        try:
            for _ in done:
                pass
        except BaseException:
            # Without this, an interrupt would wait until every image is decoded.
            pool.shutdown(wait=False, cancel_futures=True)
            raise
