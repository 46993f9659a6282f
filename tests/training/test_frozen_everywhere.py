"""Frozen is frozen: parameters and BatchNorm statistics, in every family of backbones and in every kind of loop."""

import copy
import functools

import pytest
import torch
from narrow_networks import narrow
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import Trainer, TrainingArguments

from torchthaw import (
    Stage,
    ThawTrainer,
    ThawTrainingArguments,
    TorchvisionConfig,
    TorchvisionForImageClassification,
    param_groups,
)
from torchthaw.backbones.anatomy import FAMILIES, family_of
from torchthaw.stages.freezing import freeze_for_stage

# The cheapest member of each family, and an image size that leaves BatchNorm more than one pixel to learn from.
ONE_OF_EACH = {
    "alexnet": 63,
    "convnext_tiny": 32,
    "densenet121": 64,
    "efficientnet_b0": 64,
    "googlenet": 64,
    "inception_v3": 107,
    "maxvit_t": 224,
    "mnasnet0_5": 64,
    "mobilenet_v2": 64,
    "mobilenet_v3_small": 64,
    "regnet_y_400mf": 64,
    "resnet18": 64,
    "shufflenet_v2_x0_5": 64,
    "squeezenet1_1": 64,
    "swin_t": 32,
    "vgg11_bn": 32,
    "vit_b_32": 32,
}
WITHOUT_BATCH_NORM_AT_THE_END = ("alexnet", "convnext_tiny", "squeezenet1_1", "swin_t", "vgg11_bn", "vit_b_32")
STEPS = 2
BATCH = 2


@functools.lru_cache(maxsize=1)
def pristine(architecture, size, aux_logits=False):
    """A model with random weights, and BatchNorm statistics that suit them; the widest and deepest made smaller."""
    torch.manual_seed(0)
    config = TorchvisionConfig(architecture=architecture, num_labels=3, image_size=size, aux_logits=aux_logits)
    model = narrow(TorchvisionForImageClassification(config))
    if architecture == "vit_b_32":
        model.backbone.encoder.layers = model.backbone.encoder.layers[:2]
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(torch.stack([sample["pixel_values"] for sample in samples(size)]))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return model


def samples(size):
    random = torch.Generator().manual_seed(1)
    return [
        {"pixel_values": torch.randn(3, size, size, generator=random), "labels": torch.tensor(number % 3)}
        for number in range(STEPS * BATCH)
    ]


def by_hand(model, stage, policy, data, folder):
    freeze_for_stage(model, stage, policy)
    optimizer = torch.optim.AdamW(param_groups(model, model.layer_groups(), stage))
    for step in range(STEPS):
        model.train()
        batch = data[step * BATCH : (step + 1) * BATCH]
        loss = model(**{key: torch.stack([sample[key] for sample in batch]) for key in batch[0]}).loss
        loss.backward()
        without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
        assert not without, "the loss does not reach these trainable parameters"
        optimizer.step()
        optimizer.zero_grad()


def arguments(folder):
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": BATCH,
        "save_strategy": "no",
        "eval_strategy": "no",
        "load_best_model_at_end": False,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }


def by_trainer(model, stage, policy, data, folder):
    freeze_for_stage(model, stage, policy)
    optimizer = torch.optim.AdamW(param_groups(model, model.layer_groups(), stage))
    args = TrainingArguments(**arguments(folder), num_train_epochs=1)
    Trainer(model, args, train_dataset=data, optimizers=(optimizer, None)).train()


def by_thaw_trainer(model, stage, policy, data, folder):
    plan = [Stage(stage.name, stage.unfreeze, learning_rate=stage.learning_rate, warmup=0.0, batch_norm=policy)]
    ThawTrainer(model, ThawTrainingArguments(**arguments(folder), plan=plan, weight_decay=0.0), data).train()


def names_that_may_move(model, live, policy):
    """Parameters of the live groups, and statistics of their BatchNorm layers, as the policy has it."""
    groups = model.layer_groups()
    roots = [path for name in live for path in groups[name].modules]
    names = {path for name in live for path in groups[name].parameters if path not in dict(model.named_modules())}
    for path, module in model.named_modules():
        if isinstance(module, _BatchNorm) and any(f"{path}.".startswith(f"{root}.") for root in roots):
            own = {f"{path}.{name}" for name, _ in module.named_parameters(recurse=False)}
            statistics = {f"{path}.{name}" for name, _ in module.named_buffers(recurse=False)}
            names = names - own if policy != "train" else names
            names = names | statistics if policy != "eval" else names
    return names


def check(model, unfreeze, policy, loop, size, folder):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    live = list(model.layer_groups())[-1 if unfreeze == "head" else -2 :]
    torch.manual_seed(2)
    loop(model, Stage("stage", unfreeze, learning_rate=1e-2, weight_decay=0.0), policy, samples(size), folder)
    after = model.state_dict()
    assert after.keys() == before.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == names_that_may_move(model, live, policy)
    assert all(tensor.isfinite().all() for tensor in after.values())


def test_each_family_is_here():
    assert sorted(family_of(name).name for name in ONE_OF_EACH) == sorted(family.name for family in FAMILIES)


@pytest.mark.parametrize("loop", [by_hand, by_trainer, by_thaw_trainer])
@pytest.mark.parametrize("unfreeze", ["head", 1])
@pytest.mark.parametrize(("architecture", "size"), ONE_OF_EACH.items())
def test_what_is_frozen_stays_and_all_the_rest_moves(architecture, size, unfreeze, loop, tmp_path):
    """The policy is the one under which a live BatchNorm both stays (scale and shift) and moves (statistics)."""
    check(copy.deepcopy(pristine(architecture, size)), unfreeze, "freeze_affine", loop, size, tmp_path)


@pytest.mark.parametrize("policy", ["eval", "train"])
@pytest.mark.parametrize("architecture", [name for name in ONE_OF_EACH if name not in WITHOUT_BATCH_NORM_AT_THE_END])
def test_the_other_batch_norm_policies(architecture, policy, tmp_path):
    size = ONE_OF_EACH[architecture]
    check(copy.deepcopy(pristine(architecture, size)), 1, policy, by_hand, size, tmp_path)


@pytest.mark.parametrize("policy", ["freeze_affine", "eval", "train"])
@pytest.mark.parametrize(("architecture", "size"), [("googlenet", 64), ("inception_v3", 299)])
def test_auxiliary_heads_train_with_the_head(architecture, size, policy, tmp_path):
    model = copy.deepcopy(pristine(architecture, size, aux_logits=True))
    check(model, "head", policy, by_hand, size, tmp_path)
    assert any("aux" in name.lower() for name in model.layer_groups()["head"].parameters)
