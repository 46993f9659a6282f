"""How uneven classes are, and weights by their counts; plain numpy."""

from typing import Any

import numpy as np
import numpy.typing as npt

# Exponent p of a class's count n: it weighs in proportion to n ** -p.
WEIGHT_POWERS = {"balanced": 1.0, "sqrt": 0.5}
# Exponent q of a class's count n: it is drawn with a probability in proportion to n ** q.
SAMPLING_POWERS = {"balanced": 0.0, "sqrt": 0.5}


def class_counts(labels: npt.ArrayLike, num_classes: int) -> npt.NDArray[np.int64]:
    """Returns the number of images of each class, shape (num_classes,), from class ids."""
    return np.bincount(np.asarray(labels, dtype=np.int64), minlength=num_classes)


def label_bits(counts: npt.NDArray[np.int64]) -> float:
    """Returns how much labels say, in bits: the number of images times the entropy of their classes."""
    shares = counts[counts > 0] / max(1, counts.sum())
    return float(-(shares * np.log2(shares)).sum() * counts.sum())


def imbalance_ratio(counts: npt.NDArray[Any]) -> float:
    """Returns how many times the images of the smallest class the largest one has; no images count as one."""
    return float(counts.max() / max(1, counts.min()))


def count_weights(counts: npt.NDArray[np.int64], kind: str) -> npt.NDArray[np.float64]:
    """Returns a weight for each class that falls with its number of images; their mean over images is 1.

    Args:
        counts: Images of each class, shape (K,).
        kind: `balanced` is n / (K n_c), as `sklearn.utils.class_weight.compute_class_weight` has it, which gives every
            class the same share of the loss (King and Zeng, "Logistic Regression in Rare Events Data", 2001).
            `sqrt` is in proportion to its square root, half way to that.

    Returns:
        Weights, shape (K,). Classes without images do not count in K, and weigh nothing.
    """
    present = counts > 0
    weights = np.zeros(len(counts))
    weights[present] = counts[present] ** -WEIGHT_POWERS[kind]
    return weights * counts.sum() / (weights * counts).sum()


def class_probabilities(counts: npt.NDArray[np.int64], kind: str) -> npt.NDArray[np.float64]:
    """Returns how often a draw is of each class, shape (K,); those without images are never drawn.

    Args:
        counts: Images of each class, shape (K,).
        kind: `balanced` or `sqrt`: in proportion to n_c ** 0 or n_c ** 0.5 (Kang et al., "Decoupling Representation
            and Classifier for Long-Tailed Recognition", ICLR 2020, section 3).
    """
    shares = np.where(counts > 0, counts.astype(np.float64) ** SAMPLING_POWERS[kind], 0.0)
    return shares / shares.sum()
