"""Profiles of real staged runs, and what is concluded from where the time goes."""

import gzip
import json
import time

import pytest
import torch
import yaml
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import TrainerCallback

from torchthaw import Stage, ThawTrainer, ThawTrainingArguments, TorchvisionForImageClassification
from torchthaw.recipe import load_recipe
from torchthaw.training.bottlenecks import PARTS, Circumstances, find_bottleneck
from torchthaw.training.profiling import ProfileCallback
from torchthaw.training.step_times import Step, step_shares, trace_window

PLAN = [
    Stage("head", unfreeze="head", epochs=2, learning_rate=1e-2),
    Stage("last / block", unfreeze=1, epochs=1, learning_rate=1e-3),
    Stage("all", unfreeze="all", epochs=1, learning_rate=1e-3),
]
ALL = [Stage("all", unfreeze="all", epochs=2, learning_rate=1e-3)]


class Samples(torch.utils.data.Dataset):
    """Random images, each of which takes its time."""

    def __init__(self, number=24, seconds=0.0):
        random = torch.Generator().manual_seed(0)
        self.pixels = torch.randn(number, 3, 32, 32, generator=random)
        self.seconds = seconds

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, index):
        time.sleep(self.seconds)
        return {"pixel_values": self.pixels[index], "labels": torch.tensor(index % 3)}


def new_trainer(tmp_path, callbacks=(), *, data=None, plan=ALL, **options):
    torch.manual_seed(0)
    model = TorchvisionForImageClassification.from_torchvision("shufflenet_v2_x0_5", weights=None, id2label=list("abc"))
    arguments = ThawTrainingArguments(
        output_dir=str(tmp_path / "stages"), plan=plan, per_device_train_batch_size=8, disable_tqdm=True, use_cpu=True,
        report_to=[], dataloader_num_workers=0, save_strategy="no", load_best_model_at_end=False, gate="off", **options,
    )  # fmt: skip
    data = data or Samples()
    return ThawTrainer(model, arguments, data, Samples(9), callbacks=list(callbacks))


def events_of(file):
    with gzip.open(file, "rt") as stream:
        return [event.get("name", "") for event in json.load(stream)["traceEvents"] if event.get("ph") == "X"]


def test_each_stage_gets_a_trace_and_shares_and_nothing_that_trains_changes(tmp_path):
    plain = new_trainer(tmp_path / "plain", plan=PLAN)
    plain.train()
    profiler = ProfileCallback(tmp_path, steps=2)
    trainer = new_trainer(tmp_path, [profiler], plan=PLAN)
    hooks = (len(trainer.model._forward_hooks), len(trainer.model._forward_pre_hooks))
    trainer.train()
    for name, tensor in plain.model.state_dict().items():
        assert torch.equal(tensor, trainer.model.state_dict()[name]), name
    assert (len(trainer.model._forward_hooks), len(trainer.model._forward_pre_hooks)) == hooks

    summary = json.loads((tmp_path / "profile" / "summary.json").read_text())
    assert summary == profiler.summary
    assert [stage["name"] for stage in summary["stages"]] == ["head", "last / block", "all"]
    assert [stage["steps"] for stage in summary["stages"]] == [6, 3, 3]
    assert [stage["trace"] for stage in summary["stages"]] == [
        "trace-1-head.json.gz", "trace-2-last-block.json.gz", "trace-3-all.json.gz",
    ]  # fmt: skip
    for stage in summary["stages"]:
        assert sum(stage["shares"].values()) == pytest.approx(1, abs=1e-3)
        assert stage["shares"]["forward"] > 0
        assert stage["shares"]["backward"] > 0
        assert stage["step_seconds"] * stage["images_per_second"] == pytest.approx(8, rel=0.01)
        assert 0 < stage["in_steps"] <= 1
        shares = [operator["share"] for operator in stage["top_operators"]]
        assert shares == sorted(shares, reverse=True)
        assert 0 < sum(shares) <= 1.0005
        assert not any(operator["name"].startswith("step") for operator in stage["top_operators"])
        names = events_of(tmp_path / "profile" / stage["trace"])
        for part in ("data", "forward", "backward", "optimizer"):
            assert names.count(f"step: {part}") == 2, (stage["name"], part)
        assert any(name.startswith("aten::") for name in names)
    longest = max(summary["stages"], key=lambda stage: stage["seconds"])
    assert {key: summary[key] for key in ("bound", "sentence", "advice")}.items() <= longest.items()


@pytest.mark.parametrize("part", ["data", "forward", "backward", "optimizer"])
def test_time_is_booked_where_it_goes(tmp_path, part):
    profiler = ProfileCallback(tmp_path, steps=1)
    seconds = 0.5
    trainer = new_trainer(tmp_path, [profiler], data=Samples(16, seconds / 8 if part == "data" else 0.0))
    handles = []
    if part == "forward":
        last = trainer.model.backbone.fc
        handles.append(last.register_forward_pre_hook(lambda *_: time.sleep(seconds if last.training else 0)))
    elif part == "backward":
        handles.append(trainer.model.backbone.fc.bias.register_hook(lambda _: time.sleep(seconds)))
    elif part == "optimizer":
        handles.append(register_optimizer_step_pre_hook(lambda *_: time.sleep(seconds)))
    try:
        trainer.train()
    finally:
        for handle in handles:
            handle.remove()
    (stage,) = profiler.stages
    # Each of the others takes a tenth of that on a busy machine.
    assert stage["shares"][part] * stage["step_seconds"] >= seconds


def test_validation_is_no_part_of_a_step(tmp_path):
    class Slow(TrainerCallback):
        def on_prediction_step(self, *_, **__):
            time.sleep(1.0)

    profiler = ProfileCallback(tmp_path)
    new_trainer(tmp_path, [Slow(), profiler], eval_strategy="steps", eval_steps=1, eval_on_start=False).train()
    (stage,) = profiler.stages
    assert stage["step_seconds"] < 1.0
    assert stage["in_steps"] < 0.5
    assert stage["bound"] == "outside of steps"


@pytest.mark.parametrize(("images", "steps", "options"), [(8, 1, {}), (24, 3, {"gradient_accumulation_steps": 2})])
def test_short_stages_and_accumulated_gradients(tmp_path, images, steps, options):
    plan = [Stage("a", epochs=1 if images == 8 else 2, learning_rate=1e-3)]
    profiler = ProfileCallback(tmp_path, steps=9)
    trainer = new_trainer(tmp_path, [profiler], plan=plan, data=Samples(images), **options)
    trainer.train()
    (stage,) = profiler.stages
    assert stage["steps"] == trainer.state.global_step
    names = events_of(tmp_path / "profile" / stage["trace"])
    traced, batches = names.count("step: optimizer"), names.count("step: forward")
    # The second case has epochs of two steps, with two batches and one.
    assert (traced, batches) == ((1, 1) if images == 8 else (2, 3))


def test_a_run_that_breaks_within_a_trace_can_be_profiled_again(tmp_path):
    class Break(TrainerCallback):
        broken = False

        def on_pre_optimizer_step(self, args, state, control, **_):
            if state.global_step == 3 and not self.broken:
                self.broken = True
                raise KeyboardInterrupt

    profiler = ProfileCallback(tmp_path)
    trainer = new_trainer(tmp_path, [Break(), profiler])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.train()
    (stage,) = profiler.stages
    assert events_of(tmp_path / "profile" / stage["trace"]).count("step: forward") == 3
    assert not trainer.model._forward_hooks


def test_no_steps_to_trace_is_refused(tmp_path):
    with pytest.raises(ValueError, match="steps is 0"):
        ProfileCallback(tmp_path, steps=0)


@pytest.mark.parametrize(
    ("length", "per_epoch", "steps", "window"),
    [
        (100, 100, 4, (48, 52)),
        (100, 50, 4, (50, 54)),  # 48 to 52 would lie in two epochs
        (9, 3, 3, (3, 6)),
        (10, 4, 6, (4, 8)),
        (2, 2, 5, (0, 2)),
        (1, 1, 3, (0, 1)),
        (7, None, 3, (2, 5)),
        (None, None, 3, (10, 13)),
    ],
)
def test_the_trace_is_in_the_middle_and_within_an_epoch(length, per_epoch, steps, window):
    assert trace_window(length, per_epoch, steps) == window


def step(kind, **seconds):
    return Step(kind, {**dict.fromkeys(PARTS, 0.0), **seconds})


def test_shares_are_of_undisturbed_steps_but_the_first():
    steps = [step("timed", data=9.0), step("timed", data=1.0, forward=3.0), step("timed", data=1.0, forward=1.0)]
    shares, seconds = step_shares([*steps, step("traced", backward=99.0)])
    assert (shares["data"], shares["forward"], shares["backward"]) == pytest.approx((2 / 6, 4 / 6, 0))
    assert seconds == 3.0
    shares, seconds = step_shares([step("traced", backward=2.0)])
    assert (shares["backward"], seconds) == (1.0, 2.0)
    assert step_shares([steps[0], step("traced", backward=2.0)])[1] == 9.0


def test_work_on_a_device_is_shared_out_as_in_steps_that_waited_for_it():
    # The device works behind: the wait shows in whatever waits for it first.
    steps = [step("timed"), step("timed", data=0.2, optimizer=0.8), step("synced", forward=1.0, backward=3.0)]
    shares, seconds = step_shares(steps)
    assert (shares["data"], shares["forward"], shares["backward"]) == pytest.approx((0.2, 0.2, 0.6))
    assert seconds == 1.0


CPU = Circumstances(num_workers=2, cores=2, batch_size=32, image_size=224)
GPU = Circumstances(num_workers=4, cores=16, batch_size=32, image_size=224, device="cuda", frozen_dtype="float32")


@pytest.mark.parametrize(
    ("given", "in_steps", "shares", "bound", "advice"),
    [
        (GPU, 0.9, {"data": 0.3, "backward": 0.7}, "data", "num_workers: 16"),
        (CPU, 0.9, {"data": 0.6, "backward": 0.4}, "data", "image_size: 160"),
        (CPU, 0.9, {"data": 0.1, "backward": 0.9}, "computing", "image_size: 160"),
        (CPU, 0.9, {"frozen": 0.8, "backward": 0.2}, "computing", "augmentation: none"),
        (GPU, 0.9, {"frozen": 0.8, "backward": 0.2}, "computing", "frozen_precision: bfloat16"),
        (GPU, 0.9, {"optimizer": 0.6, "backward": 0.4}, "optimizer", "batch_size: 64"),
        (GPU, 0.9, {"other": 0.6, "backward": 0.4}, "overhead", "batch_size: 64"),
        (GPU, 0.1, {"data": 0.9, "backward": 0.1}, "outside of steps", None),
        (Circumstances(2, 2, 32, image_size=224, train_cached=True), 0.9, {"frozen": 1.0}, "computing", None),
        (Circumstances(2, 2, 32, image_size=64), 0.9, {"backward": 1.0}, "computing", None),
        (Circumstances(2, 2, 32, image_size=224, train_cached=True), 0.9, {"backward": 1.0}, "computing", None),
    ],
)
def test_what_bounds_a_stage_and_advice_that_a_recipe_takes(given, in_steps, shares, bound, advice):
    found = find_bottleneck("all", {**dict.fromkeys(PARTS, 0.0), **shares}, in_steps, "aten::mm", given)
    assert (found.bound, found.advice) == (bound, advice)
    assert "all" in found.sentence
    if bound == "computing":
        assert "aten::mm" in found.sentence
    recipe = {"backbone": "resnet50", "data": {"path": "photos"}, **yaml.safe_load(advice or "{}")}
    load_recipe(recipe)
