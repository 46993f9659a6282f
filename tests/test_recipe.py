"""Recipes are read safely and checked completely."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from torchthaw.errors import PlanError, RecipeError, ThawError
from torchthaw.recipe import Recipe, find_recipe, load_recipe, packaged_recipes, parse_override
from torchthaw.stages.plan import Stage, StagePlan

MINIMAL = {"backbone": "resnet18", "data": {"path": "photos"}}


def test_every_packaged_recipe_is_valid():
    recipes = packaged_recipes()
    assert {"quickstart", "staged", "two_phase"} <= set(recipes)
    for name, file in recipes.items():
        recipe = load_recipe(file, {"data.path": "photos"})
        assert recipe.stage_plan().stages
        header = file.read_text().split("\nbackbone:")[0]
        assert f"torchthaw train {name}" in header, f"{name}: the header shows no command"
        assert "Hardware" in header


def test_a_resolved_recipe_gives_the_same_run():
    recipe = load_recipe({**MINIMAL, "stages": [{"name": "a", "unfreeze": ["head"], "learning_rate": 1e-3}]})
    assert Recipe.model_validate(yaml.safe_load(recipe.to_yaml())) == recipe


def test_stages_take_every_field_and_survive_yaml(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text("""
backbone: resnet18
data: {path: photos}
gate: off
min_gain: 0.005
on_reject: stop
stages:
  - {name: head, unfreeze: head, steps: 40, warmup: 5, optimizer: sgd, optimizer_args: {nesterov: true}, batch_size: 8}
  - {name: top, unfreeze: ["layer[34]", head], learning_rate: 1e-5..1e-3, schedule: cosine_with_restarts,
     schedule_args: {num_cycles: 2}, max_grad_norm: 0, patience: 2, on_nan: retry, frozen_dropout: true}
  - {name: all, epochs: 2, image_size: 160, augmentation: {mixup: 0.2}, lora: {rank: 8, targets: [mlp]}}
""")
    recipe = load_recipe(file)
    assert (recipe.gate, recipe.min_gain, recipe.on_reject) == ("off", 0.005, "stop")
    assert recipe.stage_plan() == StagePlan(
        (
            Stage("head", "head", steps=40, warmup=5, optimizer="sgd", optimizer_args={"nesterov": True}, batch_size=8),
            Stage(
                "top",
                ("layer[34]", "head"),
                learning_rate="1e-5..1e-3",
                schedule="cosine_with_restarts",
                schedule_args={"num_cycles": 2},
                max_grad_norm=0,
                patience=2,
                on_nan="retry",
                frozen_dropout=True,
            ),
            Stage("all", epochs=2, image_size=160, augmentation={"mixup": 0.2}, lora={"rank": 8, "targets": ["mlp"]}),
        )
    )
    again = tmp_path / "again.yaml"
    again.write_text(recipe.to_yaml())
    assert load_recipe(again) == recipe
    # Any other reader of YAML gets the same.
    assert Recipe.model_validate(yaml.safe_load(recipe.to_yaml())) == recipe


def test_the_gate_keeps_what_is_better_unless_the_recipe_says_otherwise():
    recipe = load_recipe(MINIMAL)
    assert (recipe.gate, recipe.min_gain, recipe.on_reject) == ("best", 0.0, "continue")


def test_words_are_text_and_only_true_and_false_are_booleans():
    overrides = dict(map(parse_override, ["gate=off", "on_reject=stop", "a=yes", "b=true", "c=False", "d=~"]))
    assert overrides == {"gate": "off", "on_reject": "stop", "a": "yes", "b": True, "c": False, "d": None}
    assert load_recipe(MINIMAL, {"gate": "off"}).gate == "off"
    assert yaml.safe_load("off") is False, "PyYAML's own loader is left as it is"


def test_random_statistics_are_never_kept():
    stages = [{"name": "a", "unfreeze": "head"}, {"name": "b", "batch_norm": "freeze_affine"}]
    adapters = {**MINIMAL, "backbone": "maxvit_t", "weights": None, "stages": [{"name": "a", "lora": 4}]}
    assert load_recipe(adapters).stage_plan().stages[0].batch_norm == "eval", "unless all of the backbone is kept"
    pretrained, random = ({**MINIMAL, "stages": stages, "weights": weights} for weights in ("DEFAULT", None))
    assert [stage.batch_norm for stage in load_recipe(pretrained).stage_plan().stages] == ["auto", "freeze_affine"]
    assert [stage.batch_norm for stage in load_recipe(random).stage_plan().stages] == ["train", "freeze_affine"]


def test_numbers_such_as_1e_3_are_numbers(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text("backbone: resnet18\ndata: {path: photos}\nstages: [{name: a, learning_rate: {head: 1e-3}}]\n")
    assert load_recipe(file).stage_plan().stages[0].learning_rate == {"head": 0.001}


def test_overrides_reach_nested_keys():
    recipe = load_recipe(
        MINIMAL, dict(map(parse_override, ["data.validation=0.3", "weights=null", "learning_rate=1e-2"]))
    )
    assert recipe.data.validation == 0.3
    assert recipe.weights is None
    assert recipe.learning_rate == 0.01


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"backbon": "x", **MINIMAL}, "unknown key 'backbon'. Did you mean 'backbone'"),
        (
            {**MINIMAL, "data": {"path": "p", "valdation": 0.1}},
            "unknown key 'data.valdation'. Did you mean 'validation'",
        ),
        (
            {**MINIMAL, "stages": [{"name": "a", "unfreze": 1}]},
            "stage 'a' has the unknown key 'unfreze'. Did you mean 'unfreeze'",
        ),
        ({**MINIMAL, "stages": [{"name": "a"}, {"unfreeze": 1}]}, "stage number 2 has no name"),
        ({**MINIMAL, "stages": [{"name": "a", "epochs": 1, "steps": 5}]}, "stage 'a' has both epochs"),
        ({**MINIMAL, "epochs": 3, "stages": [{"name": "a", "steps": 5}]}, "its stages are counted in steps"),
        (
            {**MINIMAL, "stages": [{"name": "a"}, {"name": "b", "augmentation": "lihgt"}]},
            "stage 'b': unknown augmentation 'lihgt'. Did you mean 'light'",
        ),
        (
            {**MINIMAL, "stages": [{"name": "b", "augmentation": {"mixupp": 1}}]},
            "stage 'b': augmentation has the unknown key 'mixupp'",
        ),
        ({**MINIMAL, "gate": "bets"}, "gate is 'bets'.*'best', 'significant' or 'off'"),
        ({**MINIMAL, "min_gain": -0.1}, "min_gain is -0.1"),
        ({**MINIMAL, "min_gain": float("nan")}, "min_gain is nan"),
        ({**MINIMAL, "on_reject": "halt"}, "on_reject is 'halt'.*'continue' or 'stop'"),
        ({"data": {"path": "p"}}, "backbone is missing"),
        ({"backbone": "resnet18"}, "names no data; pass --data"),
        ({**MINIMAL, "batch_size": 0}, "batch_size is 0"),
        ({**MINIMAL, "batch_size": "most"}, "batch_size is .most.: .*valid integer.*; or Input should be .auto."),
        ({**MINIMAL, "learning_rate": 0}, "learning_rate is 0"),
        ({**MINIMAL, "metric": "f1"}, "metric is 'f1'"),
        ({**MINIMAL, "data": {"path": "p", "validation": 1.5}}, "data.validation is 1.5"),
        ({**MINIMAL, "data": {"path": "p", "name": "user/set"}}, "both data.path and data.name"),
        ({**MINIMAL, "plan": "staged", "stages": [{"name": "a"}]}, "both plan and stages"),
        ({**MINIMAL, "epochs": 3, "stages": [{"name": "a"}]}, "1 epochs long in all, but 3"),
        ({**MINIMAL, "plan": "stagd"}, "unknown plan 'stagd'. Did you mean 'staged'"),
        ({**MINIMAL, "epochs": 1}, "at least as many epochs, not 1"),
        ({**MINIMAL, "augmentation": "lihgt"}, "unknown augmentation 'lihgt'. Did you mean 'light'"),
        ({**MINIMAL, "augmentation": {"mixupp": 1}}, "unknown key 'mixupp'. Did you mean 'mixup'"),
    ],
)
def test_a_mistake_is_named_with_what_to_write(data, message):
    with pytest.raises(ThawError, match=message):
        load_recipe(data)


def test_files_that_are_no_recipes_are_refused(tmp_path):
    (tmp_path / "broken.yaml").write_text("backbone: [")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(RecipeError, match="not valid YAML"):
        load_recipe(tmp_path / "broken.yaml")
    with pytest.raises(RecipeError, match="holds no mapping"):
        load_recipe(tmp_path / "list.yaml")
    with pytest.raises(RecipeError, match=r"no recipe 'stagged'.*Did you mean 'staged'"):
        find_recipe("stagged")
    with pytest.raises(RecipeError, match="is a folder"):
        find_recipe(str(tmp_path))
    with pytest.raises(RecipeError, match="not of the form key=value"):
        parse_override("seed")
    with pytest.raises(RecipeError, match="is no section"):
        load_recipe(MINIMAL, {"backbone.x": 1})


def test_yaml_cannot_run_code(tmp_path):
    file = tmp_path / "evil.yaml"
    marker = tmp_path / "ran"
    file.write_text(
        f"backbone: !!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path ['{marker}']]"
    )
    with pytest.raises(RecipeError, match="not valid YAML"):
        load_recipe(file)
    assert not marker.exists()


def test_checking_a_recipe_needs_no_torch():
    code = (
        "import sys; sys.argv=['torchthaw']; from torchthaw.recipe import load_recipe; "
        "load_recipe('staged', {'data.path': 'x'}); assert 'torch' not in sys.modules, 'torch was imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_plan_error_is_a_user_error():
    assert issubclass(PlanError, ThawError)
    assert Path(packaged_recipes()["staged"]).is_file()


@pytest.mark.parametrize(("images", "size"), [(None, 32), (512, 32), (511, 16), (64, 16), (40, 10), (3, 1)])
def test_batches_of_few_images_are_small(images, size):
    assert load_recipe(MINIMAL).images_per_step(images) == size
    assert load_recipe({**MINIMAL, "batch_size": 64}).images_per_step(images) == 64


def test_the_plan_is_auto_unless_nothing_was_pretrained():
    assert load_recipe(MINIMAL).stage_plan().name == "auto"
    assert load_recipe({**MINIMAL, "weights": None}).stage_plan().name == "full"
    assert load_recipe({**MINIMAL, "plan": "staged"}).stage_plan().name == "staged"
