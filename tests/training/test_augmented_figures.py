"""A run with test-time augmentation states figures without and with it; the saved model stays the plain one."""

import json
import sys

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from scipy.special import expit, softmax
from sklearn.metrics import accuracy_score, average_precision_score, f1_score, log_loss
from torchvision.transforms import functional as F
from transformers import pipeline

from torchthaw import (
    ThawTrainer,
    ThawTrainingArguments,
    TorchvisionForImageClassification,
    TorchvisionImageProcessor,
    cli,
    load_image_dataset,
)
from torchthaw.errors import PlanError
from torchthaw.evaluation.predictions import read_predictions

CLASSES = ("ant", "bee", "cat")
SETTINGS = ["--backbone", "shufflenet_v2_x0_5", "--weights", "builtin", "--quiet"]
for _setting in ("image_size=32", "epochs=2", "plan=head", "batch_size=8", "num_workers=0", "audit=off",
                 "calibrate=temperature", "tta=ten_crop", "learning_rate=3e-3"):  # fmt: skip
    SETTINGS += ["--set", _setting]


def draw(file, label, number):
    """Draws an image of which one side has its class's colour, or sometimes another's, so that no model is sure."""
    random = np.random.default_rng(1000 * label + number)
    pixels = random.integers(0, 150, size=(44, 60, 3), dtype=np.uint8)
    pixels[:, slice(None, 30) if number % 2 else slice(30, None), (label + (number % 4 == 3)) % 3] += 60
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(file)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "photos"
    for part, split in enumerate(("train", "val", "test")):
        for label, name in enumerate(CLASSES):
            for number in range(12):
                draw(root / split / name / f"{number:02d}.png", label, 100 * part + number)
    return root


def call(*arguments):
    before, sys.argv = sys.argv, ["torchthaw", *map(str, arguments)]
    try:
        with pytest.raises(SystemExit) as exit_:
            cli.main()
    finally:
        sys.argv = before
    return exit_.value.code or 0


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    assert call("train", "staged", "--data", data, "--output", out, *SETTINGS) == 0
    return out


@pytest.fixture(scope="module")
def results(run):
    return json.loads((run / "results.json").read_text())


@pytest.fixture(scope="module")
def by_hand(run, data):
    """Mean probability over ten crops, and the plain one, of each image of a split, by a loop of one's own."""
    model = TorchvisionForImageClassification.from_pretrained(run).eval()
    processor = TorchvisionImageProcessor.from_pretrained(run)

    def probabilities(split):
        every, labels = [], []
        for label, name in enumerate(CLASSES):
            for file in sorted((data / split / name).iterdir()):
                picture = F.resize(Image.open(file), [processor.size["shortest_edge"]])
                crops = [F.center_crop(picture, [32, 32]), *F.five_crop(picture, [32, 32])[:4]]
                crops += [F.hflip(crop) for crop in crops]
                pixels = torch.stack([F.to_tensor(crop) for crop in crops])
                pixels = F.normalize(pixels, processor.image_mean, processor.image_std)
                with torch.inference_mode():
                    every.append(model(pixel_values=pixels).logits.double().numpy())
                labels.append(label)
        views = softmax(np.stack(every), axis=2)
        return views.mean(axis=1), views[:, 0], np.array(labels)

    return probabilities


def test_results_state_figures_without_and_with_it(results, by_hand):
    tta = results["tta"]
    assert (tta["method"], tta["views"], tta["averages"]) == ("ten_crop", 10, "probabilities")
    assert results["calibration"]["problem"] is None, "the test is of calibrated scores"
    for split, folder in (("validation", "val"), ("test", "test")):
        mean, plain, labels = by_hand(folder)
        for probabilities, figures in ((mean, tta[split]), (plain, results[split])):
            predicted = probabilities.argmax(1)
            assert figures["accuracy"] == accuracy_score(labels, predicted)
            assert figures["macro_f1"] == pytest.approx(f1_score(labels, predicted, average="macro"))
            assert figures["loss"] == pytest.approx(log_loss(labels, probabilities), abs=1e-5)
        assert tta[split]["loss"] != pytest.approx(results[split]["loss"], abs=1e-3)
    assert results["test_reads"] == 1


def test_differences_are_paired_and_of_validation(results, by_hand):
    mean, plain, labels = by_hand("val")
    found = results["tta"]["differences"]
    assert list(found) == ["accuracy", "macro_f1", "loss"]
    for metric, made in found.items():
        assert made["before"] == pytest.approx(results["validation"][metric])
        assert made["after"] == pytest.approx(results["tta"]["validation"][metric])
        assert made["interval"] is not None, made["method"]
    now, then = mean.argmax(1) == labels, plain.argmax(1) == labels
    assert found["accuracy"]["wins"] == (now & ~then).sum()
    assert found["accuracy"]["losses"] == (then & ~now).sum()


def test_the_saved_model_and_its_predictions_are_the_plain_ones(run, data, by_hand):
    for name in ("config.json", "preprocessor_config.json"):
        assert "crop" not in (run / name).read_text().replace("center_crop", "").replace("crop_size", "")
    _, plain, _ = by_hand("val")
    lines = read_predictions(run / "predictions" / "validation.jsonl")
    assert np.allclose([list(line["scores"].values()) for line in lines], plain, atol=1e-5)
    (first, *_) = pipeline("image-classification", model=str(run))([str(data / "val" / "ant" / "00.png")])
    scores = {entry["label"]: entry["score"] for entry in first}
    assert [scores[name] for name in CLASSES] == pytest.approx(plain[0], abs=1e-5)


def test_the_card_and_evaluate_say_what_it_brings(run, data, results, capsys):
    card = (run / "README.md").read_text()
    assert "With test-time augmentation (`ten_crop`: the mean of the probabilities over 10 views" in card
    made = results["tta"]["differences"]["accuracy"]
    low, high = made["interval"]
    row = (
        f"| validation | accuracy | {made['before']:.4f} | {made['after']:.4f} | "
        f"{made['difference'] + 0.0:+.4f} ({low:.4f} to {high:.4f}) |"
    )
    assert row in card
    assert call("evaluate", run, "--tta", "ten_crop", "--batch-size", 8, "--json", "--quiet") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["tta"] == {key: results["tta"][key] for key in ("method", "views", "averages", "differences")}
    assert {key: document[key] for key in results["tta"]["validation"]} == results["tta"]["validation"]
    assert call("evaluate", run, "--quiet", "--json") == 0
    plain = json.loads(capsys.readouterr().out)
    assert "tta" not in plain
    assert plain["loss"] == pytest.approx(results["validation"]["loss"])
    assert call("evaluate", run, "--tta", "flip", "--quiet", "--data", data, "--split", "validation") == 0
    assert "Without and with test-time augmentation: accuracy 0." in capsys.readouterr().out


def test_predict_averages_on_request(run, data, by_hand, capsys):
    mean, plain, _ = by_hand("val")
    for options, expected in (([], plain), (["--tta", "ten_crop"], mean)):
        assert call("predict", run, data / "val" / "ant", "--json", "--quiet", *options) == 0
        lines = json.loads(capsys.readouterr().out)
        assert np.allclose([list(line["scores"].values()) for line in lines], expected[:12], atol=1e-5)


def several_labels_trainer(make_image_folder, tmp_path, **settings):
    names = ["red", "green", "blue"]
    images = load_image_dataset(make_image_folder(classes=("a", "b", "c"), per_class=8))["train"]
    sets = [[names[label], names[(label + 1) % 3]][: 1 + row % 2] for row, label in enumerate(images["label"])]
    data = load_image_dataset(
        images.remove_columns(["label", "path"]).add_column("label", sets),
        class_names=names,
        problem_type="multi_label",
    )["train"]
    torch.manual_seed(0)
    model = TorchvisionForImageClassification.from_torchvision(
        "shufflenet_v2_x0_5", "builtin", id2label=names, problem_type="multi_label_classification"
    )
    processor = TorchvisionImageProcessor.from_torchvision("shufflenet_v2_x0_5", None, image_size=32)
    arguments = ThawTrainingArguments(
        tmp_path / "out", plan="head", num_train_epochs=1, per_device_train_batch_size=8, learning_rate=1e-2,
        report_to=[], use_cpu=True, disable_tqdm=True, **settings,
    )  # fmt: skip
    return ThawTrainer(model, arguments, train_dataset=data, eval_dataset=data, processing_class=processor), data


def test_of_several_labels_sigmoids_are_averaged_and_thresholds_are_the_models(make_image_folder, tmp_path):
    trainer, data = several_labels_trainer(make_image_folder, tmp_path, thresholds="per_class", tta="flip")
    trainer.train()
    results = trainer.save_run(tmp_path / "run", prove=False)
    model, processor = trainer.model.eval(), trainer.processing_class
    pictures = [row["image"].convert("RGB") for row in data.cast_column("image", datasets.Image())]
    pixels = processor(pictures, return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        mean = (
            expit(model(pixel_values=pixels).logits.numpy()) + expit(model(pixel_values=pixels.flip(-1)).logits.numpy())
        ) / 2
    truth = np.array([[k in labels for k in range(3)] for labels in data["label"]])
    figures = results["tta"]["validation"]
    assert figures["map"] == pytest.approx(average_precision_score(truth, mean, average="macro"), abs=1e-6)
    thresholds = np.array(model.config.thresholds)
    assert [row["threshold"] for row in figures["per_class"].values()] == thresholds.tolist()
    assert figures["macro_f1"] == pytest.approx(f1_score(truth, mean >= thresholds, average="macro"), abs=1e-6)
    assert list(results["tta"]["differences"]) == ["map", "loss"]


def test_what_cannot_be_cropped_is_refused_before_training(make_image_folder, tmp_path):
    with pytest.raises(PlanError, match="unknown tta 'flips'. Did you mean 'flip'"):
        ThawTrainingArguments(tmp_path, tta="flips")
    samples = [{"pixel_values": torch.zeros(3, 32, 32), "labels": torch.tensor(i % 2)} for i in range(16)]
    model = TorchvisionForImageClassification.from_torchvision("shufflenet_v2_x0_5", "builtin", id2label=["a", "b"])
    arguments = ThawTrainingArguments(
        tmp_path, plan="head", per_device_train_batch_size=4, tta="five_crop", use_cpu=True, report_to=[]
    )
    with pytest.raises(PlanError, match="tta is 'five_crop', but the images come as tensors"):
        ThawTrainer(model, arguments, train_dataset=samples, eval_dataset=samples)
