"""Every recipe that comes with torchthaw: its header is whole, its commands work, and it trains."""

import json
import math
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from torchthaw import cli
from torchthaw.console import Reporter
from torchthaw.cross_validation import make_folds, prepare_images
from torchthaw.data_preparation import selection_metric
from torchthaw.recipe import load_recipe, packaged_recipes
from torchthaw.single_run import Job, make_trainer

FOLDER = Path(__file__).parents[1] / "recipes"
RECIPES = sorted(file.stem for file in FOLDER.rglob("*.y*ml"))
PARTS = ("Hardware", "Time", "Expected result", "What to change")
QUIET = Reporter(quiet=True)
# Small stand-ins, since here it is the recipe that is tested; ConvNeXt has no smaller kin.
STAND_INS = {
    "resnet50": "shufflenet_v2_x0_5", "resnet18": "shufflenet_v2_x0_5", "efficientnet_b0": "mnasnet0_5",
    "vit_b_16": "swin_t",
}  # fmt: skip


def header_of(name):
    """The lines of comment that a recipe begins with, without their marks."""
    lines = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    return [line.removeprefix("#") for line in lines[: next(i for i, line in enumerate(lines) if line[:1] != "#")]]


def commands_of(name):
    return [line.strip() for line in header_of(name) if re.match(r" {3}(torchthaw|torchrun|accelerate) ", line)]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Twelve pictures of each of three classes, of patients, and the same with several labels each."""
    root = tmp_path_factory.mktemp("data")
    labels = ["file_name,labels"]
    (root / "several").mkdir()
    for index, name in enumerate(("ant", "bee", "cat")):
        (root / "one" / name).mkdir(parents=True)
        for number in range(12):
            random = np.random.default_rng(100 * index + number)
            pixels = random.integers(0, 120, size=(40, 48, 3), dtype=np.uint8)
            pixels[..., index] += 100
            picture = Image.fromarray(pixels)
            picture.save(root / "one" / name / f"patient{number}_{index}.png")
            picture.save(root / "several" / f"{name}{number}.png")
            labels.append(f"{name}{number}.png,{name}{'|ant' * (index > 0 and number % 2)}")
    (root / "several" / "metadata.csv").write_text("\n".join(labels))
    return root


def data_for(name, photos):
    return photos / ("several" if name == "multi_label" else "one")


def test_all_recipes_are_found_and_listed():
    assert set(RECIPES) == set(packaged_recipes())
    readme = (FOLDER.parent / "README.md").read_text(encoding="utf-8")
    for name in RECIPES:
        assert f"| `{name}` | " in readme, f"the README's table has no row of {name}"


@pytest.mark.parametrize("name", RECIPES)
def test_the_header_has_every_part(name):
    lines = header_of(name)
    assert re.match(r" [A-Z].{20,}[.:]$", lines[0]), "the first line says what it is for"
    assert commands_of(name), "there is no command"
    assert all(f"torchthaw train {name}" in command for command in commands_of(name))
    text = "\n".join(lines)
    found = [text.find(f"\n {part}: ") if part != PARTS[-1] else text.find(f"\n {part}:") for part in PARTS]
    assert -1 not in found, f"of {PARTS}, {[part for part, at in zip(PARTS, found, strict=True) if at < 0]} are missing"
    assert found == sorted(found), "the parts are in another order"
    for part, start, end in zip(PARTS, found, [*found[1:], len(text)], strict=True):
        said = text[start:end].split(":", 1)[1]
        assert len(said.split()) >= 2, f"{part} is empty"
        if part == "Expected result" and "not measured yet" not in said:
            assert re.search(r"\b[01]\.\d", said), "the expected result has no figure"
            assert re.search(r"\bseeds?\b", said), "the expected result does not say of how many seeds it is"
    assert max(map(len, lines)) < 120


@pytest.mark.parametrize("name", RECIPES)
def test_keys_that_the_header_names_exist(name):
    recipe = load_recipe(name, {"data.path": "photos"})
    known = {*type(recipe).model_fields, *type(recipe.data).model_fields}
    known |= {"crop_scale", "horizontal_flip", "vertical_flip", "layer_decay", "batch_norm"}
    text = "\n".join(header_of(name)).split("What to change:")[1]
    for line in text.splitlines():
        entry = re.match(r" {3}(\S.*?)(?: {2,}|$)", line)
        if entry is None or entry[1].startswith("--"):
            continue
        for key in entry[1].split(", "):
            assert key.split(":")[0].removeprefix("data.") in known, f"{key!r} is no key of a recipe"


@pytest.mark.parametrize("name", RECIPES)
def test_its_commands_are_accepted(name, photos, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for command in commands_of(name):
        words = shlex.split(command)
        arguments = words[words.index("torchthaw") + 1 :]
        if "--data" in arguments:
            arguments[arguments.index("--data") + 1] = str(data_for(name, photos))
        # There are fewer images here than some ask for.
        arguments += [
            "--dry-run",
            "--json",
            "--set",
            "batch_size=4",
            "--set",
            "audit=off",
            "--set",
            "data.validation=0.25",
        ]
        monkeypatch.setattr(sys, "argv", ["torchthaw", *arguments])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        captured = capsys.readouterr()
        assert not exit_.value.code, captured.err
        document = json.loads(captured.out)
        assert document["backbone"] == load_recipe(name, {"data.path": "photos", **backbone_in(arguments)}).backbone
        assert document["total_steps"] > 0
    assert not list(tmp_path.iterdir())


def backbone_in(arguments):
    return {"backbone": arguments[arguments.index("--backbone") + 1]} if "--backbone" in arguments else {}


@pytest.mark.parametrize("name", RECIPES)
def test_it_trains(name, photos, tmp_path):
    recipe = load_recipe(name, {"data.path": "photos"})
    stages = recipe.stage_plan().stages
    small = {"epochs": len(stages)}
    if recipe.stages is not None:
        # One step each, in small images.
        own = {"epochs": None, "steps": 1}
        small = {"stages": [{**stage, **own, **({"image_size": 32} if "image_size" in stage else {})}
                            for stage in recipe.stages]}  # fmt: skip
    backbone = STAND_INS.get(recipe.backbone, recipe.backbone)
    overrides = {
        **small, "backbone": backbone, "weights": None, "image_size": 32, "batch_size": 8,
        "num_workers": 0, "audit": "off", "cache_gb": 0, "live_precision": "float32", "frozen_precision": "float32",
        "data.path": str(data_for(name, photos)), "data.validation": 0.25, "data.test": 0,
    }  # fmt: skip
    chosen = load_recipe(name, overrides)
    data = prepare_images(chosen, QUIET, features=False)
    metric = selection_metric(chosen, data)
    if chosen.cv is not None:
        data = make_folds(chosen, data, metric)[0]
    trainer = make_trainer(Job(chosen, data, metric, tmp_path / "out"))
    # Weights of transformers would take seconds to write.
    trainer.args.save_strategy = "no"
    trainer.train()
    records = trainer.stage_records
    assert [record.name for record in records] == [stage.name for stage in stages]
    assert all(math.isfinite(record.best_metric) for record in records)
    assert trainer.state.global_step >= len(stages)
