"""Stages that hand on an average of their weights, against plain loops over the weights of every step."""

import copy
import json

import datasets
import numpy as np
import pytest
import torch
import transformers
from interruptions import Interrupt, InterruptionError
from safetensors.torch import load_file
from torch.nn import functional as F
from torch.optim.swa_utils import update_bn

from torchthaw import (
    Stage,
    ThawTrainer,
    ThawTrainingArguments,
    TorchvisionForImageClassification,
    TorchvisionImageProcessor,
)
from torchthaw.errors import PlanError, RecipeError
from torchthaw.recipe import load_recipe
from torchthaw.training.callbacks import StageCallback
from torchthaw.training.frozen_part import BorderRows

ARCHITECTURE = "shufflenet_v2_x0_5"
CLASSES = ["ant", "bee", "cat"]
# 3 steps an epoch.
HEAD = Stage("head", "head", epochs=2, learning_rate=1e-2, augmentation="none")
BLOCK = Stage("block", 1, epochs=3, learning_rate=3e-3, batch_norm="train")
EVERY_STEP = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}


def images(number, seed):
    """Noise with a bright channel that tells the class."""
    random = np.random.default_rng(seed)
    labels = np.arange(number) % len(CLASSES)
    pixels = random.integers(0, 200, size=(number, 36, 40, 3))
    pixels[np.arange(number), :, :, labels] += 30
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=CLASSES))
    columns = {"image": list(pixels.astype(np.uint8)), "label": labels.tolist()}
    return datasets.Dataset.from_dict(columns, features=features)


@pytest.fixture(scope="module")
def untrained():
    torch.manual_seed(0)
    return TorchvisionForImageClassification.from_torchvision(ARCHITECTURE, weights="builtin", id2label=CLASSES)


@pytest.fixture
def make(untrained, tmp_path):
    """Returns a function that makes the trainer of a run in a folder, `run` by default."""

    def new_trainer(callbacks=(), *, folder="run", kind=ThawTrainer, **options):
        defaults = {
            "plan": [HEAD, BLOCK], "per_device_train_batch_size": 4, "metric_for_best_model": "loss", "use_cpu": True,
            "save_total_limit": None, "disable_tqdm": True, "report_to": "none", "gate": "off", "augmentation": "light",
        }  # fmt: skip
        trainer = kind(
            model=copy.deepcopy(untrained),
            args=ThawTrainingArguments(output_dir=str(tmp_path / folder), **{**defaults, **options}),
            train_dataset=images(12, seed=1),
            eval_dataset=images(9, seed=2),
            processing_class=TorchvisionImageProcessor.from_torchvision(ARCHITECTURE, "builtin", image_size=32),
            callbacks=list(callbacks),
        )
        trainer.remove_callback(transformers.PrinterCallback)
        return trainer

    return new_trainer


class Weights(StageCallback):
    """Notes the weights that stages begin with, make in each step, show while they are validated, and leave."""

    def __init__(self):
        self.begun, self.steps, self.validated, self.left, self.data = {}, {}, {}, {}, {}

    def on_stage_begin(self, args, state, control, *, model, stage, train_dataloader=None, **_):
        self.begun[stage.name] = copied(model)
        self.steps[stage.name], self.validated[stage.name] = [], []
        self.data[stage.name] = type(self.trainer.train_dataset)

    def on_optimizer_step(self, args, state, control, *, model, **_):
        self.steps[state.stage_name].append(copied(model))

    def on_evaluate(self, args, state, control, *, model, metrics, **_):
        if state.global_step:
            self.validated[state.stage_name].append((copied(model), metrics["eval_loss"]))

    def on_stage_end(self, args, state, control, *, model, stage, record, **_):
        self.left[stage.name] = copied(model)


def run(trainer, **options):
    weights = Weights()
    weights.trainer = trainer
    trainer.add_callback(weights)
    trainer.train(**options)
    return weights


def copied(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def different(some, others):
    return [name for name in others if not torch.equal(some[name], others[name])]


def loss_of(trainer, weights):
    model = copy.deepcopy(trainer.model)
    model.load_state_dict(weights)
    model.eval()
    rows = [trainer.eval_dataset[row] for row in range(len(trainer.eval_dataset))]
    with torch.no_grad():
        logits = model(pixel_values=torch.stack([row["pixel_values"] for row in rows])).logits
    return F.cross_entropy(logits, torch.stack([row["labels"] for row in rows])).item()


def test_what_is_validated_and_kept_is_the_moving_average_of_all_steps(make):
    plain = run(make(folder="plain"))
    trainer = make(average="ema", ema_decay=0.5)
    seen = run(trainer)
    assert seen.data["head"] is BorderRows, "the head trained on cached features"
    for stage in ("head", "block"):
        average = {name: tensor.double() for name, tensor in seen.begun[stage].items()}
        for number, weights in enumerate(seen.steps[stage], start=1):
            decay = min(0.5, (1 + number) / (10 + number))
            for name, tensor in weights.items():
                counts = not tensor.is_floating_point()
                average[name] = tensor if counts else decay * average[name] + (1 - decay) * tensor.double()
            if number % 3 == 0:
                validated, loss = seen.validated[stage][number // 3 - 1]
                for name, tensor in validated.items():
                    torch.testing.assert_close(tensor.double(), average[name].double(), atol=1e-6, rtol=1e-5)
                assert loss == pytest.approx(loss_of(trainer, validated), rel=1e-4)
        losses = [loss for _, loss in seen.validated[stage]]
        best, _ = seen.validated[stage][losses.index(min(losses))]
        assert different(seen.left[stage], best) == []
    assert any("running_mean" in name for name in different(seen.left["block"], seen.begun["block"]))
    # Averages come out of training and do not go into it.
    assert [different(*pair) for pair in zip(seen.steps["head"], plain.steps["head"], strict=True)] == [[]] * 6
    records = [record.to_dict() for record in trainer.stage_records]
    assert [record["average"] for record in records] == [
        {"kind": "ema", "updates": 6, "decay": pytest.approx(7 / 16)},
        {"kind": "ema", "updates": 9, "decay": 0.5},
    ]
    assert [record["best_metric"] for record in records] == [
        min(loss for _, loss in seen.validated[stage]) for stage in ("head", "block")
    ]


def test_stages_have_averages_of_their_own(make):
    plan = [HEAD, Stage("block", 1, epochs=1, learning_rate=3e-3, average="none")]
    trainer = make(plan=plan, average="ema")
    seen = run(trainer)
    assert different(seen.validated["head"][-1][0], seen.steps["head"][-1])
    assert different(seen.validated["block"][-1][0], seen.steps["block"][-1]) == []
    assert [record.average is None for record in trainer.stage_records] == [False, True]


def test_equal_mean_of_the_last_epochs_with_measured_statistics(make, untrained):
    """Statistics are measured on all training images as their last epoch shows them, here in one batch."""
    whole = Stage("all", "all", epochs=4, learning_rate=1e-3, batch_norm="train")
    trainer = make(plan=[whole], average="swa", swa_epochs=3, per_device_eval_batch_size=12, cache_gb=0)
    seen = run(trainer)
    ends = seen.steps["all"][2::3]
    assert different(seen.validated["all"][0][0], ends[0]) == [], "the first epoch is not averaged"
    assert different(seen.validated["all"][1][0], ends[1]) == [], "nor is one epoch by itself"
    model, view = copy.deepcopy(untrained), trainer._train_data.for_stage(0)
    for last in (2, 3):
        validated, _ = seen.validated["all"][last]
        mean = {name: torch.stack([end[name].double() for end in ends[1 : last + 1]]).mean(dim=0) for name in validated}
        model.load_state_dict(mean)
        view.set_epoch(last)
        pixels = torch.stack([view[row]["pixel_values"] for row in range(12)])
        update_bn([pixels], model)
        expected = model.state_dict()
        for name, tensor in validated.items():
            if name.endswith("num_batches_tracked"):
                assert tensor == ends[last][name]
            else:
                torch.testing.assert_close(tensor, expected[name], atol=1e-4, rtol=1e-3)
    assert trainer.stage_records[0].average == {"kind": "swa", "updates": 3}


def test_without_validation_the_last_average_is_handed_on(make):
    trainer = make(average="ema", eval_strategy="no", load_best_model_at_end=False, metric_for_best_model=None)
    seen = run(trainer)
    average = None
    for number, weights in enumerate([seen.begun["head"], *seen.steps["head"]]):
        bias = weights["backbone.fc.bias"].double()
        decay = (1 + number) / (10 + number)
        average = bias if average is None else decay * average + (1 - decay) * bias
    torch.testing.assert_close(seen.left["head"]["backbone.fc.bias"].double(), average, atol=1e-7, rtol=1e-5)
    assert different(copied(trainer.model), seen.left["block"]) == []


def test_a_checkpoint_holds_the_averages_that_were_validated(make, tmp_path):
    seen = run(make(average="ema", **EVERY_STEP))
    for step in (2, 9):
        stage, number = ("head", step - 1) if step <= 6 else ("block", step - 7)
        saved = load_file(tmp_path / "run" / f"checkpoint-{step}" / "model.safetensors")
        assert different(saved, seen.validated[stage][number][0]) == []
        assert different(saved, seen.steps[stage][number])


# What a run is like, and where it is interrupted.
INTERRUPTIONS = {
    "ema in the head's stage": ({"average": "ema", **EVERY_STEP}, ("on_step_begin", 3)),
    "ema in an epoch": ({"average": "ema", **EVERY_STEP}, ("on_optimizer_step", 10)),
    "ema at the border": ({"average": "ema"}, ("on_stage_end", 6)),
    "swa between its epochs": ({"average": "swa"}, ("on_step_end", 13)),
    "swa before the end of an epoch": ({"average": "swa", **EVERY_STEP}, ("on_epoch_end", 12)),
    "swa at the end": ({"average": "swa", "wise_ft": True}, ("on_train_end", 15)),
}


@pytest.mark.parametrize("name", INTERRUPTIONS)
def test_an_interrupted_run_is_gone_on_with_exactly(make, name):
    options, (event, step) = INTERRUPTIONS[name]
    expected, broken = make(folder="whole", **options), make([Interrupt(event, step)], **options)
    run(expected)
    with pytest.raises(InterruptionError):
        run(broken)
    trainer = make(**options)
    trainer.train(resume_from_checkpoint=True)
    assert_same(trainer, expected)


def assert_same(trainer, expected):
    assert different(copied(trainer.model), copied(expected.model)) == []
    assert [plain(line, ("_runtime", "_per_second")) for line in trainer.state.log_history] == [
        plain(line, ("_runtime", "_per_second")) for line in expected.state.log_history
    ]
    timed = ("seconds", "_per_second", "data_wait_share", "peak_memory_mb")
    records = [[plain(record.to_dict(), timed) for record in run.stage_records] for run in (trainer, expected)]
    assert records[0] == records[1]
    assert json.dumps(records[0])


def plain(entries, without):
    return {key: value for key, value in entries.items() if not key.endswith(without)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"average": "emma"}, "unknown average 'emma'.*ema.*There are none, ema, swa"),
        ({"average": "ema", "ema_decay": 1.0}, "ema_decay is 1.0; write a number between 0 and 1"),
        ({"average": "swa", "swa_epochs": 0}, "swa_epochs is 0; write a whole number from 1 on"),
        ({"wise_ft": True, "eval_strategy": "no"}, "wise_ft is on, but eval_strategy is 'no'.*eval_strategy='epoch'"),
        ({"plan": [Stage("a", optimizer="schedule_free_adamw", average="ema")]}, "stage 'a': average is 'ema'.*itself"),
    ],
)
def test_what_cannot_be_averaged_is_refused(make, options, message):
    with pytest.raises(PlanError, match=message):
        make(**options)


def test_a_stage_with_an_unknown_average_is_refused():
    with pytest.raises(PlanError, match="stage 'a': unknown average 'mean'.* There are none, ema, swa"):
        Stage("a", average="mean")


def test_no_mean_over_epochs_of_a_stream(untrained, tmp_path):
    plan = [Stage("head", "head", steps=2, average="swa")]
    with pytest.raises(PlanError, match="stage 'head': average is 'swa'.* is a stream.*write average: ema"):
        ThawTrainer(
            copy.deepcopy(untrained),
            ThawTrainingArguments(str(tmp_path), plan=plan, use_cpu=True, per_device_train_batch_size=4),
            images(12, seed=1).to_iterable_dataset(),
            images(9, seed=2),
            TorchvisionImageProcessor.from_torchvision(ARCHITECTURE, "builtin", image_size=32),
        )


def test_recipes_say_which_average():
    recipe = load_recipe({"backbone": "resnet18", "data": {"path": "x"}, "average": "swa", "swa_epochs": 3})
    assert (recipe.average, recipe.ema_decay, recipe.swa_epochs, recipe.wise_ft) == ("swa", 0.999, 3, False)
    stages = [{"name": "head", "unfreeze": "head", "average": "ema"}]
    recipe = load_recipe({"backbone": "resnet18", "data": {"path": "x"}, "stages": stages})
    assert recipe.stage_plan().stages[0].average == "ema"
    with pytest.raises(RecipeError, match="wise_ft: true and cv_final: true.* no validation images"):
        load_recipe({"backbone": "resnet18", "data": {"path": "x"}, "cv": 3, "cv_final": True, "wise_ft": True})
