"""The fast form: the same function and the same training, faster, and nothing left of it when it is off."""

import copy
import pickle

import pytest
import torch
from narrow_networks import narrow
from torch import nn
from torch.nn.utils import parametrize

from torchthaw import Stage, TorchvisionConfig, TorchvisionForImageClassification
from torchthaw.backbones.conv_norm_pairs import find_pairs
from torchthaw.backbones.folding import prefers_channels_last, put_on_fast_form, take_off_fast_form
from torchthaw.stages.freezing import freeze_for_stage
from torchthaw.stages.proof import check_unchanged, frozen_fingerprints
from torchthaw.stages.snapshots import put_back

# Architecture, auxiliary heads, image size, number of BatchNorms, and how many of them follow a convolution directly.
# DenseNet and MaxViT normalise before convolutions too.
FAMILIES = [
    ("densenet121", False, 32, 121, 59),
    ("efficientnet_b0", False, 32, 49, 49),
    ("efficientnet_v2_s", False, 32, 110, 110),
    ("googlenet", False, 32, 57, 57),
    ("googlenet", True, 32, 59, 59),
    ("inception_v3", False, 75, 94, 94),
    ("inception_v3", True, 299, 96, 96),
    ("maxvit_t", False, 224, 34, 23),
    ("mnasnet0_5", False, 32, 52, 52),
    ("mobilenet_v2", False, 32, 52, 52),
    ("mobilenet_v3_small", False, 32, 34, 34),
    ("regnet_y_400mf", False, 32, 53, 53),
    ("resnet18", False, 32, 20, 20),
    ("resnet50", False, 32, 53, 53),
    ("resnext50_32x4d", False, 32, 53, 53),
    ("wide_resnet50_2", False, 32, 53, 53),
    ("shufflenet_v2_x0_5", False, 32, 56, 56),
    ("vgg11_bn", False, 32, 8, 8),
]
SMALL = "shufflenet_v2_x0_5"
WHOLE = Stage("all", unfreeze="all", learning_rate=1e-3)
LAST_BLOCK = Stage("last block", unfreeze=1, learning_rate=1e-3)


def new_model(architecture=SMALL, aux_logits=False, size=32, dtype=torch.float32):
    """Returns a model whose BatchNorms do something: near the statistics of random images, random affine parameters."""
    torch.manual_seed(0)
    config = TorchvisionConfig(architecture=architecture, num_labels=3, aux_logits=aux_logits, dropout=None)
    model = narrow(TorchvisionForImageClassification(config))
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d) and module.bias is not None:
                module.bias.uniform_(-0.3, 0.3)
        for norm in norms:
            norm.weight.uniform_(0.7, 1.3)
            norm.bias.uniform_(-0.3, 0.3)
            norm.momentum = 1.0
        model.train()(pixel_values=torch.randn(8, 3, size, size))
        for norm in norms:
            norm.momentum = 0.1
            # Of few images some channels hardly vary; dividing by that would make rounding large.
            norm.running_var.clamp_(min=float(norm.running_var.mean()) / 2)
            norm.running_mean += norm.running_var.sqrt() * torch.empty_like(norm.bias).uniform_(-0.3, 0.3)
            norm.running_var *= torch.empty_like(norm.bias).uniform_(0.7, 1.5)
    return model.to(dtype).eval()


def images_for(size, batch=2, dtype=torch.float32):
    random = torch.Generator().manual_seed(2)
    return torch.randn(batch, 3, size, size, generator=random).to(dtype), torch.arange(batch) % 3


def freeze(model, stage=WHOLE, batch_norm="eval"):
    freeze_for_stage(model, stage, batch_norm)
    return model.train()


def logits(model, pixels):
    was_training = model.training
    model.eval()
    with torch.no_grad():
        result = model(pixel_values=pixels).logits
    model.train(was_training)
    return result


def relative(a, b):
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize(("architecture", "aux_logits", "size", "norms", "folded"), FAMILIES)
def test_every_norm_that_follows_a_convolution_is_folded(architecture, aux_logits, size, norms, folded):
    model = freeze(new_model(architecture, aux_logits, size))
    pixels, _ = images_for(size)
    assert sum(isinstance(m, nn.BatchNorm2d) for m in model.modules()) == norms
    expected = logits(model, pixels)
    form = put_on_fast_form(model)
    assert form.folded == folded
    result = logits(model, pixels)
    assert relative(result, expected) < 1e-4
    assert not torch.equal(result, expected), "rounding shows that another sum was computed"


def train(model, stage, optimizer, *, size, steps, lr, fast):
    """Returns the loss of each step, and how far each tensor moved in all."""
    freeze(model, stage)
    if fast:
        assert put_on_fast_form(model).folded
    trainable = [p for p in model.parameters() if p.requires_grad]
    before = frozen_fingerprints(model)
    start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    optimizer = optimizer(trainable, lr=lr)
    pixels, labels = images_for(size, batch=1 if size > 100 else 2, dtype=model.dtype)
    losses = []
    for step in range(steps):
        torch.manual_seed(step)  # For dropout and stochastic depth.
        model.train()
        loss = model(pixel_values=pixels + step / 10, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        losses.append(loss.item())
    check_unchanged(before, model, stage.name)
    return torch.tensor(losses, dtype=torch.float64), {
        name: p.detach() - start[name] for name, p in model.named_parameters() if name in start
    }


def assert_same_training(start, stage, optimizer, *, size, steps, lr, tolerance):
    results = []
    for fast in (False, True):
        model = copy.deepcopy(start)
        results.append(train(model, stage, optimizer, size=size, steps=steps, lr=lr, fast=fast))
    (losses, moves), (fast_losses, fast_moves) = results
    assert losses.unique().numel() == steps
    torch.testing.assert_close(fast_losses, losses, rtol=tolerance, atol=tolerance)
    assert fast_moves.keys() == moves.keys()
    longest = max(float(move.norm()) for move in moves.values())
    assert longest > 0
    for name, move in moves.items():
        # Where a loss is flat in a tensor, as in the bias before a softmax, its gradient is rounding only.
        assert float((fast_moves[name] - move).norm()) <= tolerance * max(float(move.norm()), longest / 1000), name


@pytest.mark.parametrize("stage", [WHOLE, LAST_BLOCK], ids=lambda stage: stage.name)
@pytest.mark.parametrize(("architecture", "aux_logits", "size"), [f[:3] for f in FAMILIES if f[0] != "wide_resnet50_2"])
def test_training_is_the_same_in_double_precision(architecture, aux_logits, size, stage):
    start = new_model(architecture, aux_logits, size, torch.float64)
    assert_same_training(start, stage, torch.optim.SGD, size=size, steps=2, lr=1e-3, tolerance=1e-5)


# In single precision the sums round differently, and a ReLU that flips changes the gradient in steps. AdamW makes steps
# of full length of gradients that are little but rounding.
@pytest.mark.parametrize(
    ("optimizer", "lr", "tolerance"), [(torch.optim.SGD, 1e-3, 1e-3), (torch.optim.AdamW, 1e-5, 0.1)]
)
@pytest.mark.parametrize("architecture", ["mobilenet_v2", "resnet18", SMALL])
def test_training_is_the_same_in_single_precision(architecture, optimizer, lr, tolerance):
    results = []
    for fast in (False, True):
        model = new_model(architecture)
        losses, moves = train(model, WHOLE, optimizer, size=32, steps=3, lr=lr, fast=fast)
        results.append((losses, torch.cat([move.flatten() for move in moves.values()])))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-3, atol=1e-4)
    assert relative(results[1][1], results[0][1]) < tolerance


def gradient(model, pixels, labels, *, autocast=False):
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(pixel_values=pixels, labels=labels).loss
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


@pytest.mark.parametrize("architecture", ["mobilenet_v2", "densenet121"])
def test_gradient_checkpointing_recomputes_what_is_folded(architecture):
    pixels, labels = images_for(32)
    results = []
    for checkpointing in (False, True):
        model = freeze(new_model(architecture))
        assert put_on_fast_form(model).folded > 50
        model._set_gradient_checkpointing(checkpointing)
        results.append(gradient(model, pixels, labels))
    torch.testing.assert_close(*results)


def test_autocast_is_as_near_as_without_the_form():
    pixels, labels = images_for(32, batch=4)
    exact = gradient(freeze(new_model("mobilenet_v2")), pixels, labels)
    errors = {}
    for fast in (False, True):
        model = freeze(new_model("mobilenet_v2"))
        if fast:
            put_on_fast_form(model)
        exact_logits = logits(model, pixels)
        with torch.autocast("cpu", torch.bfloat16):
            result = logits(model, pixels)
        # The form leaves the head in the type of its weights.
        assert result.dtype == (torch.float32 if fast else torch.bfloat16)
        errors[fast] = (
            relative(result.float(), exact_logits),
            relative(gradient(model, pixels, labels, autocast=True), exact),
        )
        model.zero_grad()
        assert relative(gradient(model, pixels, labels), exact) < 1e-4, "float32 again without autocast"
    assert errors[True][0] < 1.5 * errors[False][0]
    assert errors[True][1] < 1.5 * errors[False][1]


def test_what_is_kept_follows_autocast():
    model = freeze(new_model(), Stage("head", unfreeze="head"))
    pixels, _ = images_for(32)
    put_on_fast_form(model)
    exact = logits(model, pixels)
    with torch.autocast("cpu", torch.bfloat16):
        assert 1e-4 < relative(logits(model, pixels).float(), exact) < 0.3
        assert model.backbone.conv1[0].forward.kernel._value[0].dtype == torch.bfloat16
    assert torch.equal(logits(model, pixels), exact)


def test_distributed_training_reaches_folded_weights():
    model = freeze(new_model())
    put_on_fast_form(model)
    pixels, labels = images_for(32)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        wrapped(pixel_values=pixels, labels=labels).loss.backward()
    finally:
        torch.distributed.destroy_process_group()
    alone = freeze(new_model())
    alone(pixel_values=pixels, labels=labels).loss.backward()
    for (name, a), b in zip(model.named_parameters(), alone.parameters(), strict=True):
        if b.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-4 * float(b.grad.abs().max()), msg=name)
            assert a.grad.stride() == a.stride(), "or DistributedDataParallel warns, and copies each time"


def test_the_form_leaves_names_and_state_alone_and_comes_off_without_trace():
    model = freeze(new_model("mobilenet_v2"), LAST_BLOCK)
    pixels, _ = images_for(32)
    names, state, everything = list(dict(model.named_modules())), copy.deepcopy(model.state_dict()), _attributes(model)
    expected, random = logits(model, pixels), torch.get_rng_state()
    form = put_on_fast_form(model)
    assert torch.equal(torch.get_rng_state(), random)
    logits(model, pixels)
    assert list(dict(model.named_modules())) == names
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in state.items())
    assert all(tensor.is_contiguous() for tensor in model.state_dict().values())
    form.remove()
    assert _attributes(model) == everything
    assert torch.equal(logits(model, pixels), expected)
    form.remove()


def _attributes(model):
    """Returns what each module's attributes are; tensors and modules by identity."""
    return {
        name: {
            key: {k: id(v) for k, v in value.items()} if isinstance(value, dict) else id(value)
            for key, value in vars(module).items()
        }
        for name, module in model.named_modules()
    }


def test_saved_models_know_nothing_of_it(tmp_path):
    model = freeze(new_model())
    pixels, _ = images_for(32)
    expected = logits(model, pixels)
    put_on_fast_form(model)
    model.save_pretrained(tmp_path)
    again = TorchvisionForImageClassification.from_pretrained(tmp_path)
    assert again.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(logits(again, pixels), expected)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_wear_a_form_of_their_own(copied):
    model = freeze(new_model(), LAST_BLOCK)
    pixels, _ = images_for(32)
    put_on_fast_form(model)
    expected = logits(model, pixels)
    twin = copied(model)
    assert torch.equal(logits(twin, pixels), expected)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.zero_()
    assert torch.equal(logits(twin, pixels), expected)
    take_off_fast_form(twin)
    plain = freeze(new_model(), LAST_BLOCK)
    assert torch.equal(logits(twin, pixels), logits(plain, pixels))
    assert _kinds_of_forward(twin) == set()


def _kinds_of_forward(model):
    return {type(vars(module)["forward"]).__name__ for module in model.modules() if "forward" in vars(module)}


def test_a_second_form_replaces_the_first():
    model = freeze(new_model())
    first, second = put_on_fast_form(model), put_on_fast_form(model)
    assert first.folded == second.folded == 56
    assert len(model.backbone._forward_pre_hooks) == 1
    second.remove()
    assert _kinds_of_forward(model) == set()


@pytest.mark.parametrize("policy", ["train", "freeze_affine"])
def test_norms_that_train_are_not_folded_in_training(policy):
    pixels, labels = images_for(32, batch=4)
    states, results = [], []
    for fast in (False, True):
        model = freeze(new_model(), batch_norm=policy)
        if fast:
            assert put_on_fast_form(model).folded == 0
        else:
            pixels = pixels.contiguous(memory_format=torch.channels_last)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        for _ in range(3):
            # Evaluation folds them, and must see the statistics of the last step.
            results.append(logits(model, pixels))
            model(pixel_values=pixels, labels=labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append(logits(model, pixels))
        states.append(model.state_dict())
    assert all(torch.equal(states[1][name], tensor) for name, tensor in states[0].items())
    for plain, fast in zip(results[:4], results[4:], strict=True):
        assert 0 < relative(fast, plain) < 1e-4
    assert relative(results[1], results[0]) > 0.01


def test_norms_whose_affine_parameters_get_gradients_are_not_folded():
    model = new_model()
    model.hold_in_eval(name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d))
    pixels = images_for(32)[0].contiguous(memory_format=torch.channels_last)
    expected = model(pixel_values=pixels).logits
    assert put_on_fast_form(model).folded == 0
    assert torch.equal(model(pixel_values=pixels).logits, expected)
    with torch.no_grad():
        assert 0 < relative(model(pixel_values=pixels).logits, expected) < 1e-4


def test_a_norm_follows_the_policy_of_the_moment():
    model = freeze(new_model())
    put_on_fast_form(model)
    pixels, labels = images_for(32, batch=4)
    logits(model, pixels)
    model.hold_in_eval([])
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    before = model.backbone.conv1[1].running_mean.clone()
    model(pixel_values=pixels, labels=labels).loss.backward()
    assert not torch.equal(model.backbone.conv1[1].running_mean, before)
    assert model.backbone.conv1[1].weight.grad.abs().sum() > 0
    fast = logits(model, pixels)
    take_off_fast_form(model)
    assert relative(fast, logits(model, pixels)) < 1e-4


def optimizer_step(model):
    model(pixel_values=images_for(32)[0], labels=images_for(32)[1]).loss.backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()


def fused_optimizer_step(model):
    model(pixel_values=images_for(32)[0], labels=images_for(32)[1]).loss.backward()
    torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01, fused=True).step()


def other_values(model):
    random = torch.Generator().manual_seed(5)
    return {
        name: tensor * (1 + 0.3 * torch.rand(tensor.shape, generator=random)) if tensor.is_floating_point() else tensor
        for name, tensor in model.state_dict().items()
    }


def new_data(model):
    """Gives parameters other memory, or the same once more, if nothing holds it."""
    values = other_values(model)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.new_empty(0)
        parameter.data = values[name].clone()


def write_statistics(model):
    model.backbone.conv1[1].running_var.mul_(2)


def write_in_inference_mode(model):
    with torch.inference_mode():
        put_back(model, other_values(model))


def write_through_data(model):
    """Such writes leave no trace in tensors; those that train are written so by some optimizers."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.mul_(1.5)


@pytest.mark.parametrize(
    "change",
    [
        optimizer_step,
        fused_optimizer_step,
        new_data,
        write_statistics,
        write_in_inference_mode,
        write_through_data,
        lambda model: put_back(model, other_values(model)),
        lambda model: model.load_state_dict(other_values(model)),
        lambda model: model.load_state_dict(other_values(model), assign=True),
        lambda model: model.double().float().bfloat16().float(),
    ],
)
@pytest.mark.parametrize("stage", [WHOLE, LAST_BLOCK], ids=lambda stage: stage.name)
def test_weights_that_change_are_folded_anew(change, stage):
    model = freeze(new_model(), stage)
    pixels, _ = images_for(32)
    put_on_fast_form(model)
    before = logits(model, pixels)
    change(model)
    fast = logits(model, pixels)
    take_off_fast_form(model)
    assert relative(fast, logits(model, pixels)) < 1e-4
    assert relative(fast, before) > 1e-3


def test_what_is_kept_is_computed_once():
    model = freeze(new_model(), LAST_BLOCK)
    pixels, _ = images_for(32)
    put_on_fast_form(model)
    first, live = model.backbone.conv1[0].forward, model.backbone.conv5[0].forward
    logits(model, pixels)
    kernel, scaling = first.kernel._value, live.scaling._value
    assert kernel is not None
    assert scaling is not None
    model.train()
    optimizer_step(model)
    logits(model, pixels)
    assert first.kernel._value is kernel
    assert live.scaling._value is scaling
    assert live.kernel._value is None


def test_what_inference_mode_computed_first_serves_training():
    model = freeze(new_model())
    put_on_fast_form(model)
    pixels, labels = images_for(32)
    with torch.inference_mode():
        model.eval()(pixel_values=pixels)
    model.train()(pixel_values=pixels, labels=labels).loss.backward()
    assert model.backbone.conv1[0].weight.grad is not None


def test_a_model_made_in_inference_mode_is_never_stale():
    with torch.inference_mode():
        model = new_model()
        put_on_fast_form(model)
        pixels, _ = images_for(32)
        before = model(pixel_values=pixels).logits
        model.backbone.conv1[0].weight.mul_(2)
        assert relative(model(pixel_values=pixels).logits, before) > 1e-3


class OwnConvolution(nn.Conv2d):
    def forward(self, images):
        return 2 * super().forward(images)


class ReadTwice(nn.Module):
    """A block where more than the norm sees what the convolution gives."""

    def __init__(self, block, use):
        super().__init__()
        self.conv, self.norm, self.use = block[0], block[1], use

    def forward(self, images):
        return self.use(self, images)


class Double(nn.Module):
    def forward(self, weight):
        return 2 * weight


def own_convolution(model, _calls):
    model.backbone.conv5[0] = OwnConvolution(192, 1024, 1, bias=False)


def hook_after_convolution(model, calls):
    model.backbone.conv5[0].register_forward_hook(lambda module, inputs, output: calls.append(output))


def hook_before_norm(model, calls):
    model.backbone.conv5[1].register_forward_pre_hook(lambda module, inputs: calls.append(inputs[0]))


def backward_hook(model, calls):
    model.backbone.conv5[0].register_full_backward_hook(lambda module, inputs, outputs: calls.append(inputs[0]))


def own_forward(model, calls):
    conv = model.backbone.conv5[0]
    conv.forward = lambda images: nn.Conv2d.forward(conv, images).tanh()


def parametrized(model, _calls):
    parametrize.register_parametrization(model.backbone.conv5[0], "weight", Double())


def weight_norm(model, _calls):
    nn.utils.spectral_norm(model.backbone.conv5[0])


def batch_statistics(model, _calls):
    model.backbone.conv1[1] = nn.BatchNorm2d(24, track_running_stats=False)


def reused(use):
    def change(model, _calls):
        model.backbone.conv5 = ReadTwice(model.backbone.conv5, use)

    return change


def read_beside(block, images):
    seen = block.conv(images)
    return block.norm(seen) + seen


def read_by_list(block, images):
    seen = block.conv(images)
    return torch.cat([block.norm(seen), seen]).chunk(2)[1]


def written_to(block, images):
    return block.norm(block.conv(images).mul_(2))


def viewed(block, images):
    return block.norm(block.conv(images).flip(1))


def norm_called_twice(block, images):
    return block.norm(block.norm(block.conv(images)))


def convolution_called_twice(block, images):
    return block.norm(block.conv(images)) + block.conv(images).tanh()


ODD = [
    own_convolution, hook_after_convolution, hook_before_norm, backward_hook, own_forward, parametrized, weight_norm,
    batch_statistics, *map(reused, (read_beside, read_by_list, written_to, viewed, norm_called_twice,
    convolution_called_twice)),
]  # fmt: skip


@pytest.mark.parametrize("change", ODD)
def test_what_is_not_a_plain_pair_is_left_alone(change):
    results, seen = [], []
    for fast in (False, True):
        calls = []
        model = new_model()
        torch.manual_seed(0)
        change(model, calls)
        freeze(model)
        model.backbone.conv5.train(False)
        if fast:
            assert put_on_fast_form(model).folded == 55
            assert not calls, "the probe calls no hooks"
        pixels, labels = images_for(64)
        if change is not backward_hook:
            results.append(logits(model, pixels))
        torch.manual_seed(0)
        output = model(pixel_values=pixels, labels=labels)
        output.loss.backward()
        results.append(model.backbone.conv1[0].weight.grad)
        seen.append(calls)
    half = len(results) // 2
    for plain, fast in zip(results[:half], results[half:], strict=True):
        assert relative(fast, plain) < 1e-3
    assert len(seen[0]) == len(seen[1])
    for plain, fast in zip(*seen, strict=True):
        assert relative(fast, plain) < 1e-3


def test_a_hook_put_on_later_sees_what_it_would_see():
    model = freeze(new_model())
    pixels, _ = images_for(32)
    put_on_fast_form(model)
    seen = []
    handles = [
        model.backbone.conv5[0].register_forward_hook(lambda module, inputs, output: seen.append(output)),
        model.backbone.conv1[1].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0])),
    ]
    logits(model, pixels)
    take_off_fast_form(model)
    logits(model, pixels)
    first, last, plain_first, plain_last = seen
    assert relative(first, plain_first) < 1e-4
    assert relative(last, plain_last) < 1e-4
    assert [handle.remove() for handle in handles]


def test_a_wrong_pair_is_noticed_by_its_numbers(monkeypatch):
    model = freeze(new_model())
    assert len(find_pairs(model)) == 56
    forward = nn.BatchNorm2d.forward
    monkeypatch.setattr(nn.BatchNorm2d, "forward", lambda self, images: 1.1 * forward(self, images))
    assert find_pairs(model) == []


class NeedsLargeImages(nn.Module):
    def forward(self, images):
        return images.reshape(-1, 24, 48, 48)


def test_a_network_that_cannot_be_probed_is_left_alone():
    model = new_model()
    model.backbone.conv1.append(NeedsLargeImages())
    freeze(model)
    pixels, _ = images_for(96)
    expected = logits(model, pixels)
    assert put_on_fast_form(model).folded == 0
    assert relative(logits(model, pixels), expected) < 1e-4
    assert not model.backbone.conv1._forward_hooks


def test_the_probe_keeps_modes_and_statistics():
    model = new_model("mobilenet_v2").train()
    model.backbone.features[3].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    state = copy.deepcopy(model.state_dict())
    assert len(find_pairs(model)) == 52
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(("architecture", "expected"), [("mobilenet_v2", True), ("swin_t", False), ("vit_b_32", False)])
def test_images_come_in_channels_last_where_the_network_is_convolutional(architecture, expected):
    model = new_model(architecture, size=224)
    put_on_fast_form(model)
    seen = []

    def watch(_module, inputs):
        seen.append(inputs[0].is_contiguous(memory_format=torch.channels_last))

    next(m for m in model.modules() if isinstance(m, nn.Conv2d)).register_forward_pre_hook(watch)
    logits(model, images_for(224)[0])
    assert seen == [expected] == [prefers_channels_last(architecture)]
