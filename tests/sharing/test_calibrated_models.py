"""A temperature in a saved model: counts in eval mode, goes where it can, is dropped with a word elsewhere."""

import json
import logging

import numpy as np
import onnxruntime
import pytest
import torch
import torchvision
from PIL import Image
from torch.nn import functional as F
from transformers import pipeline

from torchthaw import (
    Stage,
    ThawTrainer,
    ThawTrainingArguments,
    TorchvisionConfig,
    TorchvisionForImageClassification,
    TorchvisionImageProcessor,
)
from torchthaw.backbones import weights as weights_module
from torchthaw.errors import PlanError
from torchthaw.sharing.export_onnx import export_onnx
from torchthaw.sharing.export_timm import export_timm
from torchthaw.sharing.export_torchvision import export_torchvision
from torchthaw.sharing.fresh_process import check_saved_folder
from torchthaw.sharing.soup import greedy_soup, uniform_soup, wise_ft

TEMPERATURE = 1.7
CLASSES = ["ant", "bee", "cat"]
PIXELS = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def save(folder, architecture="shufflenet_v2_x0_5", *, seed=0, temperature=TEMPERATURE):
    torch.manual_seed(seed)
    weights = "builtin" if architecture == "shufflenet_v2_x0_5" else None
    model = TorchvisionForImageClassification.from_torchvision(architecture, weights, id2label=CLASSES)
    model.config.temperature = temperature
    model.save_pretrained(folder)
    TorchvisionImageProcessor.from_torchvision(architecture, weights, image_size=32).save_pretrained(folder)
    return model


def plain_logits(model):
    with torch.inference_mode():
        return model.backbone(PIXELS)


@pytest.fixture
def saved(tmp_path):
    return tmp_path / "saved", save(tmp_path / "saved")


def test_logits_are_divided_in_eval_mode_only(saved):
    folder, _ = saved
    model = TorchvisionForImageClassification.from_pretrained(folder).eval()
    assert model.config.temperature == TEMPERATURE
    labels = torch.tensor([0, 2])
    output = model(pixel_values=PIXELS, labels=labels)
    assert torch.equal(output.logits, plain_logits(model) / TEMPERATURE)
    assert torch.equal(output.loss, F.cross_entropy(output.logits, labels))

    other = TorchvisionForImageClassification.from_pretrained(folder).train()
    model.train()
    other.config.temperature = 1.0
    with_one, without = (m(pixel_values=PIXELS, labels=labels) for m in (model, other))
    assert torch.equal(with_one.logits, without.logits)
    assert torch.equal(with_one.loss, without.loss)


def test_without_one_logits_are_the_networks_to_the_last_bit(tmp_path):
    model = save(tmp_path / "plain", temperature=1.0)
    assert torch.equal(model(pixel_values=PIXELS).logits, plain_logits(model))
    # A folder of an earlier version does not name it.
    file = tmp_path / "plain" / "config.json"
    config = json.loads(file.read_text())
    config.pop("temperature", None)
    file.write_text(json.dumps(config))
    assert TorchvisionForImageClassification.from_pretrained(tmp_path / "plain").config.temperature == 1


@pytest.mark.parametrize("temperature", [0, -1.0, float("nan"), float("inf"), "2", True])
def test_a_temperature_is_a_positive_number(temperature):
    with pytest.raises(ValueError, match="temperature must be a positive number"):
        TorchvisionConfig("resnet18", temperature=temperature)


def test_the_pipeline_with_and_without_torchthaw_gives_calibrated_scores(saved):
    folder, model = saved
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8))
    pixels = TorchvisionImageProcessor.from_pretrained(folder)(image, return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        logits = model.backbone(pixels) / TEMPERATURE
    scores = {entry["label"]: entry["score"] for entry in pipeline("image-classification", model=str(folder))(image)}
    assert scores == pytest.approx(dict(zip(CLASSES, logits.softmax(-1)[0].tolist(), strict=True)), abs=1e-6)
    # In a process that cannot import torchthaw, by the code in the folder.
    assert check_saved_folder(folder, [image], logits.double().numpy(), CLASSES)["largest_difference"] < 1e-6


def test_onnx_has_it_in_the_graph(saved, tmp_path):
    folder, model = saved
    export_onnx(folder, tmp_path / "onnx")
    session = onnxruntime.InferenceSession(tmp_path / "onnx" / "model.onnx")
    (logits,) = session.run(None, {"pixel_values": PIXELS.numpy()})
    assert np.allclose(logits, (plain_logits(model) / TEMPERATURE).numpy(), atol=1e-4)
    assert float(session.get_modelmeta().custom_metadata_map["temperature"]) == TEMPERATURE


def test_torchvision_gets_plain_logits_and_is_told(saved, tmp_path):
    folder, model = saved
    result = export_torchvision(folder, tmp_path / "out")
    network = torchvision.models.shufflenet_v2_x0_5(weights=None, num_classes=3).eval()
    network.load_state_dict(torch.load(tmp_path / "out" / "model.pth", weights_only=True))
    with torch.inference_mode():
        assert torch.equal(network(PIXELS), plain_logits(model))
    assert result["largest_difference"] == 0
    assert f"divide the logits by {TEMPERATURE}" in result["note"]
    described = json.loads((tmp_path / "out" / "model.json").read_text())
    assert described["temperature"] == TEMPERATURE
    assert described["note"] == result["note"]
    save(tmp_path / "plain", temperature=1.0)
    assert "note" not in export_torchvision(tmp_path / "plain", tmp_path / "other")


def test_timm_gets_plain_logits_and_is_told(tmp_path):
    timm = pytest.importorskip("timm")
    model = save(tmp_path / "saved", "resnet18")
    result = export_timm(tmp_path / "saved", tmp_path / "out")
    network = timm.create_model(
        result["architecture"], num_classes=3, checkpoint_path=str(tmp_path / "out" / "model.safetensors")
    ).eval()
    with torch.inference_mode():
        assert torch.allclose(network(PIXELS), plain_logits(model.eval()), atol=1e-5)
    assert f"divide the logits by {TEMPERATURE}" in result["note"]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["note"] == result["note"]


@pytest.mark.parametrize("kind", ["uniform", "greedy", "wise-ft"])
def test_averages_drop_it_and_say_so(tmp_path, kind):
    folders = [tmp_path / "one", tmp_path / "two"]
    save(folders[0], seed=0)
    save(folders[1], seed=1, temperature=1.0)
    make = {
        "uniform": lambda: uniform_soup(folders, lambda model: 0.5),
        "greedy": lambda: greedy_soup(folders, lambda model: 0.5),
        "wise-ft": lambda: wise_ft(folders[1], folders[0], lambda model: 0.5),
    }[kind]
    soup = make()
    assert soup.calibrated == {str(folders[0]): TEMPERATURE}
    soup.save(tmp_path / "soup")
    assert json.loads((tmp_path / "soup" / "soup.json").read_text())["calibration_dropped"] == soup.calibrated
    assert TorchvisionConfig.from_pretrained(tmp_path / "soup").temperature == 1


def test_fine_tuning_from_it_starts_without_one_and_says_so(saved, tmp_path, caplog):
    folder, _ = saved
    weights_module._say_uncalibrated.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            model = TorchvisionForImageClassification.from_torchvision("shufflenet_v2_x0_5", folder, id2label=CLASSES)
            assert model.config.temperature == 1
    assert sum("were calibrated, with a temperature of 1.7" in message for message in caplog.messages) == 1

    caplog.clear()
    model = TorchvisionForImageClassification.from_pretrained(folder)
    samples = [{"pixel_values": torch.randn(3, 32, 32), "labels": torch.tensor(i % 3)} for i in range(6)]
    args = ThawTrainingArguments(
        output_dir=str(tmp_path / "run"), plan=[Stage("head", "head")], per_device_train_batch_size=3, use_cpu=True,
        report_to="none", disable_tqdm=True,
    )  # fmt: skip
    trainer = ThawTrainer(model, args, samples, samples)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert model.config.temperature == 1
    assert any("Training starts without one" in message for message in caplog.messages)


def test_what_cannot_be_calibrated_is_refused():
    with pytest.raises(PlanError, match="Did you mean 'temperature'"):
        ThawTrainingArguments(output_dir="x", calibrate="temprature")
    with pytest.raises(PlanError, match="no validation images"):
        ThawTrainingArguments(output_dir="x", calibrate="temperature", eval_strategy="no", load_best_model_at_end=False)
    config = TorchvisionConfig("shufflenet_v2_x0_5", id2label=CLASSES, problem_type="multi_label_classification")
    args = ThawTrainingArguments(output_dir="x", calibrate="temperature", use_cpu=True, report_to="none")
    samples = [{"pixel_values": torch.zeros(3, 32, 32), "labels": torch.zeros(3)}] * 40
    with pytest.raises(PlanError, match="several labels an image"):
        ThawTrainer(TorchvisionForImageClassification(config), args, samples, samples)
