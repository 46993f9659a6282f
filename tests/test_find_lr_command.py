"""`torchthaw find-lr`."""

import json
import sys

import pytest
import yaml
from PIL import Image

from torchthaw import cli
from torchthaw.recipe import load_recipe

OPTIONS = ["backbone=shufflenet_v2_x0_5", "weights=builtin", "image_size=32", "batch_size=18", "num_workers=0"]
OPTIONS += ["data.validation=0.25", "audit=off", "cache_gb=0"]
HOSTILE = "all: [b]\x1b[31m$x_ <i>"


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a command in this process; returns its exit code, stdout and stderr."""

    def call(*arguments):
        words = [str(word) for word in arguments] + [word for option in OPTIONS for word in ("--set", option)]
        monkeypatch.setattr(sys, "argv", ["torchthaw", *words])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        captured = capsys.readouterr()
        return exit_.value.code or 0, captured.out, captured.err

    return call


@pytest.fixture
def recipe(tmp_path):
    file = tmp_path / "recipe.yaml"
    stages = [{"name": "head", "unfreeze": "head", "epochs": 2}, {"name": HOSTILE, "unfreeze": 1, "patience": 2}]
    file.write_text(yaml.safe_dump({"backbone": "resnet50", "stages": stages}))
    return file


def test_every_stage_is_tested_drawn_and_can_be_pasted(run, recipe, make_image_folder, tmp_path):
    data, out = make_image_folder(per_class=8), tmp_path / "rates"
    code, stdout, stderr = run(
        "find-lr", recipe, "--data", data, "--steps", 40, "--lead-steps", 5, "--output", out, "--json"
    )
    assert code == 0, stderr
    document = json.loads(stdout)
    assert document == json.loads((out / "learning_rates.json").read_text())
    assert [stage["stage"] for stage in document["stages"]] == ["head", HOSTILE]
    assert [stage["plan_rate"] for stage in document["stages"]] == [1e-3, 3e-4]
    assert [stage["family_rate"] for stage in document["stages"]] == [1e-3, 3e-4]
    plots = sorted(file.name for file in out.glob("*.png"))
    assert plots == ["01-head.png", "02-all-b-31m-x-i.png"]
    assert all(Image.open(out / name).size[0] > 300 for name in plots)
    assert "\x1b[31m" not in stderr
    assert document["stages"][0]["sentence"] in stderr
    assert document["stages"][0]["suggestion"] is not None

    # Pasted, the plan is the same but for the rates.
    pasted = load_recipe({"backbone": "resnet50", "data": {"path": "x"}, **yaml.safe_load(document["recipe"])})
    head, last = pasted.stages
    assert (head["name"], head["unfreeze"], head["epochs"]) == ("head", "head", 2)
    assert (last["name"], last["unfreeze"], last["epochs"], last["patience"]) == (HOSTILE, 1, 1, 2)
    assert head["learning_rate"] == document["stages"][0]["learning_rate"] == document["stages"][0]["suggestion"]
    assert last["learning_rate"] == (document["stages"][1]["learning_rate"] or 3e-4)
    assert last["layer_decay"] == 0.3

    code, _, stderr = run("find-lr", recipe, "--data", data, "--output", out)
    assert code == 2
    assert "exists, and nothing is overwritten" in stderr


def test_without_an_output_the_stages_are_printed_and_nothing_is_written(run, recipe, make_image_folder, tmp_path):
    data = make_image_folder(per_class=8)
    before = sorted(tmp_path.rglob("*"))
    code, stdout, stderr = run("find-lr", recipe, "--data", data, "--stage", "head", "--steps", 20, "--quiet")
    assert (code, stderr) == (0, "")
    assert stdout.startswith("# in place of plan, epochs and stages:\nstages:\n- {name: head, unfreeze: head")
    assert len(yaml.safe_load(stdout)["stages"]) == 2
    assert sorted(tmp_path.rglob("*")) == before


def test_an_unknown_stage_is_refused_before_the_images_are_read(run, recipe, tmp_path):
    code, _, stderr = run("find-lr", recipe, "--data", tmp_path / "nowhere", "--stage", "haed")
    assert code == 2
    assert "there is no stage 'haed' in the plan. Did you mean 'head'?" in stderr
    code, _, stderr = run("find-lr", recipe, "--data", tmp_path / "nowhere", "--steps", 3)
    assert code == 2
    assert "write a whole number from 20 on" in stderr
