"""What guessing reaches, and what chance alone explains."""

import math
from collections.abc import Sequence

# One-sided 1 % point of the normal distribution: what chance exceeds once in a hundred runs.
_ONE_IN_A_HUNDRED = 2.33


def guessed_balanced_accuracy(class_counts: Sequence[int], num_classes: int) -> float | None:
    """Returns the balanced accuracy that guessing exceeds once in a hundred times.

    Each class's share is binomial with its number of images, and their mean has the mean of their variances over the
    number of classes.

    Returns:
        The accuracy; None without images, or with so few that guessing is right for all of them more often than that.
    """
    counts = [count for count in class_counts if count]
    if not counts:
        return None
    guess = 1 / num_classes
    error = math.sqrt(sum(guess * (1 - guess) / count for count in counts)) / len(counts)
    reached = guess + _ONE_IN_A_HUNDRED * error
    return reached if reached < 1 else None


def guessed_loss(class_counts: Sequence[int], num_classes: int) -> float:
    """Returns the cross entropy, in nats, of a model that knows the shares of the classes and nothing else.

    Without counts that of a model that gives all classes the same probability.
    """
    total = sum(class_counts)
    if not total:
        return math.log(num_classes)
    return -sum(count / total * math.log(count / total) for count in class_counts if count)


def error_of_difference(accuracies: Sequence[float], images: int) -> float:
    """Returns the standard error of the difference of two accuracies, as if they were on different images.

    The binomial variance of the accuracy nearest to a half, twice. On the same images a difference varies less, so
    that what exceeds some of these errors exceeds more of the right ones.
    """
    return math.sqrt(2 * max(accuracy * (1 - accuracy) for accuracy in accuracies) / images)
