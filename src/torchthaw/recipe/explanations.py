"""What does not fit in a recipe, in sentences that name the key, the value and what would fit."""

from typing import Any

from pydantic import BaseModel, ValidationError

from torchthaw.errors import did_you_mean
from torchthaw.recipe.schema import DataRecipe, PushRecipe, Recipe
from torchthaw.sharing.card_options import CardOptions
from torchthaw.training.forgetting_settings import ForgettingRecipe

_SECTIONS: dict[str, type[BaseModel]] = {
    "data": DataRecipe,
    "forgetting": ForgettingRecipe,
    "card": CardOptions,
    "push": PushRecipe,
}
# Parts of a location that name no key but a type that was tried there.
_TYPES = ("function", "tagged", "dict[", "constrained-", "literal[")


def explanations(error: ValidationError) -> list[str]:
    """Returns what is wrong with each value; what each of several types has against it is one sentence."""
    by_value: dict[str, list[str]] = {}
    for problem in error.errors():
        what, why = _explain(problem)
        by_value.setdefault(what, []).append(why)
    return [what + "; or ".join(reasons) for what, reasons in by_value.items()]


def _explain(problem: Any) -> tuple[str, str]:
    """Returns which value it is about, and what is wrong with it; nothing more where the first says it all."""
    location = [part for part in problem["loc"] if not str(part).startswith(_TYPES)]
    key = ".".join(str(part) for part in location)
    if problem["type"] == "extra_forbidden":
        section = _SECTIONS.get(str(location[0]), Recipe) if len(location) > 1 else Recipe
        known = list(section.model_fields)
        return f"unknown key {key!r}.{did_you_mean(location[-1], known)} Known keys: {', '.join(known)}.", ""
    if key == "problem_type" and problem["input"] == "regression":
        return (
            "problem_type is 'regression', to estimate a number, which torchthaw does not do: it classifies images. "
            "Make classes of the numbers, such as ranges, and write problem_type: single_label",
            "",
        )
    if problem["type"] == "missing":
        return f"{key} is missing; write, for example, {key}: resnet50", ""
    return f"{key} is {problem['input']!r}: ", problem["msg"]
