"""What a trainer leaves beside the model: figures of the saved weights, plots, predictions, a card."""

import hashlib
import json
from types import SimpleNamespace

import pytest
import torch
import transformers
from sklearn.metrics import accuracy_score, f1_score
from transformers.integrations.integration_utils import CodeCarbonCallback

from torchthaw import (
    Stage,
    ThawTrainer,
    ThawTrainingArguments,
    TorchvisionForImageClassification,
    TorchvisionImageProcessor,
    load_image_dataset,
)
from torchthaw.data.views import ImageView
from torchthaw.errors import SavedModelError
from torchthaw.evaluation.predictions import read_predictions
from torchthaw.training.results import measured_emissions

ARCHITECTURE = "shufflenet_v2_x0_5"
PLAN = [Stage("head", "head", epochs=2, learning_rate=1e-2), Stage("all", "all", epochs=1, learning_rate=1e-3)]


@pytest.fixture
def splits(make_image_folder):
    return load_image_dataset(make_image_folder(splits=("train", "val", "test")))


@pytest.fixture
def trainer(tmp_path, splits):
    torch.manual_seed(0)
    names = splits["train"].features["label"].names
    trainer = ThawTrainer(
        model=TorchvisionForImageClassification.from_torchvision(ARCHITECTURE, "builtin", id2label=names),
        args=ThawTrainingArguments(
            output_dir=str(tmp_path / "run"), plan=PLAN, per_device_train_batch_size=6, use_cpu=True, report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=splits["train"],
        eval_dataset=splits["validation"],
        processing_class=TorchvisionImageProcessor.from_torchvision(ARCHITECTURE, "builtin"),
    )  # fmt: skip
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def measured_again(folder, images):
    """Evaluates a saved folder by other means: one image after the other, figures by scikit-learn."""
    model = TorchvisionForImageClassification.from_pretrained(folder).eval()
    view = ImageView(images, TorchvisionImageProcessor.from_pretrained(folder))
    with torch.inference_mode():
        predicted = [int(model(pixel_values=view[i]["pixel_values"][None]).logits.argmax()) for i in range(len(view))]
    labels = images["label"]
    return accuracy_score(labels, predicted), f1_score(labels, predicted, average="macro")


def test_everything_is_written_and_is_of_the_saved_weights(trainer, splits, tmp_path):
    trainer.train()
    results = trainer.save_run(tmp_path / "saved", test_dataset=splits["test"])
    folder = tmp_path / "saved"
    assert json.loads((folder / "results.json").read_text()) == json.loads(json.dumps(results))
    for split in ("validation", "test"):
        accuracy, macro_f1 = measured_again(folder, splits[split])
        assert results[split]["accuracy"] == pytest.approx(accuracy)
        assert results[split]["macro_f1"] == pytest.approx(macro_f1)
        assert len(read_predictions(folder / "predictions" / f"{split}.jsonl")) == 18
    assert results["model"]["sha256"] == hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert results["saved_folder"]["images"] == 16
    assert results["saved_folder"]["largest_difference"] < 1e-5
    assert results["data"]["splits"]["train"]["counts"] == {"ant": 6, "bee": 6, "cat": 6}
    assert results["num_images"] == {"train": 18, "validation": 18, "test": 18}
    assert [stage["name"] for stage in results["stages"]] == ["head", "all"]
    assert results["test_reads"] == 1
    assert results["weights"] == "builtin"
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "pipeline_tag: image-classification" in card
    assert {file.stem for file in (folder / "plots").iterdir()} == {
        "curves", "learning_rates", "confusion_validation", "confusion_test", "reliability_validation",
        "reliability_test", "classes_validation", "classes_test", "scores_validation", "scores_test", "mistakes",
        "activation_maps",
    }  # fmt: skip
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert f"<strong>{results['test']['accuracy']:.3f}</strong>" in page
    wrong = round(18 * (1 - results["validation"]["accuracy"]))
    assert page.count("taken for <strong>") == min(wrong, 12) > 0


def test_a_card_measures_weights_that_are_not_measured_yet_and_only_those(trainer, splits, tmp_path):
    folder = tmp_path / "run"
    trainer.train()
    trainer.save_run(test_dataset=splits["test"], prove=False)
    written = (folder / "results.json").read_bytes()
    trainer.create_model_card()
    assert (folder / "results.json").read_bytes() == written
    trainer.create_model_card(license="mit", tags="insects")
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "license: mit" in card
    assert "- insects" in card
    before = json.loads((folder / "results.json").read_text())
    assert "test" in before

    with torch.no_grad():
        trainer.model.backbone.fc.bias += torch.tensor([9.0, 0, 0])
    trainer.create_model_card()
    after = json.loads((folder / "results.json").read_text())
    assert after["model"]["sha256"] == hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert after["model"]["sha256"] != before["model"]["sha256"]
    # Everything is an ant to this model, and its test figures are not those of the other one.
    assert after["validation"]["accuracy"] == pytest.approx(1 / 3)
    assert "test" not in after
    assert after["test_reads"] == 1


def test_data_that_gives_tensors_is_measured_too(trainer, tmp_path):
    random = torch.Generator().manual_seed(0)
    samples = [
        {"pixel_values": torch.randn(3, 32, 32, generator=random), "labels": torch.tensor(i % 3)} for i in range(6)
    ]
    results = trainer.save_run(tmp_path / "saved", test_dataset=samples)
    assert results["test"]["num_images"] == 6
    assert not (tmp_path / "saved" / "predictions" / "test.jsonl").exists()


def test_a_folder_that_gives_something_else_fails_the_run_and_has_no_results(trainer, tmp_path, monkeypatch):
    folder = tmp_path / "saved"
    save = TorchvisionImageProcessor.save_pretrained

    def save_another(self, *args, **kwargs):
        save(self, *args, **kwargs)
        file = folder / "preprocessor_config.json"
        file.write_text(file.read_text().replace('"do_normalize": true', '"do_normalize": false'))

    monkeypatch.setattr(TorchvisionImageProcessor, "save_pretrained", save_another)
    with pytest.raises(SavedModelError, match="logits that differ"):
        trainer.save_run(folder)
    assert not (folder / "results.json").exists()
    assert not (folder / "README.md").exists()


def test_emissions_are_told_where_codecarbon_has_measured_them_and_only_there():
    callback = object.__new__(CodeCarbonCallback)
    callback.tracker = None
    assert measured_emissions([callback]) == {}
    callback.tracker = SimpleNamespace(final_emissions=None)
    assert measured_emissions([callback]) == {}
    callback.tracker = SimpleNamespace(final_emissions=0.0021)
    assert measured_emissions([callback]) == {"emissions_kg": 0.0021}
    assert measured_emissions([]) == {}
