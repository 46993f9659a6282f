"""Every classifier of torchvision: the same network, groups that are a partition in forward order, save and load."""

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn
from torchvision.ops import StochasticDepth
from transformers import AutoModelForImageClassification

from torchthaw.backbones.anatomy import family_of, list_architectures, patch_size
from torchthaw.backbones.configuration import TorchvisionConfig
from torchthaw.backbones.modeling import TorchvisionForImageClassification

# 200 million parameters and more: with a copy, gradients and a file they need up to 10 GB. Their structure is checked
# on the meta device, which is the same code with other numbers: their families are checked in full by smaller members.
GIANTS = ("convnext_large", "regnet_y_128gf", "vit_h_14", "vit_l_16", "vit_l_32")
CLASSES = 5


@pytest.fixture(autouse=True)
def free_memory() -> Iterator[None]:
    yield
    gc.collect()


def test_all_classifiers_of_torchvision_are_listed():
    assert list(list_architectures()) == torchvision.models.list_models(module=torchvision.models)
    assert len(list_architectures()) >= 80


def small_image(architecture: str) -> int:
    family = family_of(architecture)
    if family.name == "vit":
        return 2 * patch_size(architecture)
    smallest = {"alexnet": 63, "inception": 75, "maxvit": 224, "efficientnet": 33}
    return smallest.get(family.name, 32)


def build_reference(architecture: str, size: int) -> nn.Module:
    """torchvision's own network with the weights it starts from, except that nothing is zero or one by default."""
    options = {}
    if family_of(architecture).auxiliary:
        options = {"aux_logits": False, "init_weights": False}
    if family_of(architecture).name == "vit":
        options = {"image_size": size}
    net = torchvision.models.get_model(architecture, num_classes=CLASSES, **options).eval()
    for name, tensor in net.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.8, 1.2)
        elif tensor.is_floating_point() and tensor.ndim <= 1 and tensor.numel() > 1:
            tensor.add_(0.01 * torch.randn_like(tensor))
    final = net.get_submodule(family_of(architecture).final_layer)
    nn.init.normal_(final.weight, std=0.05)
    return net


@pytest.mark.parametrize("architecture", [name for name in list_architectures() if name not in GIANTS])
def test_same_network_as_torchvision(architecture: str, tmp_path: Path):
    torch.manual_seed(0)
    size = small_image(architecture)
    reference = build_reference(architecture, size)
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        expected = reference(images)
    assert expected.std() > 0

    with torch.device("meta"):
        model = TorchvisionForImageClassification(
            TorchvisionConfig(architecture=architecture, num_labels=CLASSES, image_size=size)
        )
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    assert list(model.state_dict()) == [f"backbone.{name}" for name in reference.state_dict()]
    model.load_state_dict({f"backbone.{k}": v for k, v in reference.state_dict().items()}, assign=True)
    del reference
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(images).logits, expected)

    check_partition(model)
    check_forward_order(model, images)

    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with torch.no_grad():
        assert torch.equal(loaded(images).logits, expected)
    assert not any(tensor.is_meta for tensor in [*loaded.parameters(), *loaded.buffers()])
    del loaded

    model.replace_head(["ant", "bee", "cat"])
    assert model.config.label2id == {"ant": 0, "bee": 1, "cat": 2}
    with torch.no_grad():
        assert model(images).logits.shape == (2, 3)


def check_partition(model: TorchvisionForImageClassification) -> None:
    groups = list(model.layer_groups().values())
    assert groups[-1].name == "head"
    names = [name for group in groups for name in group.parameters]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    assert all(model.get_parameter(name) is tensor for group in groups for name, tensor in group.parameters.items())
    covered: list[str] = []
    for group in groups:
        for root, module in group.modules.items():
            assert model.get_submodule(root) is module
            covered += [f"{root}.{name}" if name else root for name, _ in module.named_modules()]
    assert len(covered) == len(set(covered))
    for name, module in model.named_modules():
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        inside_attention = isinstance(module, nn.MultiheadAttention)
        leaf_with_tensors = own and (inside_attention or not list(module.children()))
        if leaf_with_tensors or isinstance(module, nn.Dropout | StochasticDepth):
            assert name in covered, name


def check_forward_order(model: TorchvisionForImageClassification, images: torch.Tensor) -> None:
    """With the last k groups trainable, they alone get gradients, and what comes before them needs no graph."""
    groups = list(model.layer_groups().values())
    for trainable in {1, 2, len(groups) // 2, len(groups)}:
        model.requires_grad_(False)
        for group in groups[-trainable:]:
            for parameter in group.parameters.values():
                parameter.requires_grad_(True)
        output = model(images, output_hidden_states=True)
        first = len(groups) - trainable
        in_graph = [state.requires_grad for state in output.hidden_states]
        assert in_graph == [index >= first for index in range(len(groups) - 1)]
        if trainable == len(groups) // 2:
            output.logits.sum().backward()
            for index, group in enumerate(groups):
                assert group.parameters
                for name, parameter in group.parameters.items():
                    assert (parameter.grad is not None) == (index >= first), name
    model.zero_grad(set_to_none=True)
    model.requires_grad_(True)


@pytest.mark.parametrize("architecture", GIANTS)
def test_structure_of_the_giants(architecture: str):
    size = small_image(architecture)
    options = {"image_size": size} if architecture.startswith("vit") else {}
    with torch.device("meta"):
        model = TorchvisionForImageClassification(
            TorchvisionConfig(architecture=architecture, num_labels=CLASSES, image_size=size)
        ).eval()
        images = torch.empty(2, 3, size, size)
    if architecture.startswith("regnet"):
        # torchvision alone cannot build a RegNet on the meta device; the published number of parameters stands in.
        expected = {}
        published = torchvision.models.RegNet_Y_128GF_Weights.DEFAULT.meta["num_params"]
        head = 7392 * 1000 + 1000 - (7392 * CLASSES + CLASSES)
        assert sum(parameter.numel() for parameter in model.parameters()) == published - head
    else:
        with torch.device("meta"):
            net = torchvision.models.get_model(architecture, num_classes=CLASSES, **options)
        expected = {f"backbone.{name}": tensor.shape for name, tensor in net.state_dict().items()}
        assert {name: tensor.shape for name, tensor in model.state_dict().items()} == expected
    check_partition(model)
    check_forward_order(model, images)
    model.replace_head(["ant", "bee", "cat"])
    assert model(images).logits.shape == (2, 3)
