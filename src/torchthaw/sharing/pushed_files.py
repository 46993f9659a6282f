"""Which files of a folder belong into a model repository, and whether they are a whole saved model."""

import ast
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from torchthaw.errors import SharingError
from torchthaw.evaluation.files import PICTURE_PLOTS

CONFIG_FILE = "config.json"
PROCESSOR_FILE = "preprocessor_config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CARD_FILE = "README.md"
RESULTS_FILE = "results.json"
# They have images of the data set, or the names of their files.
PREDICTIONS = ("predictions/*.jsonl", "report.html", *(f"plots/{name}" for name in PICTURE_PLOTS))
# Of one set of weights; in a repository that other weights are pushed to, they would be wrong.
REPORTS = (RESULTS_FILE, "recipe.yaml", "audit.json", "plots/*.png", *PREDICTIONS)
_BESIDES = (CARD_FILE, "LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE", *REPORTS)


def saved_files(folder: Path, *, include_predictions: bool = False) -> dict[str, Path]:
    """Returns what of a saved model belongs into a model repository.

    The model, its configuration, the image processor, the code that these two name, the card, `results.json`,
    `recipe.yaml`, `audit.json` and the plots; a licence, if there is one. Nothing else: no checkpoints and no hidden
    files, no other scripts, and no images of the data set or their names without being asked.

    Args:
        folder: The saved model.
        include_predictions: Whether `predictions/`, `report.html` and the plots that show images belong to it: they
            have images of the data set, and the names of their files.

    Returns:
        Files by their path in the repository.

    Raises:
        SharingError: the folder is no whole saved model.
    """
    if not folder.is_dir():
        raise SharingError(f"there is no folder {folder}; pass the folder of a saved model, as `torchthaw train` makes")
    config = _read_config(folder)
    processor = _read_json(folder, PROCESSOR_FILE, "save the image processor too: processor.save_pretrained(folder)")
    names = [CONFIG_FILE, PROCESSOR_FILE, *_weights(folder), *_code(folder, config, processor)]
    found = {file for pattern in _BESIDES for file in folder.glob(pattern)}
    if not include_predictions:
        found -= {file for pattern in PREDICTIONS for file in folder.glob(pattern)}
    names += [
        file.relative_to(folder).as_posix()
        for file in sorted(found)
        if file.is_file() and not file.name.startswith(".")
    ]
    _check_results(folder, names)
    return {name: folder / name for name in names}


def _read_config(folder: Path) -> dict[str, Any]:
    if not (folder / CONFIG_FILE).is_file() and (folder / "recipe.yaml").is_file():
        raise SharingError(
            f"{folder} holds a run that has not come to its end; finish it with "
            f"`torchthaw train {folder / 'recipe.yaml'} --resume`"
        )
    config = _read_json(folder, CONFIG_FILE, "pass the folder of a saved model, as `torchthaw train` makes")
    kind = config.get("model_type")
    if kind != "torchthaw":
        raise SharingError(
            f"{folder / CONFIG_FILE} is of a model of the type {kind!r}; pass one that torchthaw saved, and push "
            "others with their own push_to_hub"
        )
    return config


def _read_json(folder: Path, name: str, advice: str) -> dict[str, Any]:
    try:
        found = json.loads((folder / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SharingError(f"{folder} is no whole saved model: it has no {name}; {advice}") from None
    except (OSError, ValueError) as error:
        raise SharingError(f"{folder} is no whole saved model: {name} cannot be read ({error}); {advice}") from error
    if not isinstance(found, dict):
        raise SharingError(f"{folder} is no whole saved model: {name} is not a JSON object; {advice}")
    return found


def _weights(folder: Path) -> list[str]:
    advice = "save it again: model.save_pretrained(folder)"
    names = [WEIGHTS_FILE]
    if not (folder / WEIGHTS_FILE).is_file() and (folder / INDEX_FILE).is_file():
        names = sorted({str(name) for name in _read_json(folder, INDEX_FILE, advice).get("weight_map", {}).values()})
    for name in names:
        if not (folder / name).is_file() or "/" in name or "\\" in name:
            raise SharingError(f"{folder} is no whole saved model: it has no {name}; {advice}")
        try:
            with safe_open(folder / name, framework="numpy"):
                pass
        except (SafetensorError, OSError) as error:
            raise SharingError(f"{folder} is no whole saved model: {name} is damaged ({error}); {advice}") from error
    return names if names == [WEIGHTS_FILE] else [*names, INDEX_FILE]


def _code(folder: Path, *configs: dict[str, Any]) -> list[str]:
    """Returns the modules that the configurations name, and those that these import beside them."""
    advice = "save model and image processor again: model.save_pretrained(folder), processor.save_pretrained(folder)"
    named = [place for config in configs for place in _texts(config.get("auto_map"))]
    if not all(config.get("auto_map") for config in configs):
        raise SharingError(f"{folder} loads nowhere without torchthaw, since it names no code (auto_map); {advice}")
    waiting = [place.split("--")[-1].rsplit(".", 1)[0] for place in named]
    found: list[str] = []
    while waiting:
        name = f"{waiting.pop()}.py"
        if name in found:
            continue
        try:
            text = (folder / name).read_text(encoding="utf-8")
            waiting += _imported_beside(text)
        except (OSError, ValueError, SyntaxError) as error:
            reason = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error})"
            raise SharingError(f"{folder} is no whole saved model: its code {name} {reason}; {advice}") from error
        found.append(name)
    return sorted(found)


def _texts(value: Any) -> Iterator[str]:
    """Yields the texts in nested plain data; an `auto_map` may have several places for one class."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for part in value:
            yield from _texts(part)
    elif isinstance(value, str):
        yield value


def _imported_beside(text: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            yield from [node.module] if node.module else [alias.name for alias in node.names]


def _check_results(folder: Path, names: list[str]) -> None:
    """Refuses figures of other weights than those beside them."""
    if RESULTS_FILE not in names or WEIGHTS_FILE not in names:
        return
    results = _read_json(folder, RESULTS_FILE, "remove it")
    model = results.get("model")
    expected = model.get("sha256") if isinstance(model, dict) else None
    if expected is None:
        return
    if _sha256(folder / WEIGHTS_FILE) != expected:
        raise SharingError(
            f"{folder / RESULTS_FILE} has the figures of other weights than {WEIGHTS_FILE}, and so has the card; save "
            f"the run again (trainer.save_run), or remove {RESULTS_FILE}, {CARD_FILE} and plots/ to push it bare"
        )


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()
