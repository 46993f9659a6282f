"""The metric where `evaluate` takes one: alone, combined, and in its evaluator of image classification."""

import json
import os
import pickle
import socket
import subprocess
import sys

import evaluate
import numpy as np
import pytest
import sklearn.metrics
import torch
from scipy.special import softmax

from torchthaw import ClassificationMetrics
from torchthaw.errors import DataError
from torchthaw.evaluation.arrays import NonFiniteLogitsError
from torchthaw.evaluation.metrics import classification_metrics, prediction_metrics

NAMES = ["ant", "bee", "cat", "dog"]


def draw(num_images, seed=0):
    random = np.random.default_rng(seed)
    labels = random.integers(0, 4, num_images)
    return random.normal(size=(num_images, 4)) + 1.5 * np.eye(4)[labels], labels


@pytest.fixture
def metric(tmp_path):
    return ClassificationMetrics(NAMES, cache_dir=str(tmp_path))


def test_logits_give_all_figures_to_the_last_digit(metric):
    logits, labels = draw(80)
    assert metric.compute(predictions=logits, references=labels) == classification_metrics(logits, labels, NAMES)
    rounded = logits.astype(np.float32)
    expected = classification_metrics(rounded, labels, NAMES)
    assert metric.compute(predictions=torch.tensor(rounded), references=torch.tensor(labels)) == expected


def test_class_ids_and_names_give_what_takes_no_scores(metric):
    logits, labels = draw(80)
    predicted = logits.argmax(1)
    expected = prediction_metrics(predicted, labels, NAMES)
    assert metric.compute(predictions=predicted, references=labels) == expected
    assert metric.compute(predictions=predicted.tolist(), references=labels.tolist()) == expected
    assert metric.compute(predictions=[NAMES[index] for index in predicted], references=labels) == expected
    assert not expected.keys() & {"loss", "ece", "brier", "auroc"}
    assert expected["accuracy"] == sklearn.metrics.accuracy_score(labels, predicted)
    assert expected["macro_f1"] == pytest.approx(sklearn.metrics.f1_score(labels, predicted, average="macro"))


def test_probabilities_give_the_figures_of_their_logits(tmp_path):
    logits, labels = draw(80)
    metric = ClassificationMetrics(NAMES, scores="probabilities", cache_dir=str(tmp_path))
    expected = classification_metrics(logits, labels, NAMES)
    found = metric.compute(predictions=softmax(logits, axis=1), references=labels)
    assert found.pop("per_class").keys() == expected.pop("per_class").keys()
    assert found.pop("interval_method") == expected.pop("interval_method")
    assert found.pop("confusion_matrix") == expected.pop("confusion_matrix")
    assert found == {key: pytest.approx(value) for key, value in expected.items()}
    sure = metric.compute(predictions=[[1.0, 0, 0, 0], [0, 1.0, 0, 0]], references=[0, 0])
    assert np.isfinite(sure["loss"])
    with pytest.raises(DataError, match="80 of 80 rows of scores are no probabilities.*scores='logits'"):
        metric.compute(predictions=logits, references=labels)


def test_numbers_alone_where_these_are_asked_for(tmp_path):
    logits, labels = draw(40)
    options = {"only_numbers": True, "cache_dir": str(tmp_path), "top_k": 2}
    found = ClassificationMetrics(NAMES, **options).compute(predictions=logits, references=labels)
    assert found.keys() == {
        "accuracy", "macro_f1", "balanced_accuracy", "weighted_f1", "num_images", "top2_accuracy", "auroc", "loss",
        "ece", "brier"}  # fmt: skip
    everything = classification_metrics(logits, labels, NAMES, top_k=2)
    assert found == {key: everything[key] for key in found}


def test_classes_without_names_are_named_by_their_ids(tmp_path):
    metric = ClassificationMetrics(cache_dir=str(tmp_path))
    assert list(metric.compute(predictions=[0, 4, 1], references=[0, 1, 1])["per_class"]) == ["0", "1", "2", "3", "4"]
    assert list(metric.compute(predictions=[[0, 1, 2]], references=[0])["per_class"]) == ["0", "1", "2"]


@pytest.mark.parametrize("keep_in_memory", [False, True])
@pytest.mark.parametrize("kind", ["ids", "logits"])
def test_batches_are_gathered(keep_in_memory, kind, tmp_path):
    logits, labels = draw(50)
    given = logits if kind == "logits" else logits.argmax(1)
    metric = ClassificationMetrics(keep_in_memory=keep_in_memory, cache_dir=str(tmp_path))
    at_once = metric.compute(predictions=given, references=labels)
    metric.add_batch(predictions=given[:20].tolist(), references=labels[:20].tolist())
    metric.add_batch(predictions=torch.tensor(given[20:49]), references=torch.tensor(labels[20:49]))
    metric.add(prediction=given[49].tolist(), reference=int(labels[49]))
    assert metric.compute() == at_once


class ErrorRate(ClassificationMetrics):
    def _compute(self, **inputs):
        return {"error_rate": 1 - super()._compute(**inputs)["accuracy"], "accuracy": -1.0}


def test_combined_with_others(tmp_path):
    metrics = [ClassificationMetrics(cache_dir=str(tmp_path)), ErrorRate(cache_dir=str(tmp_path))]
    both = evaluate.combine(metrics)
    scores = both.compute(predictions=[0, 1, 1, 1], references=[0, 1, 0, 1])
    assert scores["error_rate"] == 0.25
    assert scores["classification_metrics_accuracy"] == 0.75
    assert scores["error_rate_accuracy"] == -1.0
    both.add_batch(predictions=[0, 1], references=[0, 0])
    both.add_batch(predictions=[1, 1], references=[0, 0])
    assert both.compute()["error_rate"] == 0.75
    logits, labels = draw(20)
    assert both.compute(predictions=logits, references=labels)["ece"] > 0


def test_the_random_state_is_left_alone(metric):
    before = pickle.dumps(np.random.get_state())
    metric.compute(predictions=[0, 1], references=[0, 1])
    assert pickle.dumps(np.random.get_state()) == before


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        ([], [], "nothing to measure"),
        ([0.7, 0.2], [0, 1], "predictions have 0.7, but class ids are whole numbers"),
        ([0, 1], [0, 0.5], "references have 0.5, but class ids are whole numbers"),
        ([0, 4], [0, 1], "label 4 .* names no class"),
        (["bee", "cats"], [0, 1], "prediction 'cats' .* is the name of no class.*cat"),
        ([[0, 1, 2, 3], [0, 1]], [0, 1], "rows of different lengths"),
        ([[0, 1, 2]], [0], "4 class names for 3 columns"),
        ([[0, np.nan, 0, 0]], [0], "logits of 1 of 1 images are not finite"),
    ],
)
def test_what_cannot_be_measured_is_named_and_the_metric_goes_on(predictions, references, message):
    metric = ClassificationMetrics(NAMES, keep_in_memory=True)
    with pytest.raises(DataError, match=message):
        metric.compute(predictions=predictions, references=references)
    assert metric.compute(predictions=[0, 1], references=[0, 1])["accuracy"] == 1.0


def test_logits_that_are_not_finite_are_an_error_of_their_own(metric):
    with pytest.raises(NonFiniteLogitsError):
        metric.compute(predictions=[[0, -np.inf, 0, 0]], references=[0])


def test_names_without_class_names_say_what_to_pass(tmp_path):
    with pytest.raises(DataError, match=r"label_mapping=model.config.label2id"):
        ClassificationMetrics(cache_dir=str(tmp_path)).compute(predictions=["bee"], references=[1])


def test_an_unknown_kind_of_scores_is_refused():
    with pytest.raises(DataError, match="scores='logit' is unknown"):
        ClassificationMetrics(scores="logit")


def test_no_connection_is_opened(monkeypatch, metric):
    def refuse(*_, **__):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    assert metric.compute(predictions=[0, 1], references=[0, 1])["accuracy"] == 1.0


# A process of its own, in which connections fail, since the evaluator is a caller that others wrote.
_EVALUATOR = """
import json, socket, sys

def refuse(*_, **__):
    raise AssertionError("a connection was opened")

socket.socket.connect = socket.create_connection = refuse
import evaluate
import numpy as np
import torch
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as Pillow
from transformers import pipeline
from torchthaw import ClassificationMetrics, TorchvisionForImageClassification, TorchvisionImageProcessor

folder, cache = sys.argv[1:]
names = ["stripes", "10", "plain"]
random = np.random.default_rng(0)
images = [Pillow.fromarray(random.integers(0, level, (70, 80, 3), dtype=np.uint8)) for level in range(20, 200, 20)]
torch.manual_seed(0)
model = TorchvisionForImageClassification.from_torchvision(
    "shufflenet_v2_x0_5", weights=None, id2label=dict(enumerate(names)), image_size=32
).eval()
processor = TorchvisionImageProcessor.from_torchvision("shufflenet_v2_x0_5", None, image_size=32)
with torch.no_grad():
    logits = model(processor(images, return_tensors="pt")["pixel_values"]).logits
    # Differences between images decide, so that each class is predicted.
    model.backbone.fc.bias -= logits.mean(0)
    model.backbone.fc.weight /= logits.std(0)[:, None]
    model.backbone.fc.bias /= logits.std(0)
model.save_pretrained(folder)
processor.save_pretrained(folder)
labels = [0, 1, 2] * 3
features = Features(image=Image(), label=ClassLabel(names=names))
data = Dataset.from_dict({"image": images, "label": labels}, features=features)
pipe = pipeline("image-classification", model=folder, device="cpu")
predicted = [answer[0]["label"] for answer in pipe(images, top_k=3)]
judge = evaluate.evaluator("image-classification")
mapping = pipe.model.config.label2id
ids = judge.compute(pipe, data, metric=ClassificationMetrics(cache_dir=cache), label_mapping=mapping)
by_name = judge.compute(pipe, data, metric=ClassificationMetrics(names, cache_dir=cache))
both = evaluate.combine([ClassificationMetrics(names, cache_dir=cache)])
combined = judge.compute(pipe, data, metric=both, label_mapping=mapping)
numbers = ClassificationMetrics(names, only_numbers=True, keep_in_memory=True)
resampled = judge.compute(
    pipe, data, metric=numbers, label_mapping=mapping, strategy="bootstrap", n_resamples=5, random_state=0
)
print(json.dumps([names, labels, predicted, ids, by_name, combined, resampled]))
"""


def test_the_evaluator_of_image_classification_runs_it_offline(tmp_path):
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", _EVALUATOR, str(tmp_path / "model"), str(tmp_path / "cache")],
        env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    names, labels, predicted, ids, by_name, combined, resampled = json.loads(done.stdout.splitlines()[-1])
    assert len(set(predicted)) == 3
    expected = prediction_metrics([names.index(name) for name in predicted], labels, names)
    for found in (by_name, combined):
        assert {key: found[key] for key in expected} == json.loads(json.dumps(expected))
    assert ids["accuracy"] == expected["accuracy"]
    assert ids["confusion_matrix"] == expected["confusion_matrix"]
    assert resampled["accuracy"].keys() == {"confidence_interval", "standard_error", "score"}
    assert resampled["accuracy"]["score"] == expected["accuracy"]
