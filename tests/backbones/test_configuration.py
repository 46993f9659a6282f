"""The configuration: class names are always there, it survives JSON, and it refuses what cannot work."""

import copy
import json
from pathlib import Path

import pytest
import torchvision
from transformers import AutoConfig

from torchthaw import TorchvisionConfig
from torchthaw.backbones.anatomy import FAMILIES, family_of, list_architectures, uses_transformer_recipe


def test_names_from_a_list_a_mapping_or_a_number():
    assert TorchvisionConfig(id2label=["ant", "bee"]).id2label == {0: "ant", 1: "bee"}
    config = TorchvisionConfig(id2label={"1": "bee", "0": "ant"})
    assert list(config.id2label.items()) == [(0, "ant"), (1, "bee")]
    assert config.label2id == {"ant": 0, "bee": 1}
    assert config.num_labels == 2
    assert TorchvisionConfig(num_labels=3).id2label == {0: "class_0", 1: "class_1", 2: "class_2"}
    assert TorchvisionConfig().num_labels == 1000


def test_names_and_ids_stay_consistent_when_changed():
    config = TorchvisionConfig(id2label=["ant", "bee"])
    config.num_labels = 2
    assert config.id2label == {0: "ant", 1: "bee"}
    config.num_labels = 3
    assert config.label2id == {"class_0": 0, "class_1": 1, "class_2": 2}
    config.id2label = ["x", "y"]
    assert config.label2id == {"x": 0, "y": 1}


@pytest.mark.parametrize("names", [None, ["ant", "bee"], [f"name {i}" for i in range(12)]])
def test_survives_saving(tmp_path: Path, names: list[str] | None):
    config = TorchvisionConfig(
        architecture="googlenet",
        image_size=96,
        dropout=0.3,
        aux_logits=True,
        transform_input=True,
        id2label=names,
        problem_type="multi_label_classification",
    )
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is TorchvisionConfig
    assert loaded.id2label == config.id2label
    assert loaded.to_diff_dict() == {**config.to_diff_dict(), "transformers_version": loaded.transformers_version}
    assert list(loaded.id2label) == list(range(config.num_labels))
    assert "LABEL_" not in (tmp_path / "config.json").read_text()
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "torchthaw"
    assert copy.deepcopy(loaded) == loaded
    assert loaded != TorchvisionConfig(architecture="resnet18")


def test_fields_replaced_while_loading(tmp_path: Path):
    TorchvisionConfig(architecture="mobilenet_v2", id2label=["ant", "bee"]).save_pretrained(tmp_path)
    config = TorchvisionConfig.from_pretrained(tmp_path, num_labels=3, dropout=0.5)
    assert (config.num_labels, config.id2label[2], config.dropout) == (3, "class_2", 0.5)
    assert TorchvisionConfig.from_pretrained(tmp_path, num_labels=2).id2label == {0: "ant", 1: "bee"}
    renamed = TorchvisionConfig.from_pretrained(tmp_path, id2label={0: "a", 1: "b", 2: "c"}, num_labels=3)
    assert renamed.label2id == {"a": 0, "b": 1, "c": 2}
    with pytest.raises(ValueError, match="mobilenet_v2 has no stochastic depth"):
        TorchvisionConfig.from_pretrained(tmp_path, stochastic_depth=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"architecture": "resnet51"}, "Unknown architecture 'resnet51'.*Did you mean 'resnet50'"),
        ({"architecture": "fasterrcnn_resnet50_fpn"}, "no classification model of that name"),
        ({"dropout": 0.1}, "resnet50 has no dropout"),
        ({"stochastic_depth": 0.1}, "resnet50 has no stochastic depth"),
        ({"architecture": "vgg11", "dropout": 1.5}, "dropout must be a probability from 0 .* it is 1.5"),
        ({"aux_logits": True}, "aux_logits=True is for googlenet and inception_v3 only; resnet50"),
        ({"transform_input": True}, "transform_input=True is for googlenet"),
        ({"id2label": ["ant", "ant"]}, "the classes 0 and 1 both 'ant'. Names must be distinct"),
        ({"id2label": {0: "a", 2: "b"}}, r"without gaps; its ids are \[0, 2\]"),
        ({"id2label": {"a": 0}}, "keys of id2label must be the ids 0, 1, 2"),
        ({"id2label": []}, "at least one class"),
        ({"id2label": "ant"}, "must be a list of class names"),
        ({"id2label": ["ant", 7]}, "Class names must be text, and id2label holds 7. Write '7'"),
        ({"id2label": ["a", "b"], "num_labels": 3}, "num_labels is 3, but id2label names 2"),
        ({"num_labels": 0}, "num_labels must be a whole number of at least 1, not 0"),
        ({"problem_type": "regression"}, "not image classification"),
        ({"image_size": 22.5}, "whole number of pixels, such as 224, not 22.5"),
        ({"architecture": "vit_b_16", "image_size": 230}, "multiple of 16 pixels.*Write image_size=224"),
        ({"architecture": "vit_h_14", "image_size": 224 + 7}, "multiple of 14 pixels"),
        ({"architecture": "maxvit_t", "image_size": 256}, "multiple of 224 pixels.*Write image_size=224"),
        ({"architecture": "inception_v3", "image_size": 64}, "at least 75 pixels.*Write image_size=75 or more"),
        (
            {"architecture": "inception_v3", "image_size": 256, "aux_logits": True},
            "auxiliary head of inception_v3 needs images of at least 299 pixels, and image_size is 256",
        ),
        ({"architecture": "alexnet", "image_size": 32}, "at least 63 pixels"),
        ({"architecture": "vgg16", "image_size": 16}, "at least 32 pixels"),
    ],
)
def test_errors(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        TorchvisionConfig(**options)


def test_each_architecture_belongs_to_one_family():
    for name in list_architectures():
        assert sum(name.startswith(family.prefixes) for family in FAMILIES) == 1, name
    assert {family_of(name).name for name in list_architectures()} == {family.name for family in FAMILIES}
    assert len(FAMILIES) == 17
    modules = {torchvision.models.get_model_builder(name).__module__ for name in list_architectures()}
    assert len(modules) == 17


def test_transformer_recipe():
    users = {family_of(name).name for name in list_architectures() if uses_transformer_recipe(name)}
    assert users == {"convnext", "maxvit", "swin", "vit"}
