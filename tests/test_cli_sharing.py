"""`torchthaw card`, `export` and `soup` on real runs; `push` is tested with the stand-in of the Hub."""

import json
import sys

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from torchthaw import TorchvisionForImageClassification, cli

TINY = ["--backbone", "shufflenet_v2_x0_5", "--weights", "builtin", "--set", "image_size=32", "--set", "epochs=2"]
TINY += ["--set", "batch_size=8", "--set", "num_workers=0", "--set", "learning_rate=0.02"]


def draw(folder, number, channel):
    random = np.random.default_rng(100 * channel + number)
    pixels = random.integers(0, 150, (40, 40, 3), dtype=np.uint8)
    pixels[..., channel] += 60
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(folder / f"{number:02d}.png")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "photos"
    for split, first in (("train", 0), ("val", 50)):
        for channel, name in enumerate(("ant", "bee")):
            for number in range(first, first + 8):
                draw(root / split / name, number, channel)
    return root


@pytest.fixture(scope="module")
def runs(photos, tmp_path_factory):
    """Two runs with other seeds on the same given splits."""
    root = tmp_path_factory.mktemp("runs")
    before = sys.argv
    for seed in (0, 1):
        sys.argv = ["torchthaw", "train", "two_phase", "--data", str(photos), *TINY, "--set", f"seed={seed}"]
        sys.argv += ["--output", str(root / f"run{seed}"), "--set", "card.license=mit", "--quiet"]
        sys.argv += ["--set", "report_to=[tensorboard]"]
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        assert not exit_.value.code
    sys.argv = before
    return [root / "run0", root / "run1"]


def test_train_writes_a_card_with_the_recipes_options(runs):
    card = (runs[0] / "README.md").read_text(encoding="utf-8")
    results = json.loads((runs[0] / "results.json").read_text())
    assert "license: mit" in card
    assert results["command"].startswith("torchthaw train two_phase")
    assert results["data"]["splits"]["train"] == {"counts": {"ant": 8, "bee": 8}, "origin": "given", "share": None}
    assert results["saved_folder"]["images"] == 16
    assert str(results["validation"]["accuracy"]) in card
    assert list((runs[0] / "stages" / "runs").rglob("events.out.tfevents.*")), "report_to reaches the trainer"


def test_card_takes_options_and_keeps_what_is_the_users(run, runs):
    file = runs[0] / "README.md"
    file.write_text(file.read_text(encoding="utf-8") + "\n## Thanks\n\nTo the ants.\n", encoding="utf-8")
    code, out, err = run("card", runs[0], "--set", "intended_use=Counting ants.", "--json")
    assert code == 0, err
    assert json.loads(out) == {"card": str(file)}
    card = file.read_text(encoding="utf-8")
    assert "Counting ants." in card
    assert "To the ants." in card
    assert run("card", runs[0])[0] == 0
    assert file.read_text(encoding="utf-8") == card

    code, _, err = run("card", runs[0], "--set", "licence=mit")
    assert code == 2
    assert "a card has no option 'licence'. Did you mean 'license'" in err
    code, _, err = run("card", runs[0], "--set", "license=My Own!")
    assert code == 2
    assert "no license identifier" in err
    assert file.read_text(encoding="utf-8") == card


def test_card_refuses_other_weights_than_were_measured(run, runs, tmp_path):
    code, _, err = run("card", tmp_path / "nothing")
    assert code == 2
    model = TorchvisionForImageClassification.from_pretrained(runs[1])
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("results.json", "recipe.yaml"):
        (copy / name).write_bytes((runs[1] / name).read_bytes())
    with torch.no_grad():
        model.backbone.fc.bias += 1
    model.save_pretrained(copy)
    code, _, err = run("card", copy)
    assert code == 2
    assert "model.safetensors" in err


def test_export_commands(run, runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = run("export", runs[0], "--to", "torchvision")
    assert code == 0, err
    assert "largest difference of the logits: 0\n" in out
    network = torchvision.models.shufflenet_v2_x0_5(weights=None, num_classes=2)
    network.load_state_dict(torch.load("run0-torchvision/model.pth", weights_only=True))
    code, out, _ = run("export", runs[0], "--to", "onnx", "--output", "graph", "--preprocessing", "--json")
    assert code == 0
    assert json.loads(out)["files"] == ["graph/model.onnx"]
    code, _, err = run("export", runs[0], "--to", "timm")
    assert code == 2
    assert "timm has no shufflenet_v2_x0_5" in err
    code, _, err = run("export", runs[0], "--to", "torchvision", "--opset", "18", "-o", "x")
    assert code == 2
    assert "--preprocessing and --opset go with --to onnx" in err


def test_soup_commands(run, runs, photos, tmp_path):
    code, out, err = run("soup", *runs, "--output", tmp_path / "soup", "--json")
    assert code == 0, err
    found = json.loads(out)
    singles = [json.loads((folder / "results.json").read_text())["validation"]["accuracy"] for folder in runs]
    assert found["num_images"] == 16
    assert found["score"] >= max(singles)
    # What was saved has the score that was told.
    code, out, err = run("evaluate", tmp_path / "soup", "--data", photos, "--json")
    assert json.loads(out)["accuracy"] == pytest.approx(found["score"])
    assert "README.md" in {path.name for path in (tmp_path / "soup").iterdir()}

    code, out, err = run("soup", runs[0], "--start", "builtin", "--data", photos, "-o", tmp_path / "mix", "--json")
    assert code == 0, err
    assert json.loads(out)["score"] >= singles[0]
    assert len(json.loads(out)["steps"]) == 11

    code, _, err = run("soup", *runs, "--start", "builtin", "-o", tmp_path / "other")
    assert code == 2
    assert "--start goes with one run" in err
    code, _, err = run("soup", *runs, "-o", tmp_path / "soup")
    assert code == 2
    assert "never overwrites" in err


def test_soup_refuses_to_choose_on_images_that_a_run_was_trained_on(run, runs, tmp_path):
    for name, changes in (("other data", {"validation: 0.15": "validation: 0.25"}), ("no recipe", {})):
        copy = tmp_path / name
        copy.mkdir()
        for file in runs[1].iterdir():
            if file.is_file():
                (copy / file.name).write_bytes(file.read_bytes())
        recipe = copy / "recipe.yaml"
        for old, new in changes.items():
            assert old in recipe.read_text()
            recipe.write_text(recipe.read_text().replace(old, new))
        if not changes:
            recipe.unlink()
    code, _, err = run("soup", runs[0], tmp_path / "other data", "-o", tmp_path / "soup")
    assert code == 2
    assert "were trained on other data" in err
    code, _, err = run("soup", runs[0], tmp_path / "no recipe", "-o", tmp_path / "soup")
    assert code == 2
    assert "has no recipe.yaml" in err
    assert not (tmp_path / "soup").exists()


def test_runs_that_cut_their_validation_with_other_seeds_are_not_compared(run, photos, tmp_path):
    for seed in (0, 1):
        command = ["train", "two_phase", "--data", photos / "train", *TINY, "--set", f"seed={seed}"]
        code, _, err = run(*command, "--set", "data.validation=0.25", "--output", tmp_path / f"run{seed}")
        assert code == 0, err
    code, _, err = run("soup", tmp_path / "run0", tmp_path / "run1", "-o", tmp_path / "soup")
    assert code == 2
    assert "cut off their validation images with other seeds" in err
