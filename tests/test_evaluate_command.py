"""`torchthaw evaluate`: figures as asked for, and the test images of a run, which are measured once."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

from torchthaw import TorchvisionConfig
from torchthaw.evaluation.looks import count_test_images, describe_images
from torchthaw.evaluation.predictions import read_predictions

SETTINGS = ["--backbone", "shufflenet_v2_x0_5", "--weights", "builtin"]
for _setting in ("image_size=32", "epochs=2", "plan=two_phase", "batch_size=8", "num_workers=0", "seed=1"):
    SETTINGS += ["--set", _setting]
# Writes down the name of each file that is opened, in order.
TRACED = """
import os, sys
log = open(sys.argv.pop(1), "w", buffering=1)
def hook(event, arguments):
    if event == "open" and isinstance(arguments[0], (str, bytes)):
        log.write(os.fsdecode(arguments[0]) + "\\n")
sys.addaudithook(hook)
from torchthaw.cli import main
main()
"""


def draw(file, label, number):
    """Draws an image of a class, by its colour; some are of a wrong one, so that no model is sure."""
    random = np.random.default_rng(1000 * label + number)
    pixels = random.integers(0, 160, size=(40, 40, 3), dtype=np.uint8)
    pixels[..., (label + (number % 4 == 3)) % 3] += 60
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(file)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "photos"
    for part, split in enumerate(("train", "val", "test")):
        for label, name in enumerate(("ant", "bee", "cat")):
            for number in range(12):
                draw(root / split / name / f"{number:02d}.png", label, 100 * part + number)
    return root


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """A git repository with a recipe."""
    folder = tmp_path_factory.mktemp("repository")
    shutil.copy(Path(__file__).parents[1] / "recipes" / "staged.yaml", folder / "mine.yaml")
    who = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    for arguments in (["init", "-q"], ["add", "mine.yaml"], [*who, "commit", "-q", "-m", "first"]):
        subprocess.run(["git", *arguments], cwd=folder, check=True)
    return folder


@pytest.fixture(scope="module")
def trained(data, repository, tmp_path_factory):
    """A run with calibration in a process of its own, and the files that it opened in order."""
    folder = tmp_path_factory.mktemp("runs")
    out, log = folder / "run", folder / "opened"
    arguments = ["train", repository / "mine.yaml", "--data", data, "--output", out, *SETTINGS]
    arguments += ["--set", "calibrate=temperature", "--set", "audit=off"]
    subprocess.run([sys.executable, "-c", TRACED, log, *arguments], check=True, capture_output=True)
    return out, log.read_text().splitlines()


@pytest.fixture
def saved(trained, tmp_path):
    """A copy of the run, to be changed."""
    return Path(shutil.copytree(trained[0], tmp_path / "run"))


def log_loss_at(log_temperature, logits, labels):
    return -log_softmax(logits / np.exp(log_temperature), axis=1)[np.arange(len(labels)), labels].mean()


def results_of(folder):
    return json.loads((folder / "results.json").read_text())


def test_test_images_are_opened_at_the_check_and_at_the_end_only(trained, data):
    out, names = trained
    test = [i for i, name in enumerate(names) if name.startswith(str(data / "test")) and name.endswith(".png")]
    training = [i for i, name in enumerate(names) if name.startswith(str(out / "stages"))]
    assert len({names[i] for i in test}) == 36
    before = [i for i in test if i < training[0]]
    after = [i for i in test if i > training[-1]]
    assert len(before) + len(after) == len(test), "test images were opened while something could still be chosen"
    # The check that they can be decoded; then their digests and pixels.
    assert len(before) == 36
    validated = [i for i, name in enumerate(names) if name.startswith(str(data / "val")) and i > training[-1]]
    assert max(validated[:36]) < min(after), "the temperature is fitted before"


def test_the_look_is_recorded_with_time_and_commit(trained, repository):
    results = results_of(trained[0])
    assert results["test_reads"] == 1
    (look,) = results["test_looks"]
    assert look["by"] == "train"
    assert look["time"].endswith("+00:00")
    assert look["torchthaw"] == results["versions"]["torchthaw"]
    commit = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=repository, text=True).strip()
    digest = hashlib.sha256((trained[0] / "recipe.yaml").read_bytes()).hexdigest()
    assert look["recipe"] == {"sha256": digest, "commit": commit, "dirty": False}
    assert look["figures"]["accuracy"] == results["test"]["accuracy"]
    assert "The test images were used once" in (trained[0] / "README.md").read_text()


def test_what_is_saved_and_measured_is_calibrated(trained):
    out, results = trained[0], results_of(trained[0])
    calibration = results["calibration"]
    temperature = calibration["temperature"]
    assert calibration["problem"] is None
    assert temperature != 1
    assert TorchvisionConfig.from_pretrained(out).temperature == temperature
    for split in ("validation", "test"):
        rows = read_predictions(out / "predictions" / f"{split}.jsonl")
        names = list(rows[0]["scores"])
        labels = np.array([names.index(row["label"]) for row in rows])
        after = np.log([list(row["scores"].values()) for row in rows])
        # Logits are known from scores up to a constant of each image, which no figure depends on.
        before = after * temperature
        losses = {"before": before, "after": after}
        for when, logits in losses.items():
            assert calibration["loss"][split][when] == pytest.approx(log_loss_at(0, logits, labels), rel=1e-4)
        assert results[split]["loss"] == calibration["loss"][split]["after"]
        assert results[split]["ece"] == calibration["ece"][split]["after"]
        if split == "validation":
            best = minimize_scalar(log_loss_at, args=(before, labels), bounds=(-3, 3), method="bounded")
            assert temperature == pytest.approx(np.exp(best.x), rel=1e-3)
    # What chose the weights was not.
    kept = [stage for stage in results["stages"] if stage["accepted"]][-1]
    assert kept["best_metric"] == pytest.approx(results["validation"][results["metric"]])
    card = (out / "README.md").read_text()
    assert f"calibrated by temperature with {temperature:.4f}" in card


def test_a_second_look_is_refused_and_with_again_recorded(run, saved, data):
    before = results_of(saved)
    for arguments in (["--data", data], [], ["--data", data / "test", "--split", "train"]):
        split = [] if "--split" in arguments else ["--split", "test"]
        code, stdout, stderr = run("evaluate", saved, *arguments, *split)
        assert code == 2, stderr
        assert "36 of the 36 images" in stderr
        assert "--again" in stderr
        assert stdout == ""
        assert results_of(saved) == before

    code, stdout, stderr = run("evaluate", saved, "--data", data, "--split", "test", "--again", "--json")
    assert code == 0, stderr
    figures, after = json.loads(stdout), results_of(saved)
    assert figures["accuracy"] == before["test"]["accuracy"]
    assert figures["loss"] == pytest.approx(before["test"]["loss"], rel=1e-5)
    assert figures["test_reads"] == after["test_reads"] == 2
    first, second = after["test_looks"]
    assert first == before["test_looks"][0]
    assert second["by"] == "evaluate"
    assert "--again" in second["command"]
    assert second["figures"]["accuracy"] == figures["accuracy"]
    assert {**after, "test_looks": 0, "test_reads": 0} == {**before, "test_looks": 0, "test_reads": 0}
    card = (saved / "README.md").read_text()
    assert "used 2 times" in card
    assert "used 2 times" in (saved / "report.html").read_text()
    assert f"{second['time']} by evaluate" in card


def test_other_images_are_free(run, saved, data, tmp_path):
    code, stdout, stderr = run("evaluate", saved, "--json")
    assert code == 0, stderr
    figures = json.loads(stdout)
    assert figures["split"] == "validation"
    assert figures["accuracy"] == results_of(saved)["validation"]["accuracy"]
    assert "test_reads" not in figures
    for label, name in enumerate(("ant", "bee", "cat")):
        for number in range(2):
            draw(tmp_path / "new" / "test" / name / f"{number:02d}.png", label, 900 + number)
    # One test image among others is no look.
    shutil.copy(data / "test" / "ant" / "00.png", tmp_path / "new" / "test" / "ant" / "copy.png")
    code, _, stderr = run("evaluate", saved, "--data", tmp_path / "new", "--split", "test")
    assert code == 0, stderr
    assert results_of(saved)["test_reads"] == 1
    (saved / "results.json").unlink()
    assert run("evaluate", saved, "--data", data, "--split", "test")[0] == 0


def test_a_part_of_the_test_images_under_other_names_is_a_look(run, saved, data, tmp_path):
    for name in ("ant", "bee", "cat"):
        for number in range(3):
            (tmp_path / "part" / name).mkdir(parents=True, exist_ok=True)
            shutil.copy(data / "test" / name / f"{number:02d}.png", tmp_path / "part" / name / f"x{number}.png")
    code, _, stderr = run("evaluate", saved, "--data", tmp_path / "part", "--split", "train")
    assert code == 2
    assert "9 of the 9 images" in stderr


def test_what_counts_as_the_test_images():
    known = [f"{number:032x}" for number in range(10)]
    run = {"test_images": describe_images(known)}
    assert count_test_images(run, set(known), known[::-1]) == 10
    assert count_test_images(run, set(known), [*known[:5], *"abcdefghijkl"]) == 5
    assert count_test_images(run, set(known), [*known[:4], *"abcdefghijkl"]) == 0
    assert count_test_images(run, set(known), known[:2]) == 2
    # From the Hub only the digest of all is known.
    assert count_test_images(run, set(), known) == 10
    assert count_test_images(run, set(), known[:9]) == 0
    assert count_test_images({}, set(), known) == 0


def test_a_folder_that_cannot_be_written_to_is_refused(saved, data):
    if os.name != "posix":
        pytest.skip("file modes are for POSIX")
    file = saved / "results.json"
    content = file.read_bytes()
    program = """
import os, sys
from pathlib import Path
from torchthaw.errors import DataError
from torchthaw.evaluations import _check_look
folder = Path(sys.argv[1])
folder.chmod(0o555)
if os.getuid() == 0:
    # To root no folder is read-only; to nobody the folders of pytest have to be open.
    for parent in folder.parents[:4]:
        parent.chmod(0o755)
    os.seteuid(65534)
try:
    _check_look(str(folder), "the data", 3, 3, True)
except DataError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program, saved], capture_output=True, text=True, check=True)
    saved.chmod(0o755)
    assert "cannot be written to (Permission denied)" in done.stdout
    assert file.read_bytes() == content


def test_a_repository_on_the_hub_cannot_record_it():
    from torchthaw.errors import DataError
    from torchthaw.evaluations import _check_look

    with pytest.raises(DataError, match="hf download user/model"):
        _check_look("user/model", "the data", 3, 3, True)


def test_a_run_that_was_killed_while_it_measured_counts_one_look(run, saved, data):
    """As after a kill during the measurement: no results.json, the earlier one set aside, no card."""
    before = results_of(saved)
    run("evaluate", saved, "--split", "test", "--again", "--quiet")
    looks = results_of(saved)["test_looks"]
    weights = (saved / "model.safetensors").read_bytes()
    shutil.move(saved / "results.json", saved / ".results.json.earlier")
    (saved / "README.md").unlink()
    code, stdout, stderr = run("train", saved / "recipe.yaml", "--resume", "--output", saved, "--json")
    assert code == 0, stderr
    after = json.loads(stdout)
    assert after["test_reads"] == 2
    assert after["test_looks"] == looks
    assert after["test"] == before["test"]
    assert after["calibration"] == before["calibration"]
    assert (saved / "model.safetensors").read_bytes() == weights
    assert not (saved / ".results.json.earlier").exists()

    # A first measurement that was killed leaves nothing that would count.
    (saved / "results.json").unlink()
    (saved / "README.md").unlink()
    code, stdout, _ = run("train", saved / "recipe.yaml", "--resume", "--output", saved, "--json")
    assert json.loads(stdout)["test_reads"] == len(json.loads(stdout)["test_looks"]) == 1


def test_an_average_cannot_be_chosen_on_test_images(run, saved, data, tmp_path):
    other = Path(shutil.copytree(saved, tmp_path / "other"))
    code, _, stderr = run("soup", saved, other, "--output", tmp_path / "soup", "--data", data, "--split", "test")
    assert code == 2
    assert "test images of" in stderr
    assert not (tmp_path / "soup").exists()


def test_figures_are_shown_as_tables(run, saved):
    code, stdout, _ = run("evaluate", saved, "--quiet", "--per-class", "--confusion")
    assert code == 0
    of = results_of(saved)["validation"]
    for name in ("accuracy", "macro_f1", "balanced_accuracy", "weighted_f1", "auroc", "loss", "ece", "brier"):
        assert f"{of[name]:.4f}" in stdout, name
    low, high = of["accuracy_interval"]
    assert f"{low:.4f} to {high:.4f}" in stdout
    assert "scores calibrated by temperature" in stdout
    for name, figures in of["per_class"].items():
        row = next(line for line in stdout.splitlines() if name in line and "." in line)
        assert all(f"{figures[key]:.4f}" in row for key in ("precision", "recall", "f1"))
    rows = [line for line in stdout.splitlines() if "ant" in line][-1]
    assert [int(cell) for cell in rows.split("│")[2:5]] == of["confusion_matrix"][0]
    plain = run("evaluate", saved, "--quiet")[1]
    assert "precision" not in plain
    assert "predicted" not in plain


def test_without_a_recipe_there_is_no_data_by_default(run, saved):
    (saved / "recipe.yaml").unlink()
    code, _, stderr = run("evaluate", saved)
    assert code == 2
    assert "no recipe.yaml to take images from; pass --data" in stderr


def test_cross_validation_cannot_be_calibrated(run, data):
    code, _, stderr = run("train", "staged", "--data", data, "--set", "cv=3", "--set", "calibrate=temperature")
    assert code == 2
    assert "calibrate: temperature and cv: 3" in stderr
