"""The learning-rate finder leaves the trainer bit for bit what it is, and tests what training would do."""

import copy
import json
import random

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers import TrainerCallback

from torchthaw import (
    Stage,
    ThawTrainer,
    ThawTrainingArguments,
    TorchvisionConfig,
    TorchvisionForImageClassification,
    TorchvisionImageProcessor,
    load_image_dataset,
    split_dataset,
)
from torchthaw.errors import PlanError

NAMES = ["ant", "bee", "cat"]
STEPS = 20
# BatchNorm of live groups takes statistics of batches, so that a test that ran on the model itself would show.
PLAN = [
    Stage("head", "head", epochs=2, learning_rate=1e-2),
    Stage("all", "all", epochs=1, learning_rate=1e-3, layer_decay=0.5, batch_norm="train"),
]


def convolutional():
    torch.manual_seed(0)
    return TorchvisionForImageClassification.from_torchvision("shufflenet_v2_x0_5", "builtin", id2label=NAMES)


def transformer():
    torch.manual_seed(0)
    config = TorchvisionConfig(architecture="vit_b_32", image_size=32, dropout=0.1, id2label=NAMES)
    model = TorchvisionForImageClassification(config)
    model.backbone.encoder.layers = model.backbone.encoder.layers[:2]
    return model


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    """Noisy fields whose class shows in one channel."""
    root = tmp_path_factory.mktemp("photos")
    for index, label in enumerate(NAMES):
        (root / label).mkdir()
        for number in range(12):
            pixels = np.random.default_rng(100 * index + number).integers(0, 120, size=(32, 32, 3), dtype=np.uint8)
            pixels[..., index] += 60
            Image.fromarray(pixels).save(root / label / f"{number}.png")
    return split_dataset(load_image_dataset(root), validation=0.25, seed=0)


class Events(TrainerCallback):
    def __init__(self):
        self.seen = []

    def on_train_begin(self, args, state, control, **kwargs):
        self.seen.append("train_begin")

    def on_step_end(self, args, state, control, **kwargs):
        self.seen.append("step")

    def on_log(self, args, state, control, **kwargs):
        self.seen.append("log")


def new_trainer(splits, folder, model, *, kind=ThawTrainer, **options):
    defaults = {
        "plan": PLAN, "per_device_train_batch_size": 9, "use_cpu": True, "disable_tqdm": True, "report_to": "none",
        "gate": "off", "load_best_model_at_end": False, "dataloader_num_workers": 0, "logging_steps": 1,
        "logging_strategy": "steps", "save_strategy": "no", "augmentation": "medium",
    }  # fmt: skip
    transformers.set_seed(0)
    trainer = kind(
        model,
        ThawTrainingArguments(str(folder), **{**defaults, **options}),
        train_dataset=splits["train"],
        eval_dataset=splits["validation"],
        processing_class=TorchvisionImageProcessor.from_torchvision(
            model.config.architecture, weights=None, image_size=32
        ),
        callbacks=[Events()],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def weights_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_equal(left, right):
    """Compares nested data bit for bit, tensors and arrays included; other objects by their attributes or as equal."""
    assert type(left) is type(right)
    if isinstance(left, torch.Tensor):
        assert torch.equal(left, right)
    elif isinstance(left, np.ndarray):
        assert left.tobytes() == right.tobytes()
    elif isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left:
            assert_equal(left[key], right[key])
    elif isinstance(left, list | tuple):
        assert len(left) == len(right)
        for one, other in zip(left, right, strict=True):
            assert_equal(one, other)
    else:
        assert left == right


def everything(trainer):
    """All that training depends on or changes, copied."""
    model = trainer.model
    optimizer, schedule = trainer.optimizer, trainer.lr_scheduler
    found = {
        "weights": model.state_dict(),
        "other buffers": dict(model.named_buffers()),
        "trains": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "modes": {name: module.training for name, module in model.named_modules()},
        "held": sorted(model.held_in_eval),
        "gradients": {n: p.grad for n, p in model.named_parameters() if p.grad is not None},
        "optimizer": None if optimizer is None else optimizer.state_dict(),
        "schedule": None if schedule is None else schedule.state_dict(),
        "random": [random.getstate(), np.random.get_state(), torch.get_rng_state()],
        "state": json.loads(json.dumps(vars(trainer.state), default=str)),
        "control": vars(trainer.control),
        "arguments": {key: str(value) for key, value in vars(trainer.args).items()},
        "progress": {key: str(value) for key, value in vars(trainer._progress).items()},
        "callbacks": [*map(id, trainer.callback_handler.callbacks), *trainer.callback_handler.callbacks[-1].seen]
        if isinstance(trainer.callback_handler.callbacks[-1], Events)
        else [next(c for c in trainer.callback_handler.callbacks if isinstance(c, Events)).seen],
        # The objects themselves stay too, so that nobody who holds one is left behind.
        "attributes": {key: id(value) for key, value in vars(trainer).items()},
        "accelerate": [len(trainer.accelerator._models), len(trainer.accelerator._optimizers)],
    }
    return copy.deepcopy(found)


@pytest.mark.parametrize("make", [convolutional, transformer])
def test_the_trainer_stays_what_it_is_and_trains_as_without_the_test(make, splits, tmp_path):
    alone = new_trainer(splits, tmp_path / "alone", make())
    alone.train()
    trainer = new_trainer(splits, tmp_path / "tested", make())
    before = everything(trainer)
    tests = [trainer.find_lr("head", steps=STEPS), trainer.find_lr(1, steps=STEPS, lead_steps=2)]
    assert_equal(everything(trainer), before)
    assert [test.stage for test in tests] == ["head", "all"]
    # Both trained something.
    assert all(len(set(test.losses)) > 5 for test in tests)

    trainer.train()
    assert_equal(weights_of(trainer.model), weights_of(alone.model))
    timed = ("runtime", "per_second", "data_wait")
    lines = [
        [{k: v for k, v in line.items() if not any(word in k for word in timed)} for line in each.state.log_history]
        for each in (trainer, alone)
    ]
    assert lines[0] == lines[1]

    # After training there is more that could be changed.
    trained = everything(trainer)
    assert trained["optimizer"]["state"]
    trainer.find_lr("all", steps=STEPS)
    assert_equal(everything(trainer), trained)


def test_a_test_sees_what_training_sees(splits, tmp_path):
    """Same images, augmentation, order, loss and weights: the losses are the same until the rates tell them apart."""
    options = {
        "plan": [Stage("all", "all", epochs=1, learning_rate=1e-3, warmup=0.9, batch_size=6)],
        "augmentation": {"mixup": 0.4}, "label_smoothing_factor": 0.1, "max_grad_norm": 0.5,
        "class_weights": {"ant": 2.0}, "gradient_accumulation_steps": 2,
    }  # fmt: skip
    trainer = new_trainer(splits, tmp_path, convolutional(), **options)
    test = trainer.find_lr(steps=STEPS, lowest=1e-12, highest=1e-9)
    trainer.train()
    logged = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    # The first step of the warmup has the rate 0.
    assert test.losses[:2] == pytest.approx(logged[:2], abs=1e-6)
    assert len(test.losses) == STEPS > len(logged)


def test_rates_rise_together_and_overridden_methods_are_tested(splits, tmp_path):
    seen = []

    class Own(ThawTrainer):
        def compute_loss(self, model, *args, **kwargs):
            if model.training:
                seen.append({group["layer_group"]: group["lr"] for group in self.optimizer.param_groups})
            return super().compute_loss(model, *args, **kwargs)

    trainer = new_trainer(splits, tmp_path, convolutional(), kind=Own)
    test = trainer.find_lr("all", steps=STEPS, lowest=1e-7, highest=1e-3)
    assert len(seen) == STEPS
    planned = trainer.plan.stages[1].learning_rates(list(trainer.model.layer_groups()))
    for rates, top in zip(seen, np.geomspace(1e-7, 1e-3, STEPS), strict=True):
        assert rates["head"] == pytest.approx(top)
        assert rates == pytest.approx({group: top * rate / 1e-3 for group, rate in planned.items()})
    assert test.rates == pytest.approx([rates["head"] for rates in seen])
    assert test.plan_rate == 1e-3


def test_a_later_stage_can_be_tested_after_the_ones_before_it(splits, tmp_path):
    short = new_trainer(splits, tmp_path / "short", convolutional(), plan=PLAN[:1])
    short.train()
    after = new_trainer(splits, tmp_path / "after", short.model).find_lr("all", steps=STEPS)
    trainer = new_trainer(splits, tmp_path / "lead", convolutional())
    assert trainer.find_lr("all", steps=STEPS, lead_steps=100).losses == after.losses
    assert trainer.find_lr("all", steps=STEPS).losses != after.losses


def test_a_learnable_task_gets_a_suggestion_a_line_and_a_plot(splits, tmp_path):
    trainer = new_trainer(splits, tmp_path, convolutional(), augmentation="none", per_device_train_batch_size=27)
    test = trainer.find_lr("head", steps=80, highest=1e3, plot=tmp_path / "plots" / "head.png")
    assert 1e-4 < test.suggestion < 1
    assert len(test.rates) == len(test.losses) < 80
    assert "diverges at" in test.sentence
    assert test.recipe == f"- {{name: head, unfreeze: head, epochs: 2, learning_rate: {test.learning_rate}}}"
    assert test.learning_rate == test.suggestion
    assert Image.open(tmp_path / "plots" / "head.png").size[0] > 300
    json.loads(json.dumps(test.to_dict(), allow_nan=False))


def test_mixed_precision_of_accelerate_stays_on_the_model_that_it_was_put_on(splits, tmp_path):
    trainer = new_trainer(splits, tmp_path, convolutional(), bf16=True)
    trainer.train()
    before = weights_of(trainer.model)
    test = trainer.find_lr("all", steps=STEPS)
    assert_equal(weights_of(trainer.model), before)
    assert len(set(test.losses)) > 5
    again = trainer.find_lr("all", steps=STEPS)
    assert again.losses == test.losses


def test_images_that_are_not_finite_are_named_and_nothing_is_suggested(tmp_path):
    rows = [{"pixel_values": torch.full((3, 32, 32), torch.nan), "labels": torch.tensor(row % 3)} for row in range(9)]
    trainer = new_trainer({"train": rows, "validation": rows}, tmp_path, convolutional(), augmentation=None)
    before = everything(trainer)
    test = trainer.find_lr("head", steps=STEPS)
    assert test.suggestion is None
    assert test.recipe is None
    assert "images with values that are not finite" in test.sentence
    assert_equal(everything(trainer), before)


def test_what_cannot_be_tested_is_refused(splits, tmp_path):
    trainer = new_trainer(splits, tmp_path, convolutional())
    for options, message in (
        ({"stage": "hed"}, r"there is no stage 'hed' in the plan\. Did you mean 'head'"),
        ({"stage": 2}, "there is no stage 2 in the plan"),
        ({"steps": 5}, "steps of the learning-rate finder is 5; write a whole number from 20 on"),
        ({"lead_steps": -1}, "lead_steps of the learning-rate finder is -1"),
        ({"lowest": 1e-3, "highest": 1e-4}, "to go from 0.001 to 0.0001"),
        ({"lowest": 0.0}, "write two positive numbers"),
    ):
        with pytest.raises(PlanError, match=message):
            trainer.find_lr(**options)

    class Meddler(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            trainer.find_lr()

    trainer.add_callback(Meddler())
    with pytest.raises(PlanError, match="while the trainer is training; call it before or after"):
        trainer.train()


def test_what_is_cached_stays_and_is_used(splits, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHTHAW_CACHE", str(tmp_path / "cache"))
    trainer = new_trainer(splits, tmp_path / "out", convolutional(), plan=PLAN[:1], augmentation=None)
    trainer.train()

    def files():
        return {str(path): path.read_bytes() for path in (tmp_path / "cache").rglob("*") if path.is_file()}

    before = files()
    assert before
    trainer.find_lr(steps=STEPS)
    assert files() == before
