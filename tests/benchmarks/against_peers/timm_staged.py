"""timm: its data loader, optimizer factory, schedule and checkpoint saver around torchvision's network.

The loop is that of timm's train.py. timm's own mobilenetv2 has another state_dict, so that torchvision's is trained.
"""

import logging
import tempfile
from pathlib import Path

import torch
from common import (
    BATCH,
    CLIP_NORM,
    CROP_SCALE,
    FLIP,
    MEAN,
    STAGES,
    STD,
    WARMUP,
    Clock,
    Stage,
    Task,
    finish,
    freeze,
    optimizer_groups,
)
from timm.data import create_dataset, create_loader
from timm.layers import freeze_batch_norm_2d, unfreeze_batch_norm_2d
from timm.models import load_checkpoint
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import AverageMeter, CheckpointSaver, accuracy, dispatch_clip_grad
from torch import nn
from torch.utils.data import DataLoader

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def new_loaders(task: Task) -> tuple[DataLoader, DataLoader]:
    options = {
        "input_size": (3, task.size, task.size),
        "batch_size": BATCH,
        "mean": MEAN,
        "std": STD,
        "interpolation": "bilinear",
        "num_workers": task.workers,
        "device": DEVICE,
    }
    train_images, val_images = (create_dataset("", root=str(task.data), split=split) for split in ("train", "val"))
    train_loader = create_loader(
        train_images, is_training=True, scale=CROP_SCALE, hflip=FLIP, color_jitter=None, **options
    )
    return train_loader, create_loader(val_images, crop_pct=224 / 256, **options)


def train_stage(
    model: nn.Module, stage: Stage, epochs: int, loaders: tuple[DataLoader, DataLoader], saver: CheckpointSaver
) -> None:
    train_loader, val_loader = loaders
    freeze(model, stage)
    optimizer = create_optimizer_v2(
        model, opt="adamw", lr=1e-3, param_group_fn=lambda network: optimizer_groups(network, stage)
    )
    steps = epochs * len(train_loader)
    warmup = round(WARMUP * steps)
    schedule = CosineLRScheduler(optimizer, t_initial=steps, warmup_t=warmup, t_in_epochs=False)
    saver.optimizer = optimizer
    updates = 0
    schedule.step_update(updates)
    for epoch in range(epochs):
        model.train()
        for pixels, labels in train_loader:
            loss = nn.functional.cross_entropy(model(pixels), labels)
            optimizer.zero_grad()
            loss.backward()
            dispatch_clip_grad(model.parameters(), CLIP_NORM)
            optimizer.step()
            updates += 1
            schedule.step_update(updates)
        saver.save_checkpoint(epoch, metric=validate(model, val_loader))


@torch.inference_mode()
def validate(model: nn.Module, loader: DataLoader) -> float:
    model.eval()
    meter = AverageMeter()
    for pixels, labels in loader:
        meter.update(accuracy(model(pixels), labels)[0].item(), len(labels))
    return meter.avg


def main() -> None:
    logging.disable(logging.WARNING)
    task = Task.from_command_line()
    clock = Clock(task)
    loaders = new_loaders(task)
    # BatchNorm layers become FrozenBatchNorm2d in place.
    model = freeze_batch_norm_2d(task.new_model().to(DEVICE))
    with tempfile.TemporaryDirectory() as folder:
        saver = CheckpointSaver(model, None, checkpoint_dir=folder, recovery_dir=folder, max_history=1)
        for stage, epochs in zip(STAGES, task.epochs, strict=True):
            with clock.stage(stage.name, epochs):
                train_stage(model, stage, epochs, loaders, saver)
                # The next stage goes on from the best weights.
                load_checkpoint(model, str(Path(folder, "model_best.pth.tar")))
        clock.stop()
    del loaders
    finish(clock, unfreeze_batch_norm_2d(model).state_dict(), ("timm",))


if __name__ == "__main__":
    main()
