"""Pretrained weights: each source, what is kept of a head, and one clear message for all that can go wrong."""

import socket
import urllib.request
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
import torchvision
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torchvision.models import DenseNet121_Weights, ResNet18_Weights, ShuffleNet_V2_X0_5_Weights

from torchthaw import TorchvisionForImageClassification, TorchvisionImageProcessor, TorchvisionModel
from torchthaw.backbones import weights as weights_module
from torchthaw.backbones.anatomy import list_architectures
from torchthaw.backbones.weights import BUILTIN_ARCHITECTURE, describe_backbones
from torchthaw.errors import WeightsError

SMALL = "shufflenet_v2_x0_5"
load = TorchvisionForImageClassification.from_torchvision


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    return torchvision.models.get_model(SMALL, num_classes=4).eval()


@pytest.fixture
def weights_file(net: nn.Module, tmp_path: Path) -> Path:
    file = tmp_path / "weights.pth"
    torch.save(net.state_dict(), file)
    return file


def assert_same_logits(model: TorchvisionForImageClassification, net: nn.Module, size: int = 32) -> None:
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(model(images).logits, net(images))


@pytest.mark.parametrize("form", ["pth", "pt", "safetensors", "state_dict", "model", "module.", "backbone.", "half"])
def test_files_of_each_form(net: nn.Module, tmp_path: Path, form: str):
    state = net.state_dict()
    file = tmp_path / f"weights.{form if form in ('pt', 'safetensors') else 'pth'}"
    if form == "safetensors":
        save_file(state, file)
    elif form in ("state_dict", "model"):
        torch.save({form: state, "epoch": 3}, file)
    elif form.endswith("."):
        torch.save({f"{form}{name}": tensor for name, tensor in state.items()}, file)
    elif form == "half":
        net = torchvision.models.get_model(SMALL, num_classes=4).eval()
        net.load_state_dict({k: v.half() if v.is_floating_point() else v for k, v in state.items()})
        torch.save({k: v.half() if v.is_floating_point() else v for k, v in state.items()}, file)
    else:
        torch.save(state, file)
    model = load(SMALL, file)
    assert not model.training
    assert model.dtype == torch.float32
    assert model.config.id2label == {index: f"class_{index}" for index in range(4)}
    assert_same_logits(model, net)
    assert_same_logits(load(SMALL, str(file)), net)


def test_the_configuration_remembers_the_weights_but_no_folder_of_this_machine(weights_file: Path, tmp_path: Path):
    assert load(SMALL, None).config.pretrained_weights is None
    assert load(SMALL, "builtin").config.pretrained_weights == "builtin"
    model = load(SMALL, weights_file, id2label=["a", "b"])
    assert model.config.pretrained_weights == "weights.pth"
    model.save_pretrained(tmp_path / "saved")
    assert (
        TorchvisionForImageClassification.from_pretrained(tmp_path / "saved").config.pretrained_weights == "weights.pth"
    )
    assert load(SMALL, tmp_path / "saved", id2label=["c", "d"]).config.pretrained_weights == "saved"
    assert str(tmp_path) not in (tmp_path / "saved" / "config.json").read_text()


def test_head_of_a_file_is_kept_or_replaced(net: nn.Module, weights_file: Path):
    named = load(SMALL, weights_file, id2label=["a", "b", "c", "d"])
    assert named.config.label2id == {"a": 0, "b": 1, "c": 2, "d": 3}
    assert_same_logits(named, net)
    fewer = load(SMALL, weights_file, id2label=["ant", "bee"])
    assert fewer.config.id2label == {0: "ant", 1: "bee"}
    assert fewer.backbone.fc.weight.shape == (2, 1024)
    assert torch.equal(fewer.backbone.conv5[0].weight, net.conv5[0].weight)


def test_model_without_head_from_a_file(net: nn.Module, weights_file: Path):
    model = TorchvisionModel.from_torchvision(SMALL, weights_file)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(net.fc(model(images).pooler_output), net(images))


def test_saved_folder(net: nn.Module, weights_file: Path, tmp_path: Path):
    load(SMALL, weights_file, id2label=["a", "b", "c", "d"], image_size=96).save_pretrained(tmp_path / "saved")
    model = load(SMALL, tmp_path / "saved")
    assert (model.config.id2label[3], model.config.image_size) == ("d", 96)
    assert_same_logits(model, net)
    assert_same_logits(load(SMALL, str(tmp_path / "saved"), id2label=["a", "b", "c", "d"]), net)
    other_names = load(SMALL, tmp_path / "saved", id2label=["d", "c", "b", "a"])
    assert not torch.equal(other_names.backbone.fc.weight, net.fc.weight)
    with pytest.raises(
        WeightsError, match=r"holds a shufflenet_v2_x0_5, not a resnet18. Write from_torchvision\('shuff"
    ):
        load("resnet18", tmp_path / "saved")


def test_builtin(net: nn.Module, weights_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(weights_module, "BUILTIN_FOLDER", tmp_path / "builtin")
    with pytest.raises(WeightsError, match="no built-in weights: .*builtin is missing or incomplete"):
        load(BUILTIN_ARCHITECTURE, "builtin")
    load(SMALL, weights_file, id2label=["a", "b", "c", "d"]).save_pretrained(tmp_path / "builtin")
    TorchvisionImageProcessor(size=40, crop_size=36).save_pretrained(tmp_path / "builtin")
    model = load(BUILTIN_ARCHITECTURE, "builtin")
    assert model.config.id2label[0] == "a"
    assert_same_logits(model, net)
    processor = TorchvisionImageProcessor.from_torchvision(BUILTIN_ARCHITECTURE, "builtin")
    assert processor.crop_size == {"height": 36, "width": 36}
    with pytest.raises(
        WeightsError, match=r"those of shufflenet_v2_x0_5, not resnet50. Write from_torchvision\('shuff"
    ):
        load("resnet50", "builtin")


def test_builtin_of_the_package():
    model = load(BUILTIN_ARCHITECTURE, "builtin")
    processor = TorchvisionImageProcessor.from_torchvision(BUILTIN_ARCHITECTURE, "builtin")
    pixels = processor(Image.new("RGB", (50, 40), "navy"), return_tensors="pt").pixel_values
    assert model(pixels).logits.shape == (1, model.config.num_labels)
    assert model.config.id2label[0] != "class_0"


def test_random_weights():
    model = load(SMALL, None, id2label=["ant", "bee"])
    assert model.config.id2label == {0: "ant", 1: "bee"}
    assert load(SMALL, None).config.num_labels == 1000


def cache_of_downloads(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_HOME", str(folder))
    checkpoints = folder / "hub" / "checkpoints"
    checkpoints.mkdir(parents=True)
    return checkpoints


def test_enum_from_the_cache_of_downloads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(1)
    net = torchvision.models.get_model(SMALL).eval()
    member = ShuffleNet_V2_X0_5_Weights.DEFAULT
    torch.save(net.state_dict(), cache_of_downloads(tmp_path, monkeypatch) / Path(member.url).name)
    for name in ("DEFAULT", "IMAGENET1K_V1", "ShuffleNet_V2_X0_5_Weights.IMAGENET1K_V1", member):
        model = load(SMALL, name)
        assert list(model.config.id2label.values()) == member.meta["categories"]
        assert_same_logits(model, net)
    assert_same_logits(load(SMALL, id2label=member.meta["categories"]), net)
    # As many classes, but others: the head of ImageNet cannot stay.
    others = load(SMALL, id2label=[f"other {index}" for index in range(1000)])
    assert not torch.equal(others.backbone.fc.weight, net.fc.weight)
    assert load(SMALL, id2label=["ant", "bee"]).backbone.fc.weight.shape == (2, 1024)


def test_damaged_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = cache_of_downloads(tmp_path, monkeypatch) / Path(ShuffleNet_V2_X0_5_Weights.DEFAULT.url).name
    file.write_bytes(b"PK\x03\x04 cut off")
    with pytest.raises(WeightsError, match=r"download of ShuffleNet.* is damaged: .*Delete .*pth"):
        load(SMALL)
    assert file.exists()


def test_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        port = reserved.getsockname()[1]
    # Nothing listens at that port, so the connection fails at once, network or not.
    monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{port}")
    for name in ("no_proxy", "NO_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(urllib.request, "_opener", None)  # Proxies are read once, when the opener is made.
    checkpoints = cache_of_downloads(tmp_path, monkeypatch)
    member = ResNet18_Weights.DEFAULT
    with pytest.raises(WeightsError) as caught:
        load("resnet18")
    message = str(caught.value)
    assert f"Cannot download ResNet18_Weights.IMAGENET1K_V1 from {member.url}" in message
    assert str(checkpoints / Path(member.url).name) in message
    assert "weights='path/to/file.pth'" in message
    assert "weights='builtin' with architecture 'shufflenet_v2_x0_5'" in message
    assert list(checkpoints.iterdir()) == []


def test_hub_repository_that_cannot_be_had():
    with pytest.raises(
        WeightsError, match="Cannot load the Hub repository nobody/no-such-model: .*names: IMAGENET1K_V1"
    ):
        load("resnet18", "nobody/no-such-model")


def test_densenet_files_with_old_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    net = torchvision.models.densenet121().eval()
    old = OrderedDict()
    for name, tensor in net.state_dict().items():
        for kind in ("norm", "relu", "conv"):
            name = name.replace(f".{kind}1.", f".{kind}.1.").replace(f".{kind}2.", f".{kind}.2.")
        if not name.endswith("num_batches_tracked"):  # Files as old as these do not have it.
            old[name] = tensor
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    file = cache_of_downloads(tmp_path, monkeypatch) / Path(DenseNet121_Weights.DEFAULT.url).name
    torch.save(old, file)
    assert_same_logits(load("densenet121"), net)
    assert_same_logits(load("densenet121", file), net)


def test_vit_files_with_old_names_and_another_size(tmp_path: Path):
    torch.manual_seed(0)
    net = torchvision.models.vit_b_32(image_size=96, num_classes=3).eval()
    nn.init.normal_(net.heads.head.weight)
    state = net.state_dict()
    old = {name.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2."): t for name, t in state.items()}
    assert old.keys() != state.keys()
    torch.save(old, tmp_path / "vit.pth")
    model = load("vit_b_32", tmp_path / "vit.pth")
    assert model.config.image_size == 96
    assert_same_logits(model, net, size=96)

    larger = load("vit_b_32", tmp_path / "vit.pth", image_size=160)
    positions = net.encoder.pos_embedding
    grid = positions[:, 1:].reshape(1, 3, 3, 768).permute(0, 3, 1, 2)
    grid = nn.functional.interpolate(grid, size=(5, 5), mode="bicubic", align_corners=True)
    expected = torch.cat([positions[:, :1], grid.permute(0, 2, 3, 1).reshape(1, 25, 768)], dim=1)
    assert torch.equal(larger.backbone.encoder.pos_embedding, expected)
    assert larger(torch.randn(1, 3, 160, 160)).logits.shape == (1, 3)

    larger.save_pretrained(tmp_path / "saved")
    reloaded = TorchvisionForImageClassification.from_pretrained(tmp_path / "saved")
    assert reloaded.backbone.image_size == 160
    assert load("vit_b_32", tmp_path / "saved").config.image_size == 160
    assert load("vit_b_32", tmp_path / "saved", image_size=64).backbone.seq_length == 5


def test_mnasnet_from_safetensors_which_has_no_versions(tmp_path: Path):
    torch.manual_seed(0)
    net = torchvision.models.mnasnet0_5(num_classes=3).eval()
    save_file(net.state_dict(), tmp_path / "mnasnet.safetensors")
    model = load("mnasnet0_5", tmp_path / "mnasnet.safetensors")
    assert_same_logits(model, net)
    model.load_state_dict({f"backbone.{name}": tensor for name, tensor in net.state_dict().items()})


@pytest.mark.parametrize(("architecture", "size"), [("googlenet", 64), ("inception_v3", 96)])
def test_auxiliary_heads_and_input_scale(architecture: str, size: int, tmp_path: Path):
    torch.manual_seed(0)
    net = torchvision.models.get_model(
        architecture, num_classes=3, aux_logits=True, transform_input=True, init_weights=False
    ).eval()
    torch.save(net.state_dict(), tmp_path / "weights.pth")
    without = load(architecture, tmp_path / "weights.pth")
    assert without.config.transform_input
    assert not any("aux" in name.lower() for name in without.state_dict())
    assert_same_logits(without, net, size)
    both = load(architecture, tmp_path / "weights.pth", aux_logits=True)
    assert both.backbone.state_dict().keys() == net.state_dict().keys()
    assert_same_logits(both, net, size)
    TorchvisionModel.from_torchvision(architecture, tmp_path / "weights.pth", aux_logits=True)

    without.save_pretrained(tmp_path / "saved")
    assert load(architecture, tmp_path / "saved").config.transform_input
    with pytest.raises(WeightsError, match="missing: .*(aux1|AuxLogits).* more"):
        load(architecture, tmp_path / "saved", aux_logits=True)
    assert not load(architecture, None, id2label=["a", "b"]).config.transform_input


def test_names_that_torchvision_does_not_have():
    with pytest.raises(WeightsError) as caught:
        load("resnet50", "imagenet1k_v3")
    assert "no weights 'imagenet1k_v3' for resnet50. Did you mean 'IMAGENET1K_V2' or 'IMAGENET1K_V1'" in str(
        caught.value
    )
    assert "Its weights are: IMAGENET1K_V1, IMAGENET1K_V2, DEFAULT" in str(caught.value)
    with pytest.raises(
        WeightsError, match="ResNet18_Weights.IMAGENET1K_V1 are weights of another architecture than vgg11"
    ):
        load("vgg11", ResNet18_Weights.DEFAULT)


def test_files_that_cannot_be_read(weights_file: Path, net: nn.Module, tmp_path: Path):
    with pytest.raises(WeightsError, match=r"There is no file .*weigths.pth. Did you mean 'weights.pth'"):
        load(SMALL, tmp_path / "weigths.pth")
    with pytest.raises(WeightsError, match="There is no file .*nowhere"):
        load(SMALL, "nowhere/weights.safetensors")

    cut = tmp_path / "cut.pth"
    cut.write_bytes(weights_file.read_bytes()[:100_000])
    with pytest.raises(WeightsError, match=r"cut.pth \(100000 bytes\): it is truncated or no file of weights"):
        load(SMALL, cut)
    (tmp_path / "empty.pth").touch()
    with pytest.raises(WeightsError, match=r"empty.pth \(0 bytes\): it is truncated"):
        load(SMALL, tmp_path / "empty.pth")
    (tmp_path / "text.pt").write_text("not weights at all")
    with pytest.raises(WeightsError, match="text.pt: it is damaged or no file of weights at all, or it holds more"):
        load(SMALL, tmp_path / "text.pt")
    (tmp_path / "cut.safetensors").write_bytes(b"\x00\x10\x00\x00\x00\x00\x00\x00{")
    with pytest.raises(WeightsError, match="cut.safetensors .* truncated"):
        load(SMALL, tmp_path / "cut.safetensors")


def test_whole_pickled_model_is_refused(net: nn.Module, tmp_path: Path):
    torch.save(net, tmp_path / "model.pth")
    with pytest.raises(WeightsError, match=r"holds more than tensors.*refused.*can run code.*torch.save\(model.state"):
        load(SMALL, tmp_path / "model.pth")


def test_files_that_hold_something_else(net: nn.Module, tmp_path: Path):
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(WeightsError, match="holds a list and not a state_dict"):
        load(SMALL, tmp_path / "list.pth")
    torch.save({"epoch": 3, "weights": net.state_dict()}, tmp_path / "odd.pth")
    with pytest.raises(WeightsError, match=r"it holds epoch \(int\), weights \(OrderedDict\)"):
        load(SMALL, tmp_path / "odd.pth")


def test_weights_of_another_architecture(weights_file: Path, net: nn.Module, tmp_path: Path):
    with pytest.raises(
        WeightsError, match=r"no weights of vgg11: it has no tensor 'classifier.6.weight'.*conv1.0.weight"
    ):
        load("vgg11", weights_file)
    with pytest.raises(WeightsError) as caught:
        load("shufflenet_v2_x1_0", weights_file)
    assert "does not fit shufflenet_v2_x1_0. other shapes: stage2.0.branch1.2.weight (24, 24, 1, 1) instead of" in str(
        caught.value
    )
    with pytest.raises(WeightsError, match=r"missing: .*unexpected: .* and \d+ more"):
        load("resnet18", weights_file)
    extra = {**net.state_dict(), "extra.weight": torch.zeros(1)}
    del extra["conv5.0.weight"]
    torch.save(extra, tmp_path / "extra.pth")
    with pytest.raises(WeightsError, match=r"missing: conv5.0.weight; unexpected: extra.weight. Choose"):
        load(SMALL, tmp_path / "extra.pth")


def test_options_are_checked_before_a_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for options in ({"dropout": 0.2}, {"image_size": 0}, {"id2label": ["a", "a"]}, {"aux_logits": True}):
        with pytest.raises(ValueError, match="resnet18|image_size|distinct"):
            load("resnet18", **options)
    assert list(tmp_path.iterdir()) == []


def test_description_of_all_backbones():
    infos = {info.name: info for info in describe_backbones()}
    assert list(infos) == list(list_architectures())
    resnet = infos["resnet50"]
    assert (resnet.family, resnet.weights, resnet.image_size) == ("resnet", "IMAGENET1K_V2", 224)
    assert resnet.accuracy == pytest.approx(80.858)
    assert resnet.parameters == pytest.approx(25.557032)
    assert infos["vit_h_14"].image_size == 518
