"""PyTorch Lightning: one fit, with a finetuning callback that unfreezes at the stages' epochs."""

import logging
import tempfile
import time
import warnings

import lightning as L
import torch
from common import BATCH, CLIP_NORM, STAGES, Clock, Task, finish, freeze, hold_batch_norm, optimizer_groups, rate_factor
from lightning.pytorch.callbacks import BaseFinetuning, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader


class Classifier(L.LightningModule):
    """A torchvision network with loss and accuracy."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def training_step(self, batch: tuple[Tensor, Tensor], _index: int) -> Tensor:
        pixels, labels = batch
        return nn.functional.cross_entropy(self.network(pixels), labels)

    def validation_step(self, batch: tuple[Tensor, Tensor], _index: int) -> None:
        pixels, labels = batch
        self.log("accuracy", (self.network(pixels).argmax(1) == labels).float().mean(), batch_size=len(labels))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(optimizer_groups(self.network, STAGES[0]))


class StagedFinetuning(BaseFinetuning):
    """Begins with the head, and unfreezes and sets rates where a stage begins; as `BackboneFinetuning` does."""

    def __init__(self, epochs: tuple[int, ...], clock: Clock) -> None:
        super().__init__()
        self.epochs, self.clock = epochs, clock
        self.starts = [sum(epochs[:number]) for number in range(len(epochs))]

    def freeze_before_training(self, pl_module: L.LightningModule) -> None:
        freeze(pl_module.network, STAGES[0])

    def finetune_function(self, pl_module: L.LightningModule, epoch: int, optimizer: torch.optim.Optimizer) -> None:
        # BatchNorm is in train mode again after each validation.
        hold_batch_norm(pl_module)
        if epoch not in self.starts:
            return
        self.number = self.starts.index(epoch)
        self.begun, self.step = time.perf_counter(), 0
        stage = STAGES[self.number]
        freeze(pl_module.network, stage)
        optimizer.param_groups.clear()
        optimizer.state.clear()
        for group in optimizer_groups(pl_module.network, stage):
            optimizer.add_param_group({**group, "peak": group["lr"]})

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: object) -> None:
        factor = rate_factor(self.step, self.epochs[self.number] * trainer.num_training_batches)
        for group in trainer.optimizers[0].param_groups:
            group["lr"] = group["peak"] * factor
        self.step += 1

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Validation came before.
        if trainer.current_epoch + 1 == self.starts[self.number] + self.epochs[self.number]:
            seconds = time.perf_counter() - self.begun
            self.clock.add_stage(STAGES[self.number].name, self.epochs[self.number], seconds)


def main() -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    task = Task.from_command_line()
    clock = Clock(task)
    train_images, val_images = task.folders()
    model = Classifier(task.new_model())
    with tempfile.TemporaryDirectory() as folder:
        best = ModelCheckpoint(folder, monitor="accuracy", mode="max")
        trainer = L.Trainer(
            max_epochs=sum(task.epochs),
            gradient_clip_val=CLIP_NORM,
            callbacks=[StagedFinetuning(task.epochs, clock), best],
            default_root_dir=folder,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )
        trainer.fit(
            model,
            DataLoader(train_images, BATCH, shuffle=True, num_workers=task.workers),
            DataLoader(val_images, BATCH, num_workers=task.workers),
        )
        state = torch.load(best.best_model_path, weights_only=True)["state_dict"]
        clock.stop()
    weights = {name.removeprefix("network."): tensor for name, tensor in state.items()}
    finish(clock, weights, ("lightning",))


if __name__ == "__main__":
    main()
