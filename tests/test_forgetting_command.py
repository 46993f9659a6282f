"""`forgetting:` and `l2_sp:` in recipes: what a run says, writes and refuses."""

import json
import sys

import pytest
import yaml

from torchthaw import TorchvisionForImageClassification, cli
from torchthaw.errors import RecipeError
from torchthaw.recipe import Recipe, load_recipe
from torchthaw.training.forgetting_settings import ForgettingRecipe

MINIMAL = {"backbone": "shufflenet_v2_x0_5", "weights": "builtin", "data": {"path": "photos"}}
SETTINGS = ["--backbone", "shufflenet_v2_x0_5", "--weights", "builtin"]
for _setting in ("image_size=32", "batch_size=8", "num_workers=0", "audit=off", "gate=off"):
    SETTINGS += ["--set", _setting]


@pytest.fixture
def run(monkeypatch, capsys):
    """Returns a function that runs the command line: its exit code, stdout, and stderr in one line."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["torchthaw", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        return ended.value.code or 0, captured.out, " ".join(captured.err.split())

    return call


@pytest.fixture
def photos(make_image_folder):
    return make_image_folder(per_class=8, splits=("train", "val"))


@pytest.fixture
def source(make_image_folder):
    """Images that are called like three of the ten classes of the built-in weights, one of them almost."""
    return make_image_folder(classes=("Cat", "dog", "lorry"), per_class=5, name="source <b>")


def test_a_run_tells_what_was_forgotten(run, photos, source, tmp_path):
    output = tmp_path / "run"
    stages = "[{name: all, unfreeze: all, epochs: 2, learning_rate: 1e-2, layer_decay: 1}]"
    asked = f"forgetting={{data: '{source}', names: {{lorry: truck}}}}"
    own = ["plan=null", "epochs=null", f"stages={stages}", asked, "l2_sp=0.5"]
    sets = [word for setting in own for word in ("--set", setting)]
    code, _, said = run("train", "staged", "--data", photos, *SETTINGS, "--output", output, *sets)
    assert code == 0, said
    results = json.loads((output / "results.json").read_text())
    found = results["forgetting"]
    assert (found["data"], found["split"], found["num_images"], found["num_classes"]) == ("source <b>", "train", 15, 3)
    assert found["difference"] == pytest.approx(found["after"]["accuracy"] - found["before"]["accuracy"])
    distance = results["distance_from_start"]
    assert distance["backbone"] > 0
    assert list(distance["groups"]) == ["stem", "stage2", "stage3", "stage4"]
    # One stage, so that it went as far as the run.
    for name, share in distance["groups"].items():
        assert share == pytest.approx(results["stages"][0]["changes"][name], abs=1e-6)
    accuracy = f"accuracy {found['before']['accuracy']:.4f} -> {found['after']['accuracy']:.4f}"
    assert "forgetting: source <b> (train, 15 images) with the pretrained head:" in said
    assert accuracy in said
    card, report = (output / "README.md").read_text(), (output / "report.html").read_text()
    for shown in (f"{found['after']['accuracy']:.4f}", f"stem {100 * distance['groups']['stem']:.3g} %"):
        assert shown in card
        assert shown in report
    assert "source <b>" not in "".join(card.split("```")[::2]), "but in the command, which is code"
    assert "<bdi>source &lt;b&gt;</bdi>" in report
    saved = yaml.safe_load((output / "recipe.yaml").read_text())
    assert saved["forgetting"]["names"] == {"lorry": "truck"}
    assert saved["l2_sp"] == 0.5
    model = TorchvisionForImageClassification.from_pretrained(output)
    assert model.config.class_names == ["ant", "bee", "cat"]


def test_nothing_is_said_where_it_was_not_asked_for_and_a_head_alone_moves_nothing(run, photos, tmp_path):
    output = tmp_path / "run"
    head = ["--set", "plan=head", "--set", "epochs=1"]
    code, _, said = run("train", "staged", "--data", photos, *SETTINGS, "--output", output, *head)
    assert code == 0, said
    results = json.loads((output / "results.json").read_text())
    assert "forgetting" not in results
    assert results["distance_from_start"]["backbone"] == 0.0
    for text in (said, (output / "README.md").read_text(), (output / "report.html").read_text()):
        assert "forgot" not in text
        assert "Forgetting:" not in text
        assert "forgetting:" not in text.replace("forgetting: null", "")  # of the recipe


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("forgetting={source}", "the class 'lorry' of {source} is none of the 10 classes"),
        ("forgetting={{data: '{source}', names: {{lorry: truck}}, split: val}}", "has no split 'val'"),
        ("forgetting={{data: '{source}', names: {{lory: truck}}}}", "Did you mean 'lorry'"),
        ("forgetting={source}/nowhere", "nowhere"),
        ("forgetting.dta={source}", "unknown key 'forgetting.dta'. Did you mean 'data'"),
    ],
)
@pytest.mark.parametrize("dry", [True, False])
def test_mistakes_show_before_anything_is_written(run, photos, source, tmp_path, setting, message, dry):
    output = tmp_path / "run"
    arguments = ["train", "staged", "--data", photos, *SETTINGS, "--output", output]
    code, _, said = run(*arguments, "--set", setting.format(source=source), *(["--dry-run"] if dry else []))
    assert code == 2
    assert message.format(source=source) in said
    assert not output.exists()


def test_a_dry_run_shows_what_is_pulled_in_place_of_decay(run, photos):
    _, out, said = run("train", "staged", "--data", photos, *SETTINGS, "--set", "l2_sp=2", "--dry-run", "--json")
    document = json.loads(out)
    assert document["l2_sp"] == 2
    decays = {group["group"]: group["weight_decay"] for group in document["stages"][-1]["groups"]}
    assert decays.pop("head") == 0.01
    assert set(decays.values()) == {0.0}
    assert "L2-SP 2: in place of weight decay" in said


def test_the_data_alone_is_short_for_the_section():
    recipe = load_recipe({**MINIMAL, "forgetting": "user/images", "l2_sp": "1e-2"})
    assert recipe.forgetting == ForgettingRecipe(data="user/images")
    assert recipe.l2_sp == 0.01
    assert Recipe.model_validate(yaml.safe_load(recipe.to_yaml())) == recipe
    assert load_recipe(MINIMAL).forgetting is None
    assert load_recipe(MINIMAL).l2_sp is None


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({**MINIMAL, "l2_sp": 0}, "l2_sp is 0"),
        ({**MINIMAL, "l2_sp": float("inf")}, "l2_sp is inf"),
        (
            {**MINIMAL, "weights": None, "l2_sp": 0.1},
            "has l2_sp, which pulls .* and weights: null",
        ),
        ({**MINIMAL, "weights": None, "forgetting": "x"}, "has forgetting, .* and weights: null"),
        ({**MINIMAL, "forgetting": {"split": "x"}}, "forgetting.data is missing"),
        ({**MINIMAL, "forgetting": ""}, "forgetting.data is ''"),
    ],
)
def test_a_recipes_mistakes_are_named(data, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(data)


def test_real_weights_know_ants_and_bees_and_a_head_alone_forgets_nothing(run, shared_data, shared_weights, tmp_path):
    data, output = shared_data / "hymenoptera", tmp_path / "run"
    code, _, said = run(
        "train", "staged", "--data", data, "--backbone", "mobilenet_v2", "--weights", shared_weights,
        "--output", output, "--set", "plan=head", "--set", "epochs=1", "--set", "image_size=96",
        "--set", "num_workers=0", "--set", "audit=off", "--set", "data.on_bad_image=drop",
        "--set", f"forgetting={{data: {data}, names: {{ants: ant, bees: n02206856}}}}",
    )  # fmt: skip
    assert code == 0, said
    found = json.loads((output / "results.json").read_text())["forgetting"]
    # Chance is one in a thousand.
    assert found["before"]["accuracy"] > 0.2
    assert found["after"] == found["before"]
    assert (found["difference"], found["forgotten"], found["gained"], found["num_images"]) == (0, 0, 0, 153)
