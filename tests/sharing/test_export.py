"""Exports to torchvision and timm: what leaves gives what stayed, or does not leave."""

import json

import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image
from torch import nn

from torchthaw import TorchvisionForImageClassification, TorchvisionImageProcessor
from torchthaw.errors import SharingError
from torchthaw.sharing import export_timm as timm_module
from torchthaw.sharing.export_onnx import export_onnx
from torchthaw.sharing.export_timm import SAME_KEYS, export_timm
from torchthaw.sharing.export_torchvision import export_torchvision

# Small inputs where the network takes them.
ONE_OF_EACH_FAMILY = {
    "alexnet": 64, "convnext_tiny": 32, "densenet121": 32, "efficientnet_b0": 32, "googlenet": 64, "inception_v3": 96,
    "maxvit_t": 224, "mnasnet0_5": 32, "mobilenet_v2": 32, "mobilenet_v3_small": 32, "regnet_y_400mf": 32,
    "resnet18": 32, "shufflenet_v2_x0_5": 32, "squeezenet1_1": 32, "swin_t": 32, "swin_v2_t": 32, "vgg11_bn": 32,
    "vit_b_16": 32,
}  # fmt: skip
CLASSES = ["ant", "bee", "häßlich <b>"]


def save(architecture, folder, size=None, **options):
    """Saves a model whose logits depend on the image, although it was never trained."""
    torch.manual_seed(0)
    weights = "builtin" if architecture == "shufflenet_v2_x0_5" else None
    model = TorchvisionForImageClassification.from_torchvision(
        architecture, weights, id2label=CLASSES, image_size=size, **options
    )
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    side = 224 if architecture == "maxvit_t" else 96
    with torch.no_grad():
        if norms and weights is None:
            model.train()(pixel_values=torch.randn(4, 3, side, side))
        for parameter in model.layer_groups()["head"].parameters.values():
            parameter.normal_(std=0.1)
    model.eval().save_pretrained(folder)
    TorchvisionImageProcessor.from_torchvision(architecture, None, image_size=size).save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "shuffle"
    return folder, save("shufflenet_v2_x0_5", folder, 32)


# torchvision


@pytest.mark.parametrize("architecture", ONE_OF_EACH_FAMILY)
def test_torchvision_loads_every_family_bit_for_bit(architecture, tmp_path):
    size = ONE_OF_EACH_FAMILY[architecture]
    model = save(architecture, tmp_path / "saved", size)
    result = export_torchvision(tmp_path / "saved", tmp_path / "out")
    described = json.loads((tmp_path / "out" / "model.json").read_text(encoding="utf-8"))
    assert described["classes"] == CLASSES
    assert result["largest_difference"] == 0
    # The lines that it gives are all that is needed.
    program = "\n".join(described["load"]).replace('"model.pth"', repr(str(tmp_path / "out" / "model.pth")))
    names: dict = {}
    exec(program, names)
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        assert torch.equal(names["model"](images), model(pixel_values=images).logits)


def test_torchvision_gets_auxiliary_heads_too(tmp_path):
    save("googlenet", tmp_path / "saved", 64, aux_logits=True)
    result = export_torchvision(tmp_path / "saved", tmp_path / "out")
    assert "aux_logits=True" in result["load"][2]
    state = torch.load(tmp_path / "out" / "model.pth", weights_only=True)
    network = torchvision.models.googlenet(weights=None, num_classes=3, aux_logits=True, init_weights=False)
    network.load_state_dict(state)


def test_nothing_is_overwritten_or_left_behind(saved, tmp_path):
    folder, _ = saved
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    for export in (export_torchvision, export_onnx):
        with pytest.raises(SharingError, match=r"out exists, and torchthaw never overwrites anything; pass another"):
            export(folder, tmp_path / "out")
        with pytest.raises(SharingError, match="holds no config.json"):
            export(tmp_path, tmp_path / "other")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]


# timm


def test_timm_refuses_what_it_builds_in_another_way(saved, tmp_path):
    with pytest.raises(SharingError, match=r"timm has no shufflenet_v2_x0_5 .* densenet121, .*--to onnx"):
        export_timm(saved[0], tmp_path / "out")


@pytest.mark.parametrize("architecture", SAME_KEYS)
def test_timm_has_the_same_names_and_shapes(architecture):
    with torch.device("meta"):
        ours = torchvision.models.get_model(architecture, weights=None)
        theirs = timm.create_model(SAME_KEYS[architecture])
    shapes = [{n: tuple(t.shape) for n, t in network.state_dict().items()} for network in (ours, theirs)]
    assert {n: s for n, s in shapes[0].items() if not n.startswith("AuxLogits.")} == shapes[1]


@pytest.mark.parametrize("architecture", ["densenet121", "inception_v3", "resnet18", "resnet50", "resnext50_32x4d"])
def test_timm_gives_the_same_logits(architecture, tmp_path):
    size = 96 if architecture == "inception_v3" else 64
    model = save(architecture, tmp_path / "saved", size)
    result = export_timm(tmp_path / "saved", tmp_path / "out")
    assert result["largest_difference"] < 1e-5
    names: dict = {}
    exec("\n".join(result["load"]), names)
    other = names["model"]
    images = torch.randn(3, 3, size, size)
    with torch.no_grad():
        assert other(images) == pytest.approx(model(pixel_values=images).logits, abs=1e-5)
    # As timm reads it from a repository on the Hub.
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert config["architecture"] == SAME_KEYS[architecture]
    assert config["label_names"] == CLASSES
    described = timm.data.resolve_data_config(config["pretrained_cfg"])
    assert tuple(described["input_size"]) == (3, size, size)
    processor = TorchvisionImageProcessor.from_pretrained(tmp_path / "saved")
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8))
    pixels = timm.data.create_transform(**described)(picture)
    assert pixels == pytest.approx(processor(picture, return_tensors="pt")["pixel_values"][0], abs=1e-5)


def test_timm_that_differs_is_refused(tmp_path, monkeypatch):
    save("resnet18", tmp_path / "saved", 32)
    monkeypatch.setitem(timm_module.SAME_KEYS, "resnet18", "resnet18d")
    with pytest.raises(RuntimeError, match="size mismatch|Missing key"):
        export_timm(tmp_path / "saved", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_a_missing_timm_is_named(tmp_path, monkeypatch):
    save("resnet18", tmp_path / "saved", 32)
    monkeypatch.setattr(timm_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SharingError, match="needs timm; install it with: pip install timm"):
        export_timm(tmp_path / "saved", tmp_path / "out")
