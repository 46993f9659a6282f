"""`cv: 3` in a recipe: the folds, what they say together, and the final model."""

import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import yaml
from PIL import Image
from sklearn.metrics import f1_score, recall_score
from transformers import pipeline

import torchthaw
from torchthaw import cli, cross_validation
from torchthaw.console import Reporter
from torchthaw.cross_validation import final_recipe, make_folds, prepare_images
from torchthaw.errors import TrainingError
from torchthaw.evaluation.intervals import mid_p_interval
from torchthaw.evaluation.predictions import read_predictions
from torchthaw.recipe import load_recipe
from torchthaw.sharing.card import write_card
from torchthaw.single_run import make_trainer

CLASSES = ("ant", "bee", "cat")
SMALL = ["--backbone", "shufflenet_v2_x0_5", "--weights", "builtin", "--set", "image_size=32", "--set", "epochs=3"]
SMALL += ["--set", "batch_size=8", "--set", "num_workers=0", "--set", "learning_rate=0.02"]
CV = [*SMALL, "--set", "cv=3", "--set", "data.test=0.25"]

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


def command(*arguments):
    """Runs a command in this process; returns its exit code, stdout and stderr."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["torchthaw", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
    return exit_.value.code or 0


@pytest.fixture
def run(capsys):
    def call(*arguments):
        code = command(*arguments)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def run_killed(event, pattern, *arguments):
    """Runs a command in a process of its own, which is killed before an operation on a file."""
    line = [sys.executable, "-c", KILLED_AT, event, pattern, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(line, capture_output=True, text=True, env=environment)
    assert done.returncode == -signal.SIGKILL, done.stderr


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """36 pictures whose class shows in their colour, but for every fifth, so that folds differ."""
    root = tmp_path_factory.mktemp("data") / "photos"
    for number, label in enumerate(CLASSES):
        (root / label).mkdir(parents=True)
        for image in range(12):
            pixels = np.random.default_rng(1000 * number + image).integers(0, 120, size=(40, 48, 3), dtype=np.uint8)
            pixels[..., (number + (image % 5 == 4)) % 3] += 100
            Image.fromarray(pixels).save(root / label / f"{image:03d}.png")
    return root


@pytest.fixture(scope="module")
def crossed(photos, tmp_path_factory):
    """A cross-validation without a final model; its folder, and the paths by split that each trainer was given."""
    out = tmp_path_factory.mktemp("run") / "out"
    given = []

    def watched(job):
        given.append({split: list(images["path"]) for split, images in job.data.splits.items()})
        return make_trainer(job)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cross_validation, "make_trainer", watched)
        assert command("train", "two_phase", "--data", photos, *CV, "--output", out, "--quiet") == 0
    return out, given


@pytest.fixture(scope="module")
def finished(crossed, tmp_path_factory):
    """The same, with the final model that was asked for later."""
    out = tmp_path_factory.mktemp("run") / "out"
    shutil.copytree(crossed[0], out)
    assert command(
        "train", out / "recipe.yaml", "--output", out, "--resume", "--set", "cv_final=true", "--quiet"
    ) == 0  # fmt: skip
    return out


def results_in(folder):
    return json.loads((folder / "results.json").read_text())


def fold_folders(out):
    return [out / "folds" / str(number) for number in (1, 2, 3)]


def test_every_image_is_validated_once_and_test_images_are_in_no_fold(photos, crossed):
    out, given = crossed
    everything = {file.relative_to(photos).as_posix() for file in photos.rglob("*.png")}
    files = [folder / "predictions" / "validation.jsonl" for folder in fold_folders(out)]
    validated = [row["path"] for file in files for row in read_predictions(file)]
    assert len(validated) == len(set(validated)) == 27
    assert len(given) == 3
    for splits, file in zip(given, files, strict=True):
        assert set(splits) == {"train", "validation"}
        assert len(splits["train"]) == 18
        assert set(splits["train"]) | set(splits["validation"]) == set(validated)
        assert not set(splits["train"]) & set(splits["validation"])
        assert [row["path"] for row in read_predictions(file)] == splits["validation"]
        # Nothing of a class is left out where there are enough images.
        assert Counter(path.split("/")[0] for path in splits["validation"]) == dict.fromkeys(CLASSES, 3)
    assert len(everything - set(validated)) == 9


def test_without_a_final_model_the_test_images_stay_unread(crossed):
    out, _ = crossed
    results = results_in(out)
    assert "test" not in results
    assert results["test_reads"] == 0
    assert results["num_images"] == {"train": 27, "test": 9}
    assert {path.name for path in out.iterdir()} == {
        "audit.json", "folds", "plots", "predictions", "recipe.yaml", "results.json",
    }  # fmt: skip
    for folder in fold_folders(out):
        assert "test" not in results_in(folder)
        assert results_in(folder)["test_reads"] == 0
        assert not (folder / "predictions" / "test.jsonl").exists()


def test_figures_are_those_of_the_files_of_the_folds(crossed):
    out, _ = crossed
    found = results_in(out)["cross_validation"]
    folds = [read_predictions(folder / "predictions" / "validation.jsonl") for folder in fold_folders(out)]

    def score(rows):
        labels, predicted = [row["label"] for row in rows], [row["predicted"] for row in rows]
        return {
            "accuracy": sum(a == b for a, b in zip(labels, predicted, strict=True)) / len(rows),
            "macro_f1": f1_score(labels, predicted, average="macro"),
            "balanced_accuracy": recall_score(labels, predicted, average="macro"),
            "loss": -statistics.mean(np.log(row["scores"][row["label"]]) for row in rows),
        }

    scores = [score(rows) for rows in folds]
    assert len({fold["loss"] for fold in scores}) == 3, "the folds differ, or nothing is tested"
    assert len({fold["accuracy"] for fold in scores}) > 1
    for name in scores[0]:
        values = [fold[name] for fold in scores]
        assert found["figures"][name]["values"] == pytest.approx(values, rel=1e-5)
        assert found["figures"][name]["mean"] == pytest.approx(statistics.mean(values), rel=1e-5)
        assert found["figures"][name]["std"] == pytest.approx(statistics.stdev(values), rel=1e-4)
    eces = [results_in(folder)["validation"]["ece"] for folder in fold_folders(out)]
    assert found["figures"]["ece"] == {"mean": np.mean(eces), "std": np.std(eces, ddof=1), "values": eces}
    assert (found["folds"], found["split_by"], found["metric"]) == (3, "image", "accuracy")
    assert found["mean"] == found["figures"]["accuracy"]["mean"]
    assert found["std"] == found["figures"]["accuracy"]["std"]

    together = [row for rows in folds for row in rows]
    for name, value in score(together).items():
        assert found["pooled"][name] == pytest.approx(value, rel=1e-5), name
    right = sum(row["label"] == row["predicted"] for row in together)
    assert found["pooled"]["accuracy_interval"] == mid_p_interval(right, 27)
    assert found["pooled"]["interval_method"] == "mid-P over 27 images"
    assert read_predictions(out / "predictions" / "out_of_fold.jsonl") == together
    assert found["num_images"] == [{"train": 18, "validation": 9}] * 3
    for number, stage in enumerate(found["stages"]):
        records = [results_in(folder)["stages"][number] for folder in fold_folders(out)]
        assert stage["kept"] == [record["accepted"] for record in records]


def test_a_fold_is_a_run_that_says_what_it_is(photos, crossed):
    out, _ = crossed
    folder = out / "folds" / "2"
    text = (folder / "recipe.yaml").read_text()
    assert text.startswith("# Fold 2 of 3 of the cross-validation")
    recipe = yaml.safe_load(text)
    assert recipe == yaml.safe_load((out / "recipe.yaml").read_text())
    assert (recipe["cv"], recipe["seed"], recipe["data"]["path"]) == (3, 0, str(photos))
    results = results_in(folder)
    assert results["fold"]["number"] == 2
    assert results["data"]["splits"]["validation"]["origin"] == "fold 2 of 3"
    card = (folder / "README.md").read_text()
    assert "| validation | 9 | fold 2 of 3 |" in card
    assert (folder / "audit.json").read_bytes() == (out / "audit.json").read_bytes()
    assert "No audit" not in card
    assert {path.name for path in (folder / "stages").iterdir() if path.name.startswith("checkpoint")} <= {
        "checkpoint-3", "checkpoint-6", "checkpoint-9"
    }  # fmt: skip
    image = photos / "ant" / "000.png"
    assert {entry["label"] for entry in pipeline("image-classification", model=str(folder))(str(image))} == set(CLASSES)


def test_the_best_epoch_of_a_stage_is_that_of_the_log(crossed):
    out, _ = crossed
    for folder in fold_folders(out):
        checkpoint = max((folder / "stages").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
        log = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
        start = 0
        for stage in results_in(folder)["stages"]:
            validations = [
                line for line in log if line.get("stage_name") == stage["name"] and "eval_accuracy" in line
                and line["step"] > start
            ]  # fmt: skip
            best = max(validations, key=lambda line: (line["eval_accuracy"], -line["step"]))
            assert stage["best_metric"] == best["eval_accuracy"]
            assert stage["best_step"] == best["step"] - start
            assert stage["best_epoch"] == (best["step"] - start) / 3
            start += stage["steps"]


def test_the_final_model_is_trained_on_all_folds_and_reads_the_test_images_once(photos, crossed, finished):
    results = results_in(finished)
    folds = results["cross_validation"]
    assert folds == results_in(crossed[0])["cross_validation"]
    assert results["num_images"] == {"train": 27, "test": 9}
    assert results["expected_from"] == "cross_validation"
    assert "validation" not in results
    assert results["test_reads"] == 1
    tested = {row["path"] for row in read_predictions(finished / "predictions" / "test.jsonl")}
    validated = {row["path"] for row in read_predictions(finished / "predictions" / "out_of_fold.jsonl")}
    assert len(tested) == 9
    assert not tested & validated
    assert results["gate"]["gate"] == "off"
    lengths = {
        stage["name"]: int(np.ceil(np.median(stage["best_epochs"])))
        for stage in folds["stages"]
        if sum(stage["kept"]) >= 2
    }
    assert lengths, "some stage is kept, or nothing is tested"
    assert {stage["name"]: stage["epochs"] for stage in results["stages"]} == lengths
    # 27 images are 4 batches of 8.
    assert {stage["name"]: stage["steps"] for stage in results["stages"]} == {
        name: 4 * epochs for name, epochs in lengths.items()
    }
    assert all(stage["best_metric"] is None and stage["ended_early"] is None for stage in results["stages"])
    assert results["saved_folder"] == {"images": 16, "largest_difference": pytest.approx(0, abs=1e-4)}
    classify = pipeline("image-classification", model=str(finished))
    for row in read_predictions(finished / "predictions" / "test.jsonl"):
        scores = {entry["label"]: entry["score"] for entry in classify(str(photos / row["path"]))}
        assert scores == pytest.approx(row["scores"], abs=1e-5)


def test_the_card_shows_the_folds(finished, tmp_path):
    card = (finished / "README.md").read_text()
    found = results_in(finished)["cross_validation"]
    accuracy = found["figures"]["accuracy"]
    assert "Cross-validation with 3 folds: every image was validated once" in card
    assert (
        f"| accuracy | {accuracy['mean']:.4f} ± {accuracy['std']:.4f} | {min(accuracy['values']):.4f} to "
        f"{max(accuracy['values']):.4f} | {found['pooled']['accuracy']:.4f} |"
    ) in card
    low, high = found["pooled"]["accuracy_interval"]
    assert f"on 27 images, all folds together, is {low:.4f} to {high:.4f} (mid-P over 27 images)." in card
    assert "The test images were used once, after everything was chosen." in card
    assert "by validation accuracy" not in card, "there was none"
    assert "confusion_out_of_fold.png" in card

    # Without test images the figures of the folds are all that there is.
    folder = tmp_path / "untested"
    shutil.copytree(finished, folder, ignore=shutil.ignore_patterns("folds", "stages"))
    results = results_in(folder)
    del results["test"]
    (folder / "results.json").write_text(json.dumps(results))
    card = write_card(folder).read_text()
    assert "how good it is, is not known" not in card
    assert f"| accuracy | {accuracy['mean']:.4f} ± {accuracy['std']:.4f} |" in card
    assert "They are what to expect of it" in card


def comparable(folder):
    """What `results.json` says, but for what depends on time, machine and command line."""
    found = results_in(folder)
    for key in ("seconds_total", "peak_memory_mb", "command", "recipe"):
        found.pop(key)
    for look in found["test_looks"]:
        for key in ("time", "command", "recipe"):
            look.pop(key, None)
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


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL is of Unix")
def test_what_was_killed_in_a_fold_and_in_the_end_goes_on(run, photos, finished, tmp_path):
    out = tmp_path / "out"
    line = ["train", "two_phase", "--data", photos, *CV, "--set", "cv_final=true", "--output", out]
    # In the second stage of the second fold, while its checkpoint is written.
    run_killed("os.rename", "folds/2/stages/checkpoint-9/complete.json$", *line)
    assert not (out / "results.json").exists()
    assert not (out / "folds" / "2" / "results.json").exists()
    journal = out / "folds" / "2" / "stages" / "journal.json"
    run_id = json.loads(journal.read_text())["run_id"]
    first = {path: path.stat().st_mtime_ns for path in (out / "folds" / "1").rglob("*") if path.is_file()}
    code, _, stderr = run(*line)
    assert code == 2
    assert "--resume" in stderr
    code, _, stderr = run(*line, "--resume", "--set", "cv=4")
    assert code == 2
    assert "cv was 3 and is 4" in stderr

    # While the final model's card is written, the last of all files.
    run_killed("os.rename", r"/out/README\.md$", *line, "--resume")
    assert results_in(out)["test_reads"] == 1
    code, stdout, stderr = run(*line, "--resume", "--json")
    assert code == 0, stderr
    assert json.loads(stdout) == results_in(out)
    assert stderr.count("is complete; it is not run again") == 3
    assert "(head)" not in stderr, "no epoch is trained again"
    assert "No whole checkpoint" not in stderr
    assert json.loads(journal.read_text())["run_id"] == run_id, "the second fold went on where it was"
    assert {path: path.stat().st_mtime_ns for path in (out / "folds" / "1").rglob("*") if path.is_file()} == first

    for part in ("", "folds/1", "folds/2", "folds/3"):
        assert comparable(out / part) == comparable(finished / part)
        assert (out / part / "model.safetensors").read_bytes() == (finished / part / "model.safetensors").read_bytes()
    for name in ("out_of_fold", "test"):
        file = f"predictions/{name}.jsonl"
        assert (out / file).read_bytes() == (finished / file).read_bytes()
    assert {path.name for path in out.iterdir()} == {path.name for path in finished.iterdir()}
    code, _, stderr = run(*line, "--resume")
    assert code == 0
    assert "nothing is left to train" in stderr


def test_a_complete_fold_of_other_images_is_refused(run, photos, crossed, tmp_path):
    data, out = tmp_path / "photos", tmp_path / "out"
    shutil.copytree(photos, data)
    shutil.copytree(crossed[0], out)
    code, _, stderr = run("train", out / "recipe.yaml", "--output", out, "--resume")
    assert code == 0
    assert "nothing is left to train" in stderr
    (out / "results.json").unlink()
    (data / "ant" / "new.png").write_bytes((data / "bee" / "003.png").read_bytes()[:-1] + b"\0")
    code, _, stderr = run("train", out / "recipe.yaml", "--output", out, "--resume", "--set", f"data.path={photos}")
    assert code == 0, stderr
    recipe = yaml.safe_load((out / "recipe.yaml").read_text())
    recipe["data"]["path"] = str(data)
    (out / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (out / "results.json").unlink()
    code, _, stderr = run("train", out / "recipe.yaml", "--output", out, "--resume")
    assert code == 2, stderr
    assert "of other images than there are now" in stderr
    assert "Traceback" not in stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["cv=1"], "cv is 1"),
        (["cv=2.5"], "cv is 2.5"),
        (["cv_final=true"], "cv_final without cv"),
        (["cv=3", "push.repo=me/it"], "without a final model there is nothing to push"),
        (
            ["cv=3", "cv_final=true", "plan=null", "epochs=null", "stages=[{name: a, schedule: greedy}]"],
            "stage 'a' has the schedule greedy",
        ),
        (["cv=100"], "100"),
        # All images would be enough for a batch of 30.
        (["cv=3", "batch_size=30"], "the batch size is 30, but there are 24 training images"),
        (["cv=3", "learning_rate=0.01", "stages=[{name: a, unfreeze: layer9}]", "plan=null", "epochs=null"], "layer9"),
    ],
)
@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_mistakes_are_found_before_anything_is_written(run, photos, tmp_path, options, message, dry):
    sets = [part for option in options for part in ("--set", option)]
    code, stdout, stderr = run("train", "two_phase", "--data", photos, *SMALL, *sets, "--output", tmp_path / "o", *dry)
    assert code == 2, stderr
    assert message in stderr
    assert stdout == ""
    assert "Traceback" not in stderr
    assert not (tmp_path / "o").exists()


def test_a_dry_run_counts_the_steps_of_all_folds(run, photos, crossed, tmp_path):
    line = ["train", "two_phase", "--data", photos, *CV, "--output", tmp_path / "out", "--dry-run"]
    code, stdout, stderr = run(*line, "--json", "--set", "cv_final=true")
    assert code == 0, stderr
    planned = json.loads(stdout)
    folds = [results_in(folder) for folder in fold_folders(crossed[0])]
    steps = [sum(stage["steps"] for stage in fold["stages"]) for fold in folds]
    assert planned["total_steps"] == sum(steps)
    assert planned["num_images"] == {"train": 27, "test": 9}
    assert planned["cross_validation"] == {
        "folds": 3, "num_images": [fold["num_images"] for fold in folds], "steps": steps, "final_steps": 12,
    }  # fmt: skip
    assert "3 folds of 27 images, each trained on 18 and validated on 9 of them" in stderr
    assert "in at most 12 further steps" in stderr
    assert "read once, by the final model" in stderr
    code, _, stderr = run(*line)
    assert "not read: cv_final is false" in stderr
    assert not (tmp_path / "out").exists()


# Without training


def folds_of(data, **keys):
    recipe = load_recipe(
        {"backbone": "shufflenet_v2_x0_5", "weights": "builtin", "image_size": 32, "batch_size": 4, "cv": 3,
         "data": {"path": str(data), **keys}}
    )  # fmt: skip
    images = prepare_images(recipe, Reporter(quiet=True), features=False)
    return images, make_folds(recipe, images, "accuracy")


def test_groups_are_never_in_both_splits_of_a_fold(photos):
    # Twelve groups of three images, with all classes in each.
    data, folds = folds_of(photos, group=r"(\d+)\.png", test=0.25)
    everything = {split: set(images["group"]) for split, images in data.splits.items()}
    assert sorted(everything["train"] | everything["test"]) == [f"{number:03d}" for number in range(12)]
    validated = []
    for fold in folds:
        groups = {split: set(images["group"]) for split, images in fold.splits.items()}
        assert not groups["train"] & groups["validation"]
        assert groups["train"] | groups["validation"] == everything["train"]
        validated += fold.splits["validation"]["path"]
    assert sorted(validated) == sorted(data.splits["train"]["path"])
    assert not everything["train"] & everything["test"]


def test_folds_of_time_are_trained_on_what_came_before(photos, tmp_path):
    lines = [f"{label}/{number:03d}.png,{label},{number * 7 % 12}" for label in CLASSES for number in range(12)]
    data = tmp_path / "photos"
    shutil.copytree(photos, data)
    (data / "metadata.csv").write_text("\n".join(["file_name,label,taken", *lines]) + "\n")
    _, folds = folds_of(data, time="taken")
    assert len(folds) == 3
    for fold in folds:
        assert max(fold.splits["train"]["time"]) < min(fold.splits["validation"]["time"])


def test_copies_of_a_picture_are_in_one_fold_also_if_one_was_given_for_validation(make_image_folder):
    data = make_image_folder(per_class=6, splits=("train", "val"))
    copies = {"train/ant/copy.png": "val/ant/000.png", "val/bee/copy.png": "train/bee/001.png"}
    for copy, original in copies.items():
        shutil.copy(data / original, data / copy)
    _, folds = folds_of(data)
    validated = [set(fold.splits["validation"]["path"]) for fold in folds]
    assert sorted(path for paths in validated for path in paths) == sorted(
        file.relative_to(data).as_posix() for file in data.rglob("*.png")
    )
    for copy, original in copies.items():
        assert [copy in paths for paths in validated] == [original in paths for paths in validated]
    assert all(set(fold.splits) == {"train", "validation"} for fold in folds)


def test_a_run_folds_given_validation_images_and_keeps_the_given_test_images_out(run, make_image_folder, tmp_path):
    data = make_image_folder(per_class=4, splits=("train", "val", "test"))
    line = ["train", "two_phase", "--data", data, *SMALL, "--set", "cv=3", "--output", tmp_path / "out"]
    code, stdout, stderr = run(*line, "--dry-run", "--json")
    assert code == 0, stderr
    document = json.loads(stdout)
    assert document["num_images"] == {"train": 24, "test": 12}
    assert document["cross_validation"]["num_images"] == [{"train": 16, "validation": 8}] * 3


def votes(*stages):
    return [
        {"name": name, "kept": kept, "best_epochs": epochs, "best_steps": [10 * epoch for epoch in epochs]}
        for name, kept, epochs in stages
    ]


STAGES = [
    {"name": "head", "unfreeze": "head", "epochs": 9, "patience": 2},
    {"name": "mid", "unfreeze": 1, "epochs": 5, "batch_norm": "train"},
    {"name": "all", "unfreeze": "all", "steps": 70},
]


def test_the_final_plan_takes_what_half_of_the_folds_kept():
    recipe = load_recipe(
        {"backbone": "resnet18", "data": {"path": "photos"}, "stages": STAGES, "cv": 4, "cv_final": True,
         "gate": "significant", "on_reject": "stop"}
    )  # fmt: skip
    said = votes(
        ("head", [True] * 4, [1, 2, 3, 9]),
        ("mid", [False, True, False, False], [5]),
        ("all", [True, False, True, False], [4, 6]),
    )
    final = final_recipe(recipe, said, {"head": "eval", "mid": "train", "all": "freeze_affine"}, {})
    head, everything = final.stage_plan().stages
    # Between 2 and 3, rounded up.
    assert (head.name, head.epochs, head.steps, head.patience, head.batch_norm) == ("head", 3, None, None, "eval")
    assert (everything.name, everything.epochs, everything.steps) == ("all", None, 50)
    assert everything.batch_norm == "freeze_affine"
    assert (final.gate, final.cv, final.plan) == ("off", None, None)
    assert recipe.stage_plan().stages[0].patience == 2

    said = votes(("head", [True, False, False, False], [1]))
    with pytest.raises(TrainingError, match="no stage was kept by at least half of the folds"):
        final_recipe(recipe, said, {"head": "eval"}, {})


@pytest.mark.parametrize(("in_folds", "in_the_end"), [("train", "auto"), ("eval", "eval")])
def test_a_final_model_by_a_probe_chooses_again_whether_batch_norm_trains(in_folds, in_the_end):
    recipe = load_recipe({"backbone": "resnet18", "data": {"path": "photos"}, "cv": 4, "plan": "auto"})
    said = votes(("head", [True] * 4, [1] * 4), ("all", [True] * 4, [5] * 4))
    head, everything = final_recipe(recipe, said, {"head": "eval", "all": in_folds}, {}).stage_plan().stages
    assert (head.batch_norm, everything.batch_norm, everything.by_probe) == ("eval", in_the_end, True)


@pytest.mark.parametrize("kept", [[True, False, True, False], [True, False, False, False]])
def test_a_final_model_gets_the_stage_that_the_probe_added_in_half_of_the_folds(kept):
    recipe = load_recipe({"backbone": "resnet18", "data": {"path": "photos"}, "cv": 4, "plan": "auto"})
    said = votes(("head", [True] * 4, [1] * 4), ("all", [True] * 4, [5] * 4), ("all anew", kept, [3] * sum(kept)))
    policies = {"head": "eval", "all": "eval", "all anew": "train"}
    stages = final_recipe(recipe, said, policies, {}).stage_plan().stages
    assert [stage.name for stage in stages] == ["head", "all", "all anew"][: 1 + 1 + (sum(kept) == 2)]
    if sum(kept) == 2:
        anew = stages[2]
        assert (anew.new_head, anew.batch_norm, anew.by_probe, anew.epochs) == (True, "train", False, 3)
        assert (anew.learning_rate, anew.layer_decay) == (1e-3, 1.0)


def test_a_final_model_is_mixed_as_those_of_the_folds():
    """Though it has more images, of so many of which nothing would be mixed."""
    recipe = load_recipe({"backbone": "resnet18", "data": {"path": "photos"}, "cv": 4, "plan": "auto"})
    said = votes(("head", [True] * 4, [1] * 4), ("all", [True] * 4, [5] * 4))
    policies = {"head": "eval", "all": "eval"}
    head, everything = final_recipe(recipe, said, policies, {"all": 0.5}).stage_plan().stages
    assert (head.wise_ft, everything.wise_ft) == (None, 0.5)


def test_without_a_stage_that_pays_there_is_no_final_model_but_there_are_figures(run, photos, tmp_path):
    out = tmp_path / "out"
    # A stage that trains a new head would be kept.
    block = "[{name: block, unfreeze: [stage4], epochs: 1}]"
    code, _, stderr = run(
        "train", "two_phase", "--data", photos, *SMALL, "--set", "plan=null", "--set", "epochs=null",
        "--set", f"stages={block}", "--set", "cv=2", "--set", "cv_final=true", "--set", "min_gain=0.99",
        "--output", out,
    )  # fmt: skip
    assert code == 2, stderr
    assert "no stage was kept by at least half of the folds" in stderr
    assert results_in(out)["cross_validation"]["stages"][0]["kept"] == [False, False]
    assert not (out / "model.safetensors").exists()


@pytest.mark.skipif(sys.platform != "linux" or not dist.is_gloo_available(), reason="gloo is tested on Linux")
def test_two_processes_give_one_folder(photos, tmp_path):
    out = tmp_path / "out"
    environment = {**os.environ, "PYTHONPATH": str(Path(torchthaw.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    line = ["train", "two_phase", "--data", photos, *SMALL, "--set", "plan=head", "--set", "epochs=1"]
    line += ["--set", "batch_size=4", "--set", "cv=2", "--output", out, "--json"]
    done = subprocess.run(
        [*launcher, "-m", "torchthaw", *map(str, line)], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == results_in(out)
    validated = [row["path"] for row in read_predictions(out / "predictions" / "out_of_fold.jsonl")]
    assert len(validated) == len(set(validated)) == 36
    # Each step takes the batches of both processes: 18 images are 3 steps of 8.
    assert results_in(out / "folds" / "2")["stages"][0]["steps"] == 3
