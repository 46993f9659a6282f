"""The command that tests learning rates."""

import json
from pathlib import Path
from typing import Annotated

import typer

from torchthaw.cli_options import (
    BackboneOption,
    DataOption,
    RecipeArgument,
    SetOption,
    WeightsOption,
    recipe_overrides,
)
from torchthaw.cli_sharing import JsonOption, QuietOption

app = typer.Typer()


@app.command(
    name="find-lr",
    epilog="Example: `torchthaw find-lr staged --data photos --backbone resnet50 --output rates`; one stage in "
    "fewer steps: `torchthaw find-lr staged --data photos --stage head --steps 50`",
)
def find_lr(
    recipe: RecipeArgument,
    data: DataOption = None,
    backbone: BackboneOption = None,
    weights: WeightsOption = None,
    stage: Annotated[
        list[str] | None, typer.Option("--stage", help="Name of a stage of the plan, by default all; repeatable.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Steps of each test, from 20 on.")] = 100,
    lowest: Annotated[float, typer.Option(help="Rate of the first step.")] = 1e-6,
    highest: Annotated[float, typer.Option(help="Rate of the last step, unless the loss diverges before.")] = 10.0,
    lead_steps: Annotated[
        int,
        typer.Option(
            help="Before a stage is tested, those before it are trained by the plan, each for at most so many steps; "
            "0 tests every stage from the pretrained weights and a new head."
        ),
    ] = 200,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder to make for a plot of each stage and learning_rates.json."),
    ] = None,
    set_: SetOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Find the learning rate at which each stage learns fastest: a range test on copies of the model.

    The rates of a stage rise together, step by step, until the loss diverges. Prints the stages with the suggested
    rates, to be pasted into the recipe. Without --output nothing is written but the cache.
    """
    from torchthaw.recipe import load_recipe

    given = {"data.path": data, "backbone": backbone, "weights": weights}
    checked = load_recipe(recipe, recipe_overrides(set_, given))

    from torchthaw.console import Reporter
    from torchthaw.rate_search import find_rates
    from torchthaw.training.processes import is_main
    from torchthaw.training.rate_finder import RangeTestSettings

    settings = RangeTestSettings(steps=steps, lowest=lowest, highest=highest, lead_steps=lead_steps)
    document = find_rates(checked, Reporter(quiet=quiet), stages=stage, settings=settings, output=output)
    if is_main():
        print(json.dumps(document, indent=2) if as_json else document["recipe"], end="\n" if as_json else "")
