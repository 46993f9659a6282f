"""Averages of the weights of saved models, chosen on validation images.

Model soups: Wortsman et al., "Model soups: averaging weights of multiple fine-tuned models improves accuracy without
increasing inference time" (ICML 2022). WiSE-FT: Wortsman et al., "Robust fine-tuning of zero-shot models" (CVPR 2022).
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from torchthaw.backbones.anatomy import family_of
from torchthaw.backbones.image_processing import TorchvisionImageProcessor
from torchthaw.backbones.modeling import TorchvisionForImageClassification
from torchthaw.errors import SharingError, ThawError
from torchthaw.sharing.saved_models import load_saved, new_folder, write_json
from torchthaw.stages.averages import average_weights, interpolate

SOUP_FILE = "soup.json"
# Shares of the fine-tuned weights; 0 and 1 are the two ends themselves.
ALPHAS = tuple(round(0.1 * step, 1) for step in range(11))

State = Mapping[str, torch.Tensor]
Score = Callable[[TorchvisionForImageClassification], float]


@dataclasses.dataclass
class Soup:
    """An average of weights, and how it came about.

    Attributes:
        method: `greedy`, `uniform` or `wise-ft`.
        model: With the averaged weights.
        processor: Its image processor.
        score: Of the average, on the validation images.
        steps: What was tried, in order, each with its score.
        ingredients: Share of each saved model in the average.
        calibrated: Temperature of each saved model whose scores were calibrated; those of the average are not.
    """

    method: str
    model: TorchvisionForImageClassification
    processor: TorchvisionImageProcessor
    score: float
    steps: list[dict[str, Any]]
    ingredients: dict[str, float]
    calibrated: dict[str, float] = dataclasses.field(default_factory=dict)

    def save(self, output: str | Path) -> dict[str, Any]:
        """Saves the model as a folder that loads anywhere, with `soup.json`; returns what that says.

        Raises:
            SharingError: `output` exists.
        """
        described = {
            "method": self.method,
            "score": self.score,
            "ingredients": self.ingredients,
            "steps": self.steps,
            **({"calibration_dropped": self.calibrated} if self.calibrated else {}),
        }
        with new_folder(output) as folder:
            self.model.save_pretrained(folder)
            self.processor.save_pretrained(folder)
            write_json(folder / SOUP_FILE, described)
        return described


def uniform_soup(folders: Sequence[str | Path], score: Score) -> Soup:
    """Averages all models in equal shares, better or not.

    Args:
        folders: At least two saved models of the same architecture, classes and image processor.
        score: Measures a model on validation images; higher is better.

    Raises:
        SharingError: the models cannot be averaged.
    """
    models, processor = _load_alike(folders)
    calibrated = _drop_temperatures(folders, models)
    names = [str(folder) for folder in folders]
    steps = [{"tried": [name], "score": _finite(score(model), name)} for name, model in zip(names, models, strict=True)]
    states = [_copy(model) for model in models]
    shares = [1 / len(states)] * len(states)
    mixed = models[0]
    mixed.load_state_dict(average_weights(states, shares))
    found = _finite(score(mixed), "the average")
    steps.append({"tried": names, "score": found})
    return Soup("uniform", mixed, processor, found, steps, dict(zip(names, shares, strict=True)), calibrated)


def greedy_soup(folders: Sequence[str | Path], score: Score) -> Soup:
    """Begins with the best model, and adds each other one, best first, if the average does not get worse.

    The result is never worse on the validation images than the best of the models.

    Args:
        folders: As for `uniform_soup`.
        score: As there.

    Raises:
        SharingError: the models cannot be averaged.
    """
    models, processor = _load_alike(folders)
    calibrated = _drop_temperatures(folders, models)
    scores = [_finite(score(model), folder) for model, folder in zip(models, folders, strict=True)]
    states = [_copy(model) for model in models]
    order = sorted(range(len(models)), key=lambda number: -scores[number])
    steps = [{"tried": [str(folders[number])], "score": scores[number], "kept": False} for number in order]
    steps[0]["kept"] = True
    chosen, best, mixed = [order[0]], scores[order[0]], models[0]
    for number in order[1:]:
        trial = [*chosen, number]
        mixed.load_state_dict(average_weights([states[member] for member in trial], [1 / len(trial)] * len(trial)))
        found = _finite(score(mixed), f"the average with {folders[number]}")
        kept = found >= best
        steps.append({"tried": [str(folders[member]) for member in trial], "score": found, "kept": kept})
        if kept:
            chosen, best = trial, found
    share = 1 / len(chosen)
    mixed.load_state_dict(average_weights([states[member] for member in chosen], [share] * len(chosen)))
    ingredients = {str(folders[member]): share for member in chosen}
    return Soup("greedy", mixed, processor, best, steps, ingredients, calibrated)


def wise_ft(start: str | Path, tuned: str | Path, score: Score, alphas: Sequence[float] = ALPHAS) -> Soup:
    """Moves from the weights before fine-tuning to those after it, and keeps the best place on the way.

    The paper starts from a zero-shot classifier. Here it is a saved model with the same classes, such as one of which
    only the head was trained; or pretrained weights, which then get the fine-tuned head.

    Args:
        start: A saved model, or weights as `from_torchvision` takes them.
        tuned: The saved fine-tuned model.
        score: As for `uniform_soup`.
        alphas: Shares of the fine-tuned weights to try; of equal scores the largest wins.

    Raises:
        SharingError: the two cannot be mixed, or a share is not between 0 and 1.
    """
    wrong = [alpha for alpha in alphas if not 0 <= alpha <= 1]
    if wrong or not alphas:
        raise SharingError(f"the shares of the fine-tuned weights are {list(alphas)}; write numbers from 0 to 1")
    if Path(start).resolve() == Path(tuned).resolve():
        raise SharingError(
            f"{tuned} cannot be mixed with itself; pass the weights from before the fine-tuning as start"
        )
    model, processor = load_saved(tuned)
    calibrated = _drop_temperatures([tuned], [model])
    after = _copy(model)
    before = _start(start, model, tuned, processor)

    def measure(alpha: float, weights: dict[str, torch.Tensor]) -> float:
        model.load_state_dict(weights)
        return _finite(score(model), f"the mixture of share {alpha}")

    alpha, scores = interpolate(before, after, alphas, measure)
    model.load_state_dict(average_weights([after, before], [alpha, 1 - alpha]))
    steps = [{"alpha": share, "score": found} for share, found in scores.items()]
    shares = {str(start): round(1 - alpha, 12), str(tuned): alpha}
    return Soup("wise-ft", model, processor, scores[alpha], steps, shares, calibrated)


def _start(
    start: str | Path,
    model: TorchvisionForImageClassification,
    tuned: str | Path,
    processor: TorchvisionImageProcessor,
) -> State:
    if Path(start).is_dir():
        other, others_processor = load_saved(start)
        # In another order they are a mistake; other classes are those of pretrained weights.
        if sorted(other.config.class_names) == sorted(model.config.class_names):
            _check_alike(start, other, others_processor, tuned, model, processor)
            return _copy(other)
    config = model.config
    try:
        pretrained = TorchvisionForImageClassification.from_torchvision(
            config.architecture, start, id2label=config.class_names, image_size=config.image_size
        )
    except ThawError:
        raise
    except ValueError as error:
        raise SharingError(str(error)) from error
    state = _copy(pretrained)
    own = _copy(model)
    head = f"backbone.{family_of(config.architecture).final_layer}."
    # Auxiliary heads, if there are some, belong to training only.
    return {name: state[name] if name in state and not name.startswith(head) else own[name] for name in own}


def _load_alike(
    folders: Sequence[str | Path],
) -> tuple[list[TorchvisionForImageClassification], TorchvisionImageProcessor]:
    if len({Path(folder).resolve() for folder in folders}) < max(2, len(folders)):
        raise SharingError(f"an average needs at least two different saved models; there are {[*map(str, folders)]}")
    loaded = [load_saved(folder) for folder in folders]
    first = loaded[0]
    for folder, (model, processor) in zip(folders[1:], loaded[1:], strict=True):
        _check_alike(folders[0], *first, folder, model, processor)
    return [model for model, _ in loaded], first[1]


def _drop_temperatures(
    folders: Sequence[str | Path], models: Sequence[TorchvisionForImageClassification]
) -> dict[str, float]:
    """Takes the temperatures out of models, since none fits other weights; returns what they were."""
    found = {str(folder): model.config.temperature for folder, model in zip(folders, models, strict=True)}
    for model in models:
        model.config.temperature = 1.0
    return {folder: temperature for folder, temperature in found.items() if temperature != 1}


def _check_alike(
    first: str | Path,
    model: TorchvisionForImageClassification,
    processor: TorchvisionImageProcessor,
    second: str | Path,
    other: TorchvisionForImageClassification,
    others_processor: TorchvisionImageProcessor,
) -> None:
    facts = {
        "architecture": (model.config.architecture, other.config.architecture),
        "classes": (model.config.class_names, other.config.class_names),
        "problem_type": (model.config.problem_type, other.config.problem_type),
        "transform_input": (model.config.transform_input, other.config.transform_input),
        "image processor": (_settings(processor), _settings(others_processor)),
    }
    for what, (here, there) in facts.items():
        if here != there:
            raise SharingError(
                f"{first} and {second} cannot be averaged, for their {what} differ: {here} and {there}; pass runs of "
                "the same recipe that differ in seed, rates or augmentation"
            )
    shapes = [{name: tuple(tensor.shape) for name, tensor in m.state_dict().items()} for m in (model, other)]
    if shapes[0] != shapes[1]:
        raise SharingError(f"{first} and {second} cannot be averaged, for their weights have other names or shapes")


def _settings(processor: TorchvisionImageProcessor) -> dict[str, Any]:
    return {key: value for key, value in processor.to_dict().items() if key != "auto_map"}


def _finite(found: float, what: str | Path) -> float:
    """Refuses a score that cannot be compared."""
    if not math.isfinite(found):
        raise SharingError(f"the score of {what} is {found}, which cannot be compared; measure something else")
    return found


def _copy(model: TorchvisionForImageClassification) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}
