"""Training, saving and using models of several labels per image, on drawn shapes."""

import copy
import csv
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from sklearn.metrics import average_precision_score
from torch.nn import functional as F
from typer.testing import CliRunner

from torchthaw import (
    Stage,
    ThawTrainer,
    ThawTrainingArguments,
    TorchvisionConfig,
    TorchvisionForImageClassification,
    TorchvisionImageProcessor,
    load_image_dataset,
)
from torchthaw.cli import app
from torchthaw.console import Reporter
from torchthaw.dry_run import dry_run
from torchthaw.errors import DataError, PlanError, RecipeError
from torchthaw.evaluations import evaluate_saved
from torchthaw.recipe import load_recipe
from torchthaw.run import run_recipe
from torchthaw.use import predict_paths

SHAPES = ["circle", "square", "triangle"]
BUILTIN = {"backbone": "shufflenet_v2_x0_5", "weights": "builtin", "image_size": 64}
STAGES = [
    {"name": "head", "unfreeze": "head", "epochs": 3, "learning_rate": 1e-2},
    {"name": "last", "unfreeze": 1, "epochs": 3, "learning_rate": 3e-3, "batch_norm": "train"},
]


def draw(number):
    """Draws each shape with a probability, always in its own colour, on noise."""
    random = np.random.default_rng(number)
    picture = Image.fromarray(random.integers(0, 60, size=(48, 48, 3), dtype=np.uint8))
    pen, shapes = ImageDraw.Draw(picture), [shape for shape in SHAPES if random.random() < 0.45]
    for shape in shapes:
        left, top = random.integers(1, 28, size=2).tolist()
        box = (left, top, left + 18, top + 18)
        if shape == "circle":
            pen.ellipse(box, fill=(220, 40, 40))
        elif shape == "square":
            pen.rectangle(box, outline=(40, 220, 40), width=4)
        else:
            pen.polygon([(left, top + 18), (left + 18, top + 18), (left + 9, top)], fill=(60, 60, 230))
    return picture, shapes


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    root = tmp_path_factory.mktemp("shapes")
    with (root / "metadata.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["file_name", "label", *SHAPES])
        for number in range(160):
            picture, shapes = draw(number)
            picture.save(root / f"{number:03d}.png")
            table.writerow([f"{number:03d}.png", "|".join(shapes), *(int(shape in shapes) for shape in SHAPES)])
    return root


@pytest.fixture(scope="module")
def recipe(photos):
    return {
        **BUILTIN, "data": {"path": str(photos), "validation": 0.25, "test": 0.25}, "problem_type": "multi_label",
        "thresholds": "per_class", "stages": STAGES, "augmentation": "none", "batch_size": 16, "num_workers": 0,
    }  # fmt: skip


@pytest.fixture(scope="module")
def run(recipe, tmp_path_factory):
    output = tmp_path_factory.mktemp("run") / "out"
    results = run_recipe(load_recipe(recipe, {"output": str(output)}), Reporter(quiet=True))
    return output, results


def lines_of(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def command(*words):
    done = CliRunner().invoke(app, list(map(str, words)))
    assert done.exit_code == 0, done.output
    return done.stdout


def test_a_model_learns_and_its_figures_are_those_of_its_predictions(run):
    output, results = run
    assert results["metric"] == "map"
    head = results["stages"][0]["comparison"]
    assert head["metric"] == "map"
    assert head["method"].startswith("paired bootstrap over 40 images")
    assert results["test"]["map"] > 0.85, "chance is about 0.45"
    lines = lines_of(output / "predictions" / "test.jsonl")
    truth = np.array([[shape in line["label"] for shape in SHAPES] for line in lines])
    scores = np.array([[line["scores"][shape] for shape in SHAPES] for line in lines])
    assert results["test"]["map"] == pytest.approx(average_precision_score(truth, scores, average="macro"))
    thresholds = json.loads((output / "config.json").read_text())["thresholds"]
    assert thresholds == [results["test"]["per_class"][shape]["threshold"] for shape in SHAPES]
    assert thresholds != [0.5] * 3
    chosen = [[shape for shape, score, limit in zip(SHAPES, row, thresholds, strict=True) if score >= limit]
              for row in scores.tolist()]  # fmt: skip
    assert [line["predicted"] for line in lines] == chosen
    right = np.mean([line["predicted"] == line["label"] for line in lines])
    assert results["test"]["accuracy"] == pytest.approx(right)
    assert {"confusion_matrix", "top5_accuracy"}.isdisjoint(results["test"])
    plots = {file.name for file in (output / "plots").iterdir()}
    assert plots == {
        "curves.png", "learning_rates.png", "average_precision_test.png", "average_precision_validation.png"
    }  # fmt: skip
    card = (output / "README.md").read_text()
    assert "gives an image any of 3 labels" in card
    assert "| split | images | mAP |" in card
    assert ".sigmoid()" in card


FRESH = """
import json, sys
sys.modules["torchthaw"] = None  # as if it were not installed
from transformers import pipeline
classify = pipeline("image-classification", model=sys.argv[1], trust_remote_code=True)
print(json.dumps([classify(file, top_k=None) for file in sys.argv[2:]]))
"""


def test_a_new_process_without_torchthaw_gives_the_scores_of_the_predictions(run, photos):
    output, _ = run
    lines = lines_of(output / "predictions" / "test.jsonl")[:6]
    files = [str(photos / line["path"]) for line in lines]
    done = subprocess.run(
        [sys.executable, "-c", FRESH, str(output), *files], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for line, found in zip(lines, json.loads(done.stdout), strict=True):
        scores = {item["label"]: item["score"] for item in found}
        assert scores == pytest.approx(line["scores"], abs=1e-5)


def test_evaluate_and_predict_give_the_same_again(run, photos, tmp_path):
    output, results = run
    lines = lines_of(output / "predictions" / "validation.jsonl")
    for line in lines:
        (tmp_path / line["path"]).write_bytes((photos / line["path"]).read_bytes())
    rows = [f"{line['path']},{'|'.join(line['label'])}" for line in lines]
    (tmp_path / "metadata.csv").write_text("\n".join(["file_name,label", *rows]))
    figures = evaluate_saved(str(output), str(tmp_path), "train", reporter=Reporter(quiet=True))
    for key in ("map", "macro_f1", "micro_f1", "accuracy", "loss"):
        assert figures[key] == pytest.approx(results["validation"][key], abs=1e-5), key
    shown = command("evaluate", output, "-d", tmp_path, "-s", "train")
    assert {f"{results['validation']['map']:.4f}", "threshold", "mAP"} <= set(shown.split())
    copied = [str(tmp_path / line["path"]) for line in lines]
    predicted = predict_paths(str(output), copied, reporter=Reporter(quiet=True))
    assert [sorted(line["predicted"]) for line in predicted] == [line["predicted"] for line in lines]
    for line in predicted:
        assert line["score"] == sorted((line["scores"][name] for name in line["predicted"]), reverse=True)
    some = next(line for line in predicted if len(line["predicted"]) == 2)
    shown = command("predict", output, some["path"])
    assert f"{some['predicted'][0]} {some['score'][0]:.4f}, {some['predicted'][1]}" in shown


def test_a_dry_run_and_folds(recipe, tmp_path):
    document = dry_run(load_recipe(recipe), Reporter(quiet=True))
    assert document["metric"] == "map"
    crossed = {**recipe, "cv": 2, "thresholds": 0.4, "stages": STAGES[:1], "output": str(tmp_path / "cv")}
    results = run_recipe(load_recipe(crossed), Reporter(quiet=True))["cross_validation"]
    assert results["mean"] == pytest.approx(np.mean(results["figures"]["map"]["values"]))
    lines = lines_of(tmp_path / "cv" / "predictions" / "out_of_fold.jsonl")
    truth = np.array([[shape in line["label"] for shape in SHAPES] for line in lines])
    scores = np.array([[line["scores"][shape] for shape in SHAPES] for line in lines])
    assert results["pooled"]["map"] == pytest.approx(average_precision_score(truth, scores, average="macro"))
    right = np.mean([line["predicted"] == line["label"] for line in lines])
    assert results["pooled"]["accuracy"] == pytest.approx(right)


# The trainer by itself


@pytest.fixture(scope="module")
def images(photos):
    return load_image_dataset(photos, problem_type="multi_label", label_column="label")["train"].select(range(64))


@pytest.fixture(scope="module")
def untrained():
    torch.manual_seed(0)
    return TorchvisionForImageClassification.from_torchvision(
        BUILTIN["backbone"], weights="builtin", id2label=SHAPES, problem_type="multi_label_classification"
    )


@pytest.fixture
def make(images, untrained, tmp_path):
    def made(name="run", model=None, **options):
        defaults = {
            "plan": [Stage("head", "head", epochs=2, learning_rate=0.1, optimizer="sgd")],
            "augmentation": "none", "use_cpu": True, "report_to": "none", "disable_tqdm": True,
            "per_device_train_batch_size": 16, "dataloader_num_workers": 0,
        }  # fmt: skip
        return ThawTrainer(
            model=copy.deepcopy(untrained if model is None else model),
            args=ThawTrainingArguments(output_dir=str(tmp_path / name), **{**defaults, **options}),
            train_dataset=images.select(range(48)),
            eval_dataset=images.select(range(48, 64)),
            processing_class=TorchvisionImageProcessor.from_torchvision(
                BUILTIN["backbone"], weights="builtin", image_size=64
            ),
        )

    return made


def weights_of(trainer):
    return {name: value.detach().clone() for name, value in trainer.model.state_dict().items()}


@pytest.mark.parametrize("augmentation", ["none", {"mixup": 0.4}])
def test_cached_features_train_as_live_ones(make, augmentation, monkeypatch):
    options = {"augmentation": augmentation, "frozen_precision": "float32", "live_precision": "float32"}
    cached, live = make("cached", **options), make("live", cache_gb=0.0, **options)
    cached.train()
    live.train()
    assert cached.stage_records[0].frozen_part["cached"], "features were kept"
    assert not live.stage_records[0].frozen_part["cached"]
    for name, value in weights_of(live).items():
        torch.testing.assert_close(weights_of(cached)[name], value, atol=1e-5, rtol=1e-4)


def test_validation_has_the_exact_loss_and_map_chooses(make):
    trainer = make(per_device_eval_batch_size=5)
    trainer.train()
    assert trainer.args.metric_for_best_model == "map"
    measured = trainer.evaluate()
    view = trainer.eval_dataset
    pixels, labels = (torch.stack([sample[key] for sample in view]) for key in ("pixel_values", "labels"))
    with torch.inference_mode():
        logits = trainer.model.eval()(pixels).logits
    expected = F.binary_cross_entropy_with_logits(logits, labels)
    # Five does not divide sixteen: a mean of batches would be another one.
    assert measured["eval_loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert measured["eval_map"] == pytest.approx(average_precision_score(labels, logits, average="macro"))


def test_accumulated_parts_of_a_batch_train_as_the_batch(make):
    options = {"class_weights": {"circle": 3}, "label_smoothing_factor": 0.1, "cache_gb": 0.0}
    whole = make("whole", **options)
    parts = make("parts", per_device_train_batch_size=4, gradient_accumulation_steps=4, **options)
    whole.train()
    parts.train()
    for name, value in weights_of(whole).items():
        torch.testing.assert_close(weights_of(parts)[name], value, atol=1e-5, rtol=1e-4)


def test_a_resumed_run_ends_as_an_undisturbed_one(make):
    options = {"save_total_limit": None, "save_strategy": "epoch"}
    undisturbed = make("one", **options)
    undisturbed.train()
    folder = undisturbed.args.output_dir
    resumed = make("one", **options)
    resumed.train(resume_from_checkpoint=f"{folder}/checkpoint-3")
    for name, value in weights_of(undisturbed).items():
        assert torch.equal(weights_of(resumed)[name], value), name


def test_a_temperature_is_for_one_label(make, recipe):
    with pytest.raises(PlanError, match="calibrate is 'temperature'.* several labels"):
        make(calibrate="temperature")
    with pytest.raises(RecipeError, match="calibrate is 'temperature', which is for one label per image"):
        dry_run(load_recipe({**recipe, "calibrate": "temperature"}), Reporter(quiet=True))


@pytest.mark.parametrize("options", [{"sampling": "balanced"}, {"imbalance": "auto"}, {"loss": "logit_adjusted"}])
def test_what_goes_by_one_class_per_image_is_refused(make, options):
    with pytest.raises(PlanError, match="may have several labels; write class_weights with a weight"):
        make(**options)


def test_labels_and_model_that_do_not_fit_are_refused(make, images, untrained):
    single = TorchvisionForImageClassification.from_torchvision(BUILTIN["backbone"], weights=None, id2label=SHAPES)
    with pytest.raises(DataError, match="problem_type='multi_label_classification'"):
        make(model=single)


@pytest.mark.parametrize("value", ["per_clas", 0, 1.0, True])
def test_thresholds_are_probabilities(tmp_path, value):
    with pytest.raises(PlanError, match="write a probability such as 0.5, or per_class"):
        ThawTrainingArguments(output_dir=str(tmp_path), thresholds=value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"problem_type": "regression"},
            "to estimate a number, which torchthaw does not do",
        ),
        ({"problem_type": "multilabel"}, "problem_type is 'multilabel'"),
        ({"problem_type": "single_label", "metric": "map"}, "metric: map, thresholds go with several labels"),
        ({"cv": 3}, "thresholds: per_class is chosen on validation images"),
        ({"thresholds": 1.5}, "thresholds"),
    ],
)
def test_recipes_that_do_not_fit_are_refused(recipe, changes, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe({**recipe, **changes})


def test_metrics_for_several_labels_need_several(recipe, make_image_folder):
    data = {"path": str(make_image_folder(per_class=8)), "validation": 0.25}
    asked = {**recipe, "problem_type": "auto", "data": data}
    with pytest.raises(RecipeError, match="thresholds: per_class goes with several labels per image, and the data has"):
        dry_run(load_recipe(asked), Reporter(quiet=True))


# Regression


def test_regression_is_refused_by_models(untrained):
    message = "problem_type='regression', to estimate a number, is not image classification"
    with pytest.raises(ValueError, match=message):
        TorchvisionForImageClassification.from_torchvision("resnet18", weights=None, problem_type="regression")
    with pytest.raises(ValueError, match=message):
        copy.deepcopy(untrained).config.problem_type = "regression"
    with pytest.raises(ValueError, match="problem_type='multi_label' is unknown"):
        TorchvisionConfig("resnet18", problem_type="multi_label")
    with torch.device("meta"):
        one = TorchvisionForImageClassification(TorchvisionConfig("resnet18", num_labels=1))
    for labels in (torch.rand(2), torch.rand(2, 1)):
        with pytest.raises(ValueError, match="one number per image to be estimated, which is regression"):
            one.loss_function(labels, torch.zeros(2, 1), one.config)


def test_thresholds_in_a_configuration_are_checked_and_go_with_the_classes(untrained):
    model = copy.deepcopy(untrained)
    model.config.thresholds = (0.1, 0.5, 0.9)
    assert TorchvisionConfig.from_dict(model.config.to_dict()).thresholds == [0.1, 0.5, 0.9]
    with pytest.raises(ValueError, match="a probability for each of the 3 classes"):
        model.config.thresholds = [0.1, 0.5]
    model.replace_head(["a", "b", "c"])
    assert model.config.thresholds is None
