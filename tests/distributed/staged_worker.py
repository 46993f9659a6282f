"""What the processes do whose results test_two_processes.py reads: staged runs on drawn images, by scenario.

    torchrun --nproc_per_node 2 staged_worker.py FOLDER BATCH_SIZE SCENARIO...

Each process writes FOLDER/SCENARIO-RANK.pt. One process with twice the batch size sees the same global batches.
"""

import contextlib
import os
import signal
import sys
import traceback
from pathlib import Path

import datasets
import numpy as np
import torch
import transformers
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from torchthaw import (
    Stage,
    ThawTrainer,
    ThawTrainingArguments,
    TorchvisionForImageClassification,
    TorchvisionImageProcessor,
)
from torchthaw.stages.proof import digest
from torchthaw.training import processes

ARCHITECTURE = "shufflenet_v2_x0_5"
CLASSES = ["ant", "bee", "cat"]
HEAD = Stage("head", "head", epochs=2, learning_rate=1e-2)
BLOCK = Stage("block", 1, epochs=2, learning_rate=1e-3)
ALL = Stage("all", "all", epochs=1, learning_rate=1e-4)
PLAN = [HEAD, BLOCK, ALL]
TRAINING_IMAGES, VALIDATION_IMAGES = 24, 15  # two global batches of 12; an odd number
WAIT = 60  # seconds that a process waits for the other at most


def rank():
    return int(os.environ.get("RANK", "0"))


def images(number, seed):
    """Noise with a bright channel that tells the class, not so clearly that the head alone finds all of them."""
    random = np.random.default_rng(seed)
    labels = np.arange(number) % len(CLASSES)
    pixels = random.integers(0, 200, size=(number, 40, 48, 3))
    pixels[np.arange(number), :, :, labels] += 25
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=CLASSES))
    columns = {"image": list(pixels.astype(np.uint8)), "label": labels.tolist()}
    return datasets.Dataset.from_dict(columns, features=features)


def tensors(number, seed):
    random = torch.Generator().manual_seed(seed)
    return [
        {"pixel_values": torch.randn(3, 32, 32, generator=random), "labels": torch.tensor(row % len(CLASSES))}
        for row in range(number)
    ]


def new_model():
    torch.manual_seed(0)
    return TorchvisionForImageClassification.from_torchvision(ARCHITECTURE, "builtin", id2label=CLASSES)


class Recorder(TrainerCallback):
    """Keeps the weights after each stage, and what the model was wrapped in while it ran."""

    def __init__(self):
        self.weights, self.wraps, self.trainer = [], [], None

    def on_stage_begin(self, args, state, control, **kwargs):
        self.wraps.append(self.trainer.model_wrapped)

    def on_stage_end(self, args, state, control, *, model, **kwargs):
        self.weights.append({name: tensor.detach().clone() for name, tensor in model.state_dict().items()})


class Watched(ThawTrainer):
    """Notes which pixels each step of training sees."""

    def training_step(self, model, inputs, *args, **kwargs):
        where = (self.state.stage_index, int(self.state.epoch or 0), self.state.global_step)
        self.seen.append((*where, [digest(image) for image in inputs["pixel_values"]]))
        return super().training_step(model, inputs, *args, **kwargs)


def staged(folder, batch_size, *, plan=PLAN, data=None, callbacks=(), model=None, resume=None, **options):
    """Makes a staged run; returns what there is to tell of it, whether it ended or failed."""
    defaults = {
        "plan": plan, "per_device_train_batch_size": batch_size, "augmentation": "light", "use_cpu": True,
        "report_to": "none", "disable_tqdm": True, "ddp_timeout": WAIT, "gate": "best",
    }  # fmt: skip
    recorder = Recorder()
    trainer = Watched(
        model=model or new_model(),
        args=ThawTrainingArguments(output_dir=str(folder), **{**defaults, **options}),
        train_dataset=images(TRAINING_IMAGES, 1) if data is None else data,
        eval_dataset=images(VALIDATION_IMAGES, 2),
        processing_class=TorchvisionImageProcessor.from_torchvision(ARCHITECTURE, "builtin", image_size=32),
        callbacks=[recorder, *callbacks],
    )
    recorder.trainer, trainer.seen = trainer, []
    for callback in callbacks:
        callback.trainer = trainer
    error = None
    try:
        trainer.train(resume_from_checkpoint=resume)
    except Exception as failure:  # noqa: BLE001 - reported, with its trace
        error = {"kind": type(failure).__name__, "message": str(failure), "trace": traceback.format_exc()}
    return {
        "error": error,
        "weights": recorder.weights,
        "final": {name: tensor.detach().clone() for name, tensor in trainer.model.state_dict().items()},
        "records": [record.to_dict() for record in trainer.stage_records],
        "log": trainer.state.log_history,
        "seen": trainer.seen,
        "wraps": [
            {"kind": type(wrap).__name__, "number": recorder.wraps.index(wrap)}
            | ({"finds unused": wrap.find_unused_parameters} if hasattr(wrap, "find_unused_parameters") else {})
            for wrap in recorder.wraps
        ],
    }



class Kill(TrainerCallback):
    """Ends the process at once in a step, as a power cut does."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 7:
            os.kill(os.getpid(), signal.SIGKILL)


class Meddle(TrainerCallback):
    """Changes a weight in the second process only."""

    def on_step_end(self, args, state, control, *, model, **kwargs):
        if state.global_step == 3 and rank() == 1:
            with torch.no_grad():
                model.backbone.fc.bias[0] += 1e-6


class Freeze(TrainerCallback):
    """Freezes a parameter in the second process only."""

    def on_stage_begin(self, args, state, control, *, model, **kwargs):
        if rank() == 1:
            model.backbone.fc.bias.requires_grad_(False)

class Break(TrainerCallback):
    """Fails in the first process only."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3 and rank() == 0:
            raise RuntimeError("something broke in the first process")


def plain(folder, batch_size):
    return staged(folder / f"plain-{rank()}", batch_size, report_to="tensorboard")


def kill(folder, batch_size):
    return staged(folder / "killed", batch_size, callbacks=[Kill()], save_strategy="steps", save_steps=3, load_best_model_at_end=False)

def meddle(folder, batch_size):
    return staged(folder / "meddle", batch_size, callbacks=[Meddle()])

def freeze(folder, batch_size):
    return staged(folder / "freeze", batch_size, callbacks=[Freeze()])

def other_plan(folder, batch_size):
    return staged(folder / "other_plan", batch_size, plan=PLAN if rank() == 0 else [ALL])

def other_rate(folder, batch_size):
    return staged(folder / "other_rate", batch_size, plan=PLAN if rank() == 0 else [HEAD, ALL])

def broken_image(folder, batch_size):
    data = tensors(24, 0)
    data[4]["pixel_values"][:] = float("nan")
    return staged(folder / "nan", batch_size, plan=[HEAD,BLOCK], data=data)

def batch_norm(folder, batch_size):
    return staged(folder / "bn", batch_size, plan=[Stage("a",1,epochs=2,learning_rate=1e-3,batch_norm="train"), Stage("b","all",epochs=1,learning_rate=1e-3,batch_norm="train")])

def sync(folder, batch_size):
    return staged(folder / "sync", batch_size, model=nn.SyncBatchNorm.convert_sync_batchnorm(new_model()), plan=[HEAD,Stage("a",1,epochs=2,learning_rate=1e-3,batch_norm="train")])

def stock_unfreezing(folder, batch_size):
    class Unfreeze(TrainerCallback):
        def on_epoch_begin(self, args, state, control, *, model, optimizer, **kwargs):
            if state.epoch == 1:
                model.requires_grad_(True)
                trainer.optimizer = trainer.lr_scheduler = None
                trainer.create_optimizer_and_scheduler(2)
    trainer = stock_trainer(folder, batch_size, num_train_epochs=2, callbacks=[Unfreeze()])
    trainer.train()
    return {"final": trainer.model.state_dict(), "error": None, "wraps":[], "records":[],"weights":[]}

def stock_twice(folder, batch_size):
    trainer = stock_trainer(folder, batch_size, num_train_epochs=1)
    trainer.train()
    trainer.model.requires_grad_(True)
    trainer.optimizer = trainer.lr_scheduler = None
    trainer.train()
    return {"final": trainer.model.state_dict(), "error": None, "wraps":[], "records":[],"weights":[]}

def stock_trainer(folder, batch_size, callbacks=(), **options):
    model = new_model()
    model.requires_grad_(False)
    model.backbone.fc.requires_grad_(True)
    args = TrainingArguments(output_dir=str(folder / "stock"), per_device_train_batch_size=batch_size, report_to="none", use_cpu=True, disable_tqdm=True, save_strategy="no", learning_rate=1e-3, ddp_find_unused_parameters=False, **options)
    return Trainer(model, args, train_dataset=tensors(24, 0), callbacks=list(callbacks))

def missing_checkpoint(folder, batch_size):
    return staged(folder / "missing", batch_size, resume=True)

def crash(folder, batch_size):
    return staged(folder / "crash", batch_size, callbacks=[Break()])


SCENARIOS = {function.__name__: function for function in (plain, kill, meddle, freeze, other_plan, other_rate, broken_image, batch_norm, sync, stock_unfreezing, stock_twice, missing_checkpoint, crash)}


def main(folder, batch_size, names):
    transformers.utils.logging.set_verbosity_error()
    import time
    for name in names:
        t=time.time()
        report = SCENARIOS[name](folder, batch_size)
        torch.save(report, folder / f"{name}-{rank()}.pt")
        print(name, rank(), time.time()-t, flush=True)
        processes.wait()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
