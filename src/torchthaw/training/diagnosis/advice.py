"""Lines of a recipe to try; each replaces the recipe's own line of that key, and is a recipe's whole line.

A preset is changed by the keys of the run, as far as they reach. Where a plan is spelled out, the line spells it out
with the change: `stages: [...]`.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

from torchthaw.stages.plan import HEAD, Stage, StagePlan
from torchthaw.stages.presets import PRESETS
from torchthaw.training.bottlenecks import load_faster
from torchthaw.training.diagnosis.course import Course

_PATIENCE = 2
_SMOOTHING = 0.1


def scaled_rate(course: Course, index: int, factor: float) -> str | None:
    """Returns the line with the rates of a stage multiplied; None where they are not known.

    Where the plan leaves them open, that is the run's `learning_rate`, with which all open rates move.
    """
    stage = _stage(course, index)
    if stage is not None and stage.learning_rate is not None:
        return _changed(course, index, learning_rate=_scaled(stage.learning_rate, factor))
    if stage is not None and course.learning_rate is not None:
        return f"learning_rate: {short(course.learning_rate * factor)}"
    if index < len(course.records) and course.records[index].learning_rates:
        return f"learning_rate: {short(max(course.records[index].learning_rates.values()) * factor)}"
    return None


def frozen_statistics(course: Course, index: int) -> str | None:
    """Returns the line with which a stage keeps the statistics of BatchNorm; None where a preset cannot say it."""
    return None if _is_preset(course) else _changed(course, index, batch_norm="eval")


def shorter(course: Course, index: int, epochs: int) -> str | None:
    """Returns the line that ends a stage about so many epochs after its start; a preset gets shorter in proportion."""
    stage = _stage(course, index)
    if stage is None or course.plan is None:
        return None
    if not _is_preset(course):
        return _changed(course, index, patience=_PATIENCE)
    total = course.plan.epochs or 0
    fewer = max(len(course.plan.stages), math.ceil(total * epochs / (stage.epochs or epochs)))
    return f"epochs: {fewer}" if fewer < total else None


def less_frozen(course: Course) -> str | None:
    """Returns the line with which all of the network trains, in the last stage at least."""
    if course.plan is None or _is_preset(course):
        return None if course.plan is not None and course.plan.name == "full" else "plan: full"
    last = len(course.plan.stages) - 1
    return _changed(course, last, unfreeze="all", learning_rate=None, layer_decay=None)


def with_head(course: Course) -> str | None:
    """Returns the line with which the head trains too, in the first stage."""
    if course.plan is None or not course.records or _is_preset(course):
        return None
    live = [group for group in course.records[0].learning_rates if group != HEAD]
    rate = course.plan.stages[0].learning_rate
    return _changed(course, 0, unfreeze=[*live, HEAD], learning_rate=None if isinstance(rate, Mapping) else rate)


def against_overfitting(course: Course, index: int) -> str | None:
    """Returns the line with stronger augmentation; where it is strong already, the one that ends the stage earlier."""
    stage = _stage(course, index)
    if stage is not None and stage.augmentation is not None:
        if stage.augmentation == "strong":
            return _changed(course, index, patience=1)
        return _changed(course, index, augmentation="strong")
    if course.augmentation == "strong":
        return "label_smoothing: 0.1" if not course.label_smoothing else "weight_decay: 0.1"
    return "augmentation: strong"


def against_bad_labels(course: Course) -> str | None:
    """Returns the line that looks for bad labels, or where that was done, the one that trusts labels less."""
    if course.suspicious_labels is None:
        return "audit: warn"
    return None if course.label_smoothing >= _SMOOTHING else f"label_smoothing: {_SMOOTHING}"


def faster_loading(course: Course) -> str | None:
    """Returns the line with more processes that load images, or where all cores load, with smaller images."""
    return load_faster(course.num_workers, course.cores, course.image_size)[1]


def short(rate: float) -> str:
    """Writes a rate with two digits: `3e-4`."""
    return f"{rate:.1e}".replace("e-0", "e-").replace("e+0", "e+").replace(".0e", "e")


def _stage(course: Course, index: int) -> Stage | None:
    known = course.plan is not None and index < len(course.plan.stages)
    return course.plan.stages[index] if course.plan is not None and known else None


def _is_preset(course: Course) -> bool:
    return course.plan is not None and course.plan.name in PRESETS


def _scaled(rate: float | Mapping[str, float] | str, factor: float) -> Any:
    """Multiplies a stage's rates, rounded to two digits, as people write them."""
    if isinstance(rate, Mapping):
        return {name: _rounded(value * factor) for name, value in rate.items()}
    if isinstance(rate, str):
        low, high = (_rounded(float(part) * factor) for part in rate.split("..", 1))
        return f"{low!r}..{high!r}"
    return _rounded(rate * factor)


def _rounded(rate: float) -> float:
    return float(f"{rate:.1e}")


def _changed(course: Course, index: int, **changes: Any) -> str | None:
    """Returns the line of all stages, one of them with changes; None where the plan is not known."""
    if course.plan is None:
        return None
    stages = list(course.plan.stages)
    stages[index] = dataclasses.replace(stages[index], **changes)
    return stages_line(StagePlan(tuple(stages)))


def stages_line(plan: StagePlan) -> str:
    """Writes the stages of a plan as a line of a recipe, without what they leave at its default."""
    defaults = {field.name: field.default for field in dataclasses.fields(Stage)}
    written = []
    for stage in plan.to_dict()["stages"]:
        kept = {key: value for key, value in stage.items() if key in ("name", "unfreeze") or value != defaults[key]}
        written.append("{" + ", ".join(f"{key}: {_literal(value)}" for key, value in kept.items()) + "}")
    return f"stages: [{', '.join(written)}]"


def _literal(value: Any) -> str:
    """Writes a value as JSON, which is YAML whatever words and characters it holds."""
    text = json.dumps(value, ensure_ascii=False)
    return "".join(char if char.isprintable() else f"\\U{ord(char):08x}" for char in text)
