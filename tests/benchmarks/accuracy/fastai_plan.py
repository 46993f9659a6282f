"""fastai's `vision_learner(...).fine_tune(epochs - 1)` with its defaults, in an environment that has it.

    python fastai_plan.py JOB.json PREDICTIONS.json

The job says the images by split, as pairs of a file and a number of a class. As in fastai's tutorials, images are
resized and cropped to 460 / 224 of the size, and augmented to the size by `aug_transforms`. All else is fastai's
default: one epoch of the new head, then all layers, the backbone at up to a hundredth of the head's rate, base rate
2e-3, one cycle each, BatchNorm in training, last weights. mobilenet_v2, which fastai knows nothing about, is said to
end before its classifier and to want ImageNet's normalisation, as fastai has it for networks that it knows.
"""

import json
import sys
import time
from pathlib import Path

import torchvision
from fastai.vision.all import (
    CategoryBlock,
    DataBlock,
    ImageBlock,
    IndexSplitter,
    Resize,
    aug_transforms,
    default_split,
    imagenet_stats,
    model_meta,
    set_seed,
    vision_learner,
)
from safetensors.torch import load_file
from torch import nn


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    started = time.perf_counter()
    set_seed(job["seed"])

    def mobilenet_v2(pretrained: bool) -> nn.Module:
        model = torchvision.models.mobilenet_v2()
        model.load_state_dict(load_file(job["weights"]))
        return model

    model_meta[mobilenet_v2] = {"cut": -1, "split": default_split, "stats": imagenet_stats}
    train, validation = job["images"]["train"], job["images"]["validation"]
    # Each image is a list, as JSON has it: a tuple would be taken apart.
    block = DataBlock(
        blocks=(ImageBlock, CategoryBlock(vocab=list(range(job["classes"])), sort=False)),
        get_x=lambda pair: pair[0],
        get_y=lambda pair: pair[1],
        splitter=IndexSplitter(range(len(train), len(train) + len(validation))),
        item_tfms=Resize(round(job["size"] * 460 / 224)),
        batch_tfms=aug_transforms(size=job["size"]),
    )
    loaders = block.dataloaders([*train, *validation], bs=job["batch_size"])
    learner = vision_learner(loaders, mobilenet_v2)
    with learner.no_bar(), learner.no_logging():
        learner.fine_tune(job["epochs"] - 1, freeze_epochs=1)
        seconds = time.perf_counter() - started
        predicted = {}
        for split in ("validation", "test"):
            images = loaders.test_dl(job["images"][split])
            predicted[split] = learner.get_preds(dl=images)[0].argmax(1).tolist()
    Path(sys.argv[2]).write_text(json.dumps({"seconds": seconds, "predicted": predicted}), encoding="utf-8")


if __name__ == "__main__":
    main()
