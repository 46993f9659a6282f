"""The model card: `README.md` of a saved model, made of the files beside it."""

import json
from collections.abc import Mapping
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from pydantic import ValidationError

from torchthaw.errors import SharingError, did_you_mean
from torchthaw.evaluation.files import replacing
from torchthaw.sharing import card_numbers, card_view, markdown
from torchthaw.sharing.card_data import CardData, load_card_data
from torchthaw.sharing.card_metadata import front_matter, join_metadata, remembered
from torchthaw.sharing.card_options import CardOptions
from torchthaw.sharing.card_sections import assemble, own_parts, read_card

CARD_FILE = "README.md"
TEMPLATE = "model_card.md.jinja"


def write_card(folder: str | Path) -> Path:
    """Writes the card of a saved model, and keeps what a person added to it.

    A card consists of the front matter, the generated part between two marker lines, and text above and below it.
    Written again, the generated part is new and the rest stays. In the front matter a person's license and language
    stay, tags are joined, other generated keys are new, and further keys stay; comments in it do not.

    Args:
        folder: The saved model, as for `load_card_data`.

    Returns:
        The card's file.

    Raises:
        SharingError: The folder's files do not fit, or its `README.md` is a text of others.
    """
    file = Path(folder) / CARD_FILE
    card = render_card(load_card_data(folder), read_card(file), where=str(file))
    with replacing(file) as temporary:
        temporary.write_bytes(card.encode("utf-8"))
    return file


def set_card_options(folder: str | Path, options: Mapping[str, Any]) -> CardOptions:
    """Keeps options of the card in `results.json`, beside those that were set before.

    Args:
        folder: The saved model.
        options: Fields of `CardOptions`; None takes one back.

    Raises:
        SharingError: a field is unknown or does not fit.
    """
    file = Path(folder) / "results.json"
    results = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    wanted = {key: value for key, value in {**results.get("card", {}), **options}.items() if value is not None}
    unknown = next((key for key in wanted if key not in CardOptions.model_fields), None)
    if unknown is not None:
        known = list(CardOptions.model_fields)
        raise SharingError(
            f"a card has no option {unknown!r}.{did_you_mean(unknown, known)} There are {', '.join(known)}."
        )
    try:
        checked = CardOptions.model_validate(wanted)
    except ValidationError as error:
        reasons = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'card'}: {e['msg']}" for e in error.errors())
        raise SharingError(f"the card's options do not fit: {reasons}") from error
    with replacing(file) as temporary:
        document = {**results, "card": checked.model_dump(mode="json", exclude_defaults=True)}
        temporary.write_text(json.dumps(document, indent=2), encoding="utf-8")
    return checked


def render_card(data: CardData, previous: str | None = None, *, where: str = CARD_FILE) -> str:
    """Makes a card.

    Args:
        data: What it is made of; the same data and previous card give the same card.
        previous: The card as it stands, whose own parts are kept; None for none.
        where: What messages call the previous card.

    Raises:
        SharingError: The previous card is a text of others, or its front matter is not valid.
    """
    own = own_parts(previous or "", where)
    generated = front_matter(data)
    metadata = join_metadata(generated, own.metadata, own.base)
    body = _environment().get_template(TEMPLATE).render(card_view.template_variables(data, metadata))
    card = assemble(
        yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True, width=1_000_000), remembered(generated), body, own
    )
    _check(card, where)
    return card


def template_folder() -> Path:
    """Returns the folder with the card's template."""
    # A checkout that is installed in place has it at its top, an installed wheel inside the package.
    installed = Path(str(resources.files("torchthaw"))) / "model_cards"
    return installed if installed.is_dir() else Path(__file__).resolve().parents[3] / "model_cards"


@lru_cache(maxsize=1)
def _environment() -> Environment:
    environment = ImmutableSandboxedEnvironment(
        loader=FileSystemLoader(template_folder()),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    filters: dict[str, Any] = {
        "md": markdown.inline,
        "line": markdown.line,
        "code": markdown.code,
        "code_block": markdown.code_block,
        "listed": markdown.listed,
        "paragraphs": markdown.paragraphs,
        "paragraph": markdown.paragraph,
        "address": markdown.address,
        "figure": card_numbers.figure,
        "interval": card_numbers.interval,
        "count": card_numbers.count,
        "short": card_numbers.short,
    }
    environment.filters.update(filters)
    return environment


def _check(card: str, where: str) -> None:
    """Lets huggingface_hub read the front matter, as it does before a push."""
    try:
        ModelCard(card)
    except (ValueError, TypeError, yaml.YAMLError) as error:
        raise SharingError(
            f"the front matter of {where} does not fit the Hub: {error}; mend or remove that key"
        ) from error
