"""Options that several commands have, and what those of a recipe change in it."""

from typing import Annotated, Any

import typer

DataOption = Annotated[
    str | None,
    typer.Option("--data", "-d", help="Folder of images, parquet file, Hub data set (user/name), or builtin:digits."),
]
BackboneOption = Annotated[str | None, typer.Option("--backbone", "-b", help="Name of a torchvision model.")]
WeightsOption = Annotated[
    str | None, typer.Option("--weights", "-w", help="Name of torchvision's weights, a file, or a folder.")
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="Any key of the recipe, as key.sub=value; repeatable.")
]
RecipeArgument = Annotated[str, typer.Argument(help="A recipe file, or the name of one that comes with torchthaw.")]


def recipe_overrides(set_: list[str] | None, given: dict[str, str | None]) -> dict[str, Any]:
    """Returns the values that options put in the place of a recipe's, by dotted key.

    Args:
        set_: Texts of `--set`.
        given: Values of other options by the key that they stand for; None where an option was left out.

    Raises:
        RecipeError: a text is not of the form key=value.
    """
    from torchthaw.recipe import parse_override

    overrides = dict(parse_override(text) for text in set_ or [])
    overrides.update({key: value for key, value in given.items() if value is not None})
    if given.get("data.path") is not None:
        overrides["data.name"] = None
    return overrides
