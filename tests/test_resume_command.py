"""`torchthaw train --resume`: a command that was killed, given again, leaves what it would have left at once."""

import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

# 3 steps an epoch, so that there are checkpoints after steps 3, 6 and 9.
SMALL = ["--backbone", "shufflenet_v2_x0_5", "--weights", "builtin", "--set", "image_size=32", "--set", "epochs=3"]
SMALL += ["--set", "batch_size=8", "--set", "num_workers=0", "--set", "data.validation=0.25", "--set", "data.test=0.25"]
SMALL += ["--set", "learning_rate=0.02"]

# Runs the command line in a process that kills itself before it opens or renames a certain file.
KILLED_AT = """
import os, re, signal, sys
event, pattern = sys.argv[1:3]
del sys.argv[1:3]
def watch(name, arguments):
    if name == event and re.search(pattern, " ".join(map(str, arguments[:2]))):
        os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(watch)
from torchthaw.cli import main
main()
"""


def run_killed(event, pattern, *arguments):
    """Runs a command in a process of its own, which is killed before an operation on a file."""
    command = [sys.executable, "-c", KILLED_AT, event, pattern, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == -signal.SIGKILL, done.stderr


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "photos"
    for number, label in enumerate(("ant", "bee", "cat")):
        (root / label).mkdir(parents=True)
        for image in range(12):
            pixels = np.random.default_rng(1000 * number + image).integers(0, 120, size=(40, 48, 3), dtype=np.uint8)
            pixels[..., number] += 100
            Image.fromarray(pixels).save(root / label / f"{image:03d}.png")
    return root


def content(folder):
    """All files below a folder: their bytes, and when they were written."""
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


def results(folder):
    """What `results.json` says, but for what depends on time, machine and command line."""
    found = json.loads((folder / "results.json").read_text())
    del found["seconds_total"], found["peak_memory_mb"], found["command"]
    # The recipe has the output folder in it, and each look its time and command line; `test_reads` has their number.
    del found["recipe"], found["test_looks"]
    for stage in found["stages"]:
        for key in (
            "seconds",
            "train_images_per_second",
            "step_images_per_second",
            "data_wait_share",
            "peak_memory_mb",
        ):
            del stage[key]
    return found


def assert_same(folder, expected):
    assert results(folder) == results(expected)
    for name in ("model.safetensors", "predictions/validation.jsonl", "predictions/test.jsonl", "config.json"):
        assert (folder / name).read_bytes() == (expected / name).read_bytes(), name
    assert {path.name for path in folder.iterdir()} == {path.name for path in expected.iterdir()}
    assert {path.name for path in (folder / "plots").iterdir()} == {
        path.name for path in (expected / "plots").iterdir()
    }


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL is of Unix")
def test_a_command_that_was_killed_twice_goes_on(run, photos, tmp_path):
    expected, out = tmp_path / "expected", tmp_path / "out"
    command = ["train", "staged", "--data", photos, *SMALL, "--output", out]
    code, _, stderr = run(*command[:-1], expected, "--resume")
    assert code == 0, stderr
    assert any(stage["accepted"] for stage in results(expected)["stages"])

    # Within the second stage, while its checkpoint is written.
    run_killed("os.rename", "checkpoint-6/complete.json$", *command)
    assert not (out / "results.json").exists()
    nothing_left = tmp_path / "nothing left"
    shutil.copytree(out, nothing_left)

    before = content(out)
    code, _, stderr = run(*command)
    assert code == 2
    assert "--resume" in stderr
    code, _, stderr = run(*command, "--resume", "--set", "seed=1", "--set", "learning_rate=0.5")
    assert code == 2
    assert "holds a run of another recipe" in stderr
    assert "seed was 0 and is 1" in stderr
    assert "learning_rate was 0.02 and is 0.5" in stderr
    assert f"torchthaw train {out / 'recipe.yaml'} --resume" in stderr
    assert content(out) == before, "what is refused changes nothing"

    # While the card is written, the last of all files; what may differ on another machine does.
    run_killed("os.rename", "out/README.md$", *command, "--resume", "--set", "num_workers=1")
    assert (out / "results.json").exists()
    assert not (out / "README.md").exists()

    code, _, stderr = run("train", out / "recipe.yaml", "--resume")
    assert code == 0, stderr
    assert "epoch 1 of 3" not in stderr, "no epoch is trained again"
    assert_same(out, expected)

    before = content(out)
    code, stdout, stderr = run(*command, "--resume", "--json")
    assert code == 0
    assert "holds this run, complete; nothing is left to train" in stderr
    assert json.loads(stdout) == json.loads((out / "results.json").read_text())
    assert content(out) == before

    for checkpoint in (nothing_left / "stages").glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    code, _, stderr = run("train", nothing_left / "recipe.yaml", "--output", nothing_left, "--resume")
    assert code == 0
    assert "No whole checkpoint was left, so the run starts from the beginning." in stderr
    assert "epoch 1 of 3" in stderr
    assert_same(nothing_left, expected)


def test_what_is_no_run_is_never_gone_on_with(run, photos, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    code, _, stderr = run("train", "staged", "--data", photos, *SMALL, "--output", out, "--resume")
    assert code == 2
    assert f"the output folder {out} exists and is not empty" in stderr
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]


def test_other_images_are_refused_after_a_kill(run, photos, tmp_path):
    """The recipe is the same, but what it names is not."""
    data, out = tmp_path / "photos", tmp_path / "out"
    shutil.copytree(photos, data)
    command = ["train", "two_phase", "--data", data, *SMALL, "--output", out]
    assert run(*command)[0] == 0
    (out / "results.json").unlink()
    (data / "ant" / "new.png").write_bytes((data / "bee" / "003.png").read_bytes())
    code, _, stderr = run(*command, "--resume")
    assert code == 2
    assert "belongs to another run" in stderr
    assert "images.train.names_and_labels was" in stderr
    assert "Traceback" not in stderr
    assert yaml.safe_load((out / "recipe.yaml").read_text())["data"]["path"] == str(data)
