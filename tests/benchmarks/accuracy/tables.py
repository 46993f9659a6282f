"""Figures of runs, and tables of them."""

import statistics
from typing import Any

from plans import Outcome
from sklearn.metrics import accuracy_score, f1_score

METRICS = ("macro_f1", "accuracy", "seconds")


def figures(outcomes: list[Outcome]) -> dict[str, float]:
    """Measures the predictions of all folds as one set."""
    found: dict[str, float] = {"seconds": sum(outcome.seconds for outcome in outcomes)}
    for split, prefix in (("validation", "validation_"), ("test", "")):
        labels = [label for outcome in outcomes for label in outcome.labels[split]]
        predicted = [label for outcome in outcomes for label in outcome.predicted[split]]
        found[f"{prefix}macro_f1"] = float(f1_score(labels, predicted, average="macro"))
        found[f"{prefix}accuracy"] = float(accuracy_score(labels, predicted))
        found[f"{split}_images"] = len(labels)
    return found


def tables(rows: list[dict[str, Any]], plans: list[str], reference: str) -> str:
    """Returns mean and standard deviation over the seeds, and the paired difference from one of the plans."""
    lines = []
    for metric in METRICS:
        lines += [f"\n{metric}\n", f"| | {' | '.join(plans)} |", f"|---|{'---|' * len(plans)}"]
        for name in dict.fromkeys(row["name"] for row in rows):
            values = {
                plan: {row["seed"]: row[metric] for row in rows if (row["name"], row["plan"]) == (name, plan)}
                for plan in plans
            }
            lines.append(f"| {name} | {' | '.join(cell(values[reference], values[plan]) for plan in plans)} |")
    return "\n".join(lines)


def cell(reference: dict[int, float], found: dict[int, float]) -> str:
    """Returns mean ± deviation, and (mean paired difference ± its standard error)."""
    if not found:
        return "-"
    values = list(found.values())
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    text = f"{statistics.mean(values):.3f}{spread}"
    pairs = [found[seed] - reference[seed] for seed in found if seed in reference]
    if found is reference or not pairs:
        return text
    error = f" ± {statistics.stdev(pairs) / len(pairs) ** 0.5:.3f}" if len(pairs) > 1 else ""
    return f"{text} ({statistics.mean(pairs):+.3f}{error})"
