"""fastai: one Learner, its layer groups frozen and unfrozen, fitted stage by stage with its best weights saved."""

import tempfile

import torch
from common import (
    BATCH,
    CLIP_NORM,
    CROP_SCALE,
    FLIP,
    GROUPS,
    STAGES,
    WARMUP,
    WEIGHT_DECAY,
    Clock,
    Task,
    finish,
    group_modules,
)
from fastai.callback.schedule import ParamScheduler, combined_cos
from fastai.callback.tracker import SaveModelCallback
from fastai.callback.training import BnFreeze, GradientClip
from fastai.data.transforms import Normalize
from fastai.layers import norm_types
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.torch_core import params
from fastai.vision.augment import FlipItem, RandomResizedCrop
from fastai.vision.core import imagenet_stats
from fastai.vision.data import ImageDataLoaders
from torch import nn

# Layer groups as fastai counts them, from the input to the head.
ORDER = list(GROUPS)[::-1]


def split(model: nn.Module) -> list[list[nn.Parameter]]:
    return [params(group_modules(model, name)) for name in ORDER]


def main() -> None:
    task = Task.from_command_line()
    clock = Clock(task)
    loaders = ImageDataLoaders.from_folder(
        task.data,
        train="train",
        valid="val",
        seed=task.seed,
        bs=BATCH,
        num_workers=task.workers,
        item_tfms=[RandomResizedCrop(task.size, min_scale=CROP_SCALE[0]), FlipItem(FLIP)],
        batch_tfms=[Normalize.from_stats(*imagenet_stats)],
    )
    model = task.new_model()
    with tempfile.TemporaryDirectory() as folder:
        learner = Learner(
            loaders,
            model,
            loss_func=CrossEntropyLossFlat(),
            splitter=split,
            metrics=accuracy,
            cbs=[BnFreeze, GradientClip(CLIP_NORM)],
            wd=WEIGHT_DECAY,
            train_bn=False,
            path=folder,
        )
        # The next stages only save what is better than the best of the stages before.
        best: float | None = None
        with learner.no_bar(), learner.no_logging():
            for stage, epochs in zip(STAGES, task.epochs, strict=True):
                with clock.stage(stage.name, epochs):
                    learner.freeze_to(-len(stage.rates))
                    for module in model.modules():
                        if isinstance(module, norm_types):
                            module.requires_grad_(False)
                    rates = torch.tensor([stage.rates.get(name, 0.0) for name in ORDER]).numpy()
                    course = combined_cos(WARMUP, rates * 0, rates, rates * 0)
                    # Ends with the best weights loaded.
                    keeper = SaveModelCallback(monitor="accuracy", fname=stage.name)
                    learner.fit(epochs, lr=rates, cbs=[ParamScheduler({"lr": course}), keeper])
                    if best is None or keeper.best > best:
                        best, kept = keeper.best, stage.name
                    else:
                        learner.load(kept)
        clock.stop()
    finish(clock, model.state_dict(), ("fastai",))


if __name__ == "__main__":
    main()
