"""Export to timm: its own network gives the same logits and sees the same pixels, or nothing leaves."""

import json
import math

import numpy as np
import pytest
import torch
import torchvision
from packaging.version import Version
from PIL import Image
from torch import nn

from torchthaw import TorchvisionForImageClassification, TorchvisionImageProcessor
from torchthaw.errors import SavedModelError, SharingError
from torchthaw.sharing import export_timm as timm_module
from torchthaw.sharing.export_timm import export_timm
from torchthaw.sharing.timm_names import TIMM_NAMES, renamed_for_timm, timm_arguments

timm = pytest.importorskip("timm")

CLASSES = ["ant", "bee", "häßlich <b>"]
# Where the network's windows or layers need more than 64 pixels.
SIZES = {"inception_v3": 96, "swin_t": 224, "swin_s": 224, "swin_b": 224}


def millions_of_parameters(architecture):
    return torchvision.models.get_model_weights(architecture).DEFAULT.meta["num_params"] / 1e6


@pytest.fixture
def no_initialisation(monkeypatch):
    """Building without the random numbers that are overwritten anyway, which for large networks take long."""
    for name in ("kaiming_normal_", "kaiming_uniform_", "normal_", "trunc_normal_", "xavier_uniform_", "uniform_"):
        monkeypatch.setattr(nn.init, name, lambda tensor, *args, **kwargs: tensor)


def fill(network):
    """Gives every parameter and statistic its own values, so that any two that are swapped show."""
    random = torch.Generator().manual_seed(1)
    for name, tensor in network.state_dict().items():
        if not tensor.is_floating_point():
            continue
        noise = torch.randn(tensor.shape, generator=random)
        if name.endswith("running_var"):
            tensor.copy_(0.5 + noise.abs())
        elif tensor.ndim >= 2 and tensor.numel() > max(tensor.shape):
            tensor.copy_(noise * math.sqrt(2 / tensor[0].numel()))
        else:
            tensor.copy_(float(name.endswith(("weight", "layer_scale"))) + 0.2 * noise)


def save(architecture, folder, size, *, resize=None):
    torch.manual_seed(0)
    model = TorchvisionForImageClassification.from_torchvision(architecture, None, id2label=CLASSES, image_size=size)
    fill(model)
    model.save_pretrained(folder)
    processor = TorchvisionImageProcessor.from_torchvision(architecture, None, image_size=size)
    if resize is not None:
        processor = processor.with_settings(size=resize)
    processor.save_pretrained(folder)
    return model, processor


# Larger ones have the same layers as their smaller siblings; their names and shapes are compared below.
SMALL_ENOUGH = [name for name in TIMM_NAMES if millions_of_parameters(name) < 8]
LARGE = [name for name in TIMM_NAMES if name not in SMALL_ENOUGH]


@pytest.mark.parametrize("architecture", LARGE)
def test_large_networks_have_the_same_tensors(architecture, no_initialisation):
    options = {"init_weights": False} if architecture == "inception_v3" else {}
    # torchvision cannot build RegNet without memory for its weights.
    with torch.device("cpu" if architecture.startswith("regnet") else "meta"):
        ours = torchvision.models.get_model(architecture, weights=None, num_classes=3, **options)
        theirs = timm.create_model(TIMM_NAMES[architecture], num_classes=3, **timm_arguments(architecture, 224, 224))
    renamed = renamed_for_timm(ours.state_dict(), theirs.state_dict())
    assert renamed is not None
    shapes = {name: tensor.shape for name, tensor in theirs.state_dict().items()}
    assert {name: tensor.shape for name, tensor in renamed.items()} == shapes


@pytest.mark.parametrize("architecture", SMALL_ENOUGH)
def test_every_name_in_the_table_is_the_same_network(architecture, no_initialisation):
    size = SIZES.get(architecture, 64)
    options = {"image_size": size} if architecture.startswith("vit") else {}
    options |= {"init_weights": False} if architecture == "inception_v3" else {}
    with torch.no_grad():
        ours = torchvision.models.get_model(architecture, weights=None, num_classes=3, **options).eval()
        fill(ours)
        arguments = timm_arguments(architecture, size, size)
        theirs = timm.create_model(TIMM_NAMES[architecture], num_classes=3, **arguments).eval()
        theirs.load_state_dict(renamed_for_timm(ours.state_dict(), theirs.state_dict()), assign=True)
        images = torch.randn(2, 3, size, size)
        expected = ours(images)
        difference = float((theirs(images) - expected).abs().max())
    assert float((expected[0] - expected[1]).abs().max()) > 1e-3 * float(expected.abs().max())
    assert difference <= 1e-5 * float(expected.abs().max())


@pytest.mark.parametrize(
    ("architecture", "size"),
    [("resnet18", 64), ("inception_v3", 96), ("mobilenet_v3_small", 64), ("regnet_y_400mf", 64), ("vit_b_32", 64)],
)
def test_the_lines_load_the_model(architecture, size, tmp_path):
    model, _ = save(architecture, tmp_path / "saved", size)
    result = export_timm(tmp_path / "saved", tmp_path / "out")
    names: dict = {}
    exec("\n".join(result["load"]), names)
    images = torch.randn(3, 3, size, size)
    with torch.no_grad():
        expected = model.eval()(pixel_values=images).logits
        assert (names["model"](images) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))["label_names"] == CLASSES


@pytest.mark.skipif(
    Version(timm.__version__) < Version("1.0.31"), reason="timm 1.0.20 takes a folder's .safetensors for a pickle"
)
@pytest.mark.parametrize(("architecture", "size"), [("mobilenet_v3_small", 64), ("vit_b_32", 64)])
def test_timm_reads_the_folder_as_it_does_a_repository(architecture, size, tmp_path):
    model, _ = save(architecture, tmp_path / "saved", size)
    export_timm(tmp_path / "saved", tmp_path / "out")
    folder = f"local-dir:{tmp_path / 'out'}"
    other = timm.create_model(folder, pretrained=True).eval()
    images = torch.randn(3, 3, size, size)
    with torch.no_grad():
        expected = model.eval()(pixel_values=images).logits
        assert (other(images) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert other.pretrained_cfg["label_names"] == CLASSES
    # Another head and other channels need the names of these layers.
    assert timm.create_model(folder, pretrained=True, num_classes=5)(images).shape == (3, 5)
    assert timm.create_model(folder, pretrained=True, in_chans=1)(images[:, :1]).shape == (3, 3)


@pytest.mark.parametrize("resize", [64, 67, 73, {"height": 64, "width": 64}])
def test_timm_sees_the_same_pixels(resize, tmp_path):
    size = {"shortest_edge": resize} if isinstance(resize, int) else resize
    _, processor = save("resnet18", tmp_path / "saved", 64, resize=size)
    export_timm(tmp_path / "saved", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    transform = timm.data.create_transform(**timm.data.resolve_data_config(config["pretrained_cfg"]))
    pixels = np.random.default_rng(0).integers(0, 256, (90, 130, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    expected = processor(image, return_tensors="pt")["pixel_values"][0]
    assert torch.allclose(transform(image), expected, atol=1e-6)


def test_the_resized_side_is_the_processors_for_all_of_torchvisions_weights():
    pairs = set()
    for architecture in TIMM_NAMES:
        for weights in torchvision.models.get_model_weights(architecture):
            preset = weights.transforms()
            pairs.add((preset.resize_size[0], preset.crop_size[0]))
    assert (236, 224) in pairs
    model = TorchvisionForImageClassification.from_torchvision("resnet18", None, id2label=CLASSES)
    for resize, crop in pairs:
        processor = TorchvisionImageProcessor(size=resize, crop_size=crop)
        config = timm_module._config(model, processor, {}, {})["pretrained_cfg"]
        assert math.floor(crop / config["crop_pct"]) == resize, (resize, crop)


def test_other_networks_have_no_pairs():
    tensors = {"conv.weight": torch.zeros(4, 3), "conv.bias": torch.zeros(4)}
    assert renamed_for_timm(tensors, {"stem.weight": torch.zeros(4, 3)}) is None
    assert renamed_for_timm(tensors, {"a.weight": torch.zeros(3, 4), "a.bias": torch.zeros(4)}) is None
    renamed = renamed_for_timm(tensors, {"b.weight": torch.zeros(4, 3, 1, 1), "b.bias": torch.zeros(4)})
    assert renamed["b.weight"].shape == (4, 3, 1, 1)


def test_timm_refuses_what_it_builds_in_another_way(tmp_path):
    save("shufflenet_v2_x0_5", tmp_path / "saved", 32)
    with pytest.raises(SharingError, match=r"timm has no shufflenet_v2_x0_5 .* densenet121, .*--to onnx"):
        export_timm(tmp_path / "saved", tmp_path / "out")
    model = TorchvisionForImageClassification.from_torchvision("inception_v3", None, id2label=CLASSES, image_size=96)
    model.config.transform_input = True
    model.save_pretrained(tmp_path / "rescaled")
    TorchvisionImageProcessor.from_torchvision("inception_v3", None, image_size=96).save_pretrained(
        tmp_path / "rescaled"
    )
    with pytest.raises(SharingError, match="converts its input to the scale from -1 to 1"):
        export_timm(tmp_path / "rescaled", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("resnet18d", SharingError, "resnet18d of timm .* has other layers"),
        ("resnet1", SharingError, "timm .* cannot use the weights as its resnet1: Unknown model"),
        ("resnet18_other", SavedModelError, r"resnet18 gives logits that differ by up to [\d.]+ .* of 32 x 32 pixels"),
    ],
)
def test_timm_that_differs_is_refused(name, error, message, tmp_path, monkeypatch):
    save("resnet18", tmp_path / "saved", 32)
    if name == "resnet18_other":
        renamed = timm_module.renamed_for_timm
        monkeypatch.setattr(
            timm_module,
            "renamed_for_timm",
            lambda ours, theirs: {n: t + 0.1 if n == "bn1.bias" else t for n, t in renamed(ours, theirs).items()},
        )
    else:
        monkeypatch.setitem(timm_module.TIMM_NAMES, "resnet18", name)
    with pytest.raises(error, match=message):
        export_timm(tmp_path / "saved", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_a_missing_timm_is_named(tmp_path, monkeypatch):
    save("resnet18", tmp_path / "saved", 32)
    monkeypatch.setattr(timm_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SharingError, match="needs timm; install it with: pip install timm"):
        export_timm(tmp_path / "saved", tmp_path / "out")


def test_the_configuration_is_what_timm_keeps_on_the_hub(tmp_path):
    save("efficientnet_b5", tmp_path / "saved", 64)
    export_timm(tmp_path / "saved", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert config["architecture"] == "efficientnet_b5"
    assert config["model_args"] == {"bn_eps": 1e-3}
    assert config["pretrained_cfg"]["first_conv"] == "conv_stem"
    assert config["pretrained_cfg"]["classifier"] == "classifier"
