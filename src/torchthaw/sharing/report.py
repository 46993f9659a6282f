"""The report: `report.html` of a run, one page that needs nothing but itself, made of the files beside it."""

import base64
import hashlib
import json
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from markupsafe import Markup, escape

from torchthaw.evaluation.files import replacing
from torchthaw.evaluation.gallery import Gallery
from torchthaw.sharing import card_numbers, report_view
from torchthaw.sharing.card import template_folder
from torchthaw.sharing.card_data import CardData, load_card_data
from torchthaw.sharing.markdown import one_line
from torchthaw.sharing.report_images import read_plots

REPORT_FILE = "report.html"
TEMPLATE = "report.html.jinja"
STYLE = "report.css"


def write_report(folder: str | Path, gallery: Gallery | None = None) -> Path:
    """Writes the report of a run.

    The page holds its style and images, loads nothing, runs no script, and forbids the browser both.

    Args:
        folder: The saved model, as for `load_card_data`.
        gallery: Pictures of mistakes and near duplicates; without it, those in `plots/` are shown.

    Returns:
        The report's file.

    Raises:
        SharingError: The folder's files do not fit.
    """
    root = Path(folder)
    file = root / REPORT_FILE
    results = root / "results.json"
    document = json.loads(results.read_text(encoding="utf-8")) if results.is_file() else {}
    page = render_report(load_card_data(root), document, read_plots(root / "plots"), gallery)
    with replacing(file) as temporary:
        temporary.write_bytes(page.encode("utf-8"))
    return file


def render_report(
    data: CardData, document: Mapping[str, Any], plots: Mapping[str, Any], gallery: Gallery | None = None
) -> str:
    """Makes a report.

    Args:
        data: What the model card is made of, too.
        document: `results.json` as it is: it may have figures that the card does not show.
        plots: Images by the name of their file.
        gallery: Pictures of mistakes and near duplicates.
    """
    style = _environment().loader.get_source(_environment(), STYLE)[0]  # type: ignore[union-attr]
    digest = base64.b64encode(hashlib.sha256(style.encode("utf-8")).digest()).decode("ascii")
    variables = report_view.template_variables(data, document, plots, gallery)
    # The browser hashes what stands between the tags, so that nothing may be added there.
    return _environment().get_template(TEMPLATE).render(style=Markup(style), style_digest=Markup(digest), **variables)


def as_text(value: object) -> object:
    """Returns what an expression of the template gives on one line, without control characters; markup as it is."""
    return value if isinstance(value, Markup) or not isinstance(value, str) else one_line(value)


def as_block(text: str) -> Markup:
    """Returns several lines of text as HTML, with control characters as escapes; white space stays."""
    kept = (
        character if character.isprintable() or character == "\n" else ascii(character)[1:-1]
        for character in text.expandtabs(4)
    )
    return escape("".join(kept))


def is_figure(text: str) -> bool:
    """Whether a cell of a table holds a number, or stands for one."""
    return re.match(r"([<+-] ?)?\d|-$", text) is not None


@lru_cache(maxsize=1)
def _environment() -> Environment:
    environment = ImmutableSandboxedEnvironment(
        loader=FileSystemLoader(template_folder()),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=as_text,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters: dict[str, Any] = {
        "block": as_block,
        "figure": card_numbers.figure,
        "interval": card_numbers.interval,
        "count": card_numbers.count,
        "short": card_numbers.short,
    }
    environment.filters.update(filters)
    environment.tests["a_figure"] = is_figure
    return environment
