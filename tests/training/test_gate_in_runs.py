"""The gate at work in runs on real images: useless stages are undone, useful ones kept, and the records say so."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from scipy.stats import binomtest
from transformers import TrainerCallback

from torchthaw import (
    Stage,
    ThawTrainer,
    ThawTrainingArguments,
    TorchvisionForImageClassification,
    TorchvisionImageProcessor,
    cli,
)
from torchthaw.data.builtin import load_builtin_dataset
from torchthaw.data.views import ImageView
from torchthaw.evaluation.inference import predict_logits

ARCHITECTURE = "shufflenet_v2_x0_5"
STEPS = 6  # of an epoch
HEAD = Stage("head", "head", epochs=2, learning_rate=1e-2)
WRECK = Stage("wreck", "all", epochs=1, learning_rate=0.02, warmup=0.0)
BLOCK = Stage("block", 1, epochs=2, learning_rate=2e-3)
IDLE = Stage("idle", "head", epochs=1, learning_rate=1e-12)
PLAN = [HEAD, WRECK, BLOCK]


@pytest.fixture(scope="module")
def digits():
    images = load_builtin_dataset("digits")["train"].shuffle(seed=0)
    return images.select(range(40 * STEPS)), images.select(range(240, 440))


def new_model():
    torch.manual_seed(0)
    return TorchvisionForImageClassification.from_torchvision(
        ARCHITECTURE, "builtin", id2label=[str(digit) for digit in range(10)]
    )


def new_processor():
    return TorchvisionImageProcessor.from_torchvision(ARCHITECTURE, "builtin", image_size=32)


def copied(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


class Recorder(TrainerCallback):
    """Keeps the weights at both ends of each stage, and at each validation."""

    def __init__(self):
        self.begins, self.ends, self.validated, self.train_ends = [], [], {}, 0

    def on_stage_begin(self, args, state, control, *, model, **kwargs):
        self.begins.append(copied(model))

    def on_stage_end(self, args, state, control, *, model, **kwargs):
        self.ends.append(copied(model))

    def on_evaluate(self, args, state, control, *, model, **kwargs):
        if state.global_step not in self.validated:
            self.validated[state.global_step] = copied(model)

    def on_train_end(self, args, state, control, **kwargs):
        self.train_ends += 1


def run(digits, folder, plan=PLAN, callbacks=(), **options):
    """Trains; returns the trainer and what was recorded."""
    defaults = {"per_device_train_batch_size": 40, "augmentation": "none", "report_to": "none", "use_cpu": True}
    recorder = Recorder()
    trainer = ThawTrainer(
        new_model(),
        ThawTrainingArguments(str(folder), plan=plan, disable_tqdm=True, **{**defaults, **options}),
        train_dataset=digits[0],
        eval_dataset=digits[1],
        processing_class=new_processor(),
        callbacks=[recorder, *callbacks],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    return trainer, recorder


@pytest.fixture(scope="module")
def gated(digits, tmp_path_factory):
    return run(digits, tmp_path_factory.mktemp("gated"))


@pytest.fixture(scope="module")
def ungated(digits, tmp_path_factory):
    return run(digits, tmp_path_factory.mktemp("ungated"), gate="off")


def bit_equal(some, others):
    return some.keys() == others.keys() and all(torch.equal(some[name], others[name]) for name in some)


def predictions(weights, images):
    """Class ids by the given weights, without the Trainer."""
    model = new_model()
    model.load_state_dict(weights)
    return predict_logits(model, ImageView(images, new_processor()), batch_size=50).argmax(1)


def accuracies(trainer):
    return {entry["step"]: entry["eval_accuracy"] for entry in trainer.state.log_history if "eval_accuracy" in entry}


def test_a_useless_stage_in_the_middle_is_rolled_back_and_useful_ones_are_kept(gated):
    trainer, recorder = gated
    assert [record.accepted for record in trainer.stage_records] == [True, False, True]
    head, _, block = recorder.ends
    assert not bit_equal(recorder.validated[3 * STEPS], head), "the stage did change the weights"
    assert bit_equal(recorder.ends[1], head)
    assert bit_equal(recorder.begins[2], head)
    assert not bit_equal(block, head)


def test_without_the_gate_the_same_run_ends_worse(gated, ungated):
    trainer, recorder = ungated
    assert [record.accepted for record in trainer.stage_records] == [True, True, True]
    assert bit_equal(recorder.begins[2], recorder.validated[3 * STEPS])
    assert trainer.evaluate()["eval_accuracy"] < gated[0].evaluate()["eval_accuracy"] - 0.2


def test_the_run_ends_with_the_best_accepted_weights(gated):
    trainer, recorder = gated
    best = trainer.stage_records[2].best_metric
    assert best == max(accuracies(trainer).values())
    assert trainer.evaluate()["eval_accuracy"] == best
    assert bit_equal(copied(trainer.model), recorder.validated[5 * STEPS])
    assert trainer.state.best_metric == best
    assert trainer.state.best_global_step == 5 * STEPS
    assert trainer.state.best_model_checkpoint == str(Path(trainer.args.output_dir) / f"checkpoint-{5 * STEPS}")


def test_a_rejected_last_stage_leaves_the_best_to_the_one_before(digits, tmp_path):
    trainer, recorder = run(digits, tmp_path, [HEAD, WRECK])
    assert [record.accepted for record in trainer.stage_records] == [True, False]
    best = trainer.stage_records[0].best_metric
    assert trainer.evaluate()["eval_accuracy"] == best
    assert bit_equal(copied(trainer.model), recorder.ends[0])
    assert (trainer.state.best_metric, trainer.state.best_global_step) == (best, 2 * STEPS)
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{2 * STEPS}")
    saved = TorchvisionForImageClassification.from_pretrained(trainer.state.best_model_checkpoint)
    assert bit_equal(copied(saved), recorder.ends[0])


@pytest.fixture
def few_that_an_untrained_head_has_right(digits):
    """Training images, and validation images that the untrained model takes for what they are."""
    right = predictions(copied(new_model()), digits[1]) == np.asarray(digits[1]["label"])
    assert 2 <= right.sum() < 60
    return digits[0], digits[1].select(np.flatnonzero(right))


@pytest.mark.parametrize("gate", ["best", "significant"])
def test_an_untrained_head_that_is_right_by_chance_is_not_kept(few_that_an_untrained_head_has_right, tmp_path, gate):
    trainer, recorder = run(few_that_an_untrained_head_has_right, tmp_path, [HEAD, IDLE], gate=gate)
    head, idle = trainer.stage_records
    assert head.comparison["before"] == 1
    assert (head.accepted, idle.accepted) == (True, False)
    assert "the head was untrained before it" in head.reason
    assert bit_equal(copied(trainer.model), recorder.ends[0])
    assert not trainer.model.head_is_new
    # From here on there is something to go back to, also in a run of its own.
    again = ThawTrainer(
        trainer.model,
        ThawTrainingArguments(
            str(tmp_path / "again"), plan=[IDLE], gate=gate, per_device_train_batch_size=40, report_to="none",
            use_cpu=True, disable_tqdm=True,
        ),
        train_dataset=few_that_an_untrained_head_has_right[0],
        eval_dataset=few_that_an_untrained_head_has_right[1],
        processing_class=new_processor(),
    )  # fmt: skip
    again.train()
    assert [record.accepted for record in again.stage_records] == [False]
    assert bit_equal(copied(again.model), recorder.ends[0])


def test_comparisons_are_those_of_the_weights_before_and_after(gated, digits):
    trainer, recorder = gated
    labels = np.asarray(digits[1]["label"])
    for number, step in enumerate((2 * STEPS, 3 * STEPS, 5 * STEPS)):
        before = predictions(recorder.begins[number], digits[1]) == labels
        after = predictions(recorder.validated[step], digits[1]) == labels
        wins, losses = int((after & ~before).sum()), int((before & ~after).sum())
        comparison = trainer.stage_records[number].comparison
        assert comparison["metric"] == "accuracy"
        assert (comparison["wins"], comparison["losses"]) == (wins, losses)
        assert comparison["before"] == pytest.approx(before.mean())
        assert comparison["after"] == pytest.approx(after.mean())
        assert comparison["difference"] == pytest.approx((wins - losses) / len(labels))
        assert comparison["p_value"] == pytest.approx(binomtest(wins, wins + losses).pvalue)
        low, high = comparison["interval"]
        assert low < comparison["difference"] < high
        assert (low > 0 or high < 0) == (comparison["p_value"] < 0.05)
        assert f"{comparison['before']:.4f} -> {comparison['after']:.4f}" in trainer.stage_records[number].reason


def test_changes_are_how_far_each_layer_group_moved(gated):
    trainer, recorder = gated
    groups = {name: list(group.parameters) for name, group in trainer.model.layer_groups().items()}
    for number, step in enumerate((2 * STEPS, 3 * STEPS, 5 * STEPS)):
        before, after = recorder.begins[number], recorder.validated[step]
        for name, parameters in groups.items():
            moved = math.hypot(*((after[p] - before[p]).double().norm().item() for p in parameters))
            size = math.hypot(*(before[p].double().norm().item() for p in parameters))
            assert trainer.stage_records[number].changes[name] == pytest.approx(moved / size, rel=1e-4, abs=1e-6)
    still = [{name for name, change in record.changes.items() if change == 0.0} for record in trainer.stage_records]
    assert still == [set(groups) - {"head"}, set(), set(groups) - {"head", list(groups)[-2]}]


def test_records_are_complete(gated):
    trainer, _ = gated
    for record, stage in zip(trainer.stage_records, PLAN, strict=True):
        assert (record.name, record.epochs, record.steps) == (stage.name, stage.epochs, stage.epochs * STEPS)
        assert record.learning_rates == stage.learning_rates(list(trainer.model.layer_groups()))
        assert record.ended_early is None
        assert 0 < record.train_images_per_second * record.seconds == pytest.approx(record.steps * 40, rel=1e-2)


def test_significant_asks_for_a_gain_beyond_noise(digits, tmp_path):
    plan = [HEAD, Stage("small", "head", epochs=1, learning_rate=2e-3)]
    trainers = [run(digits, tmp_path / gate, plan, gate=gate)[0] for gate in ("best", "significant")]
    best, significant = ([record.accepted for record in trainer.stage_records] for trainer in trainers)
    assert (best, significant) == ([True, True], [True, False])
    one, other = (trainer.stage_records[1] for trainer in trainers)
    assert one.comparison == other.comparison
    assert one.comparison["difference"] > 0
    assert one.comparison["p_value"] >= 0.05
    assert "better, but not beyond chance" in other.reason
    assert trainers[1].evaluate()["eval_accuracy"] == pytest.approx(one.comparison["before"])


def test_min_gain_is_what_a_stage_must_bring(digits, gated, tmp_path):
    gains = [record.comparison["difference"] for record in gated[0].stage_records]
    assert gains[2] < 0.2 < gains[0]
    trainer, recorder = run(digits, tmp_path, [HEAD, BLOCK], min_gain=0.2)
    assert [record.accepted for record in trainer.stage_records] == [True, False]
    assert "better, but by less than the least gain of 0.2" in trainer.stage_records[1].reason
    assert bit_equal(copied(trainer.model), recorder.ends[0])


def test_the_run_may_stop_at_a_rejected_stage(digits, gated, tmp_path):
    trainer, recorder = run(digits, tmp_path, on_reject="stop")
    assert [(record.name, record.accepted) for record in trainer.stage_records] == [("head", True), ("wreck", False)]
    assert trainer.state.global_step == 3 * STEPS
    assert recorder.train_ends == 1
    assert bit_equal(copied(trainer.model), gated[1].ends[0])
    assert json.loads((tmp_path / "journal.json").read_text())["finished"] is True


@pytest.mark.parametrize("metric", ["loss", "macro_f1", "balanced_accuracy"])
def test_other_metrics_decide_in_their_own_direction(digits, tmp_path, metric):
    trainer, _ = run(digits, tmp_path, [HEAD, WRECK], metric_for_best_model=metric)
    log = {entry["step"]: entry[f"eval_{metric}"] for entry in trainer.state.log_history if f"eval_{metric}" in entry}
    head, wreck = trainer.stage_records
    choose = min if metric == "loss" else max
    assert (head.accepted, wreck.accepted) == (True, False)
    assert head.best_metric == choose(log[STEPS], log[2 * STEPS])
    assert head.comparison["before"] == log[0]
    assert wreck.comparison["after"] == log[3 * STEPS]
    assert wreck.comparison["method"].startswith("paired bootstrap")
    # Outside a stage the model runs as its modules stand, which sums in another order.
    assert trainer.evaluate()[f"eval_{metric}"] == pytest.approx(head.best_metric, rel=1e-5)


# Within a stage


class Spoil(TrainerCallback):
    """Spoils the head in every epoch from one on, before it is validated."""

    def __init__(self, epoch):
        self.epoch = epoch

    def on_epoch_end(self, args, state, control, *, model, **kwargs):
        if round(state.epoch) >= self.epoch:
            with torch.no_grad():
                model.backbone.fc.weight.copy_(torch.roll(model.backbone.fc.weight, 1, dims=0))


def test_what_a_stage_proposes_are_the_weights_of_its_best_epoch(digits, tmp_path):
    plan = [Stage("head", "head", epochs=4, learning_rate=1e-2, schedule="constant")]
    trainer, recorder = run(digits, tmp_path, plan, [Spoil(epoch=4)])
    measured = accuracies(trainer)
    best = max(measured, key=measured.get)
    assert measured[best] > measured[4 * STEPS]
    assert trainer.stage_records[0].best_metric == measured[best] == trainer.evaluate()["eval_accuracy"]
    assert trainer.stage_records[0].accepted
    assert bit_equal(copied(trainer.model), recorder.validated[best])
    assert trainer.state.best_global_step == best


def test_without_load_best_model_at_end_they_are_its_last_weights(digits, tmp_path):
    plan = [Stage("head", "head", epochs=2, learning_rate=1e-2), Stage("more", "head", epochs=2, learning_rate=1e-3)]
    trainer, recorder = run(digits, tmp_path, plan, [Spoil(epoch=4)], load_best_model_at_end=False)
    head, more = trainer.stage_records
    assert (head.accepted, more.accepted) == (True, False)
    measured = accuracies(trainer)
    assert measured[3 * STEPS] > measured[4 * STEPS] == more.comparison["after"]
    assert bit_equal(copied(trainer.model), recorder.validated[2 * STEPS])


def test_patience_ends_a_stage_early_and_the_next_one_follows(digits, tmp_path):
    plan = [Stage("head", "head", epochs=6, learning_rate=1e-2, patience=2, schedule="constant"), BLOCK]
    trainer, recorder = run(digits, tmp_path, plan, [Spoil(epoch=2)], logging_strategy="steps", logging_steps=1)
    head, block = trainer.stage_records
    assert (head.epochs, head.steps) == (3, 3 * STEPS)
    assert head.ended_early == "2 validations in a row without a better accuracy"
    assert bit_equal(recorder.ends[0], recorder.validated[STEPS])
    assert (block.epochs, block.steps, block.ended_early) == (2, 2 * STEPS, None)
    assert trainer.state.global_step == trainer.state.max_steps == 5 * STEPS
    assert trainer.state.num_train_epochs == trainer.state.epoch == 5
    lines = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [line["step"] for line in lines] == list(range(1, 5 * STEPS + 1))
    assert [line["stage_name"] for line in lines] == ["head"] * 3 * STEPS + ["block"] * 2 * STEPS
    rates = [line["learning_rate/head"] for line in lines[3 * STEPS :]]
    assert rates[0] == 0.0
    assert max(rates) == 2e-3, "the next stage has a schedule of its own, from its warmup on"


# The command line


def test_results_hold_the_decisions(make_image_folder, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    stages = "[{name: head, unfreeze: head, epochs: 1, learning_rate: 0.003}, {name: wreck, learning_rate: 0.05}]"
    arguments = ["--data", make_image_folder(per_class=12), "--output", out, "--backbone", ARCHITECTURE, "--quiet"]
    settings = [
        "weights=builtin", "image_size=32", "batch_size=9", "num_workers=0", "data.validation=0.25",
        "plan=null", "epochs=null", f"stages={stages}", "min_gain=0.01", "on_reject=stop", "metric=accuracy",
    ]  # fmt: skip
    arguments += [part for setting in settings for part in ("--set", setting)]
    monkeypatch.setattr(sys, "argv", ["torchthaw", "train", "staged", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert not exit_.value.code, capsys.readouterr().err
    results = json.loads((out / "results.json").read_text())
    assert results["gate"] == {"gate": "best", "min_gain": 0.01, "on_reject": "stop"}
    head, wreck = results["stages"]
    assert (head["accepted"], wreck["accepted"]) == (True, False)
    for stage in (head, wreck):
        comparison = stage["comparison"]
        assert comparison.keys() >= {"metric", "before", "after", "difference", "interval", "p_value", "method"}
        assert stage["reason"].startswith(
            f"validation accuracy {comparison['before']:.4f} -> {comparison['after']:.4f}"
        )
    assert wreck["comparison"]["before"] == head["best_metric"] == results["validation"]["accuracy"]
    assert wreck["changes"]["stem"] > 0.0 == head["changes"]["stem"]
