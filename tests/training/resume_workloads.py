"""Staged runs in processes of their own, for tests that kill them; started as a script, not collected as a test.

The script imports everything once and then forks a child for each run that it is asked for, so that a run costs about
a second. It reads one request a line and answers each with one line, both JSON; see `serve`.
"""

import gc
import json
import logging
import os
import re
import signal
import sys
import time
from pathlib import Path

# What a run imports only when it needs it is imported before the fork.
import sklearn.metrics  # noqa: F401
import torch
import torch._dynamo
import torch.distributed.tensor
import transformers
from safetensors.torch import save_file
from torch.nn import functional as F

from torchthaw import (
    Stage,
    ThawTrainer,
    ThawTrainingArguments,
    TorchvisionForImageClassification,
    TorchvisionImageProcessor,
    load_image_dataset,
    split_dataset,
)
from torchthaw.training.callbacks import StageCallback
from torchthaw.training.resume import has_checkpoint

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))
from small_transformers import small_model

ARCHITECTURE = "shufflenet_v2_x0_5"

# 4 steps an epoch: steps 1 to 4, 5 to 12 and 13 to 16 of the run. By validation loss, the gate keeps the first two
# stages and rolls back the last one.
PLAN = [
    Stage("head", "head", epochs=1, learning_rate=5e-3),
    Stage("last block", 1, epochs=2, learning_rate={"head": 2e-2, "backbone": 2e-2}, batch_norm="train"),
    Stage("all", "all", epochs=1, learning_rate=1e-3, layer_decay=0.5, batch_norm="train"),
]
# As long, with low-rank adapters on a transformer in the second stage.
PLAN_OF_ADAPTERS = [
    PLAN[0],
    Stage("adapters", "all", epochs=2, learning_rate=2e-2, lora=4),
    Stage("all", "all", epochs=1, learning_rate=1e-4),
]
AUGMENTATION = {"crop_scale": [0.5, 1.0], "mixup": 0.4}

LAYOUTS = {
    "epochs": {},
    "steps": {
        "save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2,
        "logging_strategy": "steps", "logging_steps": 3,
    },
    # The last weights of each stage are kept, and losses are carried over several checkpoints and borders of stages.
    "often": {
        "save_strategy": "steps", "save_steps": 1, "save_total_limit": 2, "eval_strategy": "epoch",
        "logging_strategy": "steps", "logging_steps": 5, "load_best_model_at_end": False, "gate": "off",
    },
    "adapters": {
        "plan": PLAN_OF_ADAPTERS, "save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2,
        "logging_strategy": "steps", "logging_steps": 3,
    },
}  # fmt: skip


class Kill(StageCallback):
    """Kills the process when an event of a callback comes for the nth time, at any step or at one step only."""

    def __init__(self, event, step=None, number=1):
        self.step, self.left = step, number
        setattr(self, event, self.strike)

    def strike(self, args, state, control, **_):
        if self.step is None or state.global_step == self.step:
            self.left -= 1
            if self.left == 0:
                die()


class Notes(transformers.TrainerCallback):
    """Notes where a run began and how many steps it made."""

    def __init__(self):
        self.went_on_from, self.steps = 0, 0

    def on_train_begin(self, args, state, control, **_):
        self.went_on_from = state.global_step

    def on_step_end(self, args, state, control, **_):
        self.steps += 1


def kill_at_files(events):
    """Kills the process before the last of some operations on files, once those before it have come in this order.

    Args:
        events: Pairs of an audit event and a pattern of its path (of a renamed file: of the name it gets), with the
            mode after it for `open`.
    """
    left = [(event, re.compile(pattern)) for event, pattern in events]

    def watch(event, arguments):
        if left and event == left[0][0] and left[0][1].search(" ".join(map(str, arguments[:2]))):
            del left[0]
            if not left:
                die()

    sys.addaudithook(watch)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def new_model():
    transformers.set_seed(0)
    model = TorchvisionForImageClassification.from_torchvision(
        ARCHITECTURE, weights="builtin", id2label=["ant", "bee", "cat"]
    )
    # No small architecture has both dropout and BatchNorm that learns quickly.
    model.backbone.fc.register_forward_pre_hook(
        lambda head, inputs: F.dropout(inputs[0], p=0.3, training=head.training)
    )
    return model


def run(model, splits, folder, layout, kill):
    """Runs to the end, from the last whole checkpoint if there is one, and writes what came out beside the run."""
    if layout == "adapters":
        model = small_model("vit_b_16", dropout=0.1)
    output, notes = Path(folder) / "run", Notes()
    callbacks = [notes]
    if kill and "files" in kill:
        kill_at_files(kill["files"])
    elif kill:
        callbacks.append(Kill(**kill))
    trainer = ThawTrainer(
        model=model,
        args=ThawTrainingArguments(
            output_dir=str(output),
            augmentation=AUGMENTATION,
            per_device_train_batch_size=4,
            per_device_eval_batch_size=4,
            metric_for_best_model="loss",
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            **{"plan": PLAN, **LAYOUTS[layout]},
        ),
        train_dataset=splits["train"],
        eval_dataset=splits["validation"],
        processing_class=TorchvisionImageProcessor.from_torchvision(ARCHITECTURE, weights="builtin", image_size=32),
        callbacks=callbacks,
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train(resume_from_checkpoint=has_checkpoint(output) or None)
    save_file(trainer.model.state_dict(), Path(folder) / "weights.safetensors")
    result = {
        "history": trainer.state.log_history,
        "records": [record.to_dict() for record in trainer.stage_records],
        "best": [trainer.state.best_metric, trainer.state.best_global_step],
        "went_on_from": notes.went_on_from,
        "steps": notes.steps,
    }
    (Path(folder) / "result.json").write_text(json.dumps(result))


def forked(model, splits, request):
    """Runs a request in a child; returns its exit code, as `subprocess` has it, and the seconds it took."""
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            log = os.open(Path(request["folder"]) / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1), os.dup2(log, 2)
            run(model, splits, request["folder"], request["layout"], request.get("kill"))
            code = 0
        except Exception:
            logging.exception("the run broke down")
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
    seconds = request.get("kill_after")
    while seconds is not None and time.monotonic() - started < seconds:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status), time.monotonic() - started
        time.sleep(0.005)
    if seconds is not None:
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), time.monotonic() - started


def serve(images):
    """Answers requests until the input ends.

    A request names the `folder` and `layout` of a run, and `kill` (arguments of `Kill`, or `files` for
    `kill_at_files`) or `kill_after` (seconds); the answer has the `code` with which the run ended, and `seconds`.
    """
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    # A killed process loses nothing that it has handed to the system, so that flushing to the disk only costs time.
    os.fsync = lambda descriptor: None
    splits = split_dataset(load_image_dataset(images), validation=8, seed=0)
    model = new_model()
    # Trainer collects garbage at the start of each stage, and would look through all that was imported.
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        code, seconds = forked(model, splits, json.loads(line))
        print(json.dumps({"code": code, "seconds": seconds}), file=answers)


if __name__ == "__main__":
    serve(sys.argv[1])
