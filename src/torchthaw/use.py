"""What the command line does with saved models and backbones: load, predict, list."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from torch import nn

from torchthaw.backbones.configuration import TorchvisionConfig
from torchthaw.backbones.image_processing import TorchvisionImageProcessor
from torchthaw.backbones.modeling import TorchvisionForImageClassification
from torchthaw.backbones.weights import describe_backbones
from torchthaw.console import Reporter, hide_loading_bars
from torchthaw.data.bad_images import check_images
from torchthaw.data.images import image_extensions
from torchthaw.data.views import ImageView
from torchthaw.errors import DataError, ThawError, did_you_mean
from torchthaw.evaluation.augmented_predictions import mean_prediction, predict_augmented
from torchthaw.evaluation.inference import best_device
from torchthaw.evaluation.multilabel_figures import THRESHOLD, decide
from torchthaw.sharing.saved_models import load_saved


def load_on_device(source: str) -> tuple[TorchvisionForImageClassification, TorchvisionImageProcessor]:
    """Loads a saved model and its processor, the model on the best device there is.

    Raises:
        SharingError: there is no model.
    """
    hide_loading_bars()
    model, processor = load_saved(source)
    cast(nn.Module, model).to(best_device())
    return model, processor


def predict_paths(
    source: str, paths: Sequence[str], *, batch_size: int = 32, tta: str = "none", reporter: Reporter
) -> list[dict[str, Any]]:
    """Labels image files, and all images below folders.

    Args:
        source: A folder or Hub repository that torchthaw saved.
        paths: Files and folders.
        batch_size: Images at once.
        tta: Test-time augmentation, as in a recipe.
        reporter: Where messages go.

    Returns:
        For each image `path`, `predicted`, its `score`, and `scores` of all classes. Of a model of several labels per
        image, `predicted` is the list of classes whose score is at or above their threshold, best first, and `score`
        the list of their scores.

    Raises:
        DataError: a path does not exist, there are no images, or some cannot be read.
        PlanError: the model's image processor leaves nothing to crop for `tta`.
    """
    files = _image_files(paths)
    model, processor = load_on_device(source)
    names = model.config.class_names
    columns = {"image": [{"path": f, "bytes": None} for f in files], "label": [0] * len(files), "path": files}
    features = Features(image=Image(decode=False), label=ClassLabel(names=names), path=Value("string"))
    images, _ = check_images(Dataset.from_dict(columns, features=features), progress=reporter.draws)
    with reporter.progress("predicting", len(images)) as bar:
        views, _ = predict_augmented(
            model, ImageView(images, processor), tta, batch_size=batch_size, on_progress=bar.update
        )
    logits = mean_prediction(views, several_labels=model.config.several_labels)
    if model.config.several_labels:
        return _predicted_sets(files, logits, names, model.config.thresholds)
    scores = torch.from_numpy(logits).softmax(-1).tolist()
    return [
        {
            "path": file,
            "predicted": names[int(np.argmax(row))],
            "score": max(row),
            "scores": dict(zip(names, row, strict=True)),
        }
        for file, row in zip(files, scores, strict=True)
    ]


def _predicted_sets(
    files: Sequence[str], logits: np.ndarray, names: Sequence[str], thresholds: Sequence[float] | None
) -> list[dict[str, Any]]:
    given = decide(logits, THRESHOLD if thresholds is None else thresholds)
    lines = []
    for file, row, chosen in zip(files, torch.from_numpy(logits).sigmoid().tolist(), given, strict=True):
        best = sorted(np.flatnonzero(chosen).tolist(), key=lambda index: -row[index])
        lines.append(
            {
                "path": file,
                "predicted": [names[index] for index in best],
                "score": [row[index] for index in best],
                "scores": dict(zip(names, row, strict=True)),
            }
        )
    return lines


def backbone_table() -> list[dict[str, Any]]:
    """Returns one row for each supported backbone."""
    return [
        {
            "name": info.name,
            "family": info.family,
            "parameters (M)": round(info.parameters, 1),
            "accuracy@1": info.accuracy,
            "weights": info.weights,
            "image size": info.image_size,
        }
        for info in describe_backbones()
    ]


def layer_group_table(architecture: str) -> list[dict[str, Any]]:
    """Returns one row for each layer group of a backbone, input to output.

    Raises:
        ThawError: the backbone is unknown.
    """
    try:
        config = TorchvisionConfig(architecture=architecture)
    except ValueError as error:
        raise ThawError(str(error)) from error
    with torch.device("meta"):
        model = TorchvisionForImageClassification(config)
    return [
        {
            "group": name,
            "parameters": sum(parameter.numel() for parameter in group.parameters.values()),
            "modules": ", ".join(module.removeprefix("backbone.") for module in group.modules),
        }
        for name, group in model.layer_groups().items()
    ]


def _image_files(paths: Sequence[str]) -> list[str]:
    files: list[str] = []
    for given in map(Path, paths):
        if given.is_dir():
            files += sorted(str(f) for f in given.rglob("*") if f.is_file() and f.suffix.lower() in image_extensions())
        elif given.exists():
            files.append(str(given))
        else:
            nearby = [sibling.name for sibling in given.parent.iterdir()] if given.parent.is_dir() else []
            raise DataError(f"there is no file or folder {given}.{did_you_mean(given.name, nearby)}")
    if not files:
        raise DataError(f"no images were found in {', '.join(map(str, paths))}; pass image files or folders of them")
    return files
