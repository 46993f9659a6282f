"""The command line, from a folder of images to a model that `pipeline` loads."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from transformers import pipeline

from torchthaw.evaluation.intervals import score_intervals
from torchthaw.evaluation.predictions import read_predictions

SMALL = ["--backbone", "shufflenet_v2_x0_5", "--set", "weights=null", "--set", "image_size=32", "--set", "epochs=3"]
SMALL += ["--set", "batch_size=8", "--set", "num_workers=0"]

ONE_STAGE = ["--set", "plan=null", "--set", "epochs=null", "--set", "stages=[{name: a, unfreeze: layer9}]"]


def test_train_leaves_a_complete_folder_that_pipeline_uses(run, make_image_folder, tmp_path):
    data = make_image_folder(per_class=12)
    out = tmp_path / "out"
    code, stdout, stderr = run(
        "train", "staged", "--data", data, *SMALL, "--output", out, "--json",
        "--set", "data.validation=0.25", "--set", "data.test=0.25",
    )  # fmt: skip
    assert code == 0, stderr
    results = json.loads(stdout)
    assert results == json.loads((out / "results.json").read_text())
    assert results["num_images"] == {"train": 18, "validation": 9, "test": 9}
    assert results["classes"] == ["ant", "bee", "cat"]
    assert [stage["name"] for stage in results["stages"]] == ["head", "last block", "all"]
    assert all(stage["frozen_unchanged"] for stage in results["stages"])
    assert {"torch", "transformers", "torchthaw"} <= set(results["versions"])
    for name in ("config.json", "model.safetensors", "preprocessor_config.json", "recipe.yaml", "stages"):
        assert (out / name).exists(), name
    for name in ("curves", "learning_rates", "confusion_validation", "reliability_test"):
        assert Image.open(out / "plots" / f"{name}.png").size[0] > 300

    for split in ("validation", "test"):
        rows = read_predictions(out / "predictions" / f"{split}.jsonl")
        right = sum(row["predicted"] == row["label"] for row in rows)
        assert results[split]["accuracy"] == pytest.approx(right / len(rows))
        classify = pipeline("image-classification", model=str(out))
        for row in rows:
            scores = {entry["label"]: entry["score"] for entry in classify(str(data / row["path"]))}
            assert scores == pytest.approx(row["scores"], abs=1e-5)
            assert max(scores, key=scores.get) == row["predicted"]

    # The resolved recipe runs again to the same weights.
    again = tmp_path / "again"
    assert run("train", out / "recipe.yaml", "--output", again, "--quiet")[0] == 0
    assert (again / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()

    # The whole folder, so the test images are among them.
    code, stdout, _ = run("evaluate", out, "--data", data, "--split", "train", "--json", "--again")
    assert code == 0
    assert json.loads(stdout)["num_images"] == 36
    code, stdout, _ = run("predict", out, data / "ant" / "000.png", data / "bee", "--json")
    assert code == 0
    assert len(json.loads(stdout)) == 13

    code, _, stderr = run("train", "staged", "--data", data, *SMALL, "--output", out)
    assert code == 2
    assert "holds a run, and torchthaw never overwrites one" in stderr
    assert "--resume" in stderr


def test_intervals_are_over_groups_where_these_are_known(run, make_image_folder, tmp_path):
    data, out = make_image_folder(per_class=12), tmp_path / "out"
    pattern = r"(\d+)\.png"
    code, stdout, stderr = run(
        "train", "two_phase", "--data", data, *SMALL, "--output", out, "--set", f"data.group='{pattern}'",
        "--set", "data.validation=0.25", "--set", "data.test=0.25",
    )  # fmt: skip
    assert code == 0, stderr
    results = json.loads((out / "results.json").read_text())
    card = (out / "README.md").read_text()
    for split in ("validation", "test"):
        rows = read_predictions(out / "predictions" / f"{split}.jsonl")
        patients = [Path(row["path"]).stem for row in rows]
        classes = results["classes"]
        labels, predicted = (np.array([classes.index(row[key]) for row in rows]) for key in ("label", "predicted"))
        accuracy, macro_f1, method = score_intervals(labels, predicted, patients)
        assert method == "mid-P with a jackknife over 3 groups"
        assert results[split]["accuracy_interval"] == accuracy
        assert results[split]["macro_f1_interval"] == macro_f1
        assert results[split]["interval_method"] == method
        shown = f"(95 % interval {accuracy[0]:.3f} to {accuracy[1]:.3f}, {method})"
        assert shown in " ".join(stderr.split()), "console"
        assert f"Intervals of the {split} split: {method}." in card
    code, stdout, _ = run("evaluate", out, "--data", data, "--split", "train", "--group", pattern, "--again")
    assert code == 0
    assert "Intervals: mid-P with a jackknife over 12 groups." in stdout
    assert "Intervals: mid-P over 36 images." in run("evaluate", out, "--data", data, "--split", "train", "--again")[1]
    # The run's own images have its groups.
    assert "over 3 groups." in run("evaluate", out, "--split", "validation")[1]
    code, _, stderr = run("evaluate", out, "--group", pattern)
    assert code == 2
    assert "Pass --data FOLDER too" in stderr


def test_bad_images_are_all_listed_or_dropped(run, make_image_folder, tmp_path):
    data = make_image_folder(per_class=12)
    (data / "ant" / "empty.png").touch()
    (data / "bee" / "text.jpg").write_text("not an image")
    whole = (data / "cat" / "000.png").read_bytes()
    (data / "cat" / "cut.png").write_bytes(whole[: len(whole) // 2])
    out = tmp_path / "out"
    code, _, stderr = run("train", "staged", "--data", data, *SMALL, "--output", out)
    assert code == 2
    assert all(name in stderr for name in ("ant/empty.png", "bee/text.jpg", "cat/cut.png", "on_bad_image: drop"))
    assert "Traceback" not in stderr
    assert not out.exists(), "nothing is half-written"
    code, stdout, stderr = run(
        "train", "two_phase", "--data", data, *SMALL, "--output", out, "--set", "data.on_bad_image=drop", "--json"
    )
    assert code == 0, stderr
    dropped = {image["path"] for image in json.loads(stdout)["dropped_images"]}
    assert dropped == {"ant/empty.png", "bee/text.jpg", "cat/cut.png"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "stagged"], "no recipe 'stagged'"),
        (["train", "staged"], "names no data; pass --data"),
        (["train", "staged", "--data", "no/such/folder"], "no/such/folder"),
        (["train", "staged", "--data", "DATA", "--backbone", "resnet51"], "resnet50"),
        (
            ["train", "staged", "--data", "DATA", "--backbone", "resnet18", "--weights", "IMAGENET1K_V7"],
            "IMAGENET1K_V1",
        ),
        (["train", "staged", "--data", "DATA", "--weights", "no_such.pth"], "no_such.pth"),
        (["train", "staged", "--data", "DATA", "--set", "lerning_rate=1"], "Did you mean 'learning_rate'"),
        (["train", "staged", "--data", "DATA", "--set", "learning_rate=0"], "learning_rate is 0"),
        (["train", "staged", "--data", "DATA", *SMALL, "--set", "batch_size=1000"], "batch size is 1000"),
        (["train", "staged", "--data", "DATA", *SMALL, "--set", "optimizer=adamm"], "adamm"),
        (["train", "staged", "--data", "builtin:digit"], "Did you mean 'digits'"),
        (["train", "staged", "--data", "DATA", *ONE_STAGE], "'layer9', which matches no layer group"),
        (["train", "staged", "--data", "DATA", "--backbone", "maxvit_t", "--set", "image_size=200"], "image_size=224"),
        (["backbones", "resnt50"], "resnet50"),
        (["evaluate", "DATA", "--data", "DATA"], "no config.json"),
        (["predict", "DATA", "no.png"], "no file or folder no.png"),
    ],
)
def test_bad_input_ends_with_one_message_and_code_2(run, make_image_folder, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    data = str(make_image_folder())
    code, stdout, stderr = run(*[data if argument == "DATA" else argument for argument in arguments])
    assert code == 2, stderr
    assert message in stderr
    assert stdout == ""
    assert "Traceback" not in stderr
    assert [path.name for path in tmp_path.iterdir()] == ["photos"], "nothing is left behind"


def test_a_mistake_in_the_model_is_found_before_the_images_are_read(run, make_image_folder):
    data = make_image_folder()
    (data / "ant" / "empty.png").touch()
    code, _, stderr = run("train", "staged", "--data", data, "--weights", "IMAGENET1K_V9")
    assert code == 2
    assert "IMAGENET1K_V9" in stderr
    assert "empty.png" not in stderr


def test_a_full_disk_is_one_message(run, monkeypatch, make_image_folder, tmp_path):
    if not Path("/dev/full").exists():
        pytest.skip("only Linux has /dev/full, a disk that is always full")

    def fill(file, text):
        with Path("/dev/full").open("w", encoding="utf-8") as full:
            full.write(text)

    monkeypatch.setattr("torchthaw.single_run._write", fill)
    code, _, stderr = run("train", "staged", "--data", make_image_folder(), *SMALL, "--output", tmp_path / "new")
    assert code == 1
    assert "no space left on the disk" in stderr
    assert "Traceback" not in stderr


def test_backbones_lists_all_and_shows_groups(run):
    code, stdout, _ = run("backbones", "--json")
    assert code == 0
    assert len(json.loads(stdout)) == 80
    code, stdout, _ = run("backbones", "resnet50", "--json")
    groups = json.loads(stdout)
    assert [row["group"] for row in groups] == ["stem", "layer1", "layer2", "layer3", "layer4", "head"]
    assert sum(row["parameters"] for row in groups) == 25_557_032


def test_every_command_has_an_example(run):
    for command in ("train", "evaluate", "predict", "backbones"):
        code, stdout, _ = run(command, "--help")
        assert code == 0
        assert "Example" in stdout


def test_hostile_names_are_printed_as_text(run, make_image_folder, tmp_path):
    data = make_image_folder(classes=("[red]a[/red]", "b\x1b[31m", "$c_{x}$"), per_class=8)
    out = tmp_path / "out"
    code, _, stderr = run("train", "two_phase", "--data", data, *SMALL, "--output", out)
    assert code == 0, stderr
    assert yaml.safe_load((out / "recipe.yaml").read_text())["backbone"] == "shufflenet_v2_x0_5"
    code, stdout, _ = run("predict", out, data, "--quiet")
    assert code == 0
    assert "\x1b" not in stdout


def test_the_quickstart_shows_what_each_stage_gains(run, tmp_path):
    code, stdout, stderr = run("train", "quickstart", "--output", tmp_path / "out", "--json")
    assert code == 0, stderr
    results = json.loads(stdout)
    head, last_block, everything = (stage["best_metric"] for stage in results["stages"])
    assert head + 0.1 < last_block < everything
    assert results["validation"]["accuracy"] == everything > 0.95
    assert results["test"]["accuracy"] > 0.93
    assert f"{head:.4f}" in stderr
    assert f"{everything:.4f}" in stderr


def test_python_dash_m_answers():
    done = subprocess.run([sys.executable, "-m", "torchthaw", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.count(".") == 2


def test_training_in_a_script_without_a_recipe(make_image_folder, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        f"""
from torchthaw import *
splits = split_dataset(load_image_dataset({str(make_image_folder(per_class=12))!r}), validation=0.25)
names = splits["train"].features["label"].names
model = TorchvisionForImageClassification.from_torchvision("shufflenet_v2_x0_5", weights=None, id2label=names)
processor = TorchvisionImageProcessor.from_torchvision("shufflenet_v2_x0_5", weights=None, image_size=32)
args = ThawTrainingArguments(output_dir={str(tmp_path / "run")!r}, plan="staged", num_train_epochs=3,
                             per_device_train_batch_size=8)
trainer = ThawTrainer(model, args, splits["train"], splits["validation"], processor)
trainer.train()
trainer.save_model({str(tmp_path / "saved")!r})
"""
    )
    subprocess.run([sys.executable, str(script)], check=True, capture_output=True)
    scores = pipeline("image-classification", model=str(tmp_path / "saved"))(Image.new("RGB", (40, 40)))
    assert {entry["label"] for entry in scores} == {"ant", "bee", "cat"}
    assert torch.tensor([entry["score"] for entry in scores]).sum() == pytest.approx(1)
