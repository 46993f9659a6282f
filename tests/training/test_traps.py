"""Traps of the stack: what `Trainer` or the usual habit gets wrong, beside torchthaw, which does not.

Should a first half fail one day because `Trainer` has learned it, the mechanism against it here can go.
"""

import numpy as np
import pytest
import torch
from interruptions import Interrupt, InterruptionError
from PIL import Image
from torch import nn
from torchvision.models import get_model_weights
from transformers import Trainer, TrainerCallback, TrainingArguments, ViTImageProcessor
from transformers.trainer_callback import ExportableState

from torchthaw import (
    Stage,
    ThawTrainer,
    ThawTrainingArguments,
    TorchvisionConfig,
    TorchvisionForImageClassification,
    TorchvisionImageProcessor,
    param_groups,
)
from torchthaw.stages.freezing import freeze_for_stage

HEAD = Stage("head", "head", epochs=2, learning_rate=1e-2, batch_norm="eval")
ALL = Stage("all", "all", epochs=2, learning_rate=1e-3, batch_norm="eval")
STEPS_PER_EPOCH = 3


def new_model(architecture="shufflenet_v2_x0_5"):
    torch.manual_seed(0)
    return TorchvisionForImageClassification(TorchvisionConfig(architecture=architecture, num_labels=3))


@pytest.fixture(scope="module")
def data():
    random = torch.Generator().manual_seed(0)
    return [
        {"pixel_values": torch.randn(3, 32, 32, generator=random), "labels": torch.tensor(number % 3)}
        for number in range(4 * STEPS_PER_EPOCH)
    ]


def options(folder, **changes):
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "eval_strategy": "no",
        "save_strategy": "no",
        "load_best_model_at_end": False,
        "learning_rate": 1e-2,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    } | changes


def stock_trainer(model, data, folder, callbacks=None, **changes):
    arguments = TrainingArguments(**options(folder, **changes))
    return Trainer(model, arguments, train_dataset=data, callbacks=callbacks)


def thaw_trainer(model, data, folder, plan, callbacks=None, **changes):
    arguments = ThawTrainingArguments(**options(folder, **changes), plan=plan)
    return ThawTrainer(model, arguments, train_dataset=data, callbacks=callbacks)


def weights_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def moved(before, model):
    return {name for name, tensor in model.state_dict().items() if not torch.equal(before[name], tensor)}


def statistics(names):
    return {name for name in names if name.endswith(("running_mean", "running_var", "num_batches_tracked"))}


def set_batch_norm_to_eval(model):
    """The usual habit."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()


class StepCounter(TrainerCallback):
    def __init__(self):
        self.steps = 0

    def on_step_end(self, args, state, control, **kwargs):
        self.steps += 1


class SavedStepCounter(StepCounter, ExportableState):
    """Its count goes into checkpoints."""

    def state(self):
        return {"args": {}, "attributes": {"steps": self.steps}}


def test_trap_a_batch_norm_set_to_eval_mode_is_set_back_by_trainer(tmp_path, data):
    """`Trainer` calls `model.train()` in every step, which undoes `bn.eval()`: frozen statistics move."""
    model = new_model()
    before = weights_of(model)
    model.train()
    set_batch_norm_to_eval(model)
    stock_trainer(model, data, tmp_path, num_train_epochs=1).train()
    assert statistics(moved(before, model)) == statistics(before)

    for train in (
        lambda model: thaw_trainer(model, data, tmp_path / "a", [HEAD, ALL]).train(),
        lambda model: stock_trainer(model, data, tmp_path / "b", num_train_epochs=1).train(),
    ):
        model = new_model()
        freeze_for_stage(model, ALL, "eval")
        train(model)
        changed = moved(before, model)
        assert "backbone.conv1.0.weight" in changed
        assert not statistics(changed)


def test_trap_b_trainer_keeps_its_optimizer_so_that_a_second_run_trains_nothing_new(tmp_path, data):
    """`create_optimizer` returns at once if there is an optimizer: what was unfrozen since is not in it."""
    model = new_model()
    head = set(model.layer_groups()["head"].parameters)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in head)
    trainer = stock_trainer(model, data, tmp_path, num_train_epochs=1)
    trainer.train()
    model.requires_grad_(True)
    before = weights_of(model)
    trainer.train()
    assert moved(before, model) - statistics(before) == head

    model = new_model()
    before = weights_of(model)
    thaw_trainer(model, data, tmp_path, [HEAD, ALL]).train()
    norms = {
        f"{path}.{kind}"
        for path, m in model.named_modules()
        if isinstance(m, nn.BatchNorm2d)
        for kind in ("weight", "bias")
    }
    assert moved(before, model) == {name for name, _ in model.named_parameters()} - norms


def test_trap_e_a_checkpoint_of_a_head_stage_does_not_resume_with_an_unfrozen_model(tmp_path, data):
    """The optimizer's state in the checkpoint has the head's parameters only, and `Trainer` makes one for all."""
    changes = {"save_strategy": "epoch", "num_train_epochs": 2}
    model = new_model()
    head = model.layer_groups()["head"].parameters
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in head)
    with pytest.raises(InterruptionError):
        stock_trainer(model, data, tmp_path, [Interrupt("on_step_end", STEPS_PER_EPOCH + 1)], **changes).train()
    with pytest.raises(ValueError, match=r"parameter group that doesn't match the size|different number of parameter"):
        stock_trainer(new_model(), data, tmp_path, **changes).train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    "step",
    [
        pytest.param(STEPS_PER_EPOCH + 2, id="in the head stage"),
        pytest.param(2 * STEPS_PER_EPOCH + 1, id="after the head stage"),
        pytest.param(3 * STEPS_PER_EPOCH + 2, id="in the last stage"),
    ],
)
def test_trap_e_a_staged_run_resumes_to_the_weights_of_the_undisturbed_one(tmp_path, data, step):
    """The head stage's last checkpoint is gone on from with everything unfrozen, too."""
    steps_done = StepCounter()

    def run(folder, interrupted_at=None):
        trainer = thaw_trainer(new_model(), data, folder, [HEAD, ALL], save_strategy="epoch")
        if interrupted_at is None:
            trainer.train()
            return trainer
        trainer.add_callback(Interrupt("on_step_end", interrupted_at))
        with pytest.raises(InterruptionError):
            trainer.train()
        again = thaw_trainer(new_model(), data, folder, [HEAD, ALL], [steps_done], save_strategy="epoch")
        again.train(resume_from_checkpoint=True)
        return again

    whole, resumed = run(tmp_path / "whole"), run(tmp_path / "resumed", step)
    assert not moved(weights_of(whole.model), resumed.model)
    assert resumed.state.global_step == 4 * STEPS_PER_EPOCH
    assert steps_done.steps == (4 - step // STEPS_PER_EPOCH) * STEPS_PER_EPOCH, "it went on from the last checkpoint"


def decayed(model, groups):
    """Names of the parameters that an optimizer decays."""
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)] for group in groups if group["weight_decay"] for p in group["params"]}


def decayed_by_trainer(model, folder):
    trainer = stock_trainer(model, None, folder, weight_decay=0.1)
    return decayed(model, trainer.create_optimizer().param_groups)


def decayed_by_torchthaw(model):
    stage = Stage("all", learning_rate=1e-3, weight_decay=0.1)
    freeze_for_stage(model, stage, "train")
    return decayed(model, param_groups(model, model.layer_groups(), stage))


@pytest.mark.parametrize(("architecture", "norms"), [("resnet50", 53), ("efficientnet_b0", 49), ("mobilenet_v2", 52)])
def test_trap_f_trainer_decays_batch_norm(tmp_path, architecture, norms):
    """It leaves out `nn.LayerNorm` by type and other norms by name, and torchvision calls them `bn1`, `1` or `0.1`."""
    model = new_model(architecture)
    weights = {f"{path}.weight" for path, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert len(weights) == norms
    assert weights <= decayed_by_trainer(model, tmp_path)
    assert not weights & decayed_by_torchthaw(model)


@pytest.mark.parametrize(
    ("architecture", "kinds"),
    [("vit_b_32", ("class_token", "pos_embedding")), ("convnext_tiny", ("layer_scale",))],
)
def test_trap_f_trainer_decays_tokens_positions_and_layer_scale(tmp_path, architecture, kinds):
    """Their names match none of its patterns."""
    model = new_model(architecture)
    names = {name for name, _ in model.named_parameters() if name.endswith(kinds)}
    assert {name.rsplit(".", 1)[1] for name in names} == set(kinds)
    assert names <= decayed_by_trainer(model, tmp_path)
    assert not names & decayed_by_torchthaw(model)


@pytest.mark.parametrize(
    ("architecture", "norm"),
    [
        ("resnet50", "backbone.layer1.0.downsample.1.weight"),
        ("efficientnet_b0", "backbone.features.0.1.weight"),
        ("vit_b_16", "backbone.encoder.layers.encoder_layer_0.ln_1.weight"),
    ],
)
def test_trap_g_the_usual_name_rule_misses_norm_layers(architecture, norm):
    """`"bn" in name or "norm" in name` knows few of torchvision's names."""
    with torch.device("meta"):
        model = new_model(architecture)
    assert isinstance(model.get_submodule(norm.rpartition(".")[0]), nn.BatchNorm2d | nn.LayerNorm)
    by_name = {name for name, _ in model.named_parameters() if not ("bn" in name or "norm" in name or "bias" in name)}
    assert norm in by_name
    assert norm not in decayed_by_torchthaw(model)


def test_trap_h_batch_norm_without_tracking_uses_the_statistics_of_the_batch(data):
    """`track_running_stats=False` looks like freezing, but in train mode the other images of a batch then matter."""
    images = torch.stack([sample["pixel_values"] for sample in data[:4]])

    def features(model, images):
        with torch.no_grad():
            return model.backbone.conv1(images)

    habit = new_model()
    expected = features(habit.eval(), images)
    for module in habit.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.track_running_stats = False
    habit.train()
    assert (features(habit, images) - expected).abs().max() > 0.1
    assert not torch.allclose(features(habit, images[:2]), features(habit, images)[:2], atol=1e-2)

    model = new_model()
    freeze_for_stage(model, HEAD, "eval")
    model.train()
    assert model.training
    assert torch.equal(features(model, images), expected)
    torch.testing.assert_close(features(model, images[:2]), expected[:2])


def test_trap_i_a_processor_that_squashes_shows_the_network_other_images():
    """Resizing to a square, as many image processors do, is not what torchvision's weights were validated with."""
    random = np.random.default_rng(0)
    coarse = Image.fromarray(random.integers(0, 256, (6, 10, 3), dtype=np.uint8))
    picture = coarse.resize((500, 300), Image.Resampling.NEAREST)
    weights = get_model_weights("resnet18").DEFAULT
    expected = weights.transforms()(picture)
    deviation = torch.tensor(weights.transforms().std)[:, None, None]

    squashing = ViTImageProcessor(image_mean=weights.transforms().mean, image_std=weights.transforms().std)
    squashed = torch.as_tensor(np.asarray(squashing(picture, return_tensors="np")["pixel_values"][0]))
    assert squashed.shape == expected.shape
    assert ((squashed - expected) * deviation).abs().max() > 0.5

    processor = TorchvisionImageProcessor.from_torchvision("resnet18", weights)
    assert torch.equal(processor(picture, return_tensors="pt")["pixel_values"][0], expected)


def test_trap_j_trainer_forgets_the_state_of_callbacks_on_resume(tmp_path, data):
    """It comes back with `restore_callback_states_from_checkpoint=True` only, which `ThawTrainingArguments` sets."""
    changes = {"save_strategy": "epoch", "num_train_epochs": 2}

    def steps_counted(new_trainer):
        """Counts over an interrupted run, with the step after the last checkpoint done again."""
        with pytest.raises(InterruptionError):
            new_trainer([SavedStepCounter(), Interrupt("on_step_end", STEPS_PER_EPOCH + 1)]).train()
        trainer = new_trainer([SavedStepCounter()])
        trainer.train(resume_from_checkpoint=True)
        assert trainer.state.global_step == 2 * STEPS_PER_EPOCH
        (counter,) = (c for c in trainer.callback_handler.callbacks if isinstance(c, SavedStepCounter))
        return counter.steps

    def stock(callbacks):
        return stock_trainer(new_model(), data, tmp_path / "stock", callbacks, **changes)

    def thaw(callbacks):
        return thaw_trainer(new_model(), data, tmp_path / "thaw", [HEAD], callbacks, **changes)

    assert steps_counted(stock) == STEPS_PER_EPOCH
    assert steps_counted(thaw) == 2 * STEPS_PER_EPOCH
