"""Runs of a small network on drawn images, by scenario, whose results test_two_processes.py reads.

    torchrun --nproc_per_node 2 staged_worker.py FOLDER BATCH_SIZE SCENARIO...

Each process writes FOLDER/SCENARIO-RANK.pt. One process with twice the batch size sees the same global batches.
"""

import os
import signal
import sys
import traceback
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from unittest.mock import patch

import datasets
import numpy as np
import torch
import torch.distributed as dist
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
from torchthaw.stages import auto
from torchthaw.stages.proof import digest
from torchthaw.training import processes
from torchthaw.training.step_checks import can_leave_out

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))
from small_transformers import small_model

ARCHITECTURE = "shufflenet_v2_x0_5"
CLASSES = ["ant", "bee", "cat"]
TRAINING_IMAGES, VALIDATION_IMAGES = 24, 15  # two global batches of 12; an odd number
RANK = int(os.environ.get("RANK", "0"))

HEAD = Stage("head", "head", epochs=2, learning_rate=1e-2)
WRECK = Stage("wreck", 1, epochs=2, learning_rate=3.0, optimizer="sgd")
PLAN = [HEAD, WRECK, Stage("all", "all", epochs=1, learning_rate=1e-4)]
STEPS_OF_STREAM = (5, 3)  # two and a half passes, one and a half


def images(number, seed):
    """Noise with a bright channel that tells the class, not so clearly that the head alone finds all of them."""
    random = np.random.default_rng(seed)
    labels = np.arange(number) % len(CLASSES)
    pixels = random.integers(0, 200, size=(number, 40, 48, 3))
    pixels[np.arange(number), :, :, labels] += 25
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=CLASSES))
    columns = {"image": list(pixels.astype(np.uint8)), "label": labels.tolist()}
    return datasets.Dataset.from_dict(columns, features=features)


def tensors():
    random = torch.Generator().manual_seed(0)
    return [
        {"pixel_values": torch.randn(3, 32, 32, generator=random), "labels": torch.tensor(row % len(CLASSES))}
        for row in range(TRAINING_IMAGES)
    ]


def new_model(seed=0):
    torch.manual_seed(seed)
    return TorchvisionForImageClassification.from_torchvision(ARCHITECTURE, "builtin", id2label=CLASSES)


def copied(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


class Recorder(TrainerCallback):
    """Keeps the weights after each stage, and what the model was wrapped in while it ran."""

    def __init__(self):
        self.weights, self.wraps = [], []

    def on_stage_begin(self, args, state, control, **kwargs):
        self.wraps.append(self.trainer.model_wrapped)

    def on_stage_end(self, args, state, control, *, model, **kwargs):
        self.weights.append(copied(model))


class WatchedTrainer(ThawTrainer):
    """Notes which pixels each step of training sees, and spoils an image of the second process if it is to."""

    spoiled = None

    def training_step(self, model, inputs, *args, **kwargs):
        if (self.stage.name, self.state.global_step, RANK) == self.spoiled:
            inputs["pixel_values"][2, 0, 0, 0] = float("nan")
        where = (self.state.stage_index, int(self.state.epoch or 0), self.state.global_step)
        if "pixel_values" in inputs:  # and not what frozen layers made of them
            self.seen.append((*where, [digest(image) for image in inputs["pixel_values"]]))
        return super().training_step(model, inputs, *args, **kwargs)


def staged(folder, batch_size, *, plan=PLAN, data=None, callbacks=(), model=None, resume=None, spoiled=None, **options):
    """Makes a staged run; returns what there is to tell of it, whether it ended or failed."""
    recorder = Recorder()
    defaults = {"augmentation": "light", "gate": "best", "metric_for_best_model": "loss", "report_to": "none"}
    torch.manual_seed(0)
    trainer = WatchedTrainer(
        model=model or new_model(),
        args=ThawTrainingArguments(
            output_dir=str(folder),
            plan=plan,
            per_device_train_batch_size=batch_size,
            use_cpu=True,
            disable_tqdm=True,
            **{**defaults, **options},
        ),
        train_dataset=images(TRAINING_IMAGES, seed=1) if data is None else data,
        eval_dataset=images(VALIDATION_IMAGES, seed=2),
        processing_class=TorchvisionImageProcessor.from_torchvision(ARCHITECTURE, "builtin", image_size=32),
        callbacks=[recorder, *callbacks],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    recorder.trainer, trainer.seen, trainer.spoiled = trainer, [], spoiled
    error = None
    try:
        trainer.train(resume_from_checkpoint=resume)
    except Exception as failure:  # noqa: BLE001 - reported, with its trace
        error = {"kind": type(failure).__name__, "message": str(failure), "trace": traceback.format_exc()}
    return {
        "error": error,
        "weights": recorder.weights,
        "final": copied(trainer.model),
        "records": [record.to_dict() for record in trainer.stage_records],
        "log": trainer.state.log_history,
        "seen": trainer.seen,
        "wraps": [
            {
                "kind": type(wrap).__name__,
                "same as": recorder.wraps.index(wrap),
                "finds unused": getattr(wrap, "find_unused_parameters", None),
            }
            for wrap in recorder.wraps
        ],
    }


# Runs that go well

IN_STEPS = {"save_strategy": "steps", "save_steps": 3, "load_best_model_at_end": False}


def plain(folder, batch_size):
    # Folders of their own show what each process writes.
    return staged(folder / f"plain-{RANK}", batch_size, report_to="tensorboard", **IN_STEPS)


def resumed(folder, batch_size):
    return staged(folder / "killed", batch_size, resume=True, **IN_STEPS)


def resumed_with_other_batches(folder, batch_size):
    return staged(folder / "killed", batch_size // 2, resume=True, **IN_STEPS)


def batch_norm(folder, batch_size):
    plan = [
        Stage("block", 1, epochs=2, learning_rate=1e-3, batch_norm="train"),
        Stage("all", "all", epochs=1, learning_rate=1e-3, batch_norm="freeze_affine"),
    ]
    return staged(folder / "batch norm", batch_size, plan=plan, gate="off")


def averaged(folder, batch_size):
    plan = [
        Stage("head", "head", epochs=2, learning_rate=1e-2, average="ema"),
        Stage("block", 1, epochs=2, learning_rate=1e-3, average="swa"),
        Stage("norms", 1, epochs=2, learning_rate=1e-3, average="swa", batch_norm="train"),
    ]
    return staged(folder / "averaged", batch_size, plan=plan, wise_ft=True)


def weighted_draws(folder, batch_size):
    """Batches of the processes, and those whose gradients are accumulated, have other weights than each other."""
    plan = [Stage("one", "head", epochs=2, learning_rate=1e-2), Stage("two", "head", epochs=1, learning_rate=1e-2)]
    return staged(
        folder / "weighted", batch_size // 2, plan=plan, gradient_accumulation_steps=2, gate="off", sampling="balanced",
        class_weights={"ant": 0.2, "bee": 1.0, "cat": 7.0}, label_smoothing_factor=0.1,
    )  # fmt: skip


def adapters(folder, batch_size):
    """Low-rank adapters on a transformer, drawn by each process for itself."""
    plan = [HEAD, Stage("adapters", "all", epochs=2, learning_rate=1e-2, lora=4)]
    return staged(folder / f"adapters-{RANK}", batch_size, plan=plan, model=small_model("vit_b_16", seed=RANK))


def probe(folder, batch_size):
    """The head by logistic regression, then everything as that speaks for, over accumulated gradients."""
    return staged(
        folder / f"probe-{RANK}", batch_size // 2, plan="auto", num_train_epochs=3, gradient_accumulation_steps=2,
        gate="off",
    )  # fmt: skip


def far(folder, batch_size):
    """Images count as far from those of pretraining, so that BatchNorm trains, and the head anew."""
    with far_images(FAR_IMAGES=1, FAR_STEPS=1, SMALL_BATCH=1):
        return staged(folder / f"far-{RANK}", batch_size, plan="auto", num_train_epochs=3, gate="off")


def both_ways(folder, batch_size):
    """Images count as far from those of pretraining, and as too few to learn BatchNorm's statistics for certain."""
    with far_images(FEW_IMAGES=1, TRY_IMAGES=1, TRY_BATCH=1, TRY_STEPS=1):
        return staged(folder / f"both-ways-{RANK}", batch_size, plan="auto", num_train_epochs=3, gate="best")


@contextmanager
def far_images(**found):
    found = {"FAR_SHIFT": 0.0, "FAR_PROBE": 0.0, "FAR_BITS": 1, **found}
    usual = {name: getattr(auto, name) for name in found}
    vars(auto).update(found)
    try:
        yield
    finally:
        vars(auto).update(usual)


def own_heads(folder, batch_size):
    """Each process draws another head, and the stage is rolled back to it."""
    plan = [Stage("wreck", 1, epochs=1, learning_rate=100.0, warmup=0.0, optimizer="sgd")]
    model = new_model(seed=RANK)
    model.head_is_new = False  # as of heads that there is something to go back to
    return staged(folder / "own heads", batch_size, plan=plan, model=model)


def pulled(folder, batch_size):
    """Weights are pulled to where they began, over a border of stages and with accumulated gradients."""
    plan = [
        Stage("block", 1, epochs=2, learning_rate=5e-3),
        Stage("all", "all", epochs=2, learning_rate=2e-3, layer_decay=0.5),
    ]
    return staged(
        folder / f"pulled-{RANK}", batch_size // 2, plan=plan, gradient_accumulation_steps=2, gate="off", l2_sp=50.0
    )


def stream(folder, batch_size, **options):
    plan = [Stage(f"stage {steps}", "head", steps=steps, learning_rate=1e-2) for steps in STEPS_OF_STREAM]
    data = images(TRAINING_IMAGES, seed=1).to_iterable_dataset(num_shards=3).shuffle(seed=0, buffer_size=10)
    return staged(folder / "stream", batch_size, plan=plan, data=data, load_best_model_at_end=False, **options)


def stream_read_by_each(folder, batch_size):
    return stream(folder, batch_size, accelerator_config={"dispatch_batches": False})


# Runs in which something differs between the processes, or breaks


class Kill(TrainerCallback):
    """Ends the process at once in a step, as a power cut does."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 7:
            os.kill(os.getpid(), signal.SIGKILL)


class ChangeWeight(TrainerCallback):
    def on_step_end(self, args, state, control, *, model, **kwargs):
        if state.global_step == 3 and RANK == 1:
            with torch.no_grad():
                model.backbone.fc.bias[0] += 1e-6


class ChangeFrozenWeight(TrainerCallback):
    def on_step_end(self, args, state, control, *, model, **kwargs):
        if state.global_step == 3 and RANK == 1:
            with torch.no_grad():
                model.backbone.conv5[0].weight[0] += 1e-6


class Freeze(TrainerCallback):
    def on_stage_begin(self, args, state, control, *, model, stage, **kwargs):
        if stage.name == "wreck" and RANK == 1:
            model.backbone.fc.bias.requires_grad_(False)


class Break(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3 and RANK == 0:
            # Not an Exception, so that nothing of this file catches it.
            raise SystemExit("something broke in the first process")


def kill(folder, batch_size):
    return staged(folder / "killed", batch_size, callbacks=[Kill()], **IN_STEPS)


def change_weight(folder, batch_size):
    return staged(folder / "change", batch_size, callbacks=[ChangeWeight()])


def change_frozen_weight(folder, batch_size):
    return staged(folder / "change frozen", batch_size, callbacks=[ChangeFrozenWeight()])


def freeze(folder, batch_size):
    return staged(folder / "freeze", batch_size, callbacks=[Freeze()])


def other_plan(folder, batch_size):
    return staged(folder / "other plan", batch_size, plan=PLAN if RANK == 0 else PLAN[:2])


def broken_image(folder, batch_size):
    return staged(folder / "nan", batch_size, spoiled=("wreck", 5, 1), gate="off")


def broken_image_settled_later(folder, batch_size):
    """As on GPUs: the optimizer leaves out the step, and both processes hear of it in the next one."""
    fused = Stage("wreck", 1, epochs=2, learning_rate=1e-3, optimizer="adamw_torch_fused")
    with patch.object(WatchedTrainer, "_settles_later", lambda self: can_leave_out(self.create_optimizer())):
        plan = [HEAD, fused, PLAN[2]]
        return staged(folder / "nan later", batch_size, plan=plan, spoiled=("wreck", 5, 1), gate="off")


def missing_checkpoint(folder, batch_size):
    return staged(folder / "missing", batch_size, resume=True)


def synchronized_batch_norm(folder, batch_size):
    plan = [Stage("block", 1, epochs=1, learning_rate=1e-3, batch_norm="train")]
    return staged(folder / "sync", batch_size, plan=plan, model=nn.SyncBatchNorm.convert_sync_batchnorm(new_model()))


def break_first(folder, batch_size):
    return staged(folder / "break", batch_size, callbacks=[Break()])


# `Trainer`, with the usual ways to unfreeze


def stock_trainer(folder, batch_size, callbacks=(), **options):
    model = new_model()
    model.requires_grad_(False)
    model.backbone.fc.requires_grad_(True)
    arguments = TrainingArguments(
        output_dir=str(folder / "stock"),
        per_device_train_batch_size=batch_size,
        learning_rate=1e-3,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )
    return Trainer(model, arguments, train_dataset=tensors(), callbacks=list(callbacks))


def stock_callback(folder, batch_size):
    class Unfreeze(TrainerCallback):
        def on_epoch_begin(self, args, state, control, *, model, **kwargs):
            if state.epoch == 1:
                model.requires_grad_(True)
                trainer.optimizer = trainer.lr_scheduler = None
                trainer.create_optimizer_and_scheduler(2)

    trainer = stock_trainer(folder, batch_size, [Unfreeze()], num_train_epochs=2, ddp_find_unused_parameters=True)
    trainer.train()
    return {"final": copied(trainer.model)}


def stock_second_train(folder, batch_size):
    trainer = stock_trainer(folder, batch_size, num_train_epochs=1)
    trainer.train()
    trainer.model.requires_grad_(True)
    trainer.optimizer = trainer.lr_scheduler = None
    trainer.train()
    return {"final": copied(trainer.model)}


def main(folder, batch_size, names):
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if "RANK" in os.environ:
        # Here, as `ddp_timeout` does not count on a CPU, and nothing may wait for long.
        dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    for name in names:
        report = globals()[name](folder, batch_size)
        torch.save(report, folder / f"{name}-{RANK}.pt")
        processes.wait()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
