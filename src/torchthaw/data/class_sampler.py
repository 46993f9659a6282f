"""Draws of training images by class, each epoch a pure function of (seed, stage, epoch)."""

from collections import Counter
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from torch.utils.data import Sampler

from torchthaw.data.class_balance import class_counts, class_probabilities
from torchthaw.data.views import hashed_seed


class ClassSampler(Sampler[int | tuple[int, int]]):
    """Draws a class, then one of its images, with replacement; as many draws an epoch as there are images.

    The order depends on (seed, stage, epoch) alone: not on the number of workers or processes, which share out one
    order, nor on what else has drawn random numbers, so that an epoch can be gone on with in its middle.

    Args:
        labels: Class id of each image, shape (N,).
        kind: `balanced` draws every class equally often, `sqrt` in proportion to the square root of its images; see
            `class_probabilities`.
        seed: Seed of the run.
        stage: Number of the stage; another stage draws anew.
        with_repeats: Whether to yield with each row how often it was drawn before in the epoch, so that an `ImageView`
            augments each draw of an image in another way.
    """

    def __init__(
        self, labels: npt.ArrayLike, kind: str, *, seed: int, stage: int = 0, with_repeats: bool = False
    ) -> None:
        self._labels = np.asarray(labels, dtype=np.int64)
        self._kind = kind
        self._seed = seed
        self._stage = stage
        self._with_repeats = with_repeats
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Moves on to the draws of an epoch."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._labels)

    def __iter__(self) -> Iterator[int | tuple[int, int]]:
        """Yields rows of the data set, or rows and repeats."""
        random = np.random.default_rng(hashed_seed("class sampling", self._seed, self._stage, self._epoch))
        counts = class_counts(self._labels, num_classes=0)
        classes = random.choice(len(counts), size=len(self), p=class_probabilities(counts, self._kind))
        by_class = np.argsort(self._labels, kind="stable")
        starts = np.cumsum(counts) - counts
        rows = by_class[starts[classes] + random.integers(counts[classes])].tolist()
        if not self._with_repeats:
            yield from rows
            return
        drawn: Counter[int] = Counter()
        for row in rows:
            yield row, drawn[row]
            drawn[row] += 1
