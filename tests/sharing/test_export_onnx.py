"""Export to ONNX: what onnxruntime gives is what torch gives, or there is no file."""

import json

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image
from saved_models import CLASSES, ONE_OF_EACH_FAMILY, save

from torchthaw import TorchvisionImageProcessor
from torchthaw.errors import SavedModelError, SharingError
from torchthaw.sharing import export_onnx as onnx_module
from torchthaw.sharing.export_onnx import export_onnx


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "shuffle"
    return folder, save("shufflenet_v2_x0_5", folder, 32)


@pytest.mark.parametrize("architecture", ONE_OF_EACH_FAMILY)
def test_onnx_of_every_family(architecture, tmp_path):
    size = ONE_OF_EACH_FAMILY[architecture]
    model = save(architecture, tmp_path / "saved", size)
    result = export_onnx(tmp_path / "saved", tmp_path / "out")
    assert result["largest_difference"] <= 1e-4 * result["largest_logit"]
    file = tmp_path / "out" / "model.onnx"
    onnx.checker.check_model(str(file))
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    assert json.loads(session.get_modelmeta().custom_metadata_map["classes"]) == CLASSES
    images = torch.randn(5, 3, size, size)
    (found,) = session.run(["logits"], {"pixel_values": images.numpy()})
    with torch.no_grad():
        expected = model(pixel_values=images).logits.numpy()
    assert np.abs(expected).max() > 0.01
    assert found == pytest.approx(expected, abs=1e-4 * float(np.abs(expected).max()))


def test_onnx_with_the_processors_arithmetic(saved, tmp_path):
    folder, model = saved
    result = export_onnx(folder, tmp_path / "out", preprocessing=True, opset=18)
    assert result["input"] == {"name": "images", "shape": ["batch", 32, 32, 3], "type": "uint8"}
    assert result["opset"] == 18
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / "model.onnx"))
    metadata = session.get_modelmeta().custom_metadata_map
    processor = TorchvisionImageProcessor.from_pretrained(folder)
    assert json.loads(metadata["preprocessing"])["mean"] == processor.image_mean
    assert metadata["preprocessing_included"] == "true"
    pixels = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    # Resized and cropped already, so that only arithmetic is left of the processor.
    inputs = processor([Image.fromarray(one) for one in pixels], do_resize=False, return_tensors="pt")
    with torch.no_grad():
        expected = model(**inputs).logits.numpy()
    assert session.run(None, {"images": pixels})[0] == pytest.approx(expected, abs=1e-4)


def test_onnx_that_differs_or_fails_is_refused_and_not_written(saved, tmp_path, monkeypatch):
    folder, _ = saved
    with pytest.raises(SharingError, match="shufflenet_v2_x0_5 (could not be exported|cannot be written in opset 3)"):
        export_onnx(folder, tmp_path / "out", opset=3)

    export = onnx_module._export

    def spoiled(exported, *arguments):
        result = export(exported, *arguments)
        with torch.no_grad():
            exported.network.fc.bias[0] += 0.01
        return result

    monkeypatch.setattr(onnx_module, "_export", spoiled)
    with pytest.raises(SavedModelError, match=r"shufflenet_v2_x0_5 that differ by up to 0.01 from torch's"):
        export_onnx(folder, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_missing_packages_are_named(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        SharingError, match=r"needs onnx, onnxruntime, onnxscript; install with: pip install 'torchthaw"
    ):
        export_onnx(saved[0], tmp_path / "out")


def test_a_file_that_onnxruntime_cannot_run_is_refused(saved, tmp_path, monkeypatch):
    export = onnx_module._export

    def damaged(exported, images, name, file, *arguments):
        opset = export(exported, images, name, file, *arguments)
        file.write_bytes(b"no protocol buffer")
        return opset

    monkeypatch.setattr(onnx_module, "_export", damaged)
    with pytest.raises(
        SharingError, match=r"onnxruntime cannot run shufflenet_v2_x0_5 in opset \d+: .*smaller --opset"
    ):
        export_onnx(saved[0], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_large_weights_are_beside_the_file_and_found_there(saved, tmp_path, monkeypatch):
    folder, model = saved
    threshold = "torch.onnx._internal.exporter._onnx_program._LARGE_MODEL_THRESHOLD"
    monkeypatch.setattr(threshold, 1000)
    result = export_onnx(folder, tmp_path / "out")
    assert [file.rsplit("/", 1)[-1] for file in result["files"]] == ["model.onnx", "model.onnx.data"]
    (tmp_path / "out").rename(tmp_path / "moved")
    session = onnxruntime.InferenceSession(str(tmp_path / "moved" / "model.onnx"))
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = model(pixel_values=images).logits.numpy()
    assert session.run(None, {"pixel_values": images.numpy()})[0] == pytest.approx(expected, abs=1e-4)


def test_the_exporter_says_nothing_on_stdout(saved, tmp_path, capfd):
    export_onnx(saved[0], tmp_path / "out")
    assert capfd.readouterr().out == ""
