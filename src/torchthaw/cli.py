"""The command line: thin commands over the package; nothing heavy is imported before a command needs it."""

import errno
import io
import json
import shlex
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from torchthaw._version import __version__
from torchthaw.cli_find_lr import app as find_lr_command
from torchthaw.cli_options import (
    BackboneOption,
    DataOption,
    RecipeArgument,
    SetOption,
    WeightsOption,
    recipe_overrides,
)
from torchthaw.cli_sharing import JsonOption, QuietOption
from torchthaw.cli_sharing import app as sharing_commands
from torchthaw.errors import ThawError

app = typer.Typer(
    name="torchthaw",
    help="Fine-tune torchvision's pretrained image classifiers, stage by stage.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)


class Tta(str, Enum):
    """Views over which predictions are averaged."""

    none = "none"
    flip = "flip"
    five_crop = "five_crop"
    ten_crop = "ten_crop"


TtaOption = Annotated[
    Tta, typer.Option(help="Test-time augmentation: average over the image's mirror image, crops, or both.")
]


class SplitUnit(str, Enum):
    """What a cut keeps apart."""

    auto = "auto"
    image = "image"
    group = "group"
    time = "time"


def main() -> None:
    """Runs the command line; mistakes of the user end with one message and exit code 2."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A class name that the terminal's encoding lacks is no reason to fail.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        app()
    except ThawError as error:
        from torchthaw.console.text import printable

        # Names of files and classes stand in it.
        print("\n".join(map(printable, f"torchthaw: {error}".split("\n"))), file=sys.stderr)
        sys.exit(error.exit_code)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        print(f"torchthaw: no space left on the disk while writing {error.filename or 'the output'}", file=sys.stderr)
        sys.exit(1)


def _show_version(value: bool) -> None:
    if value:
        print(__version__)
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command(epilog="Example: `torchthaw train staged --data photos --backbone resnet50 --output run1`")
def train(
    recipe: RecipeArgument,
    data: DataOption = None,
    backbone: BackboneOption = None,
    weights: WeightsOption = None,
    output: Annotated[str | None, typer.Option("--output", "-o", help="Folder for the results.")] = None,
    push: Annotated[
        str | None, typer.Option("--push", help="Push the finished run to this repository on the Hub (user/name).")
    ] = None,
    set_: SetOption = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in the output folder where it was interrupted.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and show the plan; train and write nothing.")
    ] = False,
    profile: Annotated[
        bool, typer.Option("--profile", help="Find out what bounds the speed: traces of some steps in OUTPUT/profile.")
    ] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Train a model by a recipe, evaluate it and save it.

    On several devices: `torchrun --nproc_per_node 2 -m torchthaw train ...`, or `accelerate launch`. After a crash:
    the same command with `--resume`, or `torchthaw train run1/recipe.yaml --resume`.
    """
    from torchthaw.recipe import load_recipe

    given = {"data.path": data, "backbone": backbone, "weights": weights, "output": output, "push.repo": push}
    checked = load_recipe(recipe, recipe_overrides(set_, given))
    if checked.output is None:
        checked = checked.model_copy(update={"output": f"thaw-{Path(recipe).stem}"})

    from torchthaw.console import Reporter

    if dry_run:
        from torchthaw.dry_run import dry_run as show_plan

        document = show_plan(checked, Reporter(quiet=quiet))
        if as_json:
            _print_json(document)
        return

    from torchthaw.run import run_recipe
    from torchthaw.training.processes import is_main

    # What to write to do it again.
    command = shlex.join(["torchthaw", *(word for word in sys.argv[1:] if word != "--resume")])
    file = Path(recipe) if Path(recipe).is_file() else None
    try:
        results = run_recipe(
            checked, Reporter(quiet=quiet), resume=resume, command=command, profile=profile, recipe_file=file
        )
    except KeyboardInterrupt:
        if is_main():
            _say_how_to_go_on(Path(str(checked.output)))
        raise typer.Exit(130) from None
    if as_json and is_main():
        _print_json(results)


@app.command(
    epilog="Examples: `torchthaw audit photos`; as it would be cut for training, by patient: "
    "`torchthaw audit photos --validation 0.15 --group '(patient\\d+)'`; "
    "cleaned: `torchthaw audit photos --fix clean.csv`, then `torchthaw train staged -d photos --set "
    "data.splits=clean.csv`"
)
def audit(
    data: Annotated[str, typer.Argument(help="Folder of images, parquet file, Hub data set, or a recipe file.")],
    validation: Annotated[float, typer.Option(min=0, help="Cut off this share (or number) before looking.")] = 0.0,
    test: Annotated[float, typer.Option(min=0, help="Likewise for a test split.")] = 0.0,
    group: Annotated[
        str | None,
        typer.Option(help="What belongs together: a column, a CSV, or a pattern with one (group) over the paths."),
    ] = None,
    time: Annotated[str | None, typer.Option(help="When images were taken: a column, or exif.")] = None,
    split_by: Annotated[SplitUnit, typer.Option(help="What the cut keeps apart.")] = SplitUnit.auto,
    splits: Annotated[Path | None, typer.Option(help="A list of splits, such as --fix writes.")] = None,
    backbone: Annotated[
        str | None, typer.Option("--backbone", "-b", help="Look for suspicious labels with this torchvision model.")
    ] = None,
    weights: Annotated[
        str, typer.Option("--weights", "-w", help="Its weights: a name, a file, or a folder.")
    ] = "DEFAULT",
    seed: Annotated[int, typer.Option(min=0, help="Of the cut.")] = 0,
    fix: Annotated[
        Path | None, typer.Option(help="Write a cleaned list of splits to this file; no image is touched.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write all findings to this JSON file.")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="End with exit code 1 if a finding fails.")] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Look for what makes figures too good or training break: copies, leaks, bad files, odd labels."""
    from torchthaw.audits import audit_data
    from torchthaw.console import Reporter
    from torchthaw.recipe import data_section

    given = {
        "group": group, "time": time, "split_by": split_by.value, "splits": None if splits is None else str(splits),
        "validation": _share(validation), "test": _share(test),
    }  # fmt: skip
    if output is not None and output.exists():
        raise ThawError(f"{output} exists, and nothing is overwritten; write another name after --output")
    section = data_section(data, {key: value for key, value in given.items() if value not in (None, "auto", 0)})
    document = audit_data(
        section, seed=seed, reporter=Reporter(quiet=quiet), backbone=backbone, weights=weights, fix=fix
    )
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(document, indent=2), encoding="utf-8")
    if as_json:
        _print_json(document)
    if strict and document["verdict"] == "fail":
        raise typer.Exit(1)


@app.command(
    epilog="Examples: `torchthaw evaluate thaw-staged --data photos --split validation`; the run's own validation "
    "images: `torchthaw evaluate thaw-staged`"
)
def evaluate(
    model: Annotated[str, typer.Argument(help="A folder or Hub repository that torchthaw saved.")],
    data: Annotated[
        str | None,
        typer.Option(
            "--data", "-d", help="Folder of images, parquet file, or Hub data set; by default the run's, cut as there."
        ),
    ] = None,
    split: Annotated[str, typer.Option("--split", "-s", help="train, validation or test.")] = "validation",
    group: Annotated[
        str | None,
        typer.Option(help="What belongs together, for intervals over groups: as for torchthaw audit."),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at once.")] = 32,
    again: Annotated[
        bool, typer.Option("--again", help="Measure the test images of the run once more; it is recorded.")
    ] = False,
    tta: TtaOption = Tta.none,
    per_class: Annotated[bool, typer.Option("--per-class", help="Show precision, recall and F1 by class.")] = False,
    confusion: Annotated[bool, typer.Option("--confusion", help="Show which classes are taken for which.")] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Measure a saved model on labelled images.

    The test images of its run were measured once, after everything was chosen. Measuring them again takes `--again`,
    and is recorded in the run's results.json and card.
    """
    from torchthaw.console import Reporter
    from torchthaw.evaluations import evaluate_saved
    from torchthaw.figure_tables import show_figures

    figures = evaluate_saved(
        model,
        data,
        split,
        group=group,
        batch_size=batch_size,
        again=again,
        tta=tta.value,
        command=shlex.join(["torchthaw", *sys.argv[1:]]),
        reporter=Reporter(quiet=quiet),
    )
    if as_json:
        _print_json(figures)
    else:
        show_figures(figures, per_class=per_class, confusion=confusion)


@app.command(epilog="Example: `torchthaw predict thaw-staged photos/new cat.jpg --json`")
def predict(
    model: Annotated[str, typer.Argument(help="A folder or Hub repository that torchthaw saved.")],
    paths: Annotated[list[str], typer.Argument(help="Images, and folders of images.")],
    batch_size: Annotated[int, typer.Option(min=1, help="Images at once.")] = 32,
    tta: TtaOption = Tta.none,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Label images."""
    from torchthaw.console import Reporter, printable
    from torchthaw.use import predict_paths

    reporter = Reporter(quiet=quiet)
    predictions = predict_paths(model, paths, batch_size=batch_size, tta=tta.value, reporter=reporter)
    if as_json:
        _print_json(predictions)
        return
    for line in predictions:
        if isinstance(line["predicted"], list):
            pairs = zip(line["predicted"], line["score"], strict=True)
            labels = ", ".join(f"{printable(name)} {score:.4f}" for name, score in pairs) or "-"
            print(f"{labels}  {printable(line['path'])}")
            continue
        print(f"{line['score']:.4f}  {printable(line['predicted'])}  {printable(line['path'])}")


@app.command(epilog="Example: `torchthaw backbones resnet50`")
def backbones(
    name: Annotated[str | None, typer.Argument(help="A backbone whose layer groups to show.")] = None,
    as_json: JsonOption = False,
) -> None:
    """List the backbones, or the layer groups of one."""
    from torchthaw.use import backbone_table, layer_group_table

    rows = backbone_table() if name is None else layer_group_table(name)
    if as_json:
        _print_json(rows)
        return
    for row in [dict(zip(rows[0], rows[0], strict=True)), *rows]:
        print("  ".join(f"{'' if row[key] is None else row[key]!s:<{_width(rows, key)}}" for key in rows[0]).rstrip())


# After the others, so that they come last in --help.
app.add_typer(find_lr_command)
app.add_typer(sharing_commands)


def _say_how_to_go_on(output: Path) -> None:
    saved = output / "recipe.yaml"
    if not saved.is_file():
        print("torchthaw: stopped before anything was written", file=sys.stderr)
        return
    command = shlex.join(["torchthaw", "train", str(saved), "--resume"])
    print(f"torchthaw: stopped; to go on from the last checkpoint:\n  {command}", file=sys.stderr)


def _width(rows: list[dict[str, Any]], key: str) -> int:
    return max(len(key), *(len(str(row[key])) for row in rows))


def _share(value: float) -> float | int:
    """Reads a whole number as a number of images."""
    return int(value) if value >= 1 and value.is_integer() else value


def _print_json(document: Any) -> None:
    print(json.dumps(document, indent=2))
