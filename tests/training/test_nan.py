"""Losses and gradients that are not finite end a stage, not the weights; gradients that are missing end the run."""

import copy
import functools
import json
import math

import numpy as np
import pytest
import torch
import transformers
from accelerate import Accelerator
from torch import nn
from transformers import TrainerCallback

from torchthaw import Stage, ThawTrainer, ThawTrainingArguments, TorchvisionConfig, TorchvisionForImageClassification
from torchthaw.errors import TrainingError
from torchthaw.training.step_checks import DeviceFlag, can_leave_out, leave_out

ARCHITECTURE = "shufflenet_v2_x0_5"
STEPS = 3  # of an epoch
HEAD = Stage("head", "head", epochs=1, learning_rate=1e-3)
BLOCK = Stage("block", 1, epochs=2, learning_rate=1e-4)
ALL = Stage("all", "all", epochs=1, learning_rate=1e-5)


@pytest.fixture(params=["at once", "later"], autouse=True)
def when(request, monkeypatch):
    """When it is asked whether a step was finite: later where there is a GPU, which here the CPU stands in for."""
    if request.param == "later":
        monkeypatch.setattr(ThawTrainer, "_settles_later", lambda self: can_leave_out(self.create_optimizer()))
    return request.param


@pytest.fixture(scope="module")
def data():
    random = torch.Generator().manual_seed(0)
    return [
        {"pixel_values": torch.randn(3, 32, 32, generator=random), "labels": torch.tensor(row % 3)}
        for row in range(4 * STEPS)
    ]


def new_model(kind=TorchvisionForImageClassification):
    torch.manual_seed(0)
    pretrained = TorchvisionForImageClassification.from_torchvision(ARCHITECTURE, "builtin", id2label=["a", "b", "c"])
    model = kind(TorchvisionConfig(architecture=ARCHITECTURE, id2label=["a", "b", "c"]))
    model.load_state_dict(pretrained.state_dict())
    return model


def copied(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def bit_equal(some, others):
    return some.keys() == others.keys() and all(torch.equal(some[name], others[name]) for name in some)


class Recorder(TrainerCallback):
    """Keeps the weights when stages begin and end, and at each validation."""

    def __init__(self):
        self.begins, self.ends, self.validated = [], [], {}

    def on_stage_begin(self, args, state, control, *, model, **kwargs):
        self.begins.append(copied(model))

    def on_stage_end(self, args, state, control, *, model, **kwargs):
        self.ends.append(copied(model))

    def on_evaluate(self, args, state, control, *, model, **kwargs):
        self.validated.setdefault(state.global_step, copied(model))


class SpoilImages(ThawTrainer):
    """Puts NaN into images of a batch, once."""

    spoiled = None  # name of the stage, number of its step from 0 on, rows

    def training_step(self, model, inputs, *args, **kwargs):
        self.inputs = inputs
        step = self.state.global_step - self._progress.stage_start_step
        if self.spoiled and self.spoiled[:2] == (self.stage.name, step):
            inputs["pixel_values"][self.spoiled[2], 1, 2, 3] = float("nan")
            self.spoiled = None
        self.loss = super().training_step(model, inputs, *args, **kwargs)
        return self.loss


class SpoilWeight(TrainerCallback):
    def __init__(self, stage, step):
        self.where = (stage, step)

    def on_step_begin(self, args, state, control, *, model, **kwargs):
        if (state.stage_name, state.global_step) == self.where:
            with torch.no_grad():
                model.backbone.fc.weight[0, 0] = float("inf")


class SpoilGradient(TrainerCallback):
    """Makes a gradient infinite in a step, while the loss is finite."""

    def __init__(self, stage, step):
        self.where = (stage, step)

    def on_step_begin(self, args, state, control, *, model, **kwargs):
        if (state.stage_name, state.global_step) == self.where:
            self.handle = model.backbone.conv5[0].weight.register_hook(lambda gradient: gradient * float("inf"))

    def on_stage_end(self, args, state, control, *, stage, **kwargs):
        if stage.name == self.where[0]:
            self.handle.remove()


def run(data, folder, plan, *, callbacks=(), model=None, spoiled=None, kwargs=None, **options):
    """Makes a trainer with a recorder."""
    defaults = {"per_device_train_batch_size": 4, "gate": "best", "metric_for_best_model": "loss", "use_cpu": True}
    trainer = SpoilImages(
        model or new_model(),
        ThawTrainingArguments(str(folder), plan=plan, report_to="none", disable_tqdm=True, **{**defaults, **options}),
        train_dataset=[{key: value.clone() for key, value in row.items()} for row in data],
        eval_dataset=data[:6],
        callbacks=[recorder := Recorder(), *callbacks],
        **(kwargs or {}),
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.recorder, trainer.spoiled = recorder, spoiled
    return trainer


def is_finite(model):
    return all(tensor.isfinite().all() for tensor in model.state_dict().values())


# The first stage


def test_an_image_that_is_not_finite_in_the_first_stage_ends_the_run(tmp_path, data):
    trainer = run(data, tmp_path, [HEAD, ALL], spoiled=("head", 1, [0, 2]))
    before = copied(trainer.model)
    message = (
        r"the loss became nan in stage 'head' at step 2; the gradient breaks in layer group 'head' \(learning rate "
        r"0\.00075\); the batch holds images with values that are not finite \(rows \[0, 2\]\): mend these images\. "
        r"No stage before it was kept, so the run ends with the weights it began with"
    )
    with pytest.raises(TrainingError, match=message):
        trainer.train()
    assert bit_equal(copied(trainer.model), before)
    (record,) = trainer.stage_records
    assert (record.accepted, record.steps, record.best_metric) == (False, 1, None)
    assert record.reason == "it broke down before anything was validated; rolled back"
    assert "rows [0, 2]" in record.ended_early


def test_after_a_validation_that_was_better_the_run_goes_on_from_it(tmp_path, data):
    stage = Stage("head", "head", epochs=3, learning_rate=1e-3)
    trainer = run(data, tmp_path, [stage, ALL], spoiled=("head", STEPS + 1, [3]))
    trainer.train()
    head, everything = trainer.stage_records
    assert (head.accepted, head.steps, head.epochs) == (True, STEPS + 1, 2)
    assert "in stage 'head' at step 5;" in head.ended_early
    assert bit_equal(trainer.recorder.ends[0], trainer.recorder.validated[STEPS])
    assert bit_equal(trainer.recorder.begins[1], trainer.recorder.ends[0])
    assert everything.steps == STEPS
    assert trainer.state.global_step == trainer.state.max_steps == 2 * STEPS + 1
    assert is_finite(trainer.model)


# A later stage


@pytest.mark.parametrize("step", [0, 2])
def test_a_later_stage_is_rolled_back_and_the_run_goes_on(tmp_path, data, step):
    trainer = run(data, tmp_path, [HEAD, BLOCK, ALL], spoiled=("block", step, [1]))
    trainer.train()
    head, block, everything = trainer.stage_records
    assert (head.accepted, block.accepted) == (True, False)
    assert (block.steps, everything.steps) == (step, STEPS)
    assert f"the loss became nan in stage 'block' at step {STEPS + step + 1};" in block.ended_early
    assert "the gradient breaks in layer group 'head'" in block.ended_early
    assert bit_equal(trainer.recorder.ends[1], trainer.recorder.ends[0])
    assert not bit_equal(trainer.recorder.validated[2 * STEPS + step], trainer.recorder.ends[0]), "it went on training"
    assert is_finite(trainer.model)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert all(map(math.isfinite, losses))


class Losses(TrainerCallback):
    """Keeps the loss of every step, and whether the weights are finite after it."""

    def __init__(self):
        self.losses, self.finite = [], []

    def on_step_end(self, args, state, control, *, model, **kwargs):
        self.losses.append(self.trainer.loss.item())
        self.finite.append(is_finite(model))


@pytest.mark.parametrize("steps", [1, 2, 100])
def test_the_mean_training_loss_is_that_of_all_steps_made(tmp_path, data, steps, when):
    trainer = run(
        data, tmp_path, [HEAD, BLOCK, ALL], callbacks=[watch := Losses()], spoiled=("block", 4, [1]),
        logging_strategy="steps", logging_steps=steps,
    )  # fmt: skip
    watch.trainer = trainer
    output = trainer.train()
    # Callbacks hear of the broken step too, where it is asked for later.
    made = [loss for loss in watch.losses if math.isfinite(loss)]
    assert len(made) == trainer.state.global_step == 3 + 4 + 3
    assert len(watch.losses) - len(made) == (when == "later")
    assert all(watch.finite)
    assert output.training_loss == pytest.approx(np.mean(made), rel=1e-5)


def test_weights_that_are_not_finite_are_found_by_the_loss(tmp_path, data):
    trainer = run(data, tmp_path, [HEAD, BLOCK, ALL], callbacks=[SpoilWeight("block", STEPS + 1)])
    trainer.train()
    why = trainer.stage_records[1].ended_early
    assert why.startswith(f"the loss became nan in stage 'block' at step {STEPS + 2}; ")
    assert "the batch itself is finite (4 images, labels [" in why
    assert "write a lower learning_rate" in why
    assert bit_equal(trainer.recorder.ends[1], trainer.recorder.ends[0])


def test_a_gradient_that_is_not_finite_is_found_though_the_loss_is(tmp_path, data):
    plan = [HEAD, Stage("block", 1, epochs=1, learning_rate={"head": 1e-3, "backbone": 1e-4}, warmup=0.0), ALL]
    trainer = run(data, tmp_path, plan, callbacks=[SpoilGradient("block", STEPS)])
    trainer.train()
    why = trainer.stage_records[1].ended_early
    assert why.startswith(
        f"a gradient is not finite in stage 'block' at step {STEPS + 1}; the gradient breaks in layer group 'stage4' "
        "(learning rate 0.0001); the batch itself is finite (4 images"
    )
    assert trainer.stage_records[1].steps == 0
    assert bit_equal(trainer.recorder.ends[1], trainer.recorder.ends[0])
    assert is_finite(trainer.model)


def test_of_accumulated_batches_the_broken_one_is_named(tmp_path, data):
    trainer = run(data, tmp_path, [HEAD, ALL], gradient_accumulation_steps=3, spoiled=("head", 0, [2]))
    with pytest.raises(TrainingError, match=r"in stage 'head' at step 1; .* not finite \(rows \[2\]\)"):
        trainer.train()


def plain_accuracy(prediction):
    return {"accuracy": float((prediction.predictions.argmax(1) == prediction.label_ids).mean())}


EXPLODES = Stage("explodes", "all", steps=1, learning_rate=1e38, warmup=0.0, schedule="constant")


@pytest.mark.parametrize("options", [{}, {"compute_metrics": plain_accuracy}])
def test_weights_that_only_validation_finds_broken_are_not_kept(tmp_path, data, options):
    """No loss follows the last step of a stage; and as it takes all for class 0, such a model may even seem better."""
    trainer = run(data, tmp_path, [EXPLODES, ALL], metric_for_best_model="accuracy", kwargs=options)
    trainer.eval_dataset = [{**row, "labels": torch.tensor(0)} for row in data]
    with pytest.raises(TrainingError, match="at step 1 the validation .* not finite"):
        trainer.train()
    assert bit_equal(copied(trainer.model), trainer.recorder.begins[0])


@pytest.mark.parametrize("options", [{}, {"compute_metrics": plain_accuracy}])
def test_nor_are_they_with_the_gate_off(tmp_path, data, options):
    trainer = run(data, tmp_path, [HEAD, EXPLODES, ALL], gate="off", metric_for_best_model="accuracy", kwargs=options)
    trainer.train()
    assert [record.accepted for record in trainer.stage_records] == [True, False, True]
    assert trainer.stage_records[1].ended_early.startswith(f"at step {STEPS + 1} the validation ")
    assert bit_equal(trainer.recorder.ends[1], trainer.recorder.begins[1])
    assert is_finite(trainer.model)


def test_no_checkpoint_is_made_of_a_broken_step(tmp_path, data):
    trainer = run(
        data, tmp_path, [HEAD, BLOCK], spoiled=("block", 1, [1]), save_strategy="steps", save_steps=1,
        eval_strategy="steps", eval_steps=1, save_total_limit=None,
    )  # fmt: skip
    trainer.train()
    made = sorted(folder.name for folder in tmp_path.glob("checkpoint-*"))
    assert made == [f"checkpoint-{step}" for step in range(1, STEPS + 2)]
    states = [json.loads((tmp_path / name / "trainer_state.json").read_text()) for name in made]
    assert [state["global_step"] for state in states] == list(range(1, STEPS + 2))


def test_a_sound_run_is_the_same_whenever_it_is_asked(tmp_path, data, when, monkeypatch):
    options = {"gradient_accumulation_steps": 2, "max_grad_norm": 0.5, "logging_strategy": "steps", "logging_steps": 2}
    trainer = run(data, tmp_path / "one", [HEAD, ALL], **options)
    trainer.train()
    monkeypatch.setattr(ThawTrainer, "_settles_later", lambda self: when == "at once")
    other = run(data, tmp_path / "other", [HEAD, ALL], **options)
    other.train()
    assert bit_equal(copied(trainer.model), copied(other.model))
    keys = ("loss", "grad_norm", "grad_norm/head", "eval_loss")
    logged = [[[line.get(key) for key in keys] for line in finished.state.log_history] for finished in (trainer, other)]
    assert logged[0] == logged[1]


def test_an_optimizer_that_cannot_leave_out_steps_is_asked_at_once():
    weight = nn.Parameter(torch.ones(2))
    assert can_leave_out(torch.optim.AdamW([weight], fused=True))
    assert not can_leave_out(torch.optim.AdamW([weight]))
    assert not can_leave_out(torch.optim.SGD([weight], lr=0.1, foreach=True))


@pytest.mark.parametrize("kind", [torch.optim.AdamW, functools.partial(torch.optim.SGD, momentum=0.9)])
def test_a_step_that_is_left_out_changes_nothing(kind):
    def stepped(gradients):
        weight = nn.Parameter(torch.ones(3))
        optimizer = Accelerator(cpu=True).prepare(kind([weight], lr=0.1, weight_decay=0.1, fused=True))
        for value in gradients:
            weight.grad = torch.full((3,), value)
            leave_out(optimizer, torch.tensor(not math.isfinite(value)))
            optimizer.step()
        return weight, optimizer.state[weight]

    weight, state = stepped([1.0, math.nan, 2.0])
    expected, expected_state = stepped([1.0, 2.0])
    assert torch.equal(weight, expected)
    assert bit_equal(state, expected_state)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_a_flag_is_read_without_waiting_for_later_work():
    work = torch.randn(8192, 8192, device="cuda")
    torch.cuda.synchronize()
    flag = DeviceFlag((work > 100).any())
    for _ in range(20):
        work = work @ work
    done = torch.cuda.Event()
    done.record()
    assert not flag
    assert not done.query(), "later work goes on"
    assert DeviceFlag(torch.tensor(True, device="cuda"))


# Another try


def test_a_stage_may_run_once_more_at_a_tenth_of_its_rates(tmp_path, data):
    stage = Stage("block", 1, epochs=2, learning_rate=1e-3, layer_decay=0.5, on_nan="retry")
    trainer = run(
        data, tmp_path, [HEAD, stage, ALL], spoiled=("block", 2, [0]), logging_strategy="steps", logging_steps=1
    )
    trainer.train()
    block = trainer.stage_records[1]
    first, second = trainer.recorder.begins[1:3]
    assert bit_equal(first, second)
    assert bit_equal(first, trainer.recorder.ends[0])
    assert block.learning_rates == pytest.approx({"stage4": 5e-5, "head": 1e-4})
    assert block.steps == 2 * STEPS
    assert "at step 6;" in block.ended_early
    lines = [entry for entry in trainer.state.log_history if entry.get("stage_name") == "block" and "loss" in entry]
    assert [line["step"] for line in lines] == list(range(4, 4 + 2 + 2 * STEPS)), "one run, whose steps go on"
    assert max(line["learning_rate/head"] for line in lines[:2]) > 5e-4
    assert max(line["learning_rate/head"] for line in lines[2:]) == pytest.approx(1e-4)
    assert len(trainer.recorder.ends) == 3
    assert trainer.state.global_step == trainer.state.max_steps == STEPS + 2 + 2 * STEPS + STEPS


def test_a_stage_that_breaks_twice_is_rolled_back(tmp_path, data):
    stage = Stage("block", 1, epochs=2, learning_rate=1e30, warmup=0.0, on_nan="retry")
    trainer = run(data, tmp_path, [HEAD, stage, ALL])
    trainer.train()
    block = trainer.stage_records[1]
    assert not block.accepted
    assert block.ended_early.count("in stage 'block' at step") == 2
    assert block.ended_early.count("; then ") == 1
    assert bit_equal(trainer.recorder.ends[1], trainer.recorder.ends[0])
    assert is_finite(trainer.model)


# Gradients


class Detached(TorchvisionForImageClassification):
    """A model whose head alone gets a gradient, whatever is trainable."""

    def __init__(self, config):
        super().__init__(config)
        self.backbone.fc.register_forward_pre_hook(lambda module, inputs: inputs[0].detach())


def test_a_parameter_that_the_loss_does_not_reach_is_named(tmp_path, data):
    trainer = run(data, tmp_path, [HEAD, Stage("block", ["stage4", "head"])], model=new_model(Detached))
    with pytest.raises(TrainingError) as raised:
        trainer.train()
    assert "stage 'block' trains" in str(raised.value)
    assert "parameters that the loss does not reach: backbone.stage4.0.branch1.0.weight, " in str(raised.value)
    assert [record.name for record in trainer.stage_records] == ["head"]


class Gradients(TrainerCallback):
    """Keeps the gradients that the optimizer gets, and the weights and images that they come from."""

    def __init__(self):
        self.steps = []

    def on_step_begin(self, args, state, control, *, model, **kwargs):
        self.before = copied(model)

    def on_pre_optimizer_step(self, args, state, control, *, model, **kwargs):
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        self.steps.append((self.before, self.trainer.inputs, gradients))


@pytest.mark.parametrize("max_norm", [0.5, 1000.0, 0.0])
def test_gradients_are_clipped_as_torch_does(tmp_path, data, max_norm):
    plan = [HEAD, Stage("block", 1, epochs=1, learning_rate=1e-3)]
    trainer = run(
        data, tmp_path, plan, callbacks=[gradients := Gradients()], max_grad_norm=max_norm,
        logging_strategy="steps", logging_steps=1,
    )  # fmt: skip
    gradients.trainer = trainer
    trainer.train()
    logged = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    groups = [
        {key.removeprefix("grad_norm/"): norm for key, norm in entry.items() if key.startswith("grad_norm/")}
        for entry in trainer.state.log_history
        if "grad_norm" in entry
    ]
    assert len(logged) == len(gradients.steps) == 2 * STEPS
    for (weights, inputs, clipped), norm, of_groups in zip(gradients.steps, logged, groups, strict=True):
        model = copy.deepcopy(trainer.model)
        model.load_state_dict(weights)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in clipped)
        model.zero_grad()
        model.eval()  # small data: BatchNorm keeps its statistics in every group
        model(**inputs).loss.backward()
        trainable = [p for p in model.parameters() if p.requires_grad]
        squares = {
            name: [p.grad.square().sum().item() for p in group.parameters.values() if p.grad is not None]
            for name, group in model.layer_groups().items()
        }
        expected_of_groups = {name: math.sqrt(sum(found)) for name, found in squares.items() if found}
        assert of_groups == pytest.approx(expected_of_groups, rel=1e-4)
        expected = nn.utils.clip_grad_norm_(trainable, max_norm or math.inf)
        # The trainer computes the same function in another order.
        assert norm == pytest.approx(expected.item(), rel=1e-5)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                torch.testing.assert_close(clipped[name], parameter.grad, atol=1e-6, rtol=1e-4)
    if max_norm == 0.5:
        assert min(logged) > max_norm, "every step was clipped"
