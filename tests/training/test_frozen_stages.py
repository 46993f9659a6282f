"""What a stage keeps frozen is computed once or fast, and training comes out as through the whole network."""

import copy
import json

import numpy as np
import pytest
import torch
import transformers
from torch import nn
from transformers import TrainerCallback

from torchthaw import (
    Stage,
    ThawTrainer,
    ThawTrainingArguments,
    TorchvisionForImageClassification,
    TorchvisionImageProcessor,
    load_image_dataset,
    split_dataset,
)
from torchthaw.errors import PlanError
from torchthaw.training import frozen_stages
from torchthaw.training.frozen_part import BORDER_VALUES, BorderRows

ARCHITECTURE = "mobilenet_v3_small"  # with BatchNorm, a hidden layer in the classifier, and dropout
CLASSES = ["ant", "bee", "cat"]
# With SGD, since Adam makes steps of full size of gradients that are nothing but rounding.
SGD = {"optimizer": "sgd", "augmentation": "none"}
HEAD = Stage("head", "head", epochs=3, learning_rate=0.1, **SGD)
PARTIAL = Stage("partial", 2, epochs=2, learning_rate=1e-2, **SGD)
ALL = Stage("all", "all", epochs=1, learning_rate=1e-3, optimizer="sgd")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("TORCHTHAW_CACHE", str(folder))
    return folder


@pytest.fixture
def splits(make_image_folder):
    return split_dataset(load_image_dataset(make_image_folder(per_class=16)), validation=0.25, seed=0)


@pytest.fixture
def processor():
    return TorchvisionImageProcessor.from_torchvision(ARCHITECTURE, weights=None, image_size=32)


@pytest.fixture(scope="module")
def untrained():
    torch.manual_seed(0)
    model = TorchvisionForImageClassification.from_torchvision(ARCHITECTURE, weights=None, id2label=CLASSES)
    # Statistics that folding has to take into account.
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model


@pytest.fixture
def train(untrained, splits, processor, tmp_path, cache):
    """Returns a function that trains and gives back the trainer."""

    def run(plan, folder="run", *, callbacks=(), resume=None, **options):
        defaults = {
            "plan": plan, "per_device_train_batch_size": 8, "gate": "off", "use_cpu": True, "disable_tqdm": True,
            "report_to": "none", "logging_strategy": "steps", "logging_steps": 1,
        }  # fmt: skip
        trainer = ThawTrainer(
            model=copy.deepcopy(untrained),
            args=ThawTrainingArguments(output_dir=str(tmp_path / folder), **{**defaults, **options}),
            train_dataset=splits["train"],
            eval_dataset=splits["validation"],
            processing_class=processor,
            callbacks=list(callbacks),
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    return run


def losses(trainer, key="loss"):
    return [line[key] for line in trainer.state.log_history if key in line]


def assert_alike(trainer, expected, tolerance=2e-5):
    assert losses(trainer) == pytest.approx(losses(expected), rel=1e-3, abs=tolerance)
    assert losses(trainer, "eval_loss") == pytest.approx(losses(expected, "eval_loss"), rel=1e-3, abs=tolerance)
    wanted = expected.model.state_dict()
    for name, tensor in trainer.model.state_dict().items():
        torch.testing.assert_close(tensor, wanted[name], atol=tolerance, rtol=1e-3, msg=name)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"class_weights": "balanced", "label_smoothing_factor": 0.1},
        {"sampling": "balanced", "loss": "focal"},
        {"gradient_accumulation_steps": 2},
    ],
    ids=["plain", "weights", "sampler", "accumulation"],
)
def test_cached_is_live(train, options, monkeypatch):
    cached = train([HEAD, PARTIAL], "cached", **options)
    live = train([HEAD, PARTIAL], "live", cache_gb=0, **options)
    assert [record.frozen_part["cached"] for record in cached.stage_records] == [["train", "validation"]] * 2
    assert [record.frozen_part["cached"] for record in live.stage_records] == [[], []]
    assert_alike(cached, live)
    # The whole network in every step, as its modules stand.
    monkeypatch.setattr(frozen_stages, "find_border", lambda *_: None)
    monkeypatch.setattr(frozen_stages, "put_on_fast_form", lambda _: None)
    whole = train([HEAD, PARTIAL], "whole", **options)
    assert [record.frozen_part for record in whole.stage_records] == [{}, {}]
    assert_alike(cached, whole)


def test_a_number_of_views_is_computed_once_and_gone_through_in_turn(train):
    augmented = {"augmentation": {"crop_scale": [0.3, 1.0], "mixup": 0.4}, "optimizer": "sgd", "learning_rate": 0.1}
    plan = [Stage("head", "head", epochs=5, views=2, **augmented)]
    cached, live = train(plan, "cached"), train(plan, "live", cache_gb=0)
    assert cached.stage_records[0].frozen_part["cached"] == ["train", "validation"]
    assert_alike(cached, live)
    fresh = train([Stage("head", "head", epochs=5, **augmented)], "fresh")
    assert fresh.stage_records[0].frozen_part["cached"] == ["validation"]
    seen = 2 * len(losses(fresh)) // 5
    assert losses(fresh)[:seen] == pytest.approx(losses(cached)[:seen], rel=1e-3)
    assert losses(fresh)[seen:] != pytest.approx(losses(cached)[seen:], rel=1e-3)


def test_the_first_validation_and_later_stages_see_the_right_weights(train, monkeypatch):
    plan = [HEAD, ALL, Stage("head again", "head", epochs=1, learning_rate=0.1, **SGD)]
    fast = train(plan, "fast")
    monkeypatch.setattr(frozen_stages, "find_border", lambda *_: None)
    monkeypatch.setattr(frozen_stages, "put_on_fast_form", lambda _: None)
    assert_alike(fast, train(plan, "whole"), tolerance=2e-4)


def test_head_stages_see_plain_images_unless_the_run_says_otherwise(train):
    plan = [Stage("head", "head", epochs=1), Stage("last", 1, epochs=1)]
    open_, asked = train(plan, "open"), train(plan, "asked", augmentation="light")
    assert [record.frozen_part["cached"] for record in open_.stage_records] == [["train", "validation"], ["validation"]]
    assert [record.frozen_part["cached"] for record in asked.stage_records] == [["validation"], ["validation"]]


class Counted(TrainerCallback):
    """Notes how many images go through a frozen layer at once."""

    def __init__(self):
        self.passes = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        inner = model.backbone.features[3].block[0][0]
        # For all modules, since a hook on a frozen one would be respected.
        self.handle = nn.modules.module.register_module_forward_pre_hook(
            lambda module, inputs: self.passes.append(len(inputs[0])) if module is inner else None
        )

    def on_train_end(self, args, state, control, **kwargs):
        self.handle.remove()


def test_an_epoch_costs_no_pass_through_the_frozen_part(train, monkeypatch):
    # Nothing is learned here, for which the diagnosis looks at training images once.
    monkeypatch.setattr(ThawTrainer, "_accuracy_on_training_images", lambda self: None)
    head = Stage("head", "head", epochs=10, learning_rate=1e-2)
    first, second = Counted(), Counted()
    train([head], "first", callbacks=[first])
    images = 36 + 12
    assert sum(first.passes) <= images + 12, "each image once, and a few to try the cut"
    train([head], "second", callbacks=[second])
    assert sum(second.passes) <= 12, "the same features are still there"


@pytest.mark.parametrize(("size", "at_once"), [(32, 8), (160, 4)])
def test_small_images_go_through_the_frozen_part_in_larger_batches(train, processor, size, at_once):
    processor.size, processor.crop_size = {"shortest_edge": size}, {"height": size, "width": size}
    counted = Counted()
    train([HEAD], callbacks=[counted], per_device_eval_batch_size=4)
    assert max(counted.passes) == at_once


def test_other_weights_make_other_features(train, untrained):
    before = train([HEAD], "before")
    weight = untrained.backbone.features[12][0].weight
    weight.data.neg_()
    try:
        after = train([HEAD], "after")
        live = train([HEAD], "live", cache_gb=0)
    finally:
        weight.data.neg_()
    assert losses(after) != pytest.approx(losses(before), rel=1e-3)
    assert_alike(after, live)


def test_an_interrupted_cached_stage_goes_on_exactly(train):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 8:
                raise KeyboardInterrupt

    options = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    undisturbed = train([HEAD, PARTIAL], "undisturbed", **options)
    with pytest.raises(KeyboardInterrupt):
        train([HEAD, PARTIAL], "disturbed", callbacks=[Stop()], **options)
    resumed = train([HEAD, PARTIAL], "disturbed", resume=True, **options)
    weights = undisturbed.model.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in resumed.model.state_dict().items())
    assert losses(resumed) == losses(undisturbed)
    assert losses(resumed, "eval_loss") == losses(undisturbed, "eval_loss")
    assert [r.frozen_part for r in resumed.stage_records] == [r.frozen_part for r in undisturbed.stage_records]


def test_what_does_not_fit_is_computed_live_with_one_warning(train, cache, caplog):
    small = train([HEAD, PARTIAL], "small", cache_gb=1e-6)
    assert [record.frozen_part["cached"] for record in small.stage_records] == [[], []]
    warnings = [r.message for r in caplog.records if r.levelname == "WARNING" and "torchthaw" in r.name]
    assert len(warnings) == 1, warnings
    assert sum(file.stat().st_size for file in cache.rglob("*") if file.is_file()) < 1_000_000
    assert_alike(small, train([HEAD, PARTIAL], "large"))


def test_the_model_is_plain_between_and_after_stages(train):
    seen = []

    class Look(TrainerCallback):
        def on_stage_end(self, args, state, control, model=None, **kwargs):
            seen.append([name for name, module in model.named_modules() if "forward" in vars(module)])

    trainer = train([HEAD, PARTIAL, ALL], callbacks=[Look()])
    assert seen == [[], [], []]
    assert [name for name, module in trainer.model.named_modules() if "forward" in vars(module)] == []
    assert trainer.evaluate()["eval_loss"] > 0


def test_a_run_that_breaks_leaves_a_plain_model(train, untrained):
    model = copy.deepcopy(untrained)

    class Break(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            self.model = model
            raise KeyboardInterrupt

    breaking = Break()
    with pytest.raises(KeyboardInterrupt):
        train([PARTIAL], callbacks=[breaking])
    images = torch.randn(2, 3, 32, 32)
    model.eval(), breaking.model.eval()
    breaking.model.load_state_dict(model.state_dict())
    assert torch.equal(breaking.model(pixel_values=images).logits, model(pixel_values=images).logits)


def test_bfloat16_is_within_its_tolerance_and_said(train):
    exact = train([HEAD], "exact", frozen_precision="float32")
    rounded = train([HEAD], "rounded", frozen_precision="bfloat16")
    assert exact.stage_records[0].frozen_part["dtype"] == "float32"
    assert rounded.stage_records[0].frozen_part["dtype"] == "bfloat16"
    assert losses(rounded) == pytest.approx(losses(exact), rel=0.05)
    assert losses(rounded) != losses(exact)


def test_time_waiting_for_data_and_images_per_second_are_in_the_record(train, splits):
    waited = []

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            waited.append(state.data_wait_seconds)

    [record] = train([Stage("all", "all", epochs=2)], callbacks=[Look()]).stage_records
    assert 0 < record.data_wait_share < 1
    assert waited == sorted(waited)
    assert record.step_images_per_second > record.train_images_per_second
    steps = 2 * len(splits["train"]) / record.step_images_per_second
    assert waited[-1] == pytest.approx(record.data_wait_share * steps, rel=0.02)
    assert record.peak_memory_mb > 100
    assert json.dumps(record.to_dict())


def test_training_is_the_same_where_the_device_takes_the_last_steps_of_augmentation(train, monkeypatch):
    strong = {"augmentation": {"random_erasing": 0.5, "mixup": 0.4, "cutmix": 0.4}, "optimizer": "sgd"}
    plan = [
        Stage("head", "head", epochs=1, learning_rate=0.1, **strong),
        Stage("all", "all", epochs=2, learning_rate=1e-3, **strong),
    ]
    usual = train(plan)
    monkeypatch.setattr(ThawTrainer, "_finishes_batches", lambda self: True)
    seen = []
    step = ThawTrainer.training_step

    def noting(self, model, inputs, *others):
        seen.append(inputs["pixel_values"].dtype)
        return step(self, model, inputs, *others)

    monkeypatch.setattr(ThawTrainer, "training_step", noting)
    finished = train(plan, "on device")
    assert set(seen) == {torch.uint8}
    assert losses(finished) == losses(usual)
    for name, value in usual.model.state_dict().items():
        assert torch.equal(finished.model.state_dict()[name], value), name


def test_a_collator_of_the_users_gets_images(train, untrained, splits, processor, tmp_path, cache):
    shapes = set()

    def collate_own(examples):
        shapes.update(tuple(example["pixel_values"].shape) for example in examples)
        return {key: torch.stack([example[key] for example in examples]) for key in examples[0]}

    trainer = ThawTrainer(
        model=copy.deepcopy(untrained),
        args=ThawTrainingArguments(output_dir=str(tmp_path / "own"), plan=[HEAD], use_cpu=True, report_to="none",
                                   per_device_train_batch_size=8, disable_tqdm=True),
        train_dataset=splits["train"], eval_dataset=splits["validation"], processing_class=processor,
        data_collator=collate_own,
    )  # fmt: skip
    trainer.train()
    assert shapes == {(3, 32, 32)}
    assert trainer.stage_records[0].frozen_part["cached"] == []


def test_rows_go_through_their_views_epoch_by_epoch():
    values = np.arange(2 * 3 * 4, dtype=np.float32).reshape(2, 3, 4)
    rows = BorderRows(values, np.array([[0, 1, 2], [0, 1, 2]]), torch.float32)
    assert len(rows) == 3
    assert rows[1][BORDER_VALUES].tolist() == values[0, 1].tolist()
    rows.set_epoch(3)
    batch = rows.__getitems__([2, (0, 1)])
    assert batch[BORDER_VALUES].tolist() == [values[1, 2].tolist(), values[0, 0].tolist()]
    assert batch["labels"].tolist() == [2, 0]
    halves = torch.randn(1, 3, 4).bfloat16()
    rows = BorderRows(halves.view(torch.int16).numpy(), np.zeros((1, 3), np.int64), torch.bfloat16)
    assert torch.equal(rows[2][BORDER_VALUES], halves[0, 2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cache_gb": -1.0}, "cache_gb is -1.0; write 0 for no cache"),
        ({"cache_gb": float("nan")}, "cache_gb is nan"),
        ({"frozen_precision": "bf16"}, "unknown frozen_precision 'bf16'. Did you mean 'bfloat16'"),
        ({"live_precision": "float16"}, "unknown live_precision 'float16'. Did you mean 'bfloat16'"),
    ],
)
def test_settings_that_do_not_work_are_refused(tmp_path, options, message):
    with pytest.raises(PlanError, match=message):
        ThawTrainingArguments(output_dir=str(tmp_path), **options)
