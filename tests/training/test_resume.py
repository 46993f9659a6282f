"""Going on with runs that were interrupted: which checkpoint is taken, and what a run has to remember.

Interrupted by exceptions here; test_kill_anywhere.py kills processes.
"""

import copy
import json
import shutil

import pytest
import torch
import transformers
from interruptions import Interrupt, InterruptionError
from transformers import EarlyStoppingCallback

from torchthaw import (
    Stage,
    ThawTrainer,
    ThawTrainingArguments,
    TorchvisionForImageClassification,
    TorchvisionImageProcessor,
    load_image_dataset,
)
from torchthaw.errors import PlanError
from torchthaw.training.checkpoints import MANIFEST, why_incomplete
from torchthaw.training.resume import JOURNAL_FILE, has_checkpoint, read_journal

ARCHITECTURE = "shufflenet_v2_x0_5"
CLASSES = ["ant", "bee", "cat"]
# 3 steps an epoch.
PLAN = [
    Stage("head", "head", epochs=1, learning_rate=1e-2),
    Stage("last block", 1, epochs=2, learning_rate=3e-3, batch_norm="train"),
]
EVERY_STEP = {"save_strategy": "steps", "save_steps": 1, "load_best_model_at_end": False}
STEPS = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}


class Start(transformers.TrainerCallback):
    """Notes the step that a run goes on from."""

    def on_train_begin(self, args, state, control, **_):
        self.step = state.global_step


@pytest.fixture(scope="module")
def untrained():
    torch.manual_seed(0)
    return TorchvisionForImageClassification.from_torchvision(ARCHITECTURE, weights="builtin", id2label=CLASSES)


def samples(number=12, seed=0):
    random = torch.Generator().manual_seed(seed)
    labels = [torch.tensor(index % 3) for index in range(number)]
    return [{"pixel_values": torch.randn(3, 32, 32, generator=random) + label - 1, "labels": label} for label in labels]


@pytest.fixture
def make(untrained, tmp_path):
    """Returns a function that makes the trainer of a run in a folder, `run` by default."""

    def new_trainer(callbacks=(), *, folder="run", train=None, eval_dataset=None, processor=None, **options):
        defaults = {
            "plan": PLAN, "per_device_train_batch_size": 4, "metric_for_best_model": "loss", "save_total_limit": None,
            "use_cpu": True, "disable_tqdm": True, "report_to": "none",
        }  # fmt: skip
        trainer = ThawTrainer(
            model=copy.deepcopy(untrained),
            args=ThawTrainingArguments(output_dir=str(tmp_path / folder), **{**defaults, **options}),
            train_dataset=samples() if train is None else train,
            eval_dataset=eval_dataset or samples(9, seed=1),
            processing_class=processor,
            callbacks=list(callbacks),
        )
        trainer.remove_callback(transformers.PrinterCallback)
        return trainer

    return new_trainer


def interrupt(trainer, event, step, **options):
    trainer.add_callback(Interrupt(event, step))
    with pytest.raises(InterruptionError):
        trainer.train(**options)


def resume(trainer, checkpoint=True):
    """Goes on with a run; returns the step that it went on from."""
    start = Start()
    trainer.add_callback(start)
    trainer.train(resume_from_checkpoint=checkpoint)
    return start.step


def checkpoints(folder):
    return sorted(int(path.name.removeprefix("checkpoint-")) for path in folder.glob("checkpoint-*"))


def assert_same(trainer, expected):
    weights, wanted = trainer.model.state_dict(), expected.model.state_dict()
    assert [name for name in wanted if not torch.equal(weights[name], wanted[name])] == []
    assert history(trainer) == history(expected)
    assert records(trainer) == records(expected)


def history(trainer):
    timed = ("_runtime", "_per_second")
    return [{key: line[key] for key in line if not key.endswith(timed)} for line in trainer.state.log_history]


def records(trainer):
    timed = ("seconds", "train_images_per_second", "step_images_per_second", "data_wait_share", "peak_memory_mb")
    described = [record.to_dict() for record in trainer.stage_records]
    return [{key: record[key] for key in record if key not in timed} for record in described]


# Which checkpoint


def test_damaged_checkpoints_are_passed_over_with_their_reasons(make, tmp_path):
    expected = make(folder="expected")
    expected.train()
    interrupt(make(**EVERY_STEP), "on_step_end", 9)
    trainer = make()
    with pytest.raises(PlanError, match="load_best_model_at_end was false and is true"):
        resume(trainer)
    shutil.rmtree(tmp_path / "run")

    interrupt(make(), "on_train_end", 9)
    run = tmp_path / "run"
    assert checkpoints(run) == [3, 6, 9]
    weights = run / "checkpoint-9" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    (run / "checkpoint-6" / MANIFEST).unlink()
    trainer = make()
    assert resume(trainer) == 3
    assert_same(trainer, expected)
    assert checkpoints(run) == [3, 6, 9]
    assert [why_incomplete(run / f"checkpoint-{step}") for step in (3, 6, 9)] == [None] * 3, "they are made anew"

    (run / "checkpoint-9" / MANIFEST).write_text("{")
    optimizer = run / "checkpoint-6" / "optimizer.pt"
    optimizer.write_bytes(optimizer.read_bytes()[:-1])
    (run / "checkpoint-3" / "rng_state.pth").unlink()
    assert not has_checkpoint(run)
    with pytest.raises(PlanError) as error:
        make().train(resume_from_checkpoint=True)
    for reason in (
        f"checkpoint-9: its {MANIFEST} cannot be read",
        "checkpoint-6: optimizer.pt has ",
        "checkpoint-3: rng_state.pth is missing",
        "leave resume_from_checkpoint out to start anew",
    ):
        assert reason in str(error.value)


def test_a_named_checkpoint_is_taken(make, tmp_path):
    expected = make(folder="expected")
    expected.train()
    interrupt(make(), "on_stage_end", 9)
    for named, step in ((str(tmp_path / "run" / "checkpoint-3"), 3), (tmp_path / "run" / "checkpoint-6", 6)):
        trainer = make()
        assert resume(trainer, named) == step
        assert_same(trainer, expected)


def test_a_checkpoint_elsewhere_is_taken(make, tmp_path):
    """It was made in an epoch's last step, so that the first thing that comes is the epoch's end."""
    expected = make(folder="expected", **EVERY_STEP)
    expected.train()
    interrupt(make(**EVERY_STEP), "on_save", 6)
    shutil.copytree(tmp_path / "run" / "checkpoint-6", tmp_path / "copies" / "checkpoint-6")
    trainer = make(folder="elsewhere", **EVERY_STEP)
    assert resume(trainer, str(tmp_path / "copies" / "checkpoint-6")) == 6
    assert_same(trainer, expected)
    assert checkpoints(tmp_path / "elsewhere") == [7, 8, 9]


def test_what_is_no_checkpoint_is_refused(make, tmp_path):
    with pytest.raises(PlanError, match=r"no whole checkpoint in .* start anew"):
        make().train(resume_from_checkpoint=True)
    with pytest.raises(PlanError, match="there is no such folder"):
        make().train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    interrupt(make(save_only_model=True), "on_save", 3)
    interrupt(make(save_only_model=True), "on_save", 6)
    for wanted in (True, str(tmp_path / "run" / "checkpoint-3")):
        with pytest.raises(PlanError, match="save_only_model"):
            make(save_only_model=True).train(resume_from_checkpoint=wanted)


@pytest.mark.parametrize(
    ("options", "difference"),
    [
        ({"seed": 7}, "seed was 42 and is 7"),
        ({"per_device_train_batch_size": 6}, "images_per_step[0] was 4 and is 6"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps was 1 and is 2"),
        ({"train": samples(13)}, "images.train.number was 12 and is 13"),
        ({"gate": "significant"}, 'gate was "best" and is "significant"'),
        ({"max_grad_norm": 0.5}, "max_grad_norm was 1.0 and is 0.5"),
        ({"plan": [PLAN[0]]}, "plan.stages was"),
        ({"plan": [Stage("head", "head", learning_rate=1e-3), PLAN[1]]}, "plan.stages[0].learning_rate was"),
        ({"plan": [PLAN[0], Stage("all", 1, epochs=2, learning_rate=3e-3)]}, 'plan.stages[1].batch_norm was "train"'),
    ],
)
def test_another_run_is_refused_and_left_as_it_is(make, tmp_path, options, difference):
    interrupt(make(), "on_step_begin", 3)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(PlanError) as error:
        make(**options).train(resume_from_checkpoint=True)
    assert difference in str(error.value)
    assert "checkpoint-3 belongs to another run" in str(error.value)
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_other_images_are_refused(make, make_image_folder):
    processor = TorchvisionImageProcessor.from_torchvision(ARCHITECTURE, weights="builtin", image_size=32)
    photos = load_image_dataset(make_image_folder(per_class=4))["train"]
    interrupt(make(train=photos, processor=processor), "on_step_begin", 3)
    others = photos.select([*range(1, 12), 0])
    with pytest.raises(PlanError, match="images.train.names_and_labels was"):
        make(train=others, processor=processor).train(resume_from_checkpoint=True)


def test_a_finished_run_ends_with_the_same_weights_again(make, tmp_path):
    for limit in (None, 1):
        expected = make(folder=f"{limit}", save_total_limit=limit)
        expected.train()
        assert read_journal(tmp_path / f"{limit}")["finished"]
        trainer = make(folder=f"{limit}", save_total_limit=limit)
        assert resume(trainer) == 9, "nothing is trained again"
        assert_same(trainer, expected)
        assert trainer.state.best_metric == expected.state.best_metric


def test_a_new_run_never_goes_on_from_an_older_runs_checkpoints(make, tmp_path):
    make(seed=1).train()
    run = tmp_path / "run"
    assert has_checkpoint(run)
    interrupt(make(), "on_step_end", 2)
    assert not has_checkpoint(run)
    with pytest.raises(PlanError, match="checkpoint-9: it belongs to another run"):
        make().train(resume_from_checkpoint=True)
    interrupt(make(), "on_step_end", 5)
    expected = make(folder="expected")
    expected.train()
    trainer = make()
    assert resume(trainer) == 3
    assert_same(trainer, expected)


def test_a_journal_that_cannot_be_read_costs_nothing(make, tmp_path):
    expected = make(folder="expected")
    expected.train()
    interrupt(make(), "on_step_end", 5)
    (tmp_path / "run" / JOURNAL_FILE).write_text('{"run_id": "a')
    assert has_checkpoint(tmp_path / "run")
    trainer = make()
    assert resume(trainer) == 3
    assert_same(trainer, expected)


# How many checkpoints stay


def test_the_limit_keeps_the_best_and_the_last(make, tmp_path):
    """The second stage only gets worse, so that the best weights are the first stage's."""
    plan = [PLAN[0], Stage("wild", 1, epochs=3, learning_rate=1.0)]
    expected = make(plan=plan, save_total_limit=2, folder="expected")
    expected.train()
    assert [record.accepted for record in expected.stage_records] == [True, False]
    assert checkpoints(tmp_path / "expected") == [3, 12]
    interrupt(make(plan=plan, save_total_limit=2), "on_save", 9)
    assert checkpoints(tmp_path / "run") == [3, 9]
    trainer = make(plan=plan, save_total_limit=2)
    assert resume(trainer) == 9
    assert_same(trainer, expected)
    assert checkpoints(tmp_path / "run") == [3, 12]
    assert trainer.state.best_model_checkpoint == str(tmp_path / "run" / "checkpoint-3")


def test_a_run_that_was_moved_keeps_its_best_checkpoint(make, tmp_path):
    plan = [PLAN[0], Stage("wild", 1, epochs=3, learning_rate=1.0)]
    interrupt(make(plan=plan, save_total_limit=1, folder="before"), "on_save", 6)
    (tmp_path / "before").rename(tmp_path / "after")
    assert resume(make(plan=plan, save_total_limit=1, folder="after")) == 6
    assert checkpoints(tmp_path / "after") == [3, 12]
    assert not (tmp_path / "before").exists()


def test_a_damaged_checkpoint_ahead_does_not_count(make, tmp_path):
    """Else each checkpoint that is made before its step would be removed at once, as the older one."""
    options = {**EVERY_STEP, "save_total_limit": 1}
    expected = make(folder="expected", **options)
    expected.train()
    interrupt(make(**{**options, "save_total_limit": None}), "on_step_end", 7)
    run = tmp_path / "run"
    for step in (5, 6):
        (run / f"checkpoint-{step}" / "model.safetensors").write_bytes(b"")
    interrupt(make(**options), "on_step_begin", 5, resume_from_checkpoint=str(run / "checkpoint-2"))
    assert checkpoints(run) == [3, 5, 6], "the best, the last, and the damaged one"
    trainer = make(**options)
    assert resume(trainer) == 5
    assert_same(trainer, expected)


def test_a_checkpoint_is_never_taken_away_to_write_the_same_step(make, tmp_path):
    """A callback that asks for a checkpoint at the end of an epoch gets one where its last step was saved already."""

    class SaveAtTheEnd(transformers.TrainerCallback):
        def on_epoch_end(self, args, state, control, **_):
            control.should_save = True

    options = {**EVERY_STEP, "save_total_limit": 1}
    expected = make([SaveAtTheEnd()], folder="expected", **options)
    expected.train()

    class CutOff(SaveAtTheEnd):
        """The next checkpoint that is begun after step 6 does not come to its end."""

        def on_epoch_end(self, args, state, control, **_):
            control.should_save = state.global_step == 6
            if control.should_save:
                trainer._save_rng_state = self.fail

        def fail(self, *args):
            raise InterruptionError

    trainer = make([CutOff()], **options)
    with pytest.raises(InterruptionError):
        trainer.train()
    trainer = make([SaveAtTheEnd()], **options)
    assert resume(trainer) == 6
    assert_same(trainer, expected)


# What a run remembers


def all_interruptions(make, options, points, callbacks=list):
    """Interrupts and resumes a run at several points; all must end as the run that nothing interrupted."""
    expected = make(callbacks(), folder="expected", **options)
    expected.train()
    went_on = {}
    for event, step in points:
        folder = f"{event}-{step}"
        interrupt(make(callbacks(), folder=folder, **options), event, step)
        trainer = make(callbacks(), folder=folder, **options)
        went_on[event, step] = resume(trainer)
        assert_same(trainer, expected)
    return expected, went_on


def test_early_stopping_goes_on_counting(make):
    """At a rate that moves nothing no validation is better than the first: the third one after it stops the run."""
    plan = [Stage("head", "head", epochs=9, learning_rate=1e-12), PLAN[1]]
    expected, went_on = all_interruptions(
        make, {"plan": plan}, [("on_step_begin", 9), ("on_save", 12)], lambda: [EarlyStoppingCallback(3, 1e-3)]
    )
    assert went_on == {("on_step_begin", 9): 9, ("on_save", 12): 12}
    assert expected.state.global_step == 12
    assert len(expected.stage_records) == 1


class Stop(transformers.TrainerCallback):
    """Stops the run, or the epoch, after a step."""

    def __init__(self, step, what):
        self.step, self.what = step, what

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.step:
            setattr(control, self.what, True)


@pytest.mark.parametrize("point", [("on_step_end", 4), ("on_save", 5), ("on_stage_end", 5), ("on_train_end", 5)])
def test_a_run_that_a_callback_stops_is_over(make, point):
    expected, went_on = all_interruptions(make, EVERY_STEP, [point], lambda: [Stop(5, "should_training_stop")])
    assert expected.state.global_step == 5
    assert list(went_on.values()) == [3 if point[1] == 4 else 5]


@pytest.mark.parametrize("options", [EVERY_STEP, {}])
def test_an_epoch_that_a_callback_ends_is_over(make, options):
    points = [("on_save", 5), ("on_step_begin", 5), ("on_step_end", 7)] if options else [("on_save", 5)]
    expected, _ = all_interruptions(make, options, points, lambda: [Stop(5, "should_epoch_stop")])
    assert expected.state.epoch == 3
    assert expected.state.global_step == 8


@pytest.mark.parametrize(
    ("options", "last_step", "points"),
    [
        ({}, 9, [("on_step_begin", 6), ("on_save", 9), ("on_stage_end", 9), ("on_step_begin", 9)]),
        (STEPS, 3, [("on_step_begin", 2), ("on_save", 3), ("on_stage_end", 3), ("on_step_begin", 3)]),
        ({**STEPS, "save_steps": 2}, 3, [("on_step_begin", 2), ("on_stage_end", 3), ("on_step_end", 4)]),
    ],
)
def test_patience_goes_on_counting(make, options, last_step, points):
    """At a rate that moves nothing no validation is better than the stage's first: two after it end the stage."""
    plan = [
        Stage("head", "head", epochs=9, learning_rate=1e-12, patience=2),
        Stage("last block", 1, epochs=1, learning_rate=1e-3),
    ]
    expected, _ = all_interruptions(make, {"plan": plan, **options}, points)
    assert expected.stage_records[0].steps == last_step
    assert expected.stage_records[0].ended_early == "2 validations in a row without a better loss"
    assert len(expected.stage_records) == 2


class Poison(transformers.TrainerCallback):
    """Makes the loss NaN in step 5, if the rate is the one that was planned."""

    def on_step_begin(self, args, state, control, model, optimizer, **_):
        if state.global_step == 4 and max(group["lr"] for group in optimizer.param_groups) > 2e-3:
            with torch.no_grad():
                model.backbone.fc.weight.fill_(torch.nan)


@pytest.mark.parametrize("options", [EVERY_STEP, {}])
def test_a_stage_that_runs_again_at_lower_rates(make, options):
    last = Stage("last block", 1, epochs=2, learning_rate=3e-3, schedule="constant", on_nan="retry")
    points = [("on_step_end", 4), ("on_step_end", 5), ("on_step_end", 7), ("on_save", 7 if options else 10)]
    expected, _ = all_interruptions(make, {"plan": [PLAN[0], last], **options}, points, lambda: [Poison()])
    assert "nan" in expected.stage_records[1].ended_early
    assert expected.state.global_step == 10, "one step before the failure, and six after it"


def test_steps_that_accumulate_gradients(make):
    """10 images in batches of 2 are 3 steps, of 2, 2 and 1 batches."""
    options = {**EVERY_STEP, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "train": samples(10)}
    points = [("on_step_end", 2), ("on_save", 3), ("on_substep_end", 4), ("on_step_end", 6), ("on_step_begin", 8)]
    expected, went_on = all_interruptions(make, options, points)
    assert expected.state.global_step == 9
    assert list(went_on.values()) == [1, 3, 4, 5, 8]


def test_log_lines_that_come_between_checkpoints(make):
    options = {**EVERY_STEP, "save_steps": 2, "logging_strategy": "steps", "logging_steps": 5}
    points = [("on_step_begin", 3), ("on_step_end", 5), ("on_step_begin", 8), ("on_log", 9)]
    expected, went_on = all_interruptions(make, options, points)
    assert [line["step"] for line in expected.state.log_history if "loss" in line] == [3, 5, 9]
    assert list(went_on.values()) == [3, 4, 8, 8]


def test_stages_in_steps_with_batches_of_their_own(make):
    plan = [
        Stage("head", "head", steps=5, learning_rate=1e-2, batch_size=3),
        Stage("last block", 1, steps=4, learning_rate=3e-3, batch_size=5, batch_norm="train"),
        Stage("all", "all", epochs=1, learning_rate=1e-3, optimizer="sgd"),
    ]
    points = [("on_step_end", 2), ("on_save", 4), ("on_save", 5), ("on_step_begin", 7), ("on_stage_end", 9)]
    expected, went_on = all_interruptions(make, {"plan": plan, **EVERY_STEP}, points)
    assert [record.steps for record in expected.stage_records] == [5, 4, 3]
    assert list(went_on.values()) == [1, 4, 5, 7, 9]


def test_a_stream_goes_on_in_the_middle_of_a_pass(make, make_image_folder):
    """12 images are 3 steps a pass: step 5 is within the second one."""
    processor = TorchvisionImageProcessor.from_torchvision(ARCHITECTURE, weights="builtin", image_size=32)
    photos = load_image_dataset(make_image_folder(per_class=4))["train"]
    plan = [
        Stage("head", "head", steps=7, learning_rate=1e-2),
        Stage("last block", 1, steps=5, learning_rate=3e-3, batch_norm="train"),
    ]
    options = {"plan": plan, "train": photos.to_iterable_dataset(num_shards=3), "processor": processor, **EVERY_STEP}
    points = [("on_step_end", 2), ("on_save", 3), ("on_step_begin", 5), ("on_stage_end", 7), ("on_step_end", 11)]
    expected, went_on = all_interruptions(make, options, points)
    assert [record.steps for record in expected.stage_records] == [7, 5]
    assert list(went_on.values()) == [1, 3, 5, 7, 10]


def test_a_schedule_that_follows_the_metric(make):
    plan = [
        Stage(
            "head", "head", epochs=6, learning_rate=1.0, schedule="reduce_lr_on_plateau", schedule_args={"patience": 0}
        )
    ]
    expected, _ = all_interruptions(make, {"plan": plan}, [("on_step_end", 7), ("on_step_end", 13)])
    rates = [line["learning_rate"] for line in expected.state.log_history if "learning_rate" in line]
    assert len(set(rates)) > 2


def test_a_run_without_validation(make):
    options = {"eval_strategy": "no", "load_best_model_at_end": False, "metric_for_best_model": None}
    expected, _ = all_interruptions(make, options, [("on_step_end", 5), ("on_stage_end", 9)])
    assert [record.best_metric for record in expected.stage_records] == [None, None]


def test_checkpoints_of_the_best_weights_only(make):
    plan = [PLAN[0], Stage("wild", 1, epochs=3, learning_rate=1.0)]
    options = {"plan": plan, "save_strategy": "best"}
    _, went_on = all_interruptions(make, options, [("on_step_end", 8), ("on_train_end", 12)])
    assert went_on["on_step_end", 8] in (3, 6)


def test_several_validation_sets(make):
    """What was validated is known by its set's name, also where nothing is validated after the run was resumed."""
    sets = {"first": samples(9, seed=1), "second": samples(9, seed=2)}
    options = {"eval_dataset": sets, "metric_for_best_model": "second_accuracy"}
    points = [("on_step_end", 5), ("on_save", 9), ("on_stage_end", 9)]
    expected, went_on = all_interruptions(make, options, points)
    assert list(went_on.values()) == [3, 9, 9]
    assert [record.comparison["metric"] for record in expected.stage_records] == ["accuracy", "accuracy"]


def test_the_same_trainer_goes_on(make):
    """As in a notebook, where a cell is interrupted."""
    expected = make(folder="expected")
    expected.train()
    trainer = make()
    interrupt(trainer, "on_step_end", 8)
    trainer.remove_callback(Interrupt)
    assert resume(trainer) == 6
    assert_same(trainer, expected)


def test_the_journal_tells_how_far_a_run_came(make, tmp_path):
    interrupt(make(), "on_step_end", 5)
    journal = json.loads((tmp_path / "run" / JOURNAL_FILE).read_text())
    assert [stage["name"] for stage in journal["stages"]] == ["head"]
    assert not journal["finished"]
    resume(make())
    after = json.loads((tmp_path / "run" / JOURNAL_FILE).read_text())
    assert [stage["name"] for stage in after["stages"]] == ["head", "last block"]
    assert after["finished"]
    assert after["run_id"] == journal["run_id"]
