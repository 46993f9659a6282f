"""What is said of real training: runs that show each signal, and healthy ones, of which nothing else is said.

Scikit-learn's digits, on the small backbone that comes with the package.
"""

import dataclasses
import json

import numpy as np
import pytest
import torch
import transformers
import yaml
from datasets import Dataset
from datasets import Image as ImageFeature
from PIL import Image
from sklearn.metrics import balanced_accuracy_score

from torchthaw import (
    Stage,
    ThawTrainer,
    ThawTrainingArguments,
    TorchvisionForImageClassification,
    TorchvisionImageProcessor,
)
from torchthaw.data.builtin import load_builtin_dataset
from torchthaw.recipe import load_recipe
from torchthaw.recipe.reading import RecipeLoader
from torchthaw.training.callbacks import DiagnosisCallback

DIGITS = [str(digit) for digit in range(10)]


def check_advice(finding):
    """Checks that what is advised, pasted at the end of a recipe, gives a recipe."""
    assert "\n" not in finding.advice
    stages = "stages: [{name: own, epochs: 2}]\n" if finding.advice.startswith("stages") else ""
    load_recipe(yaml.load(f"backbone: resnet18\ndata: {{path: photos}}\n{stages}{finding.advice}\n", RecipeLoader))


@pytest.fixture(scope="module")
def digits():
    images = load_builtin_dataset("digits")["train"].shuffle(seed=0)
    return images.select(range(300)), images.select(range(300, 600))


def train(splits, folder, stage, *, said=None, weights="builtin", **options):
    torch.manual_seed(0)
    options.setdefault("augmentation", "none")
    trainer = ThawTrainer(
        TorchvisionForImageClassification.from_torchvision("shufflenet_v2_x0_5", weights=weights, id2label=DIGITS),
        ThawTrainingArguments(
            output_dir=str(folder), plan=stage if isinstance(stage, list) else [stage], gate="off",
            use_cpu=True, disable_tqdm=True, report_to="none", save_strategy="no", load_best_model_at_end=False,
            **options,
        ),
        train_dataset=splits[0], eval_dataset=splits[1],
        processing_class=TorchvisionImageProcessor.from_torchvision(
            "shufflenet_v2_x0_5", weights="builtin", image_size=32
        ),
    )  # fmt: skip
    trainer.remove_callback(transformers.PrinterCallback)
    if said is not None:
        trainer.add_callback(DiagnosisCallback(trainer.diagnose, said.append))
    trainer.train()
    return trainer


def shuffled(images: Dataset, seed):
    labels = np.random.default_rng(seed).permutation(images["label"]).tolist()
    return images.remove_columns("label").add_column("label", labels).cast(images.features)


FULL = Stage("all", "all", epochs=6, learning_rate=3e-3, layer_decay=0.7, batch_norm="train")


def test_real_training_that_works(digits, tmp_path):
    said = []
    calm = dataclasses.replace(FULL, learning_rate=1e-3)
    trainer = train(digits, tmp_path, [Stage("head", "head", epochs=3, learning_rate=1e-2), calm], said=said)
    assert [finding.signal for finding in trainer.diagnose()] == ["working"]
    assert said == []


def test_real_training_at_too_high_a_rate(digits, tmp_path):
    said = []
    head = Stage("head", "head", epochs=3, learning_rate=1e-2)
    wreck = Stage("wreck", "all", epochs=2, learning_rate=0.03, layer_decay=1.0, batch_norm="eval")
    trainer = train(digits, tmp_path, [head, wreck], said=said)
    assert [finding.signal for finding in trainer.diagnose()] == ["rate too high"]
    assert said == [finding.sentence for finding in trainer.diagnose()]
    assert trainer.diagnose()[0].advice.startswith('stages: [{name: "head", unfreeze: "head", epochs: 3')
    assert "learning_rate: 0.003" in trainer.diagnose()[0].advice


def test_real_training_that_breaks(digits, tmp_path):
    head = Stage("head", "head", epochs=3, learning_rate=1e-2)
    wreck = Stage("wreck", "all", epochs=2, learning_rate=3.0, optimizer="sgd", layer_decay=1.0, batch_norm="eval")
    trainer = train(digits, tmp_path, [head, wreck], max_grad_norm=0.0)
    assert [finding.signal for finding in trainer.diagnose()] == ["not finite"]


@pytest.mark.parametrize("rate", [1e-7, 1e-5])
def test_real_training_at_too_low_a_rate(digits, tmp_path, rate):
    trainer = train(digits, tmp_path, Stage("head", "head", epochs=3, learning_rate=rate))
    [finding] = trainer.diagnose()
    assert finding.signal == "rate too low"
    assert "of its gradient is left" in finding.evidence
    check_advice(finding)


def test_real_training_on_shuffled_labels(digits, tmp_path):
    splits = [shuffled(images, 1) for images in digits]
    trainer = train(splits, tmp_path, dataclasses.replace(FULL, epochs=8))
    [finding] = trainer.diagnose()
    assert finding.signal == "labels"
    [record] = trainer.stage_records
    assert sum(record.train_accuracy["class_counts"]) == 200
    assert "of 200 training images, as validation would see them" in finding.evidence
    check_advice(finding)


def test_what_is_measured_on_training_images(digits, tmp_path):
    trainer = train(digits, tmp_path, Stage("head", "head", epochs=1, learning_rate=1e-7))
    [record] = trainer.stage_records
    rows = np.sort(np.random.default_rng(trainer.args.seed).permutation(300)[:200])
    logits, labels, _ = trainer.predict(digits[0].select(rows))
    assert record.train_accuracy["balanced_accuracy"] == pytest.approx(
        balanced_accuracy_score(labels, logits.argmax(axis=1)), abs=1e-4
    )
    assert record.train_accuracy["class_counts"] == np.bincount(labels, minlength=10).tolist()


def test_what_is_measured_on_training_images_changes_nothing(digits, tmp_path, monkeypatch):
    stages = [Stage("head", "head", epochs=1, learning_rate=1e-7), dataclasses.replace(FULL, epochs=1)]
    trainer = train(digits, tmp_path / "a", stages, augmentation="light")
    assert trainer.stage_records[0].train_accuracy is not None
    monkeypatch.setattr(ThawTrainer, "_accuracy_on_training_images", lambda self: None)
    without = train(digits, tmp_path / "b", stages, augmentation="light")
    for name, tensor in without.model.state_dict().items():
        assert torch.equal(tensor, trainer.model.state_dict()[name]), name


def test_real_training_of_a_head_on_features_of_nothing(digits, tmp_path):
    # With random weights and the statistics of BatchNorm as they begin, all images look alike at the head.
    stage = Stage("head", "head", epochs=4, learning_rate=1e-2, batch_norm="eval")
    trainer = train(digits, tmp_path, stage, weights=None)
    [finding] = trainer.diagnose()
    assert finding.signal == "too much frozen"
    assert "of a class are right on training images" in finding.evidence
    check_advice(finding)


def test_real_training_without_a_head(digits, tmp_path):
    stage = Stage("stem", ["stem"], epochs=2, learning_rate=1e-6)
    trainer = train(digits, tmp_path, stage)
    [finding] = trainer.diagnose()
    assert finding.signal == "too much frozen"
    check_advice(finding)


def test_real_training_with_jumping_validation(digits, tmp_path):
    # Each restart of so high a rate throws the network back.
    stage = dataclasses.replace(
        FULL, epochs=8, learning_rate=3e-2, layer_decay=1.0, warmup=0.0, schedule="cosine_with_restarts",
        schedule_args={"num_cycles": 4}, batch_size=16,
    )  # fmt: skip
    trainer = train(digits, tmp_path, stage)
    found = {finding.signal: finding for finding in trainer.diagnose()}
    assert "erratic validation" in found
    assert found["erratic validation"].advice.count('batch_norm: "eval"') == 1
    check_advice(found["erratic validation"])


def test_real_training_longer_than_worth_it(digits, tmp_path):
    # The rates end at 0 long before the stage does.
    stage = Stage("head", "head", epochs=12, learning_rate=1e-2, schedule="polynomial",
                  schedule_args={"power": 12, "lr_end": 1e-9})  # fmt: skip
    said = []
    trainer = train(digits, tmp_path, stage, said=said)
    found = {finding.signal: finding for finding in trainer.diagnose()}
    assert set(found) == {"plateau", "working"}
    assert "patience: 2" in found["plateau"].advice
    assert said == []
    check_advice(found["plateau"])


def test_real_training_that_waits_for_images(digits, tmp_path, monkeypatch):
    # Photos of 3 megapixels, which take long to decode and nothing to compute on.
    random = np.random.default_rng(0)
    large = Image.fromarray(random.integers(0, 255, (1500, 2000, 3), dtype=np.uint8))
    names, labels = [], []
    for number in range(16):
        name = tmp_path / f"{number}.png"
        large.crop((number, 0, 2000, 1500)).save(name, compress_level=1)
        names.append(str(name))
        labels.append(number % 10)
    images = Dataset.from_dict({"image": names, "label": labels}).cast_column("image", ImageFeature())
    images = images.cast_column("label", digits[0].features["label"])
    monkeypatch.setattr("torchthaw.training.diagnosis.signals._SECONDS_LOST", 0.1)
    trainer = train(
        (images, digits[1]), tmp_path / "run", Stage("all", "all", epochs=1, learning_rate=1e-4),
        per_device_train_batch_size=8, cache_gb=0, dataloader_num_workers=0,
    )  # fmt: skip
    found = {finding.signal: finding for finding in trainer.diagnose()}
    assert "with 0 processes that load them beside the main one" in found["waiting for data"].evidence
    check_advice(found["waiting for data"])


def test_real_overfitting(digits, tmp_path):
    # Half of the training labels are drawn anew, and nothing keeps the network from learning them by heart.
    few = digits[0].select(range(120))
    wrong = shuffled(few.select(range(60)), 2)["label"]
    labels = [*wrong, *few["label"][60:]]
    noisy = few.remove_columns("label").add_column("label", labels).cast(few.features)
    said = []
    stage = dataclasses.replace(FULL, epochs=30, learning_rate=1e-2, batch_norm="eval")
    trainer = train((noisy, digits[1]), tmp_path, stage, said=said)
    assert trainer.diagnose()[0].signal == "overfitting"
    told = [sentence for sentence in said if sentence.startswith("overfitting: stage 'all'")]
    assert len(told) == 1, "said once, when it began to show"


def test_real_training_with_few_validation_images(digits, tmp_path):
    head = Stage("head", "head", epochs=1, learning_rate=1e-2)
    trainer = train((digits[0], digits[1].select(range(20))), tmp_path, head)
    assert trainer.diagnose()[-1].signal == "small validation"


def test_results_and_card_have_it(digits, tmp_path):
    trainer = train(digits, tmp_path / "checkpoints", Stage("head", "head", epochs=1, learning_rate=1e-7))
    results = trainer.save_run(tmp_path / "run", prove=False)
    assert [finding["signal"] for finding in results["diagnosis"]] == ["rate too low"]
    assert json.loads((tmp_path / "run" / "results.json").read_text())["diagnosis"] == results["diagnosis"]
    card = (tmp_path / "run" / "README.md").read_text()
    assert "**rate too low**" in card
    assert "Advice: stages: " in card
