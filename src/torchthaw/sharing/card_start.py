"""What a card says of the weights that training started from: how far the backbone moved, and what it forgot."""

from typing import Any

from torchthaw.sharing.card_numbers import count, figure, interval, p_value
from torchthaw.sharing.card_schema import Distance, Forgetting


def moved(distance: Distance | None) -> str | None:
    """Says in words how far the backbone and its layer groups are from where they started."""
    if distance is None:
        return None
    groups = ", ".join(f"{name} {_percent(share)}" for name, share in distance.groups.items())
    return f"{_percent(distance.backbone)} ({groups})" if groups else _percent(distance.backbone)


def forgotten(found: Forgetting | None) -> dict[str, Any] | None:
    """Returns the figures of the source task as they are shown; None where they were not asked for."""
    if found is None:
        return None
    return {
        "data": found.data,
        "split": found.split,
        "images": count(found.num_images),
        "classes": count(found.num_classes),
        "left_out": count(found.left_out) if found.left_out else None,
        "problem": found.problem,
        "before": figure(found.before.accuracy) if found.before else None,
        "before_interval": interval(found.before.interval) if found.before else None,
        "after": figure(found.after.accuracy) if found.after else None,
        "after_interval": interval(found.after.interval) if found.after else None,
        "difference": None if found.difference is None else f"{found.difference + 0.0:+.4f}",
        "interval": None if found.interval is None else interval(found.interval),
        "p": p_value(found.p_value),
        "lost": count(found.forgotten),
        "gained": count(found.gained),
    }


def _percent(share: float) -> str:
    """Writes a share in percent with three digits."""
    return f"{100 * share:.3g} %"
