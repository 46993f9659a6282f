"""`torchthaw find-lr`: from a recipe to the stages with suggested learning rates."""

import json
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from torchthaw.backbones.registration import register_auto_classes
from torchthaw.console import Reporter, hide_loading_bars, printable
from torchthaw.cross_validation import prepare_images
from torchthaw.data_preparation import selection_metric
from torchthaw.errors import ThawError
from torchthaw.evaluation.files import replacing
from torchthaw.evaluation.range_test_plot import plot_range_test
from torchthaw.preparation import check_model
from torchthaw.recipe import Recipe
from torchthaw.single_run import Job, make_trainer
from torchthaw.stages.plan import StagePlan
from torchthaw.training import processes
from torchthaw.training.range_test import RangeTest
from torchthaw.training.rate_finder import RangeTestSettings, check_stages, range_tests
from torchthaw.training.rate_lines import stage_line
from torchthaw.training.trainer import ThawTrainer

JSON_FILE = "learning_rates.json"
_HOW_TO_PASTE = "# in place of plan, epochs and stages:"


def find_rates(
    recipe: Recipe,
    reporter: Reporter,
    *,
    stages: Sequence[str] | None = None,
    settings: RangeTestSettings | None = None,
    output: Path | None = None,
) -> dict[str, Any]:
    """Tests the learning rates of a recipe's stages; the test images are not read.

    Args:
        recipe: The recipe.
        reporter: Where messages go.
        stages: Names of stages; None for all.
        settings: How they are tested.
        output: Folder to make for plots and figures; None writes nothing.

    Returns:
        Plain JSON data: `backbone`, `weights`, `plan`, the settings, `stages` (see `RangeTest`), and `recipe`, all
        stages of the plan with the suggested rates, as YAML.

    Raises:
        ThawError: something that the recipe names does not exist or fit, or the output folder is not empty.
    """
    settings = settings or RangeTestSettings()
    register_auto_classes()
    hide_loading_bars()
    processes.join()
    if not processes.is_main():
        reporter = Reporter(quiet=True)
    processes.on_main(lambda: _check_output(output))
    check_model(recipe)
    check_stages(recipe.stage_plan(), stages)
    data = prepare_images(recipe, reporter, features=False)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(Job(recipe, data, selection_metric(recipe, data), Path(folder)))
        tests = []
        for test in range_tests(trainer, stages, settings, progress=reporter.progress):
            reporter.say(f"{printable(test.stage)}: {test.sentence}")
            tests.append(test)
        block = _block(trainer, tests)
    _show(tests, reporter)
    document = {
        "backbone": recipe.backbone,
        "weights": recipe.weights,
        "plan": trainer.plan.name,
        **vars(settings),
        "stages": [test.to_dict() for test in tests],
        "recipe": block,
    }
    if output is not None and processes.is_main():
        _write(document, output)
        reporter.say(f"plots and figures: {output}")
    return document


def _block(trainer: ThawTrainer, tests: Sequence[RangeTest]) -> str:
    """Returns all stages of the plan as a part of a recipe; those without a suggestion keep their rates."""
    found = {test.stage: test.recipe for test in tests}
    written = StagePlan.from_dict(cast(Any, trainer.args.plan)).stages
    lines = [
        found.get(full.name) or stage_line(own, full, full.learning_rate)
        for own, full in zip(written, trainer.plan.stages, strict=True)
    ]
    return "\n".join([_HOW_TO_PASTE, "stages:", *lines, ""])


def _show(tests: Sequence[RangeTest], reporter: Reporter) -> None:
    reporter.table(
        "highest learning rate of each stage's layer groups; the others keep their ratios to it",
        ("stage", "suggested", "the plan's", "default of the family", "lowest loss at"),
        [
            (
                printable(test.stage),
                _shown(test.suggestion),
                _shown(test.plan_rate),
                _shown(test.family_rate),
                _shown(test.minimum),
            )
            for test in tests
        ],
    )


def _shown(rate: float | None) -> str:
    return "-" if rate is None else f"{rate:.1e}"


def _check_output(output: Path | None) -> None:
    if output is not None and output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ThawError(f"{output} exists, and nothing is overwritten; write another name after --output")


def _write(document: dict[str, Any], folder: Path) -> None:
    for number, test in enumerate(document["stages"], start=1):
        # A stage's name may hold anything.
        name = re.sub(r"[^A-Za-z0-9]+", "-", test["stage"]).strip("-")[:40]
        plot_range_test(test, folder / f"{number:02}-{name or 'stage'}.png")
    with replacing(folder / JSON_FILE) as temporary:
        temporary.write_text(json.dumps(document, indent=2), encoding="utf-8")
