"""The cut at the frozen part's end: both parts give the whole, for every family and every place of the cut."""

import pytest
import torch
from narrow_networks import narrow
from torch import nn
from torchvision.ops import StochasticDepth

from torchthaw import TorchvisionForImageClassification
from torchthaw.backbones.borders import find_border
from torchthaw.stages.freezing import freeze_for_stage
from torchthaw.stages.stage import Stage

# One architecture of each family, with the smallest images that it takes in all its layers.
SMALL = {
    "alexnet": 64, "convnext_tiny": 32, "densenet121": 32, "efficientnet_b0": 32, "googlenet": 32, "inception_v3": 75,
    "maxvit_t": 224, "mnasnet0_5": 32, "mobilenet_v2": 32, "mobilenet_v3_small": 32, "regnet_y_400mf": 32,
    "resnet18": 32, "shufflenet_v2_x0_5": 32, "squeezenet1_1": 32, "swin_t": 32, "vgg11_bn": 32, "vit_b_32": 32,
}  # fmt: skip


def model_of(architecture, size, **options):
    torch.manual_seed(0)
    model = TorchvisionForImageClassification.from_torchvision(
        architecture, weights=None, id2label=["a", "b", "c"], image_size=size, **options
    )
    return narrow(model)


def freeze(model, live, **options):
    stage = Stage("stage", tuple(live), epochs=1, learning_rate=1e-3, **options)
    freeze_for_stage(model, stage, "eval")
    model.train()
    return stage


@pytest.mark.parametrize("architecture", SMALL)
def test_both_parts_give_the_logits_and_gradients_of_the_whole_wherever_the_cut_is(architecture):
    size = SMALL[architecture]
    # MaxViT takes large images only.
    dtype = torch.float32 if architecture == "maxvit_t" else torch.float64
    model = model_of(architecture, size).to(dtype)
    for module in model.modules():
        if isinstance(module, StochasticDepth | nn.Dropout):
            module.p = 0.0  # the whole and the parts would drop other things
    images = torch.randn(2, 3, size, size, dtype=dtype)
    labels = torch.tensor([0, 2])
    names = list(model.layer_groups())
    places = range(1, len(names)) if len(names) < 8 else [1, 2, len(names) // 2, len(names) - 2, len(names) - 1]
    for first in [len(names) - 1] if architecture == "maxvit_t" else places:
        freeze(model, names[first:])
        border = find_border(model, names[first:], images)
        assert border is not None, names[first]
        assert border.at_head == (first == len(names) - 1)

        def gradients(values, model=model):
            model.zero_grad()
            output = model(pixel_values=values, labels=labels)
            output.loss.backward()
            return output.logits.detach(), {
                n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
            }

        logits, whole = gradients(images)
        values = border.prefix(images)
        assert tuple(values.shape[1:]) == border.shape
        assert not values.requires_grad
        with border.resumed():
            resumed_logits, resumed = gradients(values)
        torch.testing.assert_close(resumed_logits, logits)
        assert resumed.keys() == whole.keys()
        for name in whole:
            torch.testing.assert_close(resumed[name], whole[name], msg=name)


def test_the_model_is_as_before_after_the_cut():
    model = model_of("mobilenet_v2", 32)
    freeze(model, ["head"])
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    images = torch.randn(2, 3, 32, 32)
    model.eval()
    logits = model(pixel_values=images).logits
    model.train()
    random_state = torch.get_rng_state()
    border = find_border(model, ["head"], images)
    assert torch.equal(torch.get_rng_state(), random_state)
    values = border.prefix(images)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), border.resumed():
        model(pixel_values=values[:, :100])
    model.eval()
    assert torch.equal(model(pixel_values=images).logits, logits)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(ValueError, match="pixel_values must have the shape"):
        model(pixel_values=torch.randn(2, 1280))


def test_a_probe_is_nothing_that_hooks_on_live_layers_see():
    model = model_of("resnet18", 32)
    freeze(model, ["head"])
    seen = []
    model.backbone.fc.register_forward_hook(lambda *_: seen.append(1))
    border = find_border(model, ["head"], torch.randn(2, 3, 32, 32))
    assert not seen
    with border.resumed():
        model(pixel_values=torch.randn(2, 512))
    assert seen == [1]


def test_values_in_a_smaller_type_are_computed_with_in_the_models_own():
    model = model_of("shufflenet_v2_x0_5", 32)
    freeze(model, ["head"])
    images = torch.randn(4, 3, 32, 32)
    border = find_border(model, ["head"], images)
    values = border.prefix(images)
    with border.resumed():
        exact, rounded = (model(pixel_values=v).logits for v in (values, values.bfloat16()))
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, exact, atol=0.02, rtol=0.02)


class TestNoBorder:
    """Where what comes before the live part is not a fixed function of the image, the whole model must run."""

    images = torch.randn(2, 3, 64, 64)

    def test_nothing_is_frozen_before_the_live_part(self):
        model = model_of("resnet18", 64)
        freeze(model, list(model.layer_groups()))
        assert find_border(model, list(model.layer_groups()), self.images) is None

    def test_a_group_in_the_middle_trains_and_those_behind_it_do_not(self):
        model = model_of("resnet18", 64)
        freeze(model, ["layer2"])
        border = find_border(model, ["layer2"], self.images)
        assert border.path == "layer2", "the cut is before the first live group, whatever follows"

    def test_auxiliary_heads_are_fed_from_the_middle(self):
        model = model_of("googlenet", 64, aux_logits=True)
        freeze(model, ["head"])
        assert find_border(model, ["head"], self.images) is None

    def test_hidden_states_are_asked_for(self):
        model = model_of("resnet18", 64)
        model.config.output_hidden_states = True
        freeze(model, ["head"])
        assert find_border(model, ["head"], self.images) is None

    def test_dropout_stays_active_in_the_frozen_part(self):
        model = model_of("efficientnet_b0", 64)
        freeze(model, ["head"], frozen_dropout=True)
        assert find_border(model, ["head"], self.images) is None

    def test_functional_dropout_stays_active_in_the_frozen_part(self):
        model = model_of("densenet121", 64, dropout=0.2)
        freeze(model, ["head"], frozen_dropout=True)
        assert find_border(model, ["head"], self.images) is None

    def test_frozen_dropout_without_any_dropout_is_no_hindrance(self):
        model = model_of("resnet18", 64)
        freeze(model, ["head"], frozen_dropout=True)
        assert find_border(model, ["head"], self.images) is not None

    @pytest.mark.parametrize("kind", ["forward", "pre"])
    def test_somebody_watches_a_frozen_layer(self, kind):
        model = model_of("resnet18", 64)
        freeze(model, ["head"])
        layer = model.backbone.layer2[0].conv1
        if kind == "forward":
            layer.register_forward_hook(lambda *_: None)
        else:
            layer.register_forward_pre_hook(lambda *_: None)
        assert find_border(model, ["head"], self.images) is None

    def test_a_layer_that_the_user_added_trains_before_the_border(self):
        model = model_of("resnet18", 64)

        class Scaled(nn.Module):
            def __init__(self, inner):
                super().__init__()
                self.inner = inner
                self.scale = nn.Parameter(torch.ones(()))

            def forward(self, x):
                return self.scale * self.inner(x)

        model.backbone.layer2 = Scaled(model.backbone.layer2)
        freeze(model, ["head"])
        model.backbone.layer2.scale.requires_grad_(True)
        assert find_border(model, ["head"], self.images) is None
        model.backbone.layer2.scale.requires_grad_(False)
        assert find_border(model, ["head"], self.images) is not None

    def test_a_forward_of_the_users_that_the_cut_does_not_fit(self):
        model = model_of("resnet18", 64)
        freeze(model, ["head"])
        own = type(model.backbone).forward

        def forward(x):
            return own(model.backbone, x) + x.mean((1, 2, 3))[:, None]

        model.backbone.forward = forward
        assert find_border(model, ["head"], self.images) is None
