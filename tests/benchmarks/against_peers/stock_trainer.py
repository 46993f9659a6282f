"""transformers' own Trainer, staged by hand: one Trainer for each stage, with checkpoints and the best one loaded."""

import copy
import tempfile

import numpy as np
import torch
from common import (
    BATCH,
    CLIP_NORM,
    STAGES,
    WARMUP,
    Clock,
    Stage,
    Task,
    finish,
    freeze,
    hold_batch_norm,
    optimizer_groups,
)
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments
from transformers.utils import logging


class Classifier(nn.Module):
    """What Trainer needs around a torchvision network: a loss, names, and BatchNorm that `train()` leaves alone."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def train(self, mode: bool = True) -> "Classifier":
        super().train(mode)
        hold_batch_norm(self)
        return self

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.network(pixel_values)
        if labels is None:
            return {"logits": logits}
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def collate(samples: list[tuple[Tensor, int]]) -> dict[str, Tensor]:
    return {
        "pixel_values": torch.stack([pixels for pixels, _ in samples]),
        "labels": torch.tensor([label for _, label in samples]),
    }


def accuracy(outcome: tuple[np.ndarray, np.ndarray]) -> dict[str, float]:
    logits, labels = outcome
    return {"accuracy": float((logits.argmax(1) == labels).mean())}


def new_trainer(task: Task, model: Classifier, stage: Stage, epochs: int, images: tuple[Dataset, Dataset], folder: str):
    arguments = TrainingArguments(
        output_dir=folder,
        num_train_epochs=epochs,
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=BATCH,
        dataloader_num_workers=task.workers,
        lr_scheduler_type="cosine",
        # A share of all steps, if below 1.
        warmup_steps=WARMUP,
        max_grad_norm=CLIP_NORM,
        eval_strategy="epoch",
        save_strategy="epoch",
        logging_strategy="epoch",
        save_total_limit=1,
        load_best_model_at_end=True,
        metric_for_best_model="accuracy",
        remove_unused_columns=False,
        report_to=[],
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        seed=task.seed,
    )
    freeze(model.network, stage)
    return Trainer(
        model=model,
        args=arguments,
        train_dataset=images[0],
        eval_dataset=images[1],
        data_collator=collate,
        compute_metrics=accuracy,
        optimizers=(torch.optim.AdamW(optimizer_groups(model.network, stage)), None),
    )


def main() -> None:
    logging.set_verbosity_error()
    task = Task.from_command_line()
    clock = Clock(task)
    images = task.folders()
    model = Classifier(task.new_model())
    best_accuracy, best = -1.0, {}
    with tempfile.TemporaryDirectory() as folder:
        for number, (stage, epochs) in enumerate(zip(STAGES, task.epochs, strict=True)):
            with clock.stage(stage.name, epochs):
                trainer = new_trainer(task, model, stage, epochs, images, f"{folder}/{number}")
                trainer.train()
                # The stage's best weights are loaded; the next stage goes on from the best of all.
                if trainer.state.best_metric > best_accuracy:
                    best_accuracy, best = trainer.state.best_metric, copy.deepcopy(model.state_dict())
                else:
                    model.load_state_dict(best)
        clock.stop()
    finish(clock, model.network.state_dict(), ("transformers", "accelerate"))


if __name__ == "__main__":
    main()
