"""Export to torchvision: what leaves gives what stayed, or does not leave."""

import json

import pytest
import torch
import torchvision
from saved_models import CLASSES, ONE_OF_EACH_FAMILY, save

from torchthaw import TorchvisionForImageClassification, TorchvisionImageProcessor
from torchthaw.errors import SharingError
from torchthaw.sharing.export_onnx import export_onnx
from torchthaw.sharing.export_torchvision import export_torchvision


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "shuffle"
    return folder, save("shufflenet_v2_x0_5", folder, 32)


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


def test_16_bit_weights_are_exported_exactly(saved, tmp_path):
    folder, model = saved
    narrow = TorchvisionForImageClassification.from_pretrained(folder).bfloat16()
    narrow.save_pretrained(tmp_path / "narrow")
    TorchvisionImageProcessor.from_pretrained(folder).save_pretrained(tmp_path / "narrow")
    export_torchvision(tmp_path / "narrow", tmp_path / "out")
    state = torch.load(tmp_path / "out" / "model.pth", weights_only=True)
    for name, tensor in model.backbone.state_dict().items():
        expected = tensor.bfloat16().float() if tensor.is_floating_point() else tensor
        assert torch.equal(state[name], expected), name


def test_what_cannot_be_used_is_refused(saved, tmp_path):
    folder, _ = saved
    broken = TorchvisionForImageClassification.from_pretrained(folder)
    with torch.no_grad():
        broken.backbone.fc.bias[1] = torch.nan
    broken.save_pretrained(tmp_path / "nan")
    TorchvisionImageProcessor.from_pretrained(folder).save_pretrained(tmp_path / "nan")
    with pytest.raises(SharingError, match=r"not finite, in backbone\.fc\.bias"):
        export_torchvision(tmp_path / "nan", tmp_path / "out")
    save("vit_b_32", tmp_path / "vit", 32)
    TorchvisionImageProcessor.from_torchvision("vit_b_32", None, image_size=64).save_pretrained(tmp_path / "vit")
    with pytest.raises(SharingError, match="vit_b_32 takes images of 32 x 32 pixels, and its image processor makes 64"):
        export_torchvision(tmp_path / "vit", tmp_path / "out")
    assert not (tmp_path / "out").exists()
