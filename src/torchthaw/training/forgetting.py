"""Forgetting: what a fine-tuned backbone still scores on its source task, with the head that it was pretrained with."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from torchthaw.backbones.anatomy import family_of
from torchthaw.backbones.image_processing import TorchvisionImageProcessor
from torchthaw.backbones.modeling import TorchvisionForImageClassification
from torchthaw.data.bad_images import find_bad_images, without
from torchthaw.data.views import ImageView
from torchthaw.evaluation.inference import predict_split
from torchthaw.evaluation.intervals import mid_p_interval
from torchthaw.stages.snapshots import Snapshot, all_tensors, put_back
from torchthaw.training.comparison import Measured, compare
from torchthaw.training.results import ProgressBars, no_progress


@dataclass(frozen=True)
class SourceTask:
    """Images of the task that weights were pretrained for; they are looked at when training is over.

    Attributes:
        images: Columns `image`, `path` and `label`, the number of the pretrained head's output.
        weights: The pretrained weights, as `from_torchvision` takes them.
        data: What the images are called.
        split: Which of their splits they are.
    """

    images: Dataset
    weights: str
    data: str
    split: str

    def measure(
        self,
        model: TorchvisionForImageClassification,
        processor: TorchvisionImageProcessor,
        *,
        batch_size: int = 32,
        num_workers: int = 0,
        progress: ProgressBars = no_progress,
    ) -> dict[str, Any]:
        """Compares the pretrained network with itself, once the fine-tuned backbone stands in it before its own head.

        An image is right if, of all outputs of the pretrained head, that of its class is the highest. Images have the
        size and preprocessing of the fine-tuned model. Everything before the final layer is the backbone, hidden layers
        of a classifier and BatchNorm statistics included.

        Args:
            model: The fine-tuned model, which stays as it is.
            processor: Its image processor.
            batch_size: Images at once.
            num_workers: Processes that decode images besides the main one.
            progress: Shows a bar.

        Returns:
            `data`, `split`, `num_images`, `num_classes` (those that occur), `left_out` (unreadable images), `before`
            and `after` (`accuracy` and its 95 % `interval`), and their paired `difference` with `interval`, `p_value`,
            `method`, and the numbers of images that only the pretrained (`forgotten`) or the fine-tuned backbone
            (`gained`) gets right. Where it cannot be measured, `problem` says why, in place of the figures.
        """
        bad = find_bad_images(self.images, progress=False)
        images = without({"": self.images}, {"": bad})[""]
        facts = {
            "data": self.data,
            "split": self.split,
            "num_images": len(images),
            "num_classes": len(set(images["label"][:])),
            "left_out": len(bad),
        }
        if len(images) == 0:
            return {**facts, "problem": "no image could be read"}
        # What comes after must not depend on whether this was measured.
        with torch.random.fork_rng(devices=[]):
            source = TorchvisionForImageClassification.from_torchvision(
                model.config.architecture, self.weights, image_size=model.config.image_size
            )
            body = _backbone(model)
            if body.keys() != _backbone(source).keys():
                return {**facts, "problem": "the fine-tuned network has other layers than the pretrained one"}
            torch.nn.Module.to(source, next(model.parameters()).device)
            view = ImageView(images, processor)
            passes = []
            for step, weights in (("before", {}), ("after", body)):
                put_back(source, weights)
                with progress(f"source task {step} training", len(view)) as bar:
                    logits, labels = predict_split(
                        source, view, batch_size=batch_size, num_workers=num_workers, on_progress=bar.update
                    )
                passes.append(Measured(float((logits.argmax(1) == labels).mean()), logits, labels))
        return {**facts, **_compared(*passes)}


def _compared(before: Measured, after: Measured) -> dict[str, Any]:
    made = compare("accuracy", before, after)
    return {
        "before": _share(before),
        "after": _share(after),
        "difference": made.difference,
        "interval": None if made.interval is None else list(made.interval),
        "p_value": made.p_value,
        "method": made.method,
        "forgotten": made.losses,
        "gained": made.wins,
    }


def _share(measured: Measured) -> dict[str, Any]:
    right = np.asarray(measured.logits).argmax(1) == measured.labels
    return {"accuracy": measured.value, "interval": mid_p_interval(float(right.sum()), len(right))}


def _backbone(model: TorchvisionForImageClassification) -> Snapshot:
    """Returns the tensors before the final layer, by name, without those of auxiliary heads."""
    family = family_of(model.config.architecture)
    # An auxiliary head is a module of the network, of which its final layer is a part.
    heads = [family.final_layer, *(path.split(".")[0] for path in family.auxiliary)]
    prefixes = tuple(f"backbone.{path}." for path in heads)
    return {name: tensor for name, tensor in all_tensors(model).items() if not name.startswith(prefixes)}
