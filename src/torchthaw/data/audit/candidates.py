"""Pairs of pictures that may be copies, found by hashing in near-linear time."""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from torchthaw.data.audit.fingerprints import NUM_COEFFICIENTS, Floats

# A crop that is a little off the nearest one tried, changes about this many bits of 63.
MOST_DIFFERENT_BITS = 14
# Of a band, the bits that are least certain are also tried the other way round: none, one, or two of them.
_DOUBTFUL_BITS = 4
# Pictures that all look the same, such as frames of a still camera, fill one bucket; each is compared with so many.
_LARGEST_BUCKET = 48
_QUERIES_AT_ONCE = 4096


class BandIndex:
    """An index of pictures by their low frequencies: multi-probe locality-sensitive hashing (Lv et al., 2007).

    A picture's 63 coefficients give 63 bits, larger than their median or not. The bits are cut into bands; pictures
    that agree in a whole band, or would with doubtful bits turned, are compared in all bits.

    Args:
        fingerprints: Shape (pictures, 63).
    """

    def __init__(self, fingerprints: Floats) -> None:
        self.fingerprints = fingerprints
        self._bits = _bits(fingerprints)
        self._words = _packed(self._bits)
        # Wide enough that a bucket holds a picture or two by chance.
        width = 16 if len(fingerprints) <= 50_000 else 21
        shuffled = np.random.default_rng(0).permutation(NUM_COEFFICIENTS)
        self._bands = [shuffled[start : start + width] for start in range(0, NUM_COEFFICIENTS - width + 2, width)]
        keys = [_keys(self._bits[:, band]) for band in self._bands]
        self._order = [np.argsort(key, kind="stable") for key in keys]
        self._sorted = [key[order] for key, order in zip(keys, self._order, strict=True)]

    def matches(
        self, queries: Floats, *, least_similarity: float
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], Floats]:
        """Finds pictures that resemble queries.

        Args:
            queries: Fingerprints, shape (queries, 63).
            least_similarity: Of the fingerprints, as the cosine.

        Returns:
            Number of the query, number of the picture, and their similarity, for each pair, without order.
        """
        found = []
        for start in range(0, len(queries), _QUERIES_AT_ONCE):
            block = queries[start : start + _QUERIES_AT_ONCE]
            query, picture = self._lookup(block)
            similarity = np.einsum("ik,ik->i", block[query], self.fingerprints[picture])
            kept = similarity >= least_similarity
            found.append((query[kept] + start, picture[kept], similarity[kept]))
        if not found:
            return np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32)
        query, picture, similarity = (np.concatenate(parts) for parts in zip(*found, strict=True))
        return query, picture, similarity

    def _lookup(self, queries: Floats) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        bits, doubts = _bits(queries), np.abs(queries - np.median(queries, axis=1, keepdims=True))
        words = _packed(bits)
        numbers = [np.empty(0, np.int64)]
        for band, order, keys in zip(self._bands, self._order, self._sorted, strict=True):
            for probe in _probes(bits[:, band], doubts[:, band]):
                first = np.searchsorted(keys, probe, side="left")
                last = np.searchsorted(keys, probe, side="right")
                query, place = _ranges(first, np.minimum(last, first + _LARGEST_BUCKET))
                picture = order[place]
                close = _different_bits(words[query], self._words[picture]) <= MOST_DIFFERENT_BITS
                numbers.append(query[close] * len(self._words) + picture[close])
        pairs = np.unique(np.concatenate(numbers))
        query, picture = np.divmod(pairs, max(1, len(self._words)))
        return query, picture


def _bits(fingerprints: Floats) -> npt.NDArray[np.bool_]:
    return fingerprints > np.median(fingerprints, axis=1, keepdims=True)


def _packed(bits: npt.NDArray[np.bool_]) -> npt.NDArray[np.uint8]:
    """Returns 8 bytes for each picture."""
    return np.packbits(bits, axis=1)


_ONES = np.array([bin(number).count("1") for number in range(256)], dtype=np.uint8)


def _different_bits(first: npt.NDArray[np.uint8], second: npt.NDArray[np.uint8]) -> npt.NDArray:
    return _ONES[first ^ second].sum(axis=1)


def _keys(bits: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    return bits @ (1 << np.arange(bits.shape[1], dtype=np.int64))


def _probes(bits: npt.NDArray[np.bool_], doubts: Floats) -> Iterator[npt.NDArray[np.int64]]:
    """Yields keys to look up for all queries: the band as it is, and with one or two doubtful bits turned."""
    keys = _keys(bits)
    yield keys
    doubtful = np.argsort(doubts, axis=1)[:, :_DOUBTFUL_BITS]
    flips = np.int64(1) << doubtful.astype(np.int64)
    for one in range(flips.shape[1]):
        yield keys ^ flips[:, one]
        for other in range(one):
            yield keys ^ flips[:, one] ^ flips[:, other]


def _ranges(
    first: npt.NDArray[np.int64], last: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Spreads ranges out: the number of the range, and each place in it."""
    lengths = last - first
    number = np.repeat(np.arange(len(first)), lengths)
    ends = np.cumsum(lengths)
    place = np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - lengths, lengths) + first[number]
    return number, place
