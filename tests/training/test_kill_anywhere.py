"""Kill a run anywhere and go on with it: it ends as the run that nothing disturbed, bit for bit.

Each run is a process that really gets SIGKILL; see resume_workloads.py for what is run.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

pytestmark = pytest.mark.skipif(
    not hasattr(os, "fork"), reason="runs are forked from one process, which this platform cannot do"
)

WORKLOADS = Path(__file__).with_name("resume_workloads.py")
KILLED = -9


class Workloads:
    """The process that runs are forked from."""

    def __init__(self, images, folder):
        self.folder = folder
        self.log = (folder / "workloads.txt").open("w")
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, str(WORKLOADS), str(images)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True, env=environment,
        )  # fmt: skip

    def run(self, folder, layout, **kill):
        folder.mkdir(exist_ok=True)
        print(json.dumps({"folder": str(folder), "layout": layout, **kill}), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        assert answer, (self.folder / "workloads.txt").read_text()
        return json.loads(answer)

    def close(self):
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait(timeout=30)
        self.log.close()


@pytest.fixture(scope="module")
def workloads(tmp_path_factory):
    folder = tmp_path_factory.mktemp("workloads")
    for number, label in enumerate(("ant", "bee", "cat")):
        (folder / "photos" / label).mkdir(parents=True)
        for image in range(8):
            random = np.random.default_rng(1000 * number + image)
            pixels = random.integers(0, 120, size=(40, 48, 3), dtype=np.uint8)
            pixels[..., number] += 100
            Image.fromarray(pixels).save(folder / "photos" / label / f"{image}.png")
    server = Workloads(folder / "photos", folder)
    yield server
    server.close()


@pytest.fixture(scope="module")
def undisturbed(workloads):
    """Returns a function that gives the outcome of a layout's run that nothing disturbed, and how long it took."""
    done = {}

    def outcome_of(layout):
        if layout not in done:
            folder = workloads.folder / layout
            answer = workloads.run(folder, layout)
            assert answer["code"] == 0, (folder / "log.txt").read_text()
            done[layout] = outcome(folder), answer["seconds"]
        return done[layout]

    return outcome_of


def outcome(folder):
    """Reads all that a run leaves, but for what depends on time."""
    result = json.loads((folder / "result.json").read_text())
    timed = ("_runtime", "_per_second")
    result["history"] = [
        {key: value for key, value in line.items() if not key.endswith(timed)} for line in result["history"]
    ]
    for record in result["records"]:
        for key in (
            "seconds",
            "train_images_per_second",
            "step_images_per_second",
            "data_wait_share",
            "peak_memory_mb",
        ):
            del record[key]
    result["weights"] = load_file(folder / "weights.safetensors")
    result["checkpoints"] = {}
    for checkpoint in sorted((folder / "run").glob("checkpoint-*")):
        result["checkpoints"][checkpoint.name] = {
            "files": sorted(file.name for file in checkpoint.iterdir() if not file.name.startswith(".")),
            "weights": load_file(checkpoint / "model.safetensors"),
            "optimizer": torch.load(checkpoint / "optimizer.pt", weights_only=True),
            "random": torch.load(checkpoint / "rng_state.pth", weights_only=False)["cpu"],
        }
    return result


def different(one, other, where="run"):
    """Yields where two outcomes differ; tensors by their bits."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        if one.dtype != other.dtype or not torch.equal(one, other):
            yield f"{where}: other bits"
    elif isinstance(one, dict) and isinstance(other, dict):
        for key in {**one, **other}:
            if key not in one or key not in other:
                yield f"{where}: {key!r} only in {'the undisturbed' if key in one else 'this'} run"
            else:
                yield from different(one[key], other[key], f"{where}/{key}")
    elif isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        for number, pair in enumerate(zip(one, other, strict=True)):
            yield from different(*pair, f"{where}/{number}")
    elif one != other:
        yield f"{where}: {one!r} became {other!r}"


def check_same(result, expected, *, went_on_from=None):
    facts = {key: result.pop(key) for key in ("went_on_from", "steps")}
    wanted = {key: value for key, value in expected.items() if key not in facts}
    assert list(different(wanted, result)) == []
    if went_on_from is not None:
        assert facts == {"went_on_from": went_on_from, "steps": 16 - went_on_from}, "no more is lost than must be"


def test_the_runs_are_worth_comparing(undisturbed):
    """All stages change the weights, BatchNorm statistics among them, and the gate decides both ways."""
    kept = {layout: [record["accepted"] for record in undisturbed(layout)[0]["records"]] for layout in LAYOUTS}
    assert {*kept["epochs"], *kept["steps"]} == {True, False}
    assert kept["often"] == [True, True, True]
    for layout in LAYOUTS:
        result = undisturbed(layout)[0]
        moved = [{group for group, change in record["changes"].items() if change} for record in result["records"]]
        assert [len(groups) for groups in moved] == [1, 2, 5]
        assert len({line["loss"] for line in result["history"] if "loss" in line}) > 3
    weights = undisturbed("often")[0]["checkpoints"]["checkpoint-16"]["weights"]
    earlier = undisturbed("epochs")[0]["checkpoints"]["checkpoint-16"]["weights"]
    statistics = [name for name in weights if name.endswith("running_mean")]
    assert all(not torch.equal(weights[name], earlier[name]) for name in statistics)
    adapters = undisturbed("adapters")[0]["records"][1]
    assert adapters["accepted"]
    assert [group for group, change in adapters["changes"].items() if change] == ["block0", "block1", "block2", "head"]


def test_a_run_of_its_own_repeats_itself(workloads, undisturbed, tmp_path):
    assert workloads.run(tmp_path / "again", "steps")["code"] == 0
    check_same(outcome(tmp_path / "again"), undisturbed("steps")[0], went_on_from=0)


LAYOUTS = ("epochs", "steps", "often")


def at(event, step=None, number=1):
    return {"event": event, "step": step, "number": number}


def files(*events):
    return {"files": list(events)}


# Kills: the layout, where the run is killed, and the step that it must go on from.
KILLS = {
    # Within stages.
    "the first step": ("epochs", at("on_step_end", 1), 0),
    "a step of the first stage": ("epochs", at("on_step_end", 3), 0),
    "a step of the second stage": ("epochs", at("on_step_end", 6), 4),
    "before the optimizer's step": ("epochs", at("on_pre_optimizer_step", 10), 8),
    "the last step of an epoch": ("epochs", at("on_step_end", 8), 4),
    "a step of the last stage": ("epochs", at("on_step_end", 14), 12),
    "right after the last step": ("epochs", at("on_step_end", 16), 12),
    "a step, steps counted": ("steps", at("on_step_end", 3), 2),
    "the middle of an epoch": ("steps", at("on_step_begin", 6), 6),
    "the second epoch of a stage": ("steps", at("on_step_end", 11), 10),
    "the next step of every step": ("often", at("on_step_end", 2), 1),
    "an epoch's last checkpoint": ("often", at("on_save", 8), 8),
    "between the last checkpoint of an epoch and its validation": ("often", at("on_evaluate", 8), 8),
    "after an epoch's first step": ("often", at("on_step_end", 10), 9),
    "a step of the last stage, each saved": ("often", at("on_optimizer_step", 14), 14),
    # Borders.
    "the begin of training": ("epochs", at("on_train_begin"), 0),
    "the begin of the first stage": ("epochs", at("on_stage_begin"), 0),
    "the end of the first stage": ("epochs", at("on_stage_end"), 4),
    "the begin of the second stage": ("epochs", at("on_stage_begin", number=2), 4),
    "the end of the second stage": ("steps", at("on_stage_end", number=2), 12),
    "the begin of the last stage": ("steps", at("on_stage_begin", number=3), 12),
    "the end of the last stage": ("epochs", at("on_stage_end", number=3), 16),
    "the end of the first stage, each step saved": ("often", at("on_stage_end"), 4),
    "the begin of the second stage, each step saved": ("often", at("on_stage_begin", number=2), 4),
    "the end of training": ("epochs", at("on_train_end"), 16),
    "the end of training, each step saved": ("often", at("on_train_end"), 16),
    # Around validation.
    "the validation before the first step": ("epochs", at("on_prediction_step", 0), 0),
    "the validation within a stage": ("epochs", at("on_prediction_step", 8), 4),
    "the validation in the middle of an epoch": ("steps", at("on_prediction_step", 10, number=2), 8),
    "the last validation": ("steps", at("on_prediction_step", 16), 14),
    "after a validation": ("epochs", at("on_evaluate", 12), 8),
    "a log line": ("steps", at("on_log", 9), 8),
    # While files are written.
    "before a checkpoint's first file": ("epochs", files(["os.mkdir", "checkpoint-8 "]), 4),
    "before the very first checkpoint's weights": ("epochs", files(["open", "checkpoint-4/config.json w"]), 0),
    "before a checkpoint's weights": ("steps", files(["open", "checkpoint-8/config.json w"]), 6),
    "before a checkpoint's optimizer": ("steps", files(["open", "checkpoint-10/preprocessor_config.json w"]), 8),
    "before a checkpoint's state": ("epochs", files(["open", "checkpoint-12/trainer_state.json w"]), 8),
    "before a checkpoint's stage": ("steps", files(["os.rename", "checkpoint-4/stage_state.json$"]), 2),
    "before a checkpoint is flushed": ("often", files(["open", "checkpoint-7/config.json r"]), 6),
    "before a checkpoint's manifest": ("epochs", files(["open", "checkpoint-8/.complete.json.*w"]), 4),
    "before a manifest counts": ("often", files(["os.rename", "checkpoint-14/complete.json$"]), 13),
    "before an old checkpoint is removed": ("often", files(["os.remove", "checkpoint-1/complete.json"]), 3),
    "an old checkpoint without its manifest": ("often", files(["shutil.rmtree", "checkpoint-1( |$)"]), 3),
    "an old checkpoint half removed": (
        "often",
        files(["shutil.rmtree", "checkpoint-1( |$)"], *[["os.remove", "."]] * 5),
        3,
    ),
    "the journal's first entry": ("epochs", files(["os.rename", "journal.json$"]), 0),
    "the journal's entry of a stage": ("epochs", files(*[["os.rename", "journal.json$"]] * 3), 12),
    # With low-rank adapters on the model.
    "the begin of a stage of adapters": ("adapters", at("on_stage_begin", number=2), 4),
    "a step of adapters": ("adapters", at("on_step_end", 7), 6),
    "the validation of adapters": ("adapters", at("on_prediction_step", 8), 6),
    "before a checkpoint of adapters counts": ("adapters", files(["os.rename", "checkpoint-10/complete.json$"]), 8),
    "the last step of adapters": ("adapters", at("on_save", 12), 12),
    "the end of a stage of adapters": ("adapters", at("on_stage_end", number=2), 12),
    "after a stage of adapters": ("adapters", at("on_step_end", 13), 12),
    "the journal's last entry": ("steps", files(*[["os.rename", "journal.json$"]] * 5), 16),
}


@pytest.mark.parametrize("name", KILLS)
def test_killed(workloads, undisturbed, tmp_path, name):
    layout, kill, went_on_from = KILLS[name]
    assert workloads.run(tmp_path, layout, kill=kill)["code"] == KILLED, (tmp_path / "log.txt").read_text()
    assert not (tmp_path / "result.json").exists()
    assert workloads.run(tmp_path, layout)["code"] == 0, (tmp_path / "log.txt").read_text()
    check_same(outcome(tmp_path), undisturbed(layout)[0], went_on_from=went_on_from)


# The layout, the kills one after the other, and the step that the last run goes on from.
SERIES = {
    "twice within a stage": ("steps", [at("on_step_end", 7), at("on_step_end", 9)], 8),
    "twice at the same border": ("epochs", [at("on_stage_end", number=2), at("on_stage_end")], 12),
    "in a stage and while going on": ("epochs", [at("on_step_end", 6), at("on_stage_begin")], 4),
    "while the same checkpoint is written": (
        "epochs",
        [files(["open", "checkpoint-8/trainer_state.json w"]), files(["os.rename", "checkpoint-8/complete.json$"])],
        4,
    ),
    "while a half-written checkpoint is removed": (
        "epochs",
        [
            files(["os.rename", "checkpoint-8/complete.json$"]),
            files(["shutil.rmtree", "checkpoint-8( |$)"], *[["os.remove", "."]] * 3),
        ],
        4,
    ),
    "while a checkpoint is written again": (
        "often",
        [at("on_save", 8), files(["os.rename", "checkpoint-9/complete.json$"])],
        8,
    ),
    "five times": (
        "steps",
        [
            at("on_step_end", 1),
            at("on_step_end", 5),
            files(["os.remove", "checkpoint-.*/complete.json"]),
            at("on_stage_end"),
            at("on_prediction_step", 14),
        ],
        12,
    ),
}


@pytest.mark.parametrize("name", SERIES)
def test_killed_again(workloads, undisturbed, tmp_path, name):
    layout, kills, went_on_from = SERIES[name]
    for kill in kills:
        assert workloads.run(tmp_path, layout, kill=kill)["code"] == KILLED, (tmp_path / "log.txt").read_text()
    assert workloads.run(tmp_path, layout)["code"] == 0, (tmp_path / "log.txt").read_text()
    check_same(outcome(tmp_path), undisturbed(layout)[0], went_on_from=went_on_from)


@pytest.mark.parametrize("share", [0.25, 0.4, 0.55, 0.7, 0.85])
def test_killed_at_any_time(workloads, undisturbed, tmp_path, share):
    expected, seconds = undisturbed("often")
    workloads.run(tmp_path, "often", kill_after=share * seconds)
    assert workloads.run(tmp_path, "often")["code"] == 0, (tmp_path / "log.txt").read_text()
    check_same(outcome(tmp_path), expected)
