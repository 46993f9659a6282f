"""Commands that share a saved model: its card, the Hub, exports, averages."""

import json
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer()

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout, and nothing else there.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing but errors.")]
FolderArgument = Annotated[Path, typer.Argument(help="The output folder of a run, or another saved model.")]


class ExportFormat(str, Enum):
    """What a model can be exported to."""

    torchvision = "torchvision"
    onnx = "onnx"
    timm = "timm"


class SoupMetric(str, Enum):
    """What averages can be chosen by."""

    accuracy = "accuracy"
    macro_f1 = "macro_f1"
    balanced_accuracy = "balanced_accuracy"
    map = "map"
    micro_f1 = "micro_f1"


@app.command(epilog="Example: `torchthaw card run1 --set license=apache-2.0 --set 'intended_use=Sorting of photos.'`")
def card(
    folder: FolderArgument,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="What no run can know, as key=value: license, intended_use, limits, ...; repeatable."
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Write the model card anew, from the results beside it.

    What you added to README.md above or below the generated part stays, and so do your license and tags.
    """
    from torchthaw.recipe import parse_override
    from torchthaw.sharing.card import set_card_options, write_card

    if set_:
        set_card_options(folder, dict(parse_override(text) for text in set_))
    file = write_card(folder)
    _finish({"card": str(file)}, as_json, f"wrote {file}")


@app.command(epilog="Example: `torchthaw push run1 maker/ants-and-bees --private`")
def push(
    folder: FolderArgument,
    repository: Annotated[str, typer.Argument(help="user/name; it is made if it does not exist.")],
    private: Annotated[bool, typer.Option("--private", help="Only for you, if the repository is made.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch, made if it does not exist.")] = None,
    predictions: Annotated[
        bool,
        typer.Option(
            "--predictions", help="Push predictions and report too: your images and their names are in these."
        ),
    ] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Push a saved model with its card, results and plots to the Hub, in one commit.

    Log in with `hf auth login`, or set HF_TOKEN. After a failure the same command goes on where it was.
    """
    from torchthaw.console import Reporter
    from torchthaw.sharing.hub import push_folder

    pushed = push_folder(
        folder,
        repository,
        private=private or None,
        revision=revision,
        include_predictions=predictions,
        say=Reporter(quiet=quiet).say,
    )
    document = {
        "url": pushed.url,
        "repository": pushed.repo_id,
        "revision": pushed.revision,
        "commit": pushed.commit,
        "files": list(pushed.files),
        "removed": list(pushed.removed),
    }
    _finish(document, as_json, f"pushed {len(pushed.files)} files to {pushed.url}, commit {pushed.commit}")


@app.command(epilog="Example: `torchthaw export run1 --to onnx --output run1-onnx`")
def export(
    model: Annotated[str, typer.Argument(help="A folder or Hub repository that torchthaw saved.")],
    to: Annotated[ExportFormat, typer.Option(help="Who shall load it.")],
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="Folder to make; by default MODEL-FORMAT.")
    ] = None,
    preprocessing: Annotated[
        bool, typer.Option("--preprocessing", help="ONNX: scale and normalise in the graph, so that it takes 8 bits.")
    ] = False,
    opset: Annotated[int | None, typer.Option(help="ONNX: version of the operators.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Export a saved model for plain torchvision, ONNX or timm; it is compared with the original first."""
    from torchthaw.console import hide_loading_bars
    from torchthaw.errors import SharingError

    hide_loading_bars()
    if to is not ExportFormat.onnx and (preprocessing or opset is not None):
        raise SharingError(f"--preprocessing and --opset go with --to onnx, not with --to {to.value}; leave them out")
    target = output or f"{model.rstrip('/').rsplit('/', 1)[-1]}-{to.value}"
    if to is ExportFormat.onnx:
        from torchthaw.sharing.export_onnx import export_onnx

        result = export_onnx(model, target, preprocessing=preprocessing, opset=opset)
    elif to is ExportFormat.timm:
        from torchthaw.sharing.export_timm import export_timm

        result = export_timm(model, target)
    else:
        from torchthaw.sharing.export_torchvision import export_torchvision

        result = export_torchvision(model, target)
    lines = [
        f"wrote {', '.join(result['files'])}",
        f"largest difference of the logits: {result['largest_difference']:.3g}",
    ]
    lines += [result["note"]] if "note" in result else []
    _finish(result, as_json, "\n".join([*lines, *result.get("load", [])]))


@app.command(
    epilog="Example: `torchthaw soup run1 run2 run3 --output soup`, or `torchthaw soup run1 --start DEFAULT -o mix`"
)
def soup(
    runs: Annotated[list[str], typer.Argument(help="Output folders of runs that differ in seed, rates, augmentation.")],
    output: Annotated[str, typer.Option("--output", "-o", help="Folder to make.")],
    start: Annotated[
        str | None,
        typer.Option(help="WiSE-FT: weights or a saved model to mix with the one run, at the best of 11 shares."),
    ] = None,
    uniform: Annotated[bool, typer.Option("--uniform", help="Average all runs, better or not.")] = False,
    data: Annotated[
        str | None, typer.Option("--data", "-d", help="Images to choose on; by default the runs' validation images.")
    ] = None,
    split: Annotated[str, typer.Option("--split", "-s", help="Split of --data.")] = "validation",
    metric: Annotated[SoupMetric, typer.Option(help="What is compared.")] = SoupMetric.accuracy,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Average the weights of runs (a model soup), as far as that is better on validation images."""
    from torchthaw.console import Reporter, hide_loading_bars
    from torchthaw.soups import make_soup

    hide_loading_bars()
    result = make_soup(
        runs,
        output,
        reporter=Reporter(quiet=quiet),
        start=start,
        uniform=uniform,
        data=data,
        split=split,
        metric=metric.value,
    )
    if as_json:
        _finish(result, as_json, "")


def _finish(document: dict[str, Any], as_json: bool, text: str) -> None:
    if as_json:
        print(json.dumps(document, indent=2))
    else:
        print(text, file=sys.stdout)
