"""How often the 95 % intervals of accuracy and macro F1 cover the truth, beside the percentile bootstrap.

    python tests/benchmarks/interval_coverage.py [--draws 1000] [--output FILE.json]

Test sets are drawn from populations of known accuracy and macro F1: of single images, and of groups of images of very
unequal sizes (log-normal, 12 in the median), in which images are right or wrong together (intra-group correlation of
being right 0.1 or 0.4), groups being of one class ("one class") or of all ("mixed"). Classes are imbalanced, 4 or 5 to
1, and differ in how well they are found. Each line: coverage (mean width) of this package's interval, and of the
percentile bootstrap over images or groups.
"""

import argparse
import itertools
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.optimize import brentq
from scipy.special import expit
from scipy.stats import beta

from torchthaw.evaluation.intervals import score_intervals

ACCURACIES = (0.5, 0.8, 0.95, 0.99)
SIZES = (30, 100, 400)
CLASSES = (2, 5, 10)
GROUPS = (5, 10, 20, 40)
CORRELATIONS = (0.1, 0.4)
RESAMPLES = 400


@dataclass(frozen=True)
class Population:
    """Images or groups that test sets are drawn from.

    Attributes:
        classes: How many.
        accuracy: Share of images that are right.
        correlation: Of being right, among images of a group; 0 for single images.
        mixed: Whether a group has images of all classes.
    """

    classes: int
    accuracy: float
    correlation: float = 0.0
    mixed: bool = False

    @property
    def shares(self) -> np.ndarray:
        shares = np.geomspace(1, 1 / (4 if self.classes == 2 else 5), self.classes)
        return shares / shares.sum()

    @property
    def recalls(self) -> np.ndarray:
        """Recall of each class: spread on the logit scale, so that the accuracy comes out."""
        spread = 0.7 * np.linspace(-1, 1, self.classes)[np.argsort(np.arange(self.classes) * 7 % 5, kind="stable")]
        middle = brentq(lambda shift: (expit(shift + spread) * self.shares).sum() - self.accuracy, -20, 20)
        return expit(middle + spread)

    @property
    def confusion(self) -> np.ndarray:
        """Share of images by true and predicted class; mistakes go to the others by their shares."""
        matrix = np.tile(self.shares, (self.classes, 1))
        np.fill_diagonal(matrix, 0)
        matrix *= ((1 - self.recalls) / matrix.sum(axis=1))[:, None]
        np.fill_diagonal(matrix, self.recalls)
        return matrix * self.shares[:, None]

    @property
    def macro_f1(self) -> float:
        return float(macro_f1(self.confusion))

    def draw(self, number: int, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns labels, predictions and unit of each image of so many images or groups."""
        if self.correlation == 0:
            cells = random.choice(self.classes**2, size=number, p=self.confusion.ravel())
            return *np.divmod(cells, self.classes), np.arange(number)
        sizes = np.maximum(1, random.lognormal(np.log(12), 0.7, number).round()).astype(int)
        units = np.repeat(np.arange(number), sizes)
        if self.mixed:
            of_group = random.dirichlet(3 * self.shares, size=number)
        else:
            of_group = np.eye(self.classes)[random.choice(self.classes, size=number, p=self.shares)]
        labels = (of_group.cumsum(axis=1)[units, :-1] < random.random(len(units))[:, None]).sum(axis=1)
        # How hard a group is, is one draw for all its classes.
        width = (1 - self.correlation) / self.correlation
        ease = random.random(number)[:, None]
        recalls = beta.ppf(ease, width * self.recalls, width * (1 - self.recalls))
        # What a group's images of a class are taken for is mostly the same.
        others = self.confusion * (1 - np.eye(self.classes))
        liking = random.standard_gamma(np.tile(2 * others / others.sum(axis=1)[:, None], (number, 1, 1))).cumsum(axis=2)
        chosen = random.random(len(units)) * liking[units, labels, -1]
        taken_for = (liking[units, labels] < chosen[:, None]).sum(axis=1)
        predicted = np.where(random.random(len(units)) < recalls[units, labels], labels, taken_for)
        return labels, predicted, units


class Coverage(NamedTuple):
    """Share of intervals that cover the truth, and their mean width."""

    covered: float
    width: float


def macro_f1(confusions: np.ndarray) -> np.ndarray:
    """Macro F1 over the classes that occur, of matrices of shape (..., classes, classes)."""
    hits, support = np.diagonal(confusions, axis1=-2, axis2=-1), confusions.sum(axis=-1)
    either = support + confusions.sum(axis=-2)
    occurs = support > 0
    f1 = np.divide(2 * hits, either, out=np.zeros_like(either, dtype=float), where=either > 0)
    return (f1 * occurs).sum(axis=-1) / np.maximum(occurs.sum(axis=-1), 1)


def bootstrap_intervals(
    labels: np.ndarray, predicted: np.ndarray, units: np.ndarray, classes: int, random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Percentile bootstrap intervals of accuracy and macro F1 over units."""
    number = int(units.max()) + 1
    cells, kinds = units * classes**2 + labels * classes + predicted, number * classes**2
    confusions = np.bincount(cells, minlength=kinds).reshape(number, classes**2).astype(float)
    drawn = random.multinomial(number, np.full(number, 1 / number), size=RESAMPLES) @ confusions
    matrices = drawn.reshape(-1, classes, classes)
    accuracies = np.trace(matrices, axis1=1, axis2=2) / drawn.sum(axis=1)
    limits = [0.025, 0.975]
    return np.quantile(accuracies, limits), np.quantile(macro_f1(matrices), limits)


def coverage(population: Population, number: int, draws: int, *, seed: int = 0, bootstrap: bool = False) -> dict:
    """Draws test sets and counts how often intervals cover the truth.

    Returns:
        `accuracy` and `macro_f1`, and with `bootstrap` also `accuracy_bootstrap` and `macro_f1_bootstrap`.
    """
    found: dict[str, list[tuple[float, float]]] = {}
    truth = {"accuracy": population.accuracy, "macro_f1": population.macro_f1}
    for draw in range(draws):
        random = np.random.default_rng([seed, draw])
        labels, predicted, units = population.draw(number, random)
        groups = None if population.correlation == 0 else units.tolist()
        intervals = dict(zip(truth, score_intervals(labels, predicted, groups)[:2], strict=True))
        if bootstrap:
            made = bootstrap_intervals(labels, predicted, units, population.classes, random)
            intervals |= {f"{name}_bootstrap": limits for name, limits in zip(truth, made, strict=True)}
        for name, limits in intervals.items():
            found.setdefault(name, []).append(tuple(limits))
    result = {}
    for name, limits in found.items():
        low, high = np.array(limits).T
        true = truth[name.removesuffix("_bootstrap")]
        result[name] = Coverage(float(((low <= true) & (true <= high)).mean()), float((high - low).mean()))
    return result


def scenarios() -> Iterator[tuple[Population, int]]:
    for number, classes, accuracy in itertools.product(SIZES, CLASSES, ACCURACIES):
        yield Population(classes, accuracy), number
    for number, correlation, (classes, mixed) in itertools.product(GROUPS, CORRELATIONS, ((2, True), (5, False))):
        for accuracy in ACCURACIES[1:]:
            yield Population(classes, accuracy, correlation, mixed), number


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    started, rows = time.monotonic(), []
    columns = ("accuracy", "accuracy_bootstrap", "macro_f1", "macro_f1_bootstrap")
    print(f"{'test set':<34}{'classes':>8}{'accuracy':>9}  " + "".join(f"{name:<20}" for name in columns))
    for population, number in scenarios():
        found = coverage(population, number, options.draws, bootstrap=True)
        rows.append({"number": number, **asdict(population), "coverage": found})
        kind = "images" if population.correlation == 0 else (
            f"groups ({'mixed' if population.mixed else 'one class'}, correlation {population.correlation})"
        )  # fmt: skip
        shown = "".join(f"{f'{found[name].covered:.3f} ({found[name].width:.3f})':<20}" for name in columns)
        print(f"{f'{number} {kind}':<42}{population.classes:>2}{population.accuracy:>7}  {shown}", flush=True)
    print(f"{options.draws} draws each, {time.monotonic() - started:.0f} s")
    if options.output is not None:
        options.output.write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
