"""Shares out whole groups of images so that the classes come out as evenly as the groups allow."""

import itertools
from collections.abc import Sequence

import numpy as np
from scipy.sparse import csr_array

_LEAST_GAIN = 1e-12
# Elements of the group-by-class table that the search may go through; bounds it to seconds for 100,000 groups.
_WORK = 300_000_000


def assign_groups(
    groups: np.ndarray,
    labels: Sequence[int] | Sequence[Sequence[int]] | np.ndarray,
    shares: Sequence[float],
    *,
    first_needs_all: bool = False,
) -> np.ndarray:
    """Assigns each group to a part, none of which stays empty.

    The parts' shares of each class and of all images should be as given: the sum over classes and parts of
    `(share got - share asked)^2 / share asked`, averaged over classes, plus the same for all images, is made small. To
    it comes, for each class that a part lacks, 1 / number of classes, so that a class of few groups is spread out
    before its shares are exact. Large groups are placed first, each where it lowers the sum most (scikit-learn's
    StratifiedGroupKFold places one group after the other too, and ends there); then groups are moved and exchanged
    while that lowers it.

    Args:
        groups: Group of each image, numbered from 0 in the order in which groups of a size are placed.
        labels: Class of each image, numbered from 0; or all classes of each image, which then count in each of them.
        shares: Share of each part; they sum to 1. There are at least as many groups as parts.
        first_needs_all: Whether the first part is to have every class, whatever that costs elsewhere.

    Returns:
        Part of each group.
    """
    num_groups = int(groups.max()) + 1
    several = len(labels) > 0 and isinstance(labels[0], Sequence)
    sizes_of_sets = [len(found) for found in labels] if several else [1] * len(labels)  # type: ignore[arg-type]
    flat = list(itertools.chain.from_iterable(labels)) if several else labels  # type: ignore[arg-type]
    present, classes = np.unique(np.asarray(flat), return_inverse=True)
    missing_costs = np.full(len(shares), 1 / len(present))
    if first_needs_all:
        missing_costs[0] = 1000.0
    search = _Search(groups, np.repeat(groups, sizes_of_sets), classes, np.asarray(shares, dtype=float), missing_costs)
    sizes = np.bincount(groups, minlength=num_groups)
    # Sizes by powers of two: of groups that are about as large, the order decides, and with it the seed.
    for group in np.argsort(-np.floor(np.log2(sizes)), kind="stable"):
        search.place(int(group))
    search.fill_empty_parts()
    search.improve()
    return search.parts


class _Search:
    """Where the groups are, and what it would cost to move them.

    `table` is a group's share of each class and of all images, weighted; `off` how much more a part has than it
    should; `holders` how many groups of a part have a class.
    """

    def __init__(
        self,
        groups: np.ndarray,
        owners: np.ndarray,
        classes: np.ndarray,
        shares: np.ndarray,
        missing_costs: np.ndarray,
    ) -> None:
        """Starts with no group in any part.

        Args:
            groups: Group of each image.
            owners: Group of the image of each label.
            classes: Class of each label.
            shares: Share of each part.
            missing_costs: What it costs each part to lack a class.
        """
        num_groups, num_classes = int(groups.max()) + 1, int(classes.max()) + 1
        counts = csr_array((np.ones(len(owners)), (owners, classes)), shape=(num_groups, num_classes))
        self.has = csr_array((np.ones_like(counts.data), counts.indices, counts.indptr), shape=counts.shape)
        # One column for each class, and one for all images.
        weights = 1 / np.append(np.bincount(classes) * np.sqrt(num_classes), len(groups))
        columns = np.concatenate([classes, np.full(len(groups), num_classes)])
        rows = np.concatenate([owners, groups])
        self.table = csr_array((weights[columns], (rows, columns)), shape=(num_groups, num_classes + 1))
        self.squares = np.add.reduceat(self.table.data**2, self.table.indptr[:-1])
        self.shares = shares
        self.missing_costs = missing_costs
        self.parts = np.full(num_groups, -1)
        self.off = -shares[:, None] * np.append(np.full(num_classes, 1 / np.sqrt(num_classes)), 1)
        self.holders = np.zeros((len(shares), num_classes))
        self.work = _WORK

    def place(self, group: int) -> None:
        """Puts a group where it lowers the cost most."""
        columns, values = _row(self.table, group)
        cost = (2 * (self.off[:, columns] @ values) + self.squares[group]) / self.shares
        cost -= self.missing_costs * (self.holders[:, columns[:-1]] == 0).sum(axis=1)
        self._put(group, int(cost.argmin()))

    def fill_empty_parts(self) -> None:
        """Gives every part a group, taken where it costs least."""
        for part in np.flatnonzero(np.bincount(self.parts, minlength=len(self.shares)) == 0):
            cost = self._cost_of_moving()[:, part]
            group = int(cost.argmin())
            self._take(group)
            self._put(group, int(part))

    def improve(self) -> None:
        """Moves groups, and exchanges them where no move helps, until nothing does or the work is done."""
        while self.work > 0:
            costs = self._cost_of_moving()
            group, part = np.unravel_index(costs.argmin(), costs.shape)
            if costs[group, part] < -_LEAST_GAIN:
                self._take(int(group))
                self._put(int(group), int(part))
            elif not self._exchange():
                return

    def _exchange(self) -> bool:
        """Exchanges groups for the better ones, one pass over all; says whether any was."""
        found = False
        costs = self._costs()
        for group in range(len(self.parts)):
            if self.work <= 0:
                return False
            part = self.parts[group]
            change = self._cost_of_exchange(group, *costs)
            other = int(change.argmin())
            if change[other] < -_LEAST_GAIN:
                other_part = int(self.parts[other])
                self._take(group)
                self._take(other)
                self._put(group, other_part)
                self._put(other, int(part))
                costs = self._costs()
                found = True
        return found

    def _put(self, group: int, part: int) -> None:
        self.parts[group] = part
        self._change(group, part, 1)

    def _take(self, group: int) -> None:
        self._change(group, int(self.parts[group]), -1)
        self.parts[group] = -1

    def _change(self, group: int, part: int, sign: int) -> None:
        columns, values = _row(self.table, group)
        self.off[part, columns] += sign * values
        self.holders[part, columns[:-1]] += sign

    def _costs(self) -> tuple[np.ndarray, np.ndarray]:
        """What adding each group to each part would cost, (groups, parts), and what taking it away does, (groups,)."""
        self.work -= self.table.nnz * len(self.shares) * 2
        nearness = 2 * (self.table @ self.off.T)
        squares = self.squares[:, None]
        adding = (nearness + squares) / self.shares - self.missing_costs * (self.has @ (self.holders == 0).T)
        taking = (squares - nearness) / self.shares + self.missing_costs * (self.has @ (self.holders == 1).T)
        return adding, np.take_along_axis(taking, self.parts[:, None], axis=1)[:, 0]

    def _cost_of_moving(self) -> np.ndarray:
        adding, taking = self._costs()
        costs = adding + taking[:, None]
        sizes = np.bincount(self.parts, minlength=len(self.shares))
        costs[np.arange(len(costs)), self.parts] = 0
        costs[sizes[self.parts] == 1] = np.inf
        return costs

    def _cost_of_exchange(self, group: int, adding: np.ndarray, taking: np.ndarray) -> np.ndarray:
        """What exchanging a group with each other one would cost."""
        self.work -= self.table.nnz * (1 + len(self.shares))
        part = self.parts[group]
        cost = taking[group] + adding[group, self.parts] + taking + adding[:, part]
        product = self.table @ self.table[group : group + 1].toarray()[0]
        cost -= 2 * product * (1 / self.shares[part] + 1 / self.shares[self.parts])
        # A class that both have is not lost to a part of which one of them is the only holder.
        shared = self.has[group : group + 1].toarray()[0] * (self.holders == 1)
        kept = self.missing_costs * (self.has @ shared.T)
        cost -= kept[:, part] + np.take_along_axis(kept, self.parts[:, None], axis=1)[:, 0]
        cost[self.parts == part] = 0
        return cost


def _row(table: csr_array, row: int) -> tuple[np.ndarray, np.ndarray]:
    """Columns and values of a row; the last column, of all images, is always among them and comes last."""
    start, end = table.indptr[row : row + 2]
    return table.indices[start:end], table.data[start:end]
