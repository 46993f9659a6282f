"""What a stage says of its own - optimizer, schedule, clipping, batch and image size - holds in it, and only there."""

import contextlib
import copy
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.ops import StochasticDepth
from transformers import TrainerCallback

from torchthaw import (
    Stage,
    ThawTrainer,
    ThawTrainingArguments,
    TorchvisionForImageClassification,
    TorchvisionImageProcessor,
    load_image_dataset,
)
from torchthaw.data.augmentation import make_augmentation
from torchthaw.data.views import ImageView
from torchthaw.errors import PlanError
from torchthaw.stages.proof import digest

ARCHITECTURE = "shufflenet_v2_x0_5"


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for split, number in (("train", 12), ("validation", 4)):
        for label, name in enumerate(("red", "green")):
            (root / split / name).mkdir(parents=True)
            for index in range(number):
                pixels = random.integers(0, 100, size=(40, 48, 3), dtype=np.uint8)
                pixels[..., label] += 90
                Image.fromarray(pixels).save(root / split / name / f"{index}.png")
    return load_image_dataset(root)


class Settings(TrainerCallback):
    """Notes what each step runs with."""

    def __init__(self):
        self.steps, self.shapes, self.eval_shapes = [], [], []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        def note(module, inputs):
            (self.shapes if model.training else self.eval_shapes).append(tuple(inputs[0].shape))

        model.backbone.register_forward_pre_hook(note)

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        group = optimizer.param_groups[-1]
        kind = type(getattr(optimizer, "optimizer", optimizer)).__name__
        rates = [float(entry["lr"]) for entry in optimizer.param_groups]
        self.steps.append({"stage": state.stage_name, "kind": kind, "rates": rates, "group": dict(group)})

    def of(self, stage):
        return [step for step in self.steps if step["stage"] == stage]


def new_trainer(tmp_path, images, plan, *, callbacks=(), model=None, kind=ThawTrainer, **options):
    torch.manual_seed(0)
    defaults = {"per_device_train_batch_size": 6, "disable_tqdm": True, "use_cpu": True, "report_to": "none"}
    return kind(
        model=model
        or TorchvisionForImageClassification.from_torchvision(
            ARCHITECTURE, weights="builtin", id2label=["green", "red"]
        ),
        args=ThawTrainingArguments(output_dir=str(tmp_path / "out"), plan=plan, **{**defaults, **options}),
        train_dataset=images["train"],
        eval_dataset=images["validation"],
        processing_class=TorchvisionImageProcessor.from_torchvision(ARCHITECTURE, weights="builtin", image_size=32),
        callbacks=list(callbacks),
    )


def run(tmp_path, images, plan, callbacks=(), **options):
    watcher = Settings()
    trainer = new_trainer(tmp_path, images, plan, callbacks=[watcher, *callbacks], **options)
    trainer.train()
    return trainer, watcher


def test_each_stage_has_its_own_optimizer_schedule_and_clipping(tmp_path, images):
    plan = [
        Stage("plain", "head", epochs=1, learning_rate=1e-3, warmup=0),
        Stage(
            "own", 1, steps=6, learning_rate=1e-2, layer_decay=1, optimizer="sgd", schedule="linear", warmup=2,
            weight_decay=0.1, max_grad_norm=1e-4,
        ),
        Stage("tuned", "head", epochs=1, learning_rate=1e-3, optimizer_args={"betas": [0.5, 0.9]}, warmup=0,
              schedule="cosine_with_min_lr", schedule_args={"min_lr_rate": 0.5}),
    ]  # fmt: skip
    trainer, watcher = run(tmp_path, images, plan, max_grad_norm=0.7)
    plain, own, tuned = watcher.of("plain"), watcher.of("own"), watcher.of("tuned")
    assert [len(steps) for steps in (plain, own, tuned)] == [4, 6, 4]

    assert {step["kind"] for step in plain} == {"AdamW"}
    assert plain[0]["group"]["betas"] == (0.9, 0.999)
    assert [step["rates"][0] for step in plain] == pytest.approx(
        [1e-3 * (1 + math.cos(math.pi * step / 4)) / 2 for step in range(4)]
    )
    assert {step["kind"] for step in own} == {"SGD"}
    assert {step["group"]["momentum"] for step in own} == {0.9}
    # Two steps of warmup, then a straight line to 0 at the stage's end.
    assert [step["rates"][0] for step in own] == pytest.approx([0, 5e-3, 1e-2, 7.5e-3, 5e-3, 2.5e-3])
    assert tuple(tuned[0]["group"]["betas"]) == (0.5, 0.9)
    assert [step["rates"][0] for step in tuned] == pytest.approx(
        [1e-3 * (0.5 + 0.5 * (1 + math.cos(math.pi * step / 4)) / 2) for step in range(4)]
    )
    assert trainer.args.max_grad_norm == 0.7
    assert trainer.args.per_device_train_batch_size == 6


def test_clipping_of_one_stage_is_not_that_of_another(tmp_path, images):
    class Norms(TrainerCallback):
        def __init__(self):
            self.found = {}

        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            norm = math.sqrt(sum(p.grad.double().square().sum() for p in model.parameters() if p.grad is not None))
            self.found.setdefault(state.stage_name, []).append(norm)

    norms = Norms()
    plan = [
        Stage("tight", "head", epochs=1, learning_rate=1e-3, max_grad_norm=1e-3),
        Stage("free", "head", epochs=1, learning_rate=1e-3),
    ]
    run(tmp_path, images, plan, callbacks=[norms], max_grad_norm=0.0)
    assert norms.found["tight"] == pytest.approx([1e-3] * 4, rel=1e-3)
    assert min(norms.found["free"]) > 1e-2


def test_batch_and_image_size_of_a_stage_leave_validation_alone(tmp_path, images):
    plan = [
        Stage("small", "all", epochs=1, learning_rate=1e-3, batch_size=4, image_size=16, augmentation="none"),
        Stage("usual", "all", epochs=1, learning_rate=1e-3),
    ]
    trainer, watcher = run(tmp_path, images, plan)
    assert watcher.shapes == [(4, 3, 16, 16)] * 6 + [(6, 3, 32, 32)] * 4
    assert {shape[2:] for shape in watcher.eval_shapes} == {(32, 32)}
    assert trainer.state.max_steps == 6 + 4
    assert [record.steps for record in trainer.stage_records] == [6, 4]
    assert trainer.args.per_device_train_batch_size == 6


def test_a_stage_counted_in_steps_may_end_within_an_epoch(tmp_path, images):
    plan = [Stage("five", "head", steps=5, learning_rate=1e-3), Stage("one", "head", epochs=1, learning_rate=1e-3)]
    trainer, _ = run(tmp_path, images, plan)
    lines = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [(line["step"], line["epoch"], line["stage_name"]) for line in lines] == [
        (4, 1.0, "five"), (5, 1.25, "five"), (9, 3.0, "one"),
    ]  # fmt: skip
    assert [record.steps for record in trainer.stage_records] == [5, 4]
    assert trainer.state.num_train_epochs == 3


def test_a_range_of_rates_reaches_the_optimizer(tmp_path, images):
    stage = Stage("all", "all", epochs=1, learning_rate="1e-5..1e-3", warmup=0)
    trainer, watcher = run(tmp_path, images, [stage])
    rates = dict.fromkeys(watcher.steps[0]["rates"])
    assert list(rates) == pytest.approx(np.geomspace(1e-5, 1e-3, len(trainer.model.layer_groups())))


def test_a_schedule_that_follows_the_metric_lowers_the_rate_only_when_it_stalls(tmp_path, images):
    plan = [
        Stage("plateau", "head", epochs=4, learning_rate=1e-9, schedule="reduce_lr_on_plateau",
              schedule_args={"patience": 0, "factor": 0.1, "eps": 0.0}),
    ]  # fmt: skip
    _, watcher = run(tmp_path, images, plan)
    # Nothing is learned at that rate: the first validation is the best, each later one lowers the rate.
    firsts = [step["rates"][0] for step in watcher.steps[::4]]
    assert firsts == pytest.approx([1e-9, 1e-9, 1e-10, 1e-11])
    with pytest.raises(PlanError, match="follows the validation metric, but eval_strategy is 'no'"):
        run(tmp_path, images, plan, eval_strategy="no", load_best_model_at_end=False)


def test_every_stage_runs_in_bf16_and_wrappers_do_not_pile_up(tmp_path, images):
    class Precision(TrainerCallback):
        def __init__(self):
            self.seen = {}

        def on_train_begin(self, args, state, control, model=None, **kwargs):
            def note(module, inputs, output):
                if model.training:
                    forward, depth = model.forward, 0
                    while hasattr(forward, "__wrapped__"):
                        forward, depth = forward.__wrapped__, depth + 1
                    self.seen.setdefault(state.stage_name, set()).add((output.dtype, depth))

            # The head is left in the type of its weights.
            model.backbone.conv5.register_forward_hook(note)

    plan = [Stage(name, 1, epochs=1, learning_rate=1e-3) for name in ("a", "b", "c")]
    precision = Precision()
    trainer, _ = run(tmp_path, images, plan, callbacks=[precision], bf16=True)
    (first,) = precision.seen["a"]
    assert first[0] == torch.bfloat16
    assert first[1] > 0
    assert precision.seen == {name: {first} for name in ("a", "b", "c")}
    assert all(parameter.dtype == torch.float32 for parameter in trainer.model.parameters())


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        (Stage("a", optimizer="adamv", learning_rate=1e-3), "unknown optimizer 'adamv'"),
        (Stage("a", batch_size=100, learning_rate=1e-3), "the batch size is 100, but there are 24 training images"),
        (Stage("a", augmentation="hard", learning_rate=1e-3), "unknown augmentation 'hard'"),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_training(tmp_path, images, stage, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path, images, [stage])
    assert not (tmp_path / "out").exists()


def test_a_backbone_of_one_image_size_refuses_another(tmp_path, images):
    with torch.device("meta"):
        model = TorchvisionForImageClassification.from_torchvision("vit_b_16", weights=None, id2label=["green", "red"])
    arguments = ThawTrainingArguments(
        output_dir=str(tmp_path), plan=[Stage("a", image_size=160)], per_device_train_batch_size=4, use_cpu=True
    )
    with pytest.raises(PlanError, match="image_size 160, but vit_b_16 takes images of one size only"):
        ThawTrainer(model=model, args=arguments, train_dataset=images["train"], eval_dataset=images["validation"])


def test_weight_decay_of_a_stage_is_its_own_and_norms_have_none(tmp_path, images):
    class Decays(TrainerCallback):
        def __init__(self):
            self.found = {}

        def on_stage_begin(self, args, state, control, stage=None, **kwargs):
            groups = self.trainer.create_optimizer().param_groups
            self.found[stage.name] = {group["name"]: group["weight_decay"] for group in groups}

    decays = Decays()
    plan = [
        Stage("own", 1, epochs=1, learning_rate=1e-3, batch_norm="train", weight_decay=0.3),
        Stage("usual", 1, epochs=1, learning_rate=1e-3, batch_norm="train"),
        Stage("none", 1, epochs=1, learning_rate=1e-3, batch_norm="train", weight_decay=0.0, optimizer="sgd"),
    ]
    decays.trainer = new_trainer(tmp_path, images, plan, callbacks=[decays], weight_decay=0.05)
    decays.trainer.train()
    for name, decay in (("own", 0.3), ("usual", 0.05), ("none", 0.0)):
        assert decays.found[name] == {
            "stage4/decay": decay, "stage4/no_decay": 0.0, "head/decay": decay, "head/no_decay": 0.0
        }  # fmt: skip


def test_augmentation_of_a_stage_is_its_own(tmp_path, images):
    class Watched(ThawTrainer):
        def training_step(self, model, inputs, *args, **kwargs):
            self.seen.setdefault(self.stage.name, []).extend(digest(pixels) for pixels in inputs["pixel_values"])
            return super().training_step(model, inputs, *args, **kwargs)

    own = {"horizontal_flip": 0.0, "color_jitter": 0.3}
    plan = [
        Stage("usual", "all", epochs=1, learning_rate=1e-3),
        Stage("plain", "all", epochs=1, learning_rate=1e-3, augmentation="none"),
        Stage("own", "all", epochs=2, learning_rate=1e-3, augmentation=own),
        Stage("usual again", "all", epochs=1, learning_rate=1e-3),
    ]
    trainer = new_trainer(tmp_path, images, plan, kind=Watched, augmentation="light", seed=7)
    trainer.seen = {}
    trainer.train()

    def views(stage, epochs, augmentation):
        view = ImageView(images["train"], trainer.processing_class, augmentation, seed=7, stage=stage)
        found = []
        for epoch in epochs:
            view.set_epoch(epoch)
            found += [digest(view[row]["pixel_values"]) for row in range(len(view))]
        return sorted(found)

    light = make_augmentation("light")
    assert {name: sorted(digests) for name, digests in trainer.seen.items()} == {
        "usual": views(0, [0], light),
        "plain": views(1, [1], None),
        "own": views(2, [2, 3], make_augmentation(own)),
        "usual again": views(3, [4], light),
    }
    assert len(set().union(*trainer.seen.values())) == 5 * len(images["train"])


def test_dropout_of_frozen_groups_is_active_only_where_a_stage_asks_for_it(tmp_path, images):
    """With `frozen_dropout`, only BatchNorm keeps still in frozen groups."""
    seen = {}

    class Modes(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            frozen = model.backbone.features
            modes = {
                type(module).__name__: module.training
                for module in frozen.modules()
                if isinstance(module, StochasticDepth | torch.nn.BatchNorm2d)
            }
            seen.setdefault(state.stage_name, []).append(modes)

    torch.manual_seed(0)
    model = TorchvisionForImageClassification.from_torchvision("efficientnet_b0", None, id2label=["green", "red"])
    plan = [
        Stage("still", "head", steps=1, learning_rate=1e-3),
        Stage("noisy", "head", steps=1, learning_rate=1e-3, frozen_dropout=True),
        Stage("still again", "head", steps=1, learning_rate=1e-3),
    ]
    new_trainer(tmp_path, images, plan, callbacks=[Modes()], model=model).train()
    still, noisy = ({"BatchNorm2d": False, "StochasticDepth": active} for active in (False, True))
    assert seen == {"still": [still], "noisy": [noisy], "still again": [still]}


@pytest.mark.parametrize("interrupted", [False, True])
def test_settings_of_stages_do_not_stay_in_the_arguments(tmp_path, images, interrupted):
    class Interrupt(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            assert (args.per_device_train_batch_size, args.max_grad_norm) == (3, 0.1)
            if interrupted and state.global_step == 2:
                raise KeyboardInterrupt

    stage = Stage(
        "own", "head", epochs=1, learning_rate=1e-3, batch_size=3, max_grad_norm=0.1, weight_decay=0.3, image_size=16,
        augmentation="none", optimizer="sgd", optimizer_args={"momentum": 0.5}, schedule="linear",
    )  # fmt: skip
    trainer = new_trainer(tmp_path, images, [stage], callbacks=[Interrupt()], max_grad_norm=2.0)
    before, data = copy.deepcopy(trainer.args.to_dict()), trainer.train_dataset
    with pytest.raises(KeyboardInterrupt) if interrupted else contextlib.nullcontext():
        trainer.train()
    assert trainer.args.to_dict() == before
    assert trainer.train_dataset is data
    assert trainer.get_train_dataloader().total_batch_size == 6
    assert trainer.stage is None
