"""What a model card is made of: the files of a run's folder, read into checked, typed data.

Importing this module does not import torch.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from torchthaw.errors import SharingError
from torchthaw.evaluation.files import PICTURE_PLOTS
from torchthaw.sharing.card_options import CardOptions
from torchthaw.sharing.card_schema import Audit, ModelConfig, Results

WEIGHTS_FILE = "model.safetensors"


@dataclass(frozen=True)
class CardData:
    """Everything that a card is made of.

    Attributes:
        config: The saved model.
        results: What the run measured; without `results.json`, nothing.
        recipe: `recipe.yaml` without its sections `card` and `push`; None if there is none.
        options: What the author says.
        plots: Names of the PNG files in `plots`, sorted, without those that show images of the data set.
        weights_checked: Whether the weights are known to be those that were measured.
    """

    config: ModelConfig
    results: Results
    recipe: dict[str, Any] | None
    options: CardOptions
    plots: tuple[str, ...]
    weights_checked: bool


def load_card_data(folder: str | Path) -> CardData:
    """Reads what a card is made of.

    Args:
        folder: A saved model: `config.json`, and as far as they are there `results.json`, `recipe.yaml`, `audit.json`,
            `plots/*.png` and `model.safetensors`. What the author says is the section `card` of `recipe.yaml`; where
            the key `card` of `results.json` says something, too, that counts.

    Raises:
        SharingError: There is no saved model, a file cannot be read or has values of the wrong type, or the weights
            are not those that `results.json` measured.
    """
    root = Path(folder)
    if not (root / "config.json").is_file():
        raise SharingError(f"{root} holds no config.json, so it is no saved model; pass the output folder of a run")
    document = _read_json(root / "results.json")
    config = _parse(ModelConfig, _read_json(root / "config.json"), root / "config.json")
    results = _parse(Results, document, root / "results.json")
    audit_file = root / "audit.json"
    if audit_file.is_file():
        results = results.model_copy(update={"audit": _parse(Audit, _read_json(audit_file), audit_file)})
    recipe = _read_recipe(root / "recipe.yaml")
    in_recipe = None
    if recipe is not None:
        in_recipe = recipe.pop("card", None)
        recipe.pop("push", None)
    options = {
        **_options(in_recipe, root / "recipe.yaml").model_dump(exclude_defaults=True),
        **_options(document.get("card"), root / "results.json").model_dump(exclude_defaults=True),
    }
    return CardData(
        config=config,
        results=results,
        recipe=recipe,
        options=_options(options, root / "results.json"),
        plots=tuple(sorted({file.name for file in (root / "plots").glob("*.png")} - set(PICTURE_PLOTS))),
        weights_checked=_check_weights(root, results),
    )


def _check_weights(root: Path, results: Results) -> bool:
    expected = results.model.sha256
    if expected is None:
        return False
    file = root / WEIGHTS_FILE
    if not file.is_file():
        raise SharingError(
            f"{root} holds figures in results.json but no {WEIGHTS_FILE}, so nothing says what they belong to; put the "
            "run's weights back"
        )
    found = _sha256(file)
    if found != expected:
        raise SharingError(
            f"the weights in {file} are not those that results.json measured (SHA-256 {found[:12]}... instead of "
            f"{expected[:12]}...), and a card only has figures of the weights beside it. Put the run's weights back, "
            "or remove results.json for a card without figures"
        )
    return True


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _read_json(file: Path) -> dict[str, Any]:
    """Returns the mapping in a JSON file; an empty one if there is no file."""
    if not file.is_file():
        return {}
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SharingError(f"{file} is not valid JSON: {error}; restore it or remove it") from error
    if not isinstance(document, dict):
        raise SharingError(f"{file} holds no mapping of keys to values; restore it or remove it")
    return document


def _read_recipe(file: Path) -> dict[str, Any] | None:
    if not file.is_file():
        return None
    try:
        document = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SharingError(f"{file} is not valid YAML: {error}; restore it or remove it") from error
    if not isinstance(document, dict):
        raise SharingError(f"{file} holds no mapping of keys to values; restore it or remove it")
    return document


_Model = TypeVar("_Model", bound=BaseModel)


def _parse(kind: type[_Model], document: dict[str, Any], file: Path) -> _Model:
    # By way of JSON, in which lists are tuples even to the strict; half surrogate pairs from file names become "?".
    text = json.dumps(document, ensure_ascii=False).encode("utf-8", "replace")
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        raise SharingError(_explain(error, file)) from error


def _options(said: Any, where: Path) -> CardOptions:
    try:
        return CardOptions.model_validate({} if said is None else said)
    except ValidationError as error:
        raise SharingError(_explain(error, where, "card.")) from error


def _explain(error: ValidationError, file: Path, section: str = "") -> str:
    lines = []
    for problem in error.errors():
        key = section + ".".join(map(str, problem["loc"]))
        value = repr(problem["input"])
        shown = value if len(value) <= 60 else f"{value[:57]}..."
        lines.append(f"\n  - {key.rstrip('.') or 'it'} is {shown}: {problem['msg']}")
    return f"{file} does not fit:{''.join(lines)}"
