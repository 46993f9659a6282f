"""What a fine-tuned backbone scores before the pretrained head, against torchvision's own networks."""

import copy

import numpy as np
import pytest
import torch
import torchvision
from datasets import ClassLabel
from safetensors.torch import save_file
from scipy.stats import binomtest
from torch import nn

from torchthaw import (
    TorchvisionForImageClassification,
    TorchvisionImageProcessor,
    load_image_dataset,
)
from torchthaw.backbones.anatomy import family_of
from torchthaw.data.images import decode_image
from torchthaw.training.forgetting import SourceTask

ARCHITECTURE = "shufflenet_v2_x0_5"


@pytest.fixture
def images(make_image_folder):
    """Images whose labels are outputs of a head, of which there are ten."""
    folder = make_image_folder(classes=("0", "1", "2"), per_class=12)
    dataset = load_image_dataset(folder)["train"]
    names = ClassLabel(names=[str(number) for number in range(10)])
    return dataset.remove_columns("label").add_column("label", dataset["label"][:], feature=names)


def pixels_of(images, processor):
    pictures = [decode_image(row["image"]) for row in images]
    return processor(pictures, return_tensors="pt")["pixel_values"], np.array(images["label"][:])


def disturbed(model, size):
    """Moves weights and statistics of everything before the head."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if "fc." not in name and tensor.is_floating_point():
                tensor.mul_(1 + size * torch.randn_like(tensor).clamp(-2, 2))
    return model


@pytest.fixture
def weights(tmp_path, images):
    """A file of weights whose ten outputs know the images: the head is fitted to what the built-in network sees."""
    model = TorchvisionForImageClassification.from_torchvision(ARCHITECTURE, "builtin")
    processor = TorchvisionImageProcessor.from_torchvision(ARCHITECTURE, "builtin", image_size=32)
    pixels, labels = pixels_of(images, processor)
    network = model.backbone
    head, network.fc = network.fc, nn.Identity()
    with torch.no_grad():
        features = network(pixels)
    optimizer = torch.optim.Adam(head.parameters(), lr=3e-3)
    for _ in range(40):
        optimizer.zero_grad()
        nn.functional.cross_entropy(head(features), torch.from_numpy(labels)).backward()
        optimizer.step()
    network.fc = head
    file = tmp_path / "weights.safetensors"
    save_file(network.state_dict(), file)
    return str(file)


def test_figures_are_those_of_torchvisions_network_with_the_pretrained_head(weights, images):
    processor = TorchvisionImageProcessor.from_torchvision(ARCHITECTURE, "builtin", image_size=32)
    model = TorchvisionForImageClassification.from_torchvision(ARCHITECTURE, weights, id2label=["x", "y"])
    disturbed(model, 0.3)
    untouched = copy.deepcopy(model.state_dict())
    random = torch.get_rng_state()
    found = SourceTask(images, weights, "photos", "train").measure(model, processor, batch_size=8)
    assert torch.equal(torch.get_rng_state(), random)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, untouched[name])

    network = torchvision.models.shufflenet_v2_x0_5(num_classes=10).eval()
    model_file = TorchvisionForImageClassification.from_torchvision(ARCHITECTURE, weights).backbone.state_dict()
    pixels, labels = pixels_of(images, processor)
    right = []
    for state in (model_file, {**model.backbone.state_dict(), **{k: model_file[k] for k in ("fc.weight", "fc.bias")}}):
        network.load_state_dict(state)
        with torch.no_grad():
            right.append(network(pixels).argmax(1).numpy() == labels)
    before, after = right
    assert found["before"]["accuracy"] == pytest.approx(before.mean())
    assert found["after"]["accuracy"] == pytest.approx(after.mean())
    assert found["before"]["accuracy"] > 0.9
    assert 0 < found["after"]["accuracy"] < 0.8
    assert found["difference"] == pytest.approx(after.mean() - before.mean())
    lost, gained = int((before & ~after).sum()), int((after & ~before).sum())
    assert (found["forgotten"], found["gained"]) == (lost, gained)
    test = binomtest(gained, lost + gained)
    limits = test.proportion_ci(0.95, method="exact")
    expected = [(lost + gained) * (2 * limit - 1) / len(labels) for limit in (limits.low, limits.high)]
    assert found["interval"] == pytest.approx(expected)
    assert found["p_value"] == pytest.approx(test.pvalue)
    assert (found["num_images"], found["num_classes"], found["left_out"]) == (36, 3, 0)


FAMILIES = {
    "mobilenet_v3_small": ("classifier.0.weight", {}),  # a pretrained hidden layer in the classifier
    "squeezenet1_1": ("features.12.expand1x1.weight", {}),  # a convolution gives the logits
    "googlenet": ("inception5b.branch1.bn.bias", {"aux_logits": True}),  # heads within the network
    "mnasnet0_5": ("layers.0.weight", {}),
}


@pytest.mark.parametrize("architecture", FAMILIES)
def test_a_backbone_that_did_not_move_forgot_nothing_and_one_that_did_shows(tmp_path, images, architecture):
    layer, options = FAMILIES[architecture]
    torch.manual_seed(0)
    network = TorchvisionForImageClassification.from_torchvision(
        architecture, None, id2label=list("abcdefghij"), **options
    )
    processor = TorchvisionImageProcessor.from_torchvision(architecture, None, image_size=64)
    pixels, _ = pixels_of(images, processor)
    with torch.no_grad():
        logits = network(pixel_values=pixels).logits
        # So that a random network, too, gives images different labels; those that it gives are right before.
        network.backbone.get_submodule(family_of(architecture).final_layer).bias.sub_(logits.mean(0))
        labels = network(pixel_values=pixels).logits.argmax(1).tolist()
    file = tmp_path / "w.safetensors"
    save_file(network.backbone.state_dict(), file)
    own = images.remove_columns("label").add_column("label", labels, feature=images.features["label"])
    task = SourceTask(own, str(file), "photos", "train")
    model = TorchvisionForImageClassification.from_torchvision(
        architecture, str(file), id2label=["x", "y", "z"], **options
    )
    found = task.measure(model, processor)
    assert found["before"]["accuracy"] == found["after"]["accuracy"] == 1.0
    assert found["difference"] == 0
    with torch.no_grad():
        parameter = model.backbone.get_parameter(layer)
        parameter.add_(5 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    assert task.measure(model, processor)["after"]["accuracy"] < 1.0


def test_what_cannot_be_measured_is_said(weights, images, tmp_path):
    processor = TorchvisionImageProcessor.from_torchvision(ARCHITECTURE, "builtin", image_size=32)
    model = TorchvisionForImageClassification.from_torchvision(ARCHITECTURE, weights, id2label=["x", "y"])
    model.backbone.stage2.add_module("more", nn.BatchNorm2d(48))
    task = SourceTask(images, weights, "photos", "train")
    assert "has other layers" in task.measure(model, processor)["problem"]


def test_unreadable_images_are_left_out(weights, make_image_folder):
    folder = make_image_folder(classes=("0", "1"), per_class=4, name="some")
    (folder / "0" / "000.png").write_bytes(b"no image")
    dataset = load_image_dataset(folder)["train"]
    processor = TorchvisionImageProcessor.from_torchvision(ARCHITECTURE, "builtin", image_size=32)
    model = TorchvisionForImageClassification.from_torchvision(ARCHITECTURE, weights, id2label=["x", "y"])
    found = SourceTask(dataset, weights, "photos", "train").measure(model, processor)
    assert (found["num_images"], found["left_out"]) == (7, 1)
    for file in folder.rglob("*.png"):
        file.write_bytes(b"no image")
    found = SourceTask(dataset, weights, "photos", "train").measure(model, processor)
    assert found["problem"] == "no image could be read"
