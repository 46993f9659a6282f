"""The gate in real runs: a useless stage is rolled back, a useful one kept, and what is reported is what happened."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import TrainerCallback

from torchthaw import (
    Stage,
    ThawTrainer,
    ThawTrainingArguments,
    TorchvisionForImageClassification,
    TorchvisionImageProcessor,
    load_image_dataset,
)
from torchthaw.errors import PlanError

ARCHITECTURE = "shufflenet_v2_x0_5"
HEAD = Stage("head", "head", epochs=1, learning_rate=1e-2)
# Far too high for the backbone, and yet finite.
WRECK = Stage("wreck", "all", epochs=1, learning_rate={"head": 1e-2, "backbone": 0.1}, warmup=0.0)
USEFUL = Stage("last block", 1, epochs=1, learning_rate=5e-3, batch_norm="train")


def draw(label: int, number: int) -> Image.Image:
    """A noisy field whose channels differ a little: the head alone does not tell all of them apart."""
    pixels = np.random.default_rng(1000 * label + number).integers(0, 120, size=(40, 48, 3), dtype=np.uint8)
    pixels[..., label] += 24
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def fields(tmp_path_factory):
    root = tmp_path_factory.mktemp("fields")
    for split, numbers in (("train", range(24)), ("validation", range(100, 116))):
        for label, name in enumerate(("red", "green", "blue")):
            (root / split / name).mkdir(parents=True)
            for number in numbers:
                draw(label, number).save(root / split / name / f"{number}.png")
    return load_image_dataset(root)


class Watcher(TrainerCallback):
    """Notes the weights at the borders of stages."""

    def __init__(self):
        self.begins, self.ends, self.evaluated = {}, {}, []

    def on_stage_begin(self, args, state, control, *, stage, model, **kwargs):
        self.begins[stage.name] = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def on_stage_end(self, args, state, control, *, stage, record, model, **kwargs):
        self.ends[stage.name] = {name: tensor.clone() for name, tensor in model.state_dict().items()}


def run(tmp_path, fields, plan, name="out", **options):
    torch.manual_seed(0)
    classes = fields["train"].features["label"].names
    model = TorchvisionForImageClassification.from_torchvision(ARCHITECTURE, weights="builtin", id2label=classes)
    processor = TorchvisionImageProcessor.from_torchvision(ARCHITECTURE, weights="builtin", image_size=32)
    defaults = {"per_device_train_batch_size": 8, "disable_tqdm": True, "use_cpu": True, "report_to": "none"}
    watcher = Watcher()
    trainer = ThawTrainer(
        model=model,
        args=ThawTrainingArguments(output_dir=str(tmp_path / name), plan=plan, **{**defaults, **options}),
        train_dataset=fields["train"],
        eval_dataset=fields["validation"],
        processing_class=processor,
        callbacks=[watcher],
    )
    trainer.train()
    return trainer, watcher


def equal(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


def test_a_useless_stage_is_rolled_back_and_without_the_gate_the_run_ends_worse(tmp_path, fields):
    plan = [HEAD, WRECK, USEFUL]
    gated, watcher = run(tmp_path, fields, plan)
    head, wreck, useful = gated.stage_records
    assert (head.accepted, wreck.accepted, useful.accepted) == (True, False, True)
    assert wreck.best_metric < head.best_metric < useful.best_metric
    # Bit for bit, statistics included.
    assert equal(watcher.begins["wreck"], watcher.begins["last block"])
    assert equal(watcher.ends["wreck"], watcher.begins["last block"])
    assert wreck.changes["stem"] > 0.1, "the stage did move the backbone before it was rolled back"

    end = gated.evaluate()["eval_accuracy"]
    assert end == useful.best_metric == gated.state.best_metric
    assert gated.state.best_global_step == 3 * 9

    free, free_watcher = run(tmp_path, fields, plan, "free", gate="off")
    assert all(record.accepted for record in free.stage_records)
    assert not equal(free_watcher.begins["wreck"], free_watcher.begins["last block"])
    assert free.evaluate()["eval_accuracy"] < end
    # A wrecked last stage is what a run without the gate hands over.
    last, _ = run(tmp_path, fields, [HEAD, WRECK], "last", gate="off")
    assert last.evaluate()["eval_accuracy"] == last.stage_records[1].best_metric < head.best_metric


def test_what_is_reported_is_the_paired_difference_on_the_same_images(tmp_path, fields):
    trainer, watcher = run(tmp_path, fields, [HEAD, WRECK, USEFUL])
    record = trainer.stage_records[2]
    comparison = record.comparison
    assert comparison["before"] == trainer.stage_records[0].best_metric
    assert comparison["after"] == record.best_metric
    assert comparison["difference"] == pytest.approx(comparison["after"] - comparison["before"])
    assert (comparison["wins"] - comparison["losses"]) / 48 == pytest.approx(comparison["difference"])
    low, high = comparison["interval"]
    assert low < comparison["difference"] <= high
    assert f"{comparison['before']:.4f} -> {comparison['after']:.4f}" in record.reason

    # How far each group went, computed here from the weights at the borders.
    before, after = watcher.begins["last block"], watcher.ends["last block"]
    for name, group in trainer.model.layer_groups().items():
        moved = math.sqrt(sum((after[key] - before[key]).double().square().sum().item() for key in group.parameters))
        size = math.sqrt(sum(before[key].double().square().sum().item() for key in group.parameters))
        assert record.changes[name] == pytest.approx(moved / size, abs=2e-6)
    assert record.changes["stem"] == record.changes["stage3"] == 0
    assert record.changes["head"] > 0

    journal = json.loads((tmp_path / "out" / "journal.json").read_text())
    assert journal["finished"]
    assert [stage["reason"] for stage in journal["stages"]] == [r.reason for r in trainer.stage_records]


def test_a_stage_proposes_its_best_epoch_not_its_last(tmp_path, fields):
    # The rate rises to its peak at the end, so that the last epochs wreck what the first ones learned.
    plan = [Stage("head", "all", epochs=4, learning_rate={"head": 1e-2, "backbone": 0.1}, warmup=36)]
    trainer, _ = run(tmp_path, fields, plan)
    values = [entry["eval_accuracy"] for entry in trainer.state.log_history if "eval_accuracy" in entry]
    assert max(values) > values[-1]
    assert trainer.stage_records[0].best_metric == max(values[1:])
    assert trainer.evaluate()["eval_accuracy"] == max(values[1:])

    last, _ = run(tmp_path, fields, plan, "last", gate="off", load_best_model_at_end=False)
    assert last.evaluate()["eval_accuracy"] == values[-1], "without load_best_model_at_end, the last weights count"


@pytest.mark.parametrize(
    ("options", "accepted", "reason"),
    [
        ({"gate": "significant"}, True, "better, kept"),
        ({"gate": "significant", "min_gain": 0.9}, False, "by less than the least gain of 0.9, not kept"),
        ({"gate": "best", "min_gain": 0.9}, False, "by less than the least gain of 0.9, not kept"),
        ({"metric_for_best_model": "macro_f1"}, True, "validation macro_f1"),
        ({"metric_for_best_model": "loss"}, True, "validation loss"),
        ({"eval_on_start": False}, True, "there was no validation before the stage"),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else None,
)
def test_the_gate_does_what_it_is_told(tmp_path, fields, options, accepted, reason):
    trainer, watcher = run(tmp_path, fields, [HEAD], **options)
    record = trainer.stage_records[0]
    assert record.accepted is accepted
    assert reason in record.reason
    back = equal(watcher.begins["head"], trainer.model.state_dict())
    assert back is not accepted


def test_a_run_can_end_with_the_first_stage_that_is_not_kept(tmp_path, fields):
    trainer, watcher = run(tmp_path, fields, [HEAD, WRECK, USEFUL], on_reject="stop")
    assert [record.name for record in trainer.stage_records] == ["head", "wreck"]
    assert equal(watcher.begins["wreck"], trainer.model.state_dict())
    assert trainer.evaluate()["eval_accuracy"] == trainer.stage_records[0].best_metric


def test_patience_ends_a_stage_but_not_the_run(tmp_path, fields):
    still = Stage("still", "head", epochs=5, learning_rate=1e-9, patience=2)
    trainer, _ = run(tmp_path, fields, [still, USEFUL])
    first, second = trainer.stage_records
    # The first validation of a stage is its best so far; two without a gain follow.
    assert first.epochs == 3
    assert "2 validations in a row without a better accuracy" in first.ended_early
    assert second.epochs == 1
    assert trainer.state.global_step == trainer.state.max_steps == 4 * 9
    assert trainer.state.num_train_epochs == 4


def test_what_the_gate_cannot_decide_is_refused(tmp_path, fields):
    with pytest.raises(PlanError, match="no paired test for the metric 'eval_runtime'"):
        run(tmp_path, fields, [HEAD], gate="significant", metric_for_best_model="runtime")
    with pytest.raises(PlanError, match=r"validation gives no 'eval_acuracy'.* Did you mean 'accuracy'"):
        run(tmp_path, fields, [HEAD], metric_for_best_model="acuracy")
    with pytest.raises(PlanError, match="eval_strategy is 'no', so that there is nothing to decide by"):
        ThawTrainingArguments(output_dir=str(tmp_path), gate="best", eval_strategy="no", load_best_model_at_end=False)
    with pytest.raises(PlanError, match="unknown gate 'bset'. Did you mean 'best'"):
        ThawTrainingArguments(output_dir=str(tmp_path), gate="bset")
    with pytest.raises(PlanError, match="unknown on_reject 'go'"):
        ThawTrainingArguments(output_dir=str(tmp_path), on_reject="go")
    with pytest.raises(PlanError, match="min_gain is -1"):
        ThawTrainingArguments(output_dir=str(tmp_path), min_gain=-1)
