"""What all tools are given alike: the recipe, the clock, and the measure of the weights that they end with.

The recipe is what torchthaw's preset `staged` asks of mobilenet_v2 on a small data set: `torchthaw train staged
--backbone mobilenet_v2 --data FOLDER --dry-run` shows it. One thing is left to torchthaw's defaults: its head stage
sees each image unaugmented, so that features are computed once; the others augment in all stages, as their users do.
"""

import argparse
import contextlib
import gc
import importlib
import json
import math
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
import torchvision
from safetensors.torch import load_file
from sklearn.metrics import f1_score
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.transforms import v2

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
BATCH = 32
CROP_SCALE = (0.35, 1.0)
FLIP = 0.5
WEIGHT_DECAY = 0.01
WARMUP = 0.1
CLIP_NORM = 1.0
# Layer groups of mobilenet_v2 from the head towards the input: modules of `features`.
GROUPS = {
    "head": None,
    "stage4": slice(14, 19),
    "stage3": slice(7, 14),
    "stage2": slice(4, 7),
    "stage1": slice(2, 4),
    "stem": slice(0, 2),
}


@dataclass(frozen=True)
class Stage:
    """A stage: its name, what torchthaw calls that it trains, and the peak rate of each layer group that trains."""

    name: str
    unfreeze: str | int
    rates: Mapping[str, float]


def _decayed(groups: int) -> dict[str, float]:
    return {name: 3e-4 * 0.3**distance for distance, name in enumerate(list(GROUPS)[:groups])}


STAGES = (
    Stage("head", "head", {"head": 1e-3}),
    Stage("last block", 1, _decayed(2)),
    Stage("all", "all", _decayed(len(GROUPS))),
)


@dataclass(frozen=True)
class Task:
    """What a tool has to do.

    Attributes:
        data: Folder with `train/` and `val/`, each with a folder of images per class.
        weights: A torchvision state_dict of mobilenet_v2 with 1,000 classes.
        size: Side of the images in pixels.
        epochs: Epochs of each stage.
        seed: Seed of the new head, of the order of the images, and of their augmentation.
        workers: Processes that load images.
    """

    data: Path
    weights: Path
    size: int
    epochs: tuple[int, ...]
    seed: int
    workers: int

    @classmethod
    def from_command_line(cls) -> "Task":
        """Reads the arguments that run.py gives to every tool."""
        parser = argparse.ArgumentParser()
        parser.add_argument("--data", type=Path, required=True)
        parser.add_argument("--weights", type=Path, required=True)
        parser.add_argument("--size", type=int, required=True)
        parser.add_argument("--plan", type=int, nargs=3, required=True)
        parser.add_argument("--seed", type=int, required=True)
        parser.add_argument("--workers", type=int, required=True)
        given = parser.parse_args()
        return cls(given.data, given.weights, given.size, tuple(given.plan), given.seed, given.workers)

    @property
    def classes(self) -> list[str]:
        return sorted(folder.name for folder in (self.data / "train").iterdir() if folder.is_dir())

    @property
    def num_train(self) -> int:
        return sum(1 for _ in (self.data / "train").glob("*/*"))

    def train_transform(self) -> v2.Compose:
        """Returns the usual transform of training images, as torchvision's reference scripts have it."""
        return v2.Compose(
            [
                v2.RandomResizedCrop(self.size, scale=CROP_SCALE),
                v2.RandomHorizontalFlip(FLIP),
                v2.PILToTensor(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(MEAN, STD),
            ]
        )

    def eval_transform(self) -> v2.Compose:
        """Returns torchvision's transform of evaluation images."""
        return v2.Compose(
            [
                v2.Resize(round(self.size * 256 / 224)),
                v2.CenterCrop(self.size),
                v2.PILToTensor(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(MEAN, STD),
            ]
        )

    def folders(self) -> tuple[torchvision.datasets.ImageFolder, torchvision.datasets.ImageFolder]:
        """Returns the training and the validation images as torchvision's data sets."""
        return (
            torchvision.datasets.ImageFolder(str(self.data / "train"), self.train_transform()),
            torchvision.datasets.ImageFolder(str(self.data / "val"), self.eval_transform()),
        )

    def new_model(self) -> nn.Module:
        """Returns torchvision's pretrained network with a new head."""
        torch.manual_seed(self.seed)
        model = torchvision.models.mobilenet_v2()
        model.load_state_dict(load_file(self.weights))
        model.classifier[1] = nn.Linear(model.last_channel, len(self.classes))
        return model


def group_modules(model: nn.Module, name: str) -> nn.Module:
    """Returns the modules of a layer group."""
    return model.classifier if GROUPS[name] is None else model.features[GROUPS[name]]


def freeze(model: nn.Module, stage: Stage) -> None:
    """Lets the stage's layer groups train, without the scale and shift of BatchNorm."""
    model.requires_grad_(False)
    for name in stage.rates:
        group_modules(model, name).requires_grad_(True)
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.requires_grad_(False)


def optimizer_groups(model: nn.Module, stage: Stage) -> list[dict[str, Any]]:
    """Returns AdamW's groups: weights with decay, biases without, each layer group at its rate."""
    groups = []
    for name, rate in stage.rates.items():
        live = [parameter for parameter in group_modules(model, name).parameters() if parameter.requires_grad]
        for decay, chosen in (
            (WEIGHT_DECAY, [parameter for parameter in live if parameter.ndim > 1]),
            (0.0, [parameter for parameter in live if parameter.ndim <= 1]),
        ):
            if chosen:
                groups.append({"params": chosen, "lr": rate, "weight_decay": decay})
    return groups


def hold_batch_norm(model: nn.Module) -> None:
    """Puts BatchNorm into eval mode, as scripts do after `model.train()`."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.eval()


def rate_factor(step: int, steps: int) -> float:
    """Returns the share of the peak rate at a step of a stage: linear warmup, then a cosine to 0."""
    warmup = round(WARMUP * steps)
    if step < warmup:
        return step / max(1, warmup)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


@dataclass
class Clock:
    """Times a tool from here on, and its stages."""

    task: Task
    stages: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    rss_mb: float = field(default_factory=lambda: psutil.Process().memory_info().rss / 1024**2)
    _start: float = field(default_factory=time.perf_counter)

    @contextlib.contextmanager
    def stage(self, name: str, epochs: int) -> Iterator[None]:
        """Times a stage that consists of the block."""
        start = time.perf_counter()
        yield
        self.add_stage(name, epochs, time.perf_counter() - start)

    def add_stage(self, name: str, epochs: int, seconds: float) -> None:
        """Notes a stage: training images a second are over its whole time, validation included."""
        rate = self.task.num_train * epochs / seconds
        self.stages.append({"name": name, "epochs": epochs, "seconds": seconds, "images_per_second": rate})

    def stop(self) -> None:
        """Ends the time: the best weights are in memory."""
        self.seconds = time.perf_counter() - self._start


def finish(clock: Clock, weights: Mapping[str, Tensor], packages: tuple[str, ...], **facts: Any) -> None:
    """Measures the weights that the tool ended with, and prints everything as one line of JSON.

    Args:
        clock: Stopped.
        weights: A state_dict of torchvision's mobilenet_v2.
        packages: What to give the versions of.
        **facts: Further entries.
    """
    gc.collect()
    # Kilobytes on Linux, bytes on macOS.
    unit = 1024**2 if sys.platform == "darwin" else 1024
    main, workers = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    memory = {
        "rss_after_imports_mb": clock.rss_mb,
        "peak_rss_mb": main / unit,
        "peak_worker_rss_mb": workers / unit,
    }
    accuracy, macro_f1 = measure(clock.task, weights)
    # A checkout on the path has no metadata.
    versions = {name: importlib.import_module(name).__version__ for name in ("torch", "torchvision", *packages)}
    figures = {"seconds": clock.seconds, "stages": clock.stages, **memory, "accuracy": accuracy, "macro_f1": macro_f1}
    print(json.dumps({**figures, "threads": torch.get_num_threads(), "versions": versions, **facts}), flush=True)


@torch.inference_mode()
def measure(task: Task, weights: Mapping[str, Tensor]) -> tuple[float, float]:
    """Returns accuracy and macro F1 on the validation images, with plain torchvision in float32."""
    model = torchvision.models.mobilenet_v2(num_classes=len(task.classes))
    model.load_state_dict({name: tensor.detach().float().cpu() for name, tensor in weights.items()})
    model.eval()
    _, images = task.folders()
    predicted: list[int] = []
    labels: list[int] = []
    for pixels, targets in torch.utils.data.DataLoader(images, BATCH, num_workers=task.workers):
        predicted += model(pixels).argmax(1).tolist()
        labels += targets.tolist()
    right = sum(guess == label for guess, label in zip(predicted, labels, strict=True))
    return right / len(labels), float(f1_score(labels, predicted, average="macro"))
