"""The card's front matter: what the Hub reads, and how it is joined with what a person wrote there."""

import re
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData

from torchthaw.sharing.card_data import CardData
from torchthaw.sharing.card_schema import Results, SplitFigures
from torchthaw.sharing.markdown import last_part, one_line

TASK = "image-classification"

# Where a person's own values win over generated ones.
_OWN_FIRST = ("license", "license_name", "license_link", "language")


def card_title(data: CardData) -> str:
    """Returns the card's heading, which is also the model's name in its `model-index`."""
    if data.options.title and data.options.title.strip():
        return one_line(data.options.title)
    source = data_name(data.results)
    classes = f"{len(data.config.id2label)} classes of images"
    return one_line(
        f"{data.config.architecture} fine-tuned on {source}" if source else f"{data.config.architecture} for {classes}"
    )


def data_name(results: Results) -> str | None:
    """Returns what the data is called: its name on the Hub, or the last part of its path; None if unknown."""
    source = results.data.source
    if not source or not source.strip():
        return None
    return one_line(source if results.data.hub or source.startswith("builtin:") else last_part(source))


def start_of_training(data: CardData) -> dict[str, str] | None:
    """Returns the `kind` and `name` of what the network was initialised with; None if that is unknown.

    Kinds are `torchvision`, `file`, `folder`, `hub`, `builtin` and `random`.
    """
    weights, recipe = data.results.weights, data.recipe
    if weights is None:
        # Scripts may have filled a network that began at random, so a recipe has to say so.
        said = recipe is not None and "weights" in recipe and recipe["weights"] is None
        return {"kind": "random", "name": ""} if said else None
    if weights == "builtin":
        kind = "builtin"
    elif re.fullmatch(r"(\w+_Weights\.)?[A-Z][A-Z0-9_]*", weights):
        kind = "torchvision"
    elif weights.endswith((".safetensors", ".pth", ".pt")):
        kind = "file"
    else:
        kind = "hub" if re.fullmatch(r"[\w.-]+/[\w.-]+", weights, flags=re.ASCII) else "folder"
    return {"kind": kind, "name": weights if kind in ("hub", "torchvision") else last_part(weights)}


def front_matter(data: CardData) -> dict[str, Any]:
    """Returns the card's metadata, in the form of `huggingface_hub`'s `ModelCardData`.

    Metric values are those of `results.json`, unrounded. Emissions are in grams, rounded to six digits.
    """
    results, options = data.results, data.options
    evaluated = [entry for split, figures in results.measured.items() for entry in _entries(data, split, figures)]
    from_hub = (one_line(results.data.source),) if results.data.hub and results.data.source else ()
    start = start_of_training(data)
    hub_weights = start["name"] if start is not None and start["kind"] == "hub" else None
    tags = ["torchthaw", "torchvision", TASK, data.config.architecture, *options.tags]
    emissions = results.emissions_kg
    extra: dict[str, Any] = {
        "co2_eq_emissions": None
        if emissions is None
        else {
            "emissions": float(f"{1000 * emissions:.6g}"),
            "source": one_line(results.emissions_source),
            "training_type": "fine-tuning",
            **({"hardware_used": one_line(device)} if (device := _device(results)) else {}),
        },
        "widget": [
            {"src": example.src, **({"example_title": one_line(example.title)} if example.title else {})}
            for example in options.widget
        ]
        or None,
    }
    card = ModelCardData(
        library_name="transformers",
        pipeline_tag=TASK,
        license=options.license,
        license_name=options.license_name,
        license_link=options.license_link,
        language=list(options.language) or None,
        base_model=options.base_model or hub_weights,
        datasets=list(options.datasets or from_hub) or None,
        metrics=_metric_types(data) if evaluated else None,
        tags=tags,
        eval_results=evaluated or None,
        # Without results there is no model-index, whose name this is.
        model_name=card_title(data) if evaluated else None,
        **extra,
    )
    return dict(card.to_dict())


def _metric_types(data: CardData) -> list[str]:
    return ["map", "f1"] if data.config.several_labels else ["accuracy", "f1"]


def _device(results: Results) -> str | None:
    return results.hardware.device if results.hardware is not None else None


def _entries(data: CardData, split: str, figures: SplitFigures) -> list[EvalResult]:
    facts = data.results.data
    name = data_name(data.results) or "images"
    config = one_line(facts.config) if facts.config else None
    several = data.config.several_labels
    metrics: list[tuple[str, str, float | None, dict[str, Any] | None]] = [
        ("map", "Mean average precision", figures.map, {"average": "macro"}),
        ("accuracy", "Subset accuracy" if several else "Accuracy", figures.accuracy, None),
        ("f1", "Macro F1", figures.macro_f1, {"average": "macro"}),
        ("f1", "Micro F1", figures.micro_f1, {"average": "micro"}),
        ("balanced_accuracy", "Balanced accuracy", figures.balanced_accuracy, None),
    ]
    return [
        EvalResult(
            task_type=TASK,
            task_name="Image classification",
            dataset_type=name if facts.hub else "imagefolder",
            dataset_name=name,
            dataset_config=config if facts.hub else None,
            dataset_split=split,
            dataset_revision=facts.revision if facts.hub else None,
            metric_type=metric,
            metric_name=title,
            metric_value=value,
            metric_args=arguments,
        )
        for metric, title, value, arguments in metrics
        if value is not None
    ]


def join_metadata(generated: dict[str, Any], previous: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    """Joins new metadata with a previous card's, in which a person may have changed something.

    A person's values win for the license and the language; tags are joined; other keys that torchthaw writes are
    written anew, and keys that it does not write stay.

    Args:
        generated: The new metadata.
        previous: The front matter of the previous card.
        base: What torchthaw had generated for that card, as `remembered` gives it.
    """
    joined = dict(generated)
    for key, value in previous.items():
        if key in base and (key == "model-index" or value == base[key]):
            continue
        if key == "tags":
            own = [str(tag) for tag in value] if isinstance(value, list) else [str(value)] if value else []
            written = base.get("tags", [])
            tags = [*generated.get("tags", []), *(tag for tag in own if tag not in written)]
            joined["tags"] = list(dict.fromkeys(tags))
        elif key not in generated or key in _OWN_FIRST:
            joined[key] = value
    return joined


def remembered(generated: dict[str, Any]) -> dict[str, Any]:
    """Returns what has to be known about generated metadata to tell later what a person changed in it."""
    return {key: True if key == "model-index" else value for key, value in generated.items()}


class Yaml12Loader(yaml.SafeLoader):
    """Safe loading with the booleans of YAML 1.2, as the Hub reads it, so that `language: no` is Norwegian."""


_BOOLEAN = "tag:yaml.org,2002:bool"
Yaml12Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != _BOOLEAN]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
Yaml12Loader.add_implicit_resolver(_BOOLEAN, re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
