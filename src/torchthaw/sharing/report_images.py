"""Images of a report as data that stands in the page itself, of bounded size."""

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup
from PIL import Image, UnidentifiedImageError

# Pixels: of a plot, as wide as the largest that torchthaw draws.
MOST_PIXELS_WIDE = 2000
MOST_PIXELS_HIGH = 3000
_COLORS = 256


@dataclass(frozen=True)
class Embedded:
    """An image within a page.

    Attributes:
        source: Its data URI.
        width: Pixels.
        height: Pixels.
    """

    source: Markup
    width: int
    height: int


def embed_plot(picture: Image.Image) -> Embedded:
    """Returns a plot as PNG with a palette, reduced where it is larger than any plot of torchthaw."""
    flat = Image.new("RGB", picture.size, "white")
    rgba = picture.convert("RGBA")
    flat.paste(rgba, mask=rgba.getchannel("A"))
    flat.thumbnail((MOST_PIXELS_WIDE, MOST_PIXELS_HIGH))
    return _embed(flat.quantize(_COLORS, dither=Image.Dither.NONE), "PNG", optimize=True)


def embed_picture(picture: Image.Image) -> Embedded:
    """Returns a photograph as JPEG."""
    return _embed(picture.convert("RGB"), "JPEG", quality=82)


def read_plots(folder: Path) -> Mapping[str, Embedded]:
    """Reads the PNG files of a folder by name, in order of their names; what is no image is left out."""
    found = {}
    for file in sorted(folder.glob("*.png")):
        try:
            with Image.open(file) as picture:
                found[file.name] = embed_plot(picture)
        except (UnidentifiedImageError, OSError, Image.DecompressionBombError):
            continue
    return found


def _embed(picture: Image.Image, kind: str, **options: object) -> Embedded:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return Embedded(Markup(f"data:image/{kind.lower()};base64,{data}"), *picture.size)
