"""A loop as one writes it by hand, with torch and torchvision alone."""

import copy

import torch
from common import (
    BATCH,
    CLIP_NORM,
    STAGES,
    Clock,
    Stage,
    Task,
    finish,
    freeze,
    hold_batch_norm,
    optimizer_groups,
    rate_factor,
)
from torch import nn
from torch.utils.data import DataLoader


def main() -> None:
    task = Task.from_command_line()
    clock = Clock(task)
    train_images, val_images = task.folders()
    model = task.new_model()
    train_loader = DataLoader(train_images, BATCH, shuffle=True, num_workers=task.workers)
    val_loader = DataLoader(val_images, BATCH, num_workers=task.workers)
    best_accuracy, best = -1.0, {}
    for stage, epochs in zip(STAGES, task.epochs, strict=True):
        with clock.stage(stage.name, epochs):
            for accuracy in train_stage(model, stage, epochs, train_loader, val_loader):
                if accuracy > best_accuracy:
                    best_accuracy, best = accuracy, copy.deepcopy(model.state_dict())
            # The next stage goes on from the best weights.
            model.load_state_dict(best)
    clock.stop()
    del train_loader, val_loader
    finish(clock, best, ())


def train_stage(model: nn.Module, stage: Stage, epochs: int, train_loader: DataLoader, val_loader: DataLoader):
    freeze(model, stage)
    optimizer = torch.optim.AdamW(optimizer_groups(model, stage))
    steps = epochs * len(train_loader)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_factor(step, steps))
    for _ in range(epochs):
        model.train()
        hold_batch_norm(model)
        for pixels, labels in train_loader:
            loss = nn.functional.cross_entropy(model(pixels), labels)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
            optimizer.step()
            schedule.step()
        yield accuracy_of(model, val_loader)


@torch.no_grad()
def accuracy_of(model: nn.Module, loader: DataLoader) -> float:
    model.eval()
    right = sum(int((model(pixels).argmax(1) == labels).sum()) for pixels, labels in loader)
    return right / len(loader.dataset)


if __name__ == "__main__":
    main()
