"""A staged run is one run to all that watch it: reporters, the Trainer's state, callbacks."""

import itertools
import json

import pytest
import torch
import transformers
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import TrainerCallback, TrainerState

from torchthaw import Stage, ThawTrainer, ThawTrainingArguments, TorchvisionForImageClassification

ARCHITECTURE = "shufflenet_v2_x0_5"
STEPS = 3  # of an epoch
PLAN = [
    Stage("head", "head", epochs=2, learning_rate=1e-3),
    Stage("block", 1, epochs=2, learning_rate={"head": 3e-4, "backbone": 1e-4}),
    Stage("all", "all", epochs=1, learning_rate=1e-4, layer_decay=0.5),
]
TOTAL = 5 * STEPS


@pytest.fixture(scope="module")
def data():
    """Noise in which the class shows as a shift of one channel."""
    random = torch.Generator().manual_seed(0)
    rows = []
    for row in range(4 * STEPS + 9):
        pixels = torch.randn(3, 32, 32, generator=random)
        pixels[row % 3] += 0.3
        rows.append({"pixel_values": pixels, "labels": torch.tensor(row % 3)})
    return rows[: 4 * STEPS], rows[4 * STEPS :]


def new_model():
    torch.manual_seed(0)
    return TorchvisionForImageClassification.from_torchvision(ARCHITECTURE, "builtin", id2label=["a", "b", "c"])


def new_trainer(data, folder, *, plan=PLAN, callbacks=(), eval_dataset=None, **options):
    defaults = {"per_device_train_batch_size": 4, "report_to": "none", "use_cpu": True, "disable_tqdm": True}
    trainer = ThawTrainer(
        new_model(),
        ThawTrainingArguments(str(folder), plan=plan, **{**defaults, **options}),
        train_dataset=data[0],
        eval_dataset=eval_dataset or data[1],
        callbacks=list(callbacks),
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


# Reporters and state


def test_tensorboard_shows_one_run(tmp_path, data, monkeypatch):
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    options = {"report_to": "tensorboard", "logging_strategy": "steps", "logging_steps": 1}
    trainer = new_trainer(data, tmp_path, **options)
    trainer.train()
    files = list(tmp_path.rglob("*tfevents*"))
    assert len(files) == 1
    events = EventAccumulator(str(files[0]), size_guidance={"scalars": 0}).Reload()
    scalars = {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}
    for tag, points in scalars.items():
        steps = [point.step for point in points]
        assert steps == sorted(set(steps)), tag
    assert [point.step for point in scalars["train/loss"]] == list(range(1, TOTAL + 1))
    assert [point.step for point in scalars["eval/accuracy"]] == [epoch * STEPS for epoch in range(6)]
    groups = list(trainer.model.layer_groups())
    firsts = {"head": 1, groups[-2]: 2 * STEPS + 1} | dict.fromkeys(groups[:-2], 4 * STEPS + 1)
    for group in groups:
        assert [point.step for point in scalars[f"train/learning_rate/{group}"]] == list(
            range(firsts[group], TOTAL + 1)
        )
    stages = {point.step: point.value for point in scalars["train/stage"]}
    assert stages == {step: (step > 2 * STEPS) + (step > 4 * STEPS) for step in range(1, TOTAL + 1)}
    rates = {entry["step"]: entry["learning_rate/head"] for entry in trainer.state.log_history if "loss" in entry}
    logged = {point.step: point.value for point in scalars["train/learning_rate/head"]}
    assert logged == pytest.approx(rates)


def test_the_state_of_every_checkpoint_is_that_of_the_whole_run(tmp_path, data):
    trainer = new_trainer(
        data, tmp_path, save_total_limit=None, logging_strategy="steps", logging_steps=2, report_to="none"
    )
    trainer.train()
    folders = sorted(tmp_path.glob("checkpoint-*"), key=lambda folder: int(folder.name.split("-")[1]))
    assert [folder.name for folder in folders] == [f"checkpoint-{epoch * STEPS}" for epoch in range(1, 6)]
    histories = []
    for number, folder in enumerate(folders, start=1):
        state = TrainerState.load_from_json(str(folder / "trainer_state.json"))
        assert (state.global_step, state.epoch) == (number * STEPS, number)
        assert (state.max_steps, state.num_train_epochs) == (TOTAL, 5)
        steps = [entry["step"] for entry in state.log_history]
        epochs = [entry["epoch"] for entry in state.log_history]
        assert steps == sorted(steps)
        assert epochs == sorted(epochs) == pytest.approx([step / STEPS for step in steps])
        stages = [entry["stage"] for entry in state.log_history]
        assert stages == [(step > 2 * STEPS) + (step > 4 * STEPS) for step in steps]
        assert [entry["stage_name"] for entry in state.log_history] == [PLAN[stage].name for stage in stages]
        histories.append(state.log_history)
    for earlier, later in itertools.pairwise(histories):
        assert later[: len(earlier)] == earlier, "each goes on from the one before"
    assert trainer.state.log_history[: len(histories[-1])] == histories[-1]


# Callbacks


EVENTS = (
    "train_begin", "train_end", "epoch_begin", "epoch_end", "step_begin", "step_end", "pre_optimizer_step",
    "optimizer_step", "evaluate", "save", "log", "prediction_step", "stage_begin", "stage_end",
)  # fmt: skip


class Events(TrainerCallback):
    """Notes every event, with the stage that the state names and the one that is passed."""

    def __init__(self):
        self.seen = []

    def named(self, *names):
        return [event[1:] for event in self.seen if event[0] in names]

    def order(self):
        once = ("train_begin", "train_end", "stage_begin", "stage_end")
        return [(event[0], event[2]) for event in self.seen if event[0] in once]


def _note(name):
    def handle(self, args, state, control, stage=None, record=None, **kwargs):
        passed = getattr(stage, "name", None), getattr(record, "name", None)
        self.seen.append((name, state.stage_index, state.stage_name, state.global_step, *passed))

    return handle


for _name in EVENTS:
    setattr(Events, f"on_{_name}", _note(_name))

WHOLE = [("train_begin", "head")] + [
    (event, stage.name) for stage in PLAN for event in ("stage_begin", "stage_end")
] + [("train_end", "all")]  # fmt: skip


def test_callbacks_see_one_run_and_know_the_stage_in_every_event(tmp_path, data):
    events = Events()
    new_trainer(data, tmp_path, callbacks=[events], gate="off").train()
    assert {event[0] for event in events.seen} == set(EVENTS)
    assert events.order() == WHOLE
    borders = {"head": (0, 2 * STEPS), "block": (2 * STEPS, 4 * STEPS), "all": (4 * STEPS, TOTAL)}
    for index, name, step, passed, recorded in events.named("stage_begin", "stage_end"):
        assert PLAN[index].name == name == passed
        assert recorded in (None, name)
        assert step in borders[name]
    for index, name, step, *_ in events.named(*EVENTS):
        assert PLAN[index].name == name
        assert borders[name][0] <= step <= borders[name][1]
    assert [event[1:3] for event in events.named("epoch_begin")] == [
        ("head", 0), ("head", 3), ("block", 6), ("block", 9), ("all", 12)
    ]  # fmt: skip
    assert [event[2] for event in events.named("save")] == [3, 6, 9, 12, 15]


def test_a_run_resumed_at_its_very_end_begins_and_ends_once(tmp_path, data):
    whole = new_trainer(data, tmp_path)
    whole.train()
    events = Events()
    again = new_trainer(data, tmp_path, callbacks=[events])
    output = again.train(resume_from_checkpoint=True)
    assert events.order() == [("train_begin", "all"), ("stage_end", "all"), ("train_end", "all")]
    assert output.global_step == TOTAL
    assert all(torch.equal(one, other) for one, other in zip(
        whole.model.state_dict().values(), again.model.state_dict().values(), strict=True
    ))  # fmt: skip
    assert json.loads((tmp_path / "journal.json").read_text())["finished"] is True


def test_a_run_resumed_at_a_border_begins_before_the_stage_ends(tmp_path, data):
    class Interrupt(TrainerCallback):
        def on_stage_end(self, args, state, control, **kwargs):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        new_trainer(data, tmp_path, callbacks=[Interrupt()]).train()
    events = Events()
    new_trainer(data, tmp_path, callbacks=[events]).train(resume_from_checkpoint=True)
    assert events.order() == [WHOLE[0], *WHOLE[2:]], "all but the beginning of the first stage, which was before"


# Several validation sets


@pytest.mark.parametrize("name", ["a", "b"])
def test_one_of_several_validation_sets_decides(tmp_path, data, name):
    sets = {"a": data[1], "b": data[1][:4]}
    trainer = new_trainer(data, tmp_path, eval_dataset=sets, metric_for_best_model=f"eval_{name}_accuracy")
    trainer.train()
    lines = {
        key: {entry["step"]: entry[key] for entry in trainer.state.log_history if key in entry}
        for key in ("eval_a_accuracy", "eval_b_accuracy")
    }
    assert [list(values) for values in lines.values()] == [[epoch * STEPS for epoch in range(6)]] * 2
    head = trainer.stage_records[0]
    decisive = lines[f"eval_{name}_accuracy"]
    assert head.best_metric == max(decisive[STEPS], decisive[2 * STEPS])
    assert head.comparison["metric"] == "accuracy"
    assert head.comparison["before"] == decisive[0]
    images = len(sets[name])
    assert head.comparison["difference"] == pytest.approx(
        (head.comparison["wins"] - head.comparison["losses"]) / images
    )
    assert trainer.evaluate(sets[name])["eval_accuracy"] == trainer.state.best_metric
