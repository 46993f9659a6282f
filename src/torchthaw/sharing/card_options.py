"""What the author of a model says about it; all of it is optional and none is made up."""

import re
from typing import Annotated

from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # public, not declared so
from pydantic import AfterValidator, BaseModel, ConfigDict, model_validator

_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")
_LANGUAGE = re.compile(r"[a-z]{2,3}|code|multilingual")


def _hub_id(text: str) -> str:
    validate_repo_id(text)
    return text


def _license(text: str) -> str:
    if not _LICENSE.fullmatch(text):
        raise ValueError(
            f"{text!r} is no license identifier of the Hub; write, for example, apache-2.0, mit, cc-by-4.0, or other "
            "together with license_name and license_link"
        )
    return text


def _language(text: str) -> str:
    if not _LANGUAGE.fullmatch(text):
        raise ValueError(f"{text!r} is no ISO 639 code; write, for example, en")
    return text


def _link(text: str) -> str:
    if not re.fullmatch(r"https?://\S+", text):
        raise ValueError(f"{text!r} is no address; write one that starts with https://")
    return text


def _license_link(text: str) -> str:
    return text if text == "LICENSE" else _link(text)


def _words(text: str) -> str:
    if not text or not text.isprintable() or text != text.strip():
        raise ValueError(f"{text!r} is not one line of text without spaces at its ends")
    return text


HubId = Annotated[str, AfterValidator(_hub_id)]
Words = Annotated[str, AfterValidator(_words)]


class WidgetExample(BaseModel):
    """An image that visitors of the model's page can try.

    Attributes:
        src: Address of the image.
        title: What the Hub calls it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    src: Annotated[str, AfterValidator(_link)]
    title: Words | None = None


class CardOptions(BaseModel):
    """What a model card says that no run can know.

    Texts are plain text, of which empty lines make paragraphs; for Markdown of your own, write above or below the
    generated part of the card.

    Attributes:
        license: The Hub's identifier of the license of the weights; left out, the card states none.
        license_name: Name of a license that the Hub does not list, with `license: other`.
        license_link: Its address, or `LICENSE` for a file of that name beside the card.
        language: ISO 639 codes of the class names.
        title: Heading; by default the architecture and the data.
        description: What the model does.
        intended_use: What for and for whom.
        out_of_scope: What it must not be used for.
        limits: Known limits, beside those that follow from the figures.
        tags: Further tags.
        datasets: Hub names of the data sets it was trained on; by default that of the run, if it came from the Hub.
        base_model: Hub name of the model that it was fine-tuned from.
        repository: Hub name of the model itself, for the examples of use.
        widget: Images for the Hub's page.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    license: Annotated[str, AfterValidator(_license)] | None = None
    license_name: Words | None = None
    license_link: Annotated[str, AfterValidator(_license_link)] | None = None
    language: tuple[Annotated[str, AfterValidator(_language)], ...] = ()
    title: str | None = None
    description: str | None = None
    intended_use: str | None = None
    out_of_scope: str | None = None
    limits: str | None = None
    tags: tuple[Words, ...] = ()
    datasets: tuple[HubId, ...] = ()
    base_model: HubId | None = None
    repository: HubId | None = None
    widget: tuple[WidgetExample, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _lists_of_one(cls, values: object) -> object:
        """Takes `language: en` for `language: [en]`; the same for tags and data sets."""
        if not isinstance(values, dict):
            return values
        lists = ("language", "tags", "datasets")
        return {key: [value] if key in lists and isinstance(value, str) else value for key, value in values.items()}

    @model_validator(mode="after")
    def _licenses_fit(self) -> "CardOptions":
        named = self.license_name is not None or self.license_link is not None
        if self.license == "other" and (self.license_name is None or self.license_link is None):
            raise ValueError("license: other needs license_name and license_link as well")
        if named and self.license != "other":
            raise ValueError("license_name and license_link go with license: other, and with no other license")
        return self
