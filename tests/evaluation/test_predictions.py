import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ResNetConfig, ResNetForImageClassification, ViTImageProcessor, pipeline

from torchthaw.errors import DataError
from torchthaw.evaluation.predictions import read_predictions, write_predictions

NAMES = ["ant", "$bee_1$", "Grüße\u2028\n", "日本"]


def test_what_was_written_is_read(tmp_path):
    logits = np.array([[0.0, 1.0, 2.0, 3.0], [9.0, 0.0, 0.0, 0.0]])
    paths = [Path("photos") / "a b.png", "photos/\udcff\n\u2028ü.png"]
    file = tmp_path / "new" / "test.jsonl"
    write_predictions(file, paths, np.array([2, 0]), logits, NAMES)
    assert len(file.read_bytes().splitlines()) == 2
    first, second = read_predictions(file)
    assert (first["path"], first["label"], first["predicted"]) == (os.fspath(paths[0]), NAMES[2], NAMES[3])
    assert (second["path"], second["label"], second["predicted"]) == (paths[1], "ant", "ant")
    assert list(first["scores"]) == NAMES
    assert sum(first["scores"].values()) == pytest.approx(1, abs=1e-6)
    assert first["scores"]["日本"] == pytest.approx(1 / (1 + np.exp(-1) + np.exp(-2) + np.exp(-3)), abs=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_equal_those_of_the_pipeline(tmp_path, dtype):
    torch.manual_seed(0)
    names = ["ant", "bee", "cat"]
    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], id2label=dict(enumerate(names)), num_labels=3
    )
    model = ResNetForImageClassification(config).eval().to(dtype)
    processor = ViTImageProcessor(size={"height": 32, "width": 32})
    random = np.random.default_rng(0)
    images = [Image.fromarray(random.integers(0, 255, (40, 40, 3), dtype=np.uint8)) for _ in range(6)]
    with torch.inference_mode():
        inputs = [processor(images=image, return_tensors="pt").to(dtype) for image in images]
        logits = torch.cat([model(**one).logits for one in inputs]).float().numpy()
    file = tmp_path / "validation.jsonl"
    write_predictions(file, [f"{number}.png" for number in range(6)], np.zeros(6, int), logits, names)
    answers = pipeline("image-classification", model=model, image_processor=processor)(images, top_k=3)
    for line, answer in zip(read_predictions(file), answers, strict=True):
        assert line["predicted"] == answer[0]["label"]
        assert line["scores"] == pytest.approx({one["label"]: one["score"] for one in answer}, abs=1e-6)


def test_an_error_half_way_leaves_the_earlier_file(tmp_path):
    file = tmp_path / "validation.jsonl"
    write_predictions(file, ["a.png"], [0], np.zeros((1, 2)), ["ant", "bee"])
    before = file.read_bytes()
    with pytest.raises(TypeError):
        write_predictions(file, ["b.png", object()], [0, 1], np.zeros((2, 2)), ["ant", "bee"])
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    ("paths", "labels", "logits", "names", "message"),
    [
        (["a"], [0, 1], np.zeros((2, 2)), ["ant", "bee"], "1 paths for 2 images"),
        (["a", "b"], [0, 1], np.array([[0, np.inf], [0, 1]]), ["ant", "bee"], "1 of 2 images are not finite"),
        (["a", "b"], [0, 1], np.zeros((2, 2)), ["ant", "ant"], "'ant' stands for more than one class"),
        (["a", "b"], [0, 5], np.zeros((2, 2)), ["ant", "bee"], "label 5 .* names no class"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_written(tmp_path, paths, labels, logits, names, message):
    with pytest.raises(DataError, match=message):
        write_predictions(tmp_path / "x.jsonl", paths, labels, logits, names)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"path": "a", "label"', "Line 2 of .*x.jsonl is not JSON"),
        (json.dumps({"path": "a", "label": "b"}), "Line 2 of .*x.jsonl has no predicted, scores"),
        ("[1, 2]", "Line 2 of .*x.jsonl has no path, label, predicted, scores"),
    ],
)
def test_a_broken_line_is_named(tmp_path, text, message):
    file = tmp_path / "x.jsonl"
    write_predictions(file, ["a.png"], [0], np.zeros((1, 2)), ["ant", "bee"])
    file.write_text(file.read_text() + text)
    with pytest.raises(DataError, match=message):
        read_predictions(file)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"no file of predictions at .*gone\.jsonl"):
        read_predictions(tmp_path / "gone.jsonl")
