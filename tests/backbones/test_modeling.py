"""What the models do beyond the network: groups, modes, losses, heads, recomputation, loading, the pipeline."""

import copy
import json
from pathlib import Path

import pytest
import torch
import torchvision
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torchvision.models import MobileNet_V2_Weights
from torchvision.ops import StochasticDepth
from transformers import AutoModel, AutoModelForImageClassification, pipeline

from torchthaw import (
    TorchvisionConfig,
    TorchvisionForImageClassification,
    TorchvisionImageProcessor,
    TorchvisionModel,
)
from torchthaw.backbones.anatomy import FAMILIES, family_of
from torchthaw.backbones.registration import register_auto_classes

# The smallest member of each family and the smallest image it takes without a layer of one pixel in train mode.
ONE_OF_EACH = {
    "alexnet": 63,
    "convnext_tiny": 64,
    "densenet121": 64,
    "efficientnet_b0": 64,
    "googlenet": 64,
    "inception_v3": 299,
    "maxvit_t": 224,
    "mnasnet0_5": 64,
    "mobilenet_v2": 64,
    "mobilenet_v3_small": 64,
    "regnet_y_400mf": 64,
    "resnet18": 64,
    "shufflenet_v2_x0_5": 64,
    "squeezenet1_1": 64,
    "swin_v2_t": 64,
    "vgg11_bn": 64,
    "vit_b_32": 64,
}
SMALL = "shufflenet_v2_x0_5"


def build(architecture: str = SMALL, size: int | None = None, **options: object) -> TorchvisionForImageClassification:
    torch.manual_seed(0)
    options = {"num_labels": 3, "image_size": size} | options
    return TorchvisionForImageClassification(TorchvisionConfig(architecture=architecture, **options))


def test_one_of_each_family():
    assert sorted(family_of(name).name for name in ONE_OF_EACH) == sorted(family.name for family in FAMILIES)


@pytest.mark.parametrize(("architecture", "size"), ONE_OF_EACH.items())
def test_recomputation_changes_nothing(architecture: str, size: int):
    """Gradients, outputs and BatchNorm statistics of two steps are the same to the last bit; dropout stays on."""
    model = build(architecture, size, **({"aux_logits": True} if family_of(architecture).auxiliary else {})).train()
    twin = copy.deepcopy(model)
    twin.gradient_checkpointing_enable()
    assert twin.is_gradient_checkpointing
    images = torch.randn(2, 3, size, size)
    labels = torch.tensor([0, 2])
    saved = {}
    for candidate in (model, twin):
        sizes: dict[int, int] = {}
        weights = {parameter.untyped_storage().data_ptr() for parameter in candidate.parameters()}

        def count(tensor: torch.Tensor, sizes: dict[int, int] = sizes, weights: set[int] = weights) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        for step in range(2):
            torch.manual_seed(step)
            with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
                output = candidate(images, labels=labels, output_hidden_states=True)
            output.loss.backward()
        saved[candidate] = sum(sizes.values())
    assert saved[twin] < 0.8 * saved[model]
    for (name, parameter), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert parameter.grad is not None, name
        assert torch.equal(parameter.grad, other.grad), name
    for (name, buffer), other in zip(model.named_buffers(), twin.named_buffers(), strict=True):
        assert torch.equal(buffer, other[1]), name
    assert not any("forward" in vars(module) for module in twin.modules())
    twin.gradient_checkpointing_disable()
    assert not twin.is_gradient_checkpointing


def test_reentrant_recomputation_is_refused():
    with pytest.raises(ValueError, match=r"Write gradient_checkpointing_kwargs=\{'use_reentrant': False\}"):
        build().gradient_checkpointing_enable({"use_reentrant": True})


@pytest.mark.parametrize(("architecture", "size"), ONE_OF_EACH.items())
def test_features_and_hidden_states(architecture: str, size: int):
    model = build(architecture, size).eval()
    features = TorchvisionModel(TorchvisionConfig(architecture=architecture, num_labels=3, image_size=size)).eval()
    missing = features.load_state_dict(model.state_dict(), strict=False)
    assert missing.missing_keys == []
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        expected = model(images, output_hidden_states=True)
        output = features(images, output_hidden_states=True)
    assert output.pooler_output.ndim == 2
    final = model.backbone.get_submodule(family_of(architecture).final_layer)
    if isinstance(final, nn.Linear):
        with torch.no_grad():
            assert torch.equal(final(output.pooler_output), expected.logits)
    else:
        # SqueezeNet pools after its final convolution; its features are not negative, so the mean can come first.
        assert torch.allclose(output.pooler_output, output.last_hidden_state.mean((2, 3)))
    groups = list(model.layer_groups())
    assert list(features.layer_groups()) == groups
    assert features.layer_groups()["head"].parameters.keys() == set()
    assert len(output.hidden_states) == len(expected.hidden_states) == len(groups) - 1
    assert all(torch.equal(a, b) for a, b in zip(output.hidden_states, expected.hidden_states, strict=True))
    assert output.last_hidden_state.ndim == (3 if architecture.startswith("vit") else 4)
    assert output.last_hidden_state.shape[0] == 2
    logits, states = model(images, output_hidden_states=True, return_dict=False)
    assert torch.is_tensor(logits)
    assert len(states) == len(groups) - 1
    assert features(images, return_dict=False)[1].shape == output.pooler_output.shape


def test_groups_of_some_families():
    def names(architecture: str) -> dict[str, list[str]]:
        with torch.device("meta"):
            groups = build(architecture).layer_groups()
        return {name: [path.removeprefix("backbone.") for path in group.modules] for name, group in groups.items()}

    assert names("resnet50") == {
        "stem": ["conv1", "bn1", "relu", "maxpool"],
        **{f"layer{index}": [f"layer{index}"] for index in range(1, 5)},
        "head": ["avgpool", "fc"],
    }
    mobilenet = names("mobilenet_v2")
    assert mobilenet["stage4"] == [f"features.{index}" for index in range(14, 19)]
    assert mobilenet["head"] == ["classifier.0", "classifier.1"]
    vgg = names("vgg16")
    assert list(vgg) == ["stem", "stage1", "stage2", "stage3", "stage4", "classifier", "head"]
    assert vgg["stage1"] == [f"features.{index}" for index in range(5, 10)]
    assert vgg["classifier"] == ["avgpool", *(f"classifier.{index}" for index in range(5))]
    densenet = names("densenet201")
    assert densenet["block4"] == ["features.transition3", "features.denseblock4", "features.norm5"]
    assert names("convnext_tiny")["stage4"] == ["features.6", "features.7", "avgpool", "classifier.0"]
    vit = build("vit_b_32", 64).layer_groups()
    assert list(vit) == ["stem", *(f"block{index}" for index in range(12)), "head"]
    assert {"backbone.class_token", "backbone.encoder.pos_embedding"} < vit["stem"].parameters.keys()
    assert "backbone.encoder.ln" in vit["block11"].modules


def test_modules_held_in_eval_mode():
    model = build()
    model.hold_in_eval(["backbone.conv1", "backbone.stage2.0.branch1.1"])
    model.train()
    assert model.training
    assert not model.backbone.conv1[1].training
    assert not model.backbone.stage2[0].branch1[1].training
    assert model.backbone.stage2[0].branch1[3].training
    wrapped = nn.Sequential(model).train()
    assert not wrapped[0].backbone.conv1[1].training
    frozen = model.backbone.conv1[1].running_mean.clone()
    trained = model.backbone.conv5[1].running_mean.clone()
    model(torch.randn(2, 3, 64, 64))
    assert torch.equal(model.backbone.conv1[1].running_mean, frozen)
    assert not torch.equal(model.backbone.conv5[1].running_mean, trained)
    assert copy.deepcopy(model).held_in_eval == model.held_in_eval

    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model).train()
    assert isinstance(converted.backbone.conv1[1], nn.SyncBatchNorm)
    assert not converted.backbone.conv1[1].training
    assert converted.backbone.conv5[1].training

    again = nn.SyncBatchNorm.convert_sync_batchnorm(build())
    again.hold_in_eval(["backbone.stage2", "backbone.conv5.1"])
    again.train()
    modes = {name: part.training for name, part in again.named_modules() if isinstance(part, nn.SyncBatchNorm)}
    held = {name for name in modes if name.startswith("backbone.stage2.")} | {"backbone.conv5.1"}
    assert {name for name, training in modes.items() if not training} == held

    model.hold_in_eval([])
    assert model.held_in_eval == ()
    assert model.backbone.conv1[1].training
    with pytest.raises(
        ValueError, match=r"no module 'backbone.conv6' to hold in eval mode. Did you mean 'backbone.conv"
    ):
        model.hold_in_eval(["backbone.conv6"])


def group_of(model: TorchvisionForImageClassification) -> dict[str, str]:
    """Group of each parameter by name, which must be exactly one."""
    groups = model.layer_groups()
    names = [(name, group) for group, members in groups.items() for name in members.parameters]
    assert sorted(name for name, _ in names) == sorted(name for name, _ in model.named_parameters())
    assert list(groups)[-1] == "head"
    for group in groups.values():
        for name, parameter in group.parameters.items():
            assert model.get_parameter(name) is parameter
    return dict(names)


@pytest.mark.parametrize("architecture", ["resnet18", "alexnet", "convnext_tiny", "vit_b_32", "squeezenet1_1"])
def test_what_is_added_to_the_model_belongs_to_the_head(architecture: str):
    with torch.device("meta"):
        model = build(architecture, 64)
        before = group_of(model)
        modules_before = {name: list(group.modules) for name, group in model.layer_groups().items()}
        model.extra = nn.Sequential(nn.Linear(3, 3), nn.Dropout())
        model.scale = nn.Parameter(torch.ones(3))
        model.backbone.adapter = nn.BatchNorm2d(8)
        model.backbone.prompt = nn.Parameter(torch.ones(2, 8))
        model.backbone.more = nn.ModuleDict({"pool": nn.AdaptiveAvgPool2d(1), "drop": nn.Dropout()})
    after = group_of(model)
    assert {name: after[name] for name in before} == before
    assert {name: group for name, group in after.items() if name not in before} == dict.fromkeys(
        [
            "scale",
            "extra.0.weight",
            "extra.0.bias",
            "backbone.prompt",
            "backbone.adapter.weight",
            "backbone.adapter.bias",
        ],
        "head",
    )
    modules = {name: list(group.modules) for name, group in model.layer_groups().items()}
    modules_before["head"] += ["backbone.adapter", "backbone.more", "extra"]
    assert {name: sorted(paths) for name, paths in modules.items()} == {
        name: sorted(paths) for name, paths in modules_before.items()
    }


def test_layers_appended_to_a_container_that_groups_share_belong_to_the_head():
    with torch.device("meta"):
        model = build("alexnet", 64)
        model.backbone.classifier.append(nn.Linear(3, 2))
        model.backbone.classifier.norm = nn.BatchNorm1d(2)
    groups = model.layer_groups()
    names = ["backbone.classifier.6", "backbone.classifier.7", "backbone.classifier.norm"]
    assert list(groups["head"].modules) == names
    assert {name for name, group in group_of(model).items() if group == "head"} == {
        f"{name}.{kind}" for name in names for kind in ("weight", "bias")
    }


def test_what_is_put_into_a_group_belongs_to_it():
    with torch.device("meta"):
        model = build("resnet18")
        block = model.backbone.layer2[0]
        block.conv1 = nn.Sequential(block.conv1, nn.Conv2d(128, 128, 1))
        model.backbone.layer3.adapter = nn.BatchNorm2d(256)
        model.backbone.fc = nn.Sequential(nn.Dropout(), nn.Linear(512, 3))
        nn.utils.parametrizations.weight_norm(model.backbone.conv1)
    group = group_of(model)
    assert group["backbone.layer2.0.conv1.0.weight"] == group["backbone.layer2.0.conv1.1.weight"] == "layer2"
    assert group["backbone.layer3.adapter.weight"] == "layer3"
    assert group["backbone.fc.1.weight"] == "head"
    assert group["backbone.conv1.parametrizations.weight.original1"] == "stem"
    assert list(model.layer_groups()["head"].modules) == ["backbone.avgpool", "backbone.fc"]


def test_other_names_of_what_is_in_a_group_change_nothing():
    with torch.device("meta"):
        model = build("resnet18")
        before = {name: (list(g.modules), list(g.parameters)) for name, g in model.layer_groups().items()}
        model.last = model.backbone.layer4
        model.backbone.first_weight = model.backbone.conv1.weight
        model.backbone.layer4.tied = model.backbone.layer1[0].conv1.weight
    # named_parameters() finds this name first.
    before["stem"][1][0] = "backbone.first_weight"
    assert {name: (list(g.modules), list(g.parameters)) for name, g in model.layer_groups().items()} == before
    group_of(model)
    with torch.device("meta"):
        model.both = nn.ModuleList([model.backbone.layer4, nn.Linear(2, 2)])
        vit = build("vit_b_32", 64)
        vit.token = vit.backbone.class_token
    assert list(model.layer_groups()["head"].modules) == ["backbone.avgpool", "backbone.fc", "both.1"]
    assert group_of(vit)["token"] == "stem"


@pytest.mark.parametrize("architecture", ["squeezenet1_1", "maxvit_t", "googlenet", "inception_v3", "vit_b_32"])
def test_replaced_head_is_of_the_same_kind(architecture: str):
    size = ONE_OF_EACH[architecture]
    model = build(architecture, size, **({"aux_logits": True} if family_of(architecture).auxiliary else {}))
    final = family_of(architecture).final_layer
    old = model.backbone.get_submodule(final)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.double()
    model.replace_head({0: "a", 1: "b"})
    new = model.backbone.get_submodule(final)
    assert type(new) is type(old)
    assert (new.bias is None) == (old.bias is None)
    assert new.weight.dtype == torch.float64
    assert new.weight.std() > 0
    after = model.state_dict()
    assert after.keys() == before.keys()
    changed = {name for name in before if not torch.equal(after[name].float(), before[name].float())}
    layers = [final, *(family_of(architecture).auxiliary)]
    allowed = {f"backbone.{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}
    assert changed <= allowed
    assert model.config.id2label == {0: "a", 1: "b"}
    output = model.train()(torch.randn(2, 3, size, size).double(), labels=torch.tensor([0, 1]))
    assert output.logits.shape == (2, 2)
    assert output.loss.isfinite()


@pytest.mark.parametrize(("architecture", "weight", "heads"), [("googlenet", 0.3, 2), ("inception_v3", 0.4, 1)])
def test_auxiliary_heads_add_to_the_training_loss(architecture: str, weight: float, heads: int):
    size = ONE_OF_EACH[architecture]
    model = build(architecture, size, aux_logits=True).train()
    images, labels = torch.randn(2, 3, size, size), torch.tensor([0, 2])
    torch.manual_seed(0)
    loss = model(images, labels=labels).loss
    torch.manual_seed(0)
    main, *auxiliary = model.backbone(images)
    assert len(auxiliary) == heads
    expected = F.cross_entropy(main, labels) + weight * sum(F.cross_entropy(extra, labels) for extra in auxiliary)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    model.eval()
    output = model(images, labels=labels)
    assert output.loss.item() == pytest.approx(F.cross_entropy(output.logits, labels).item())
    paths = [path for path in model.layer_groups()["head"].modules if "aux" in path.lower()]
    assert len(paths) == heads


def test_losses():
    model = build().eval()
    images = torch.randn(2, 3, 64, 64)
    logits = model(images).logits
    logs = logits.log_softmax(dim=1)
    hard = model(images, labels=torch.tensor([2, 0])).loss
    assert hard.item() == pytest.approx(-(logs[0, 2] + logs[1, 0]).item() / 2, rel=1e-5)
    soft = torch.tensor([[0.25, 0.0, 0.75], [0.0, 1.0, 0.0]])
    assert model(images, labels=soft).loss.item() == pytest.approx(-(soft * logs).sum().item() / 2, rel=1e-5)
    model.config.problem_type = "multi_label_classification"
    several = torch.tensor([[1, 0, 1], [0, 0, 0]])
    chances = logits.sigmoid()
    expected = -(several * chances.log() + (1 - several) * (1 - chances).log()).mean()
    assert model(images, labels=several).loss.item() == pytest.approx(expected.item(), rel=1e-5)
    model.config.problem_type = None
    for labels in (several, torch.tensor([[0], [1]])):
        with pytest.raises(
            ValueError, match=r"do not fit logits of shape \(2, 3\). Pass class ids of shape \(batch,\)"
        ):
            model(images, labels=labels)
    with pytest.raises(ValueError, match="one number per image to be estimated, which is regression"):
        model(images, labels=torch.tensor([0.0, 1.0]))


def test_inputs_that_do_not_fit():
    model = build("vit_b_32", 64)
    with pytest.raises(ValueError, match=r"takes images of 64 x 64 pixels, and pixel_values has 96 x 96"):
        model(torch.randn(1, 3, 96, 96))
    for images in (torch.randn(3, 64, 64), torch.randn(1, 1, 64, 64), None):
        with pytest.raises(ValueError, match=r"must have the shape \(batch, 3, height, width\)"):
            model(images)


@pytest.mark.parametrize(
    "architecture",
    [name for name in ONE_OF_EACH if family_of(name).dropout],
)
def test_dropout_override(architecture: str):
    with torch.device("meta"):
        ordinary, changed = build(architecture), build(architecture, dropout=0.123)
    if architecture.startswith("densenet"):
        assert {layer.drop_rate for layer in changed.modules() if hasattr(layer, "drop_rate")} == {0.123}
        return

    def rates(model: nn.Module) -> list[float]:
        return [layer.p for layer in model.modules() if isinstance(layer, nn.Dropout)]

    assert 0.123 in rates(changed)
    assert len(rates(changed)) == len(rates(ordinary))
    assert 0.123 not in rates(ordinary)


@pytest.mark.parametrize("architecture", ["convnext_tiny", "efficientnet_b0", "maxvit_t", "swin_t", "swin_v2_t"])
def test_stochastic_depth_override(architecture: str):
    def rates(model: nn.Module) -> list[float]:
        return [layer.p for layer in model.modules() if isinstance(layer, StochasticDepth)]

    with torch.device("meta"):
        ordinary = build(architecture)
        changed, none = build(architecture, stochastic_depth=0.4), build(architecture, stochastic_depth=0.0)
    assert max(rates(changed)) == pytest.approx(0.4)
    ratio = 0.4 / max(rates(ordinary))
    assert rates(changed) == pytest.approx([ratio * rate for rate in rates(ordinary)])
    assert rates(changed) == sorted(rates(changed))
    assert set(rates(none)) == {0.0}


def test_fresh_weights_are_torchvisions_own():
    torch.manual_seed(0)
    expected = torchvision.models.mobilenet_v3_small(num_classes=3).state_dict()
    model = build("mobilenet_v3_small")
    assert all(
        torch.equal(tensor, expected[name.removeprefix("backbone.")]) for name, tensor in model.state_dict().items()
    )


@pytest.mark.parametrize(("architecture", "size"), ONE_OF_EACH.items())
def test_other_number_of_classes_while_loading(architecture: str, size: int, tmp_path: Path):
    model = build(architecture, size)
    for parameter in model.parameters():
        nn.init.constant_(parameter, 0.25)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path, num_labels=7, ignore_mismatched_sizes=True)
    assert loaded.config.id2label == {index: f"class_{index}" for index in range(7)}
    final = f"backbone.{family_of(architecture).final_layer}"
    for name, tensor in loaded.state_dict().items():
        if name.startswith(f"{final}."):
            assert len(tensor) == 7
            assert tensor.isfinite().all()
            assert tensor.std() > 0
        else:
            assert torch.equal(tensor, model.state_dict()[name]), name
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForImageClassification.from_pretrained(tmp_path, num_labels=7)
    features, report = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert type(features) is TorchvisionModel
    assert (set(report["missing_keys"]), set(report["unexpected_keys"])) == (set(), set())


def test_a_head_is_new_until_it_is_loaded(tmp_path: Path):
    def new(source, **options):
        return TorchvisionForImageClassification.from_torchvision(SMALL, source, **options).head_is_new

    names = ["cat", "dog"]
    model = TorchvisionForImageClassification.from_torchvision(SMALL, None, id2label=names)
    assert model.head_is_new
    model.save_pretrained(tmp_path)
    load = TorchvisionForImageClassification.from_pretrained
    assert not load(tmp_path).head_is_new
    assert load(tmp_path, num_labels=3, ignore_mismatched_sizes=True).head_is_new
    assert not new(tmp_path)
    assert not new(tmp_path, id2label=names)
    assert new(tmp_path, id2label=["cat", "cow"])
    model.load_state_dict(model.state_dict())
    assert not model.head_is_new
    model.replace_head(names)
    assert model.head_is_new
    features = tmp_path / "features"
    TorchvisionModel.from_pretrained(tmp_path).save_pretrained(features)
    assert load(features).head_is_new


def test_features_checkpoint_gets_a_head(tmp_path: Path):
    torch.manual_seed(0)
    TorchvisionModel(TorchvisionConfig(architecture=SMALL, num_labels=3)).save_pretrained(tmp_path)
    model = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert model.backbone.fc.weight.std() > 0
    assert model(torch.randn(1, 3, 64, 64)).logits.isfinite().all()


def test_checkpoint_without_auxiliary_heads_gets_fresh_ones(tmp_path: Path):
    build("googlenet", 64).save_pretrained(tmp_path)
    model = AutoModelForImageClassification.from_pretrained(tmp_path, aux_logits=True).train()
    assert model.backbone.aux1.conv.bn.running_var.eq(1).all()
    assert model.backbone.aux1.fc1.weight.std() > 0
    assert model(torch.randn(2, 3, 64, 64), labels=torch.tensor([0, 1])).loss.isfinite()


def test_checkpoint_of_another_image_size(tmp_path: Path):
    build("vit_b_32", 64).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"no backbone.encoder.pos_embedding of the shape.*from_torchvision"):
        AutoModelForImageClassification.from_pretrained(tmp_path, image_size=96, ignore_mismatched_sizes=True)


def test_half_precision_loading_of_regnet(tmp_path: Path):
    """RegNet computes its widths while it is built, which must not happen in the precision of the weights."""
    build("regnet_y_400mf").save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}


def test_random_state_after_loading_equals_that_before(tmp_path: Path):
    build().save_pretrained(tmp_path)
    state = torch.get_rng_state()
    AutoModelForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), state)


def test_registration_twice_does_no_harm():
    register_auto_classes()
    register_auto_classes()


def test_pipeline_on_a_saved_folder(tmp_path: Path):
    model = build(id2label=["ant", "bee", "cat"]).eval()
    processor = TorchvisionImageProcessor(size=72, crop_size=64)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    noise = torch.randint(0, 256, (90, 120, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    image = Image.fromarray(noise.numpy())
    image.save(tmp_path / "image.png")
    with torch.no_grad():
        scores = model(**processor(image, return_tensors="pt")).logits.softmax(dim=1)[0].tolist()
    by_hand = dict(zip(["ant", "bee", "cat"], scores, strict=True))
    for source in (str(tmp_path / "image.png"), image):
        answers = pipeline("image-classification", model=str(tmp_path))(source)
        assert {answer["label"]: answer["score"] for answer in answers} == pytest.approx(by_hand, abs=1e-7)
    assert "LABEL" not in json.dumps(answers)
    passed = pipeline("image-classification", model=model, image_processor=processor)(image)
    assert passed == answers


def test_real_weights_recognise_real_images(shared_data: Path, shared_weights: Path):
    categories = MobileNet_V2_Weights.DEFAULT.meta["categories"]
    model = TorchvisionForImageClassification.from_torchvision("mobilenet_v2", shared_weights, id2label=categories)
    processor = TorchvisionImageProcessor.from_torchvision("mobilenet_v2", shared_weights)
    right = total = 0
    for folder, name in (("ants", "ant"), ("bees", "bee")):
        for file in sorted((shared_data / "hymenoptera" / "val" / folder).iterdir())[:12]:
            with torch.no_grad():
                logits = model(**processor(file, return_tensors="pt")).logits[0]
            right += name in [categories[index] for index in logits.topk(3).indices]
            total += 1
    assert right >= 0.7 * total, (right, total)
