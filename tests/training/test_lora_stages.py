"""Stages that train low-rank adapters, in runs: what is kept is torchvision's network with merged weights."""

import sys

import numpy as np
import pytest
import torch
import transformers
from interruptions import Interrupt, InterruptionError
from safetensors.torch import load_file
from small_transformers import NETWORKS, small_model
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
from torchthaw.errors import PlanError, TrainingError
from torchthaw.stages.low_rank import adapted_weights, adapter_parameters
from torchthaw.stages.proof import digest

LORA = {"rank": 4, "alpha": 8}
# 3 steps an epoch.
PLAN = [
    Stage("head", "head", epochs=1, learning_rate=1e-2),
    Stage("adapters", "all", epochs=2, learning_rate=1e-2, lora=LORA),
]


@pytest.fixture
def splits(make_image_folder):
    return split_dataset(load_image_dataset(make_image_folder(per_class=10)), validation=6, seed=0)


@pytest.fixture
def make(splits, tmp_path):
    """Returns a function that makes a trainer of a small network."""

    def new_trainer(
        plan=PLAN, architecture="vit_b_16", *, folder="run", callbacks=(), model=None, network=None, **options
    ):
        defaults = {
            "plan": plan, "per_device_train_batch_size": 8, "metric_for_best_model": "loss", "gate": "off",
            "use_cpu": True, "disable_tqdm": True, "report_to": "none",
        }  # fmt: skip
        trainer = ThawTrainer(
            model=model or small_model(architecture, **(network or {})),
            args=ThawTrainingArguments(output_dir=str(tmp_path / folder), **{**defaults, **options}),
            train_dataset=splits["train"],
            eval_dataset=splits["validation"],
            processing_class=TorchvisionImageProcessor.from_torchvision(architecture, weights=None, image_size=32),
            callbacks=list(callbacks),
        )
        trainer.remove_callback(transformers.PrinterCallback)
        return trainer

    return new_trainer


class Watch(TrainerCallback):
    """Looks at the model while it has adapters, after each step."""

    def __init__(self):
        self.own_weights, self.saved, self.trainable, self.optimizer_groups = [], [], set(), []

    def on_step_end(self, args, state, control, *, model, optimizer, **_):
        if state.stage_name == "adapters":
            places = adapted_weights(model)
            named = dict(model.named_parameters())
            self.own_weights.append({name: digest(named[name]) for name in places})
            self.saved.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
            self.trainable.add(sum(p.numel() for p in model.parameters() if p.requires_grad))
            self.optimizer_groups = [group["name"] for group in optimizer.param_groups]


@pytest.mark.parametrize("architecture", list(NETWORKS))
def test_a_stage_ends_with_merged_weights_under_torchvisions_keys(make, architecture, tmp_path):
    watch = Watch()
    trainer = make(architecture=architecture, callbacks=[watch], load_best_model_at_end=False, save_total_limit=None)
    start = {name: digest(tensor) for name, tensor in trainer.model.state_dict().items()}
    trainer.train()
    stage = trainer.stage_records[1]
    groups = list(trainer.model.layer_groups())
    assert not adapter_parameters(trainer.model)
    assert {type(module).__name__ for module in trainer.model.modules()}.isdisjoint({"AdaptedLinear"})
    # Nothing wrote to torchvision's weights while adapters were on them.
    for weights in watch.own_weights:
        assert {name: start[name] for name in weights} == weights
    final = trainer.model.state_dict()
    assert list(final) == list(watch.saved[-1]) == list(small_model(architecture).state_dict())
    # With the last weights, merging changes nothing of what the last step gave.
    assert all(torch.equal(final[name], watch.saved[-1][name]) for name in final)
    merged = {name for name in final if digest(final[name]) != start[name]}
    heads = {name for name in trainer.model.layer_groups()["head"].parameters if "classifier.0" not in name}
    assert merged - {"backbone.classifier.0.weight", "backbone.classifier.0.bias"} == heads | set(watch.own_weights[0])
    # The record.
    assert [stage.changes[group] > 0 for group in groups] == [group != "stem" for group in groups]
    assert {stage.trainable_parameters} == watch.trainable
    assert stage.trainable_parameters < sum(p.numel() for p in trainer.model.parameters())
    assert list(stage.learning_rates) == groups[1:]
    assert watch.optimizer_groups[0] == f"{groups[1]}/decay"
    assert stage.frozen_unchanged
    # What is frozen below the first adapter is computed once for validation.
    assert "validation" in stage.frozen_part["cached"]
    # Checkpoints hold the network as it acts.
    saved = load_file(tmp_path / "run" / "checkpoint-9" / "model.safetensors")
    assert saved.keys() == final.keys()
    assert all(torch.equal(saved[name], final[name]) for name in final)
    within = load_file(tmp_path / "run" / "checkpoint-6" / "model.safetensors")
    assert within.keys() == final.keys()
    assert all(torch.equal(within[name], watch.saved[2][name]) for name in final)


def test_the_best_weights_of_a_stage_are_kept_as_they_were_validated(make):
    """Later ones, at a rate that is too high to be of use, are not."""
    stage = Stage("adapters", "all", epochs=6, learning_rate=0.2, lora=LORA, schedule="constant", augmentation="none")
    trainer = make([PLAN[0], stage])
    trainer.train()
    record = trainer.stage_records[1]
    measured = trainer._progress.kept.measured
    output = trainer.predict(trainer.eval_dataset)
    np.testing.assert_array_equal(output.predictions, measured.logits)
    assert record.best_metric == measured.value
    assert record.best_step < record.steps


def test_without_validation_the_last_weights_are_merged(make):
    watch = Watch()
    trainer = make(callbacks=[watch], eval_strategy="no", load_best_model_at_end=False)
    trainer.train()
    final = trainer.model.state_dict()
    assert all(torch.equal(final[name], watch.saved[-1][name]) for name in final)
    assert trainer.stage_records[1].changes["block0"] > 0


def test_a_stage_that_makes_things_worse_is_rolled_back_to_the_bit(make):
    wreck = Stage("wreck", "all", epochs=1, learning_rate=50.0, lora=LORA, optimizer="sgd", warmup=0.0)
    trainer = make([wreck], gate="best")
    trainer.model.head_is_new = False  # so that there is something to go back to
    before = {name: digest(tensor) for name, tensor in trainer.model.state_dict().items()}
    trainer.train()
    assert [record.accepted for record in trainer.stage_records] == [False]
    assert {name: digest(tensor) for name, tensor in trainer.model.state_dict().items()} == before


def test_what_follows_trains_the_merged_network(make):
    plan = [*PLAN, Stage("all", "all", epochs=1, learning_rate=1e-4), Stage("more", 1, epochs=1, lora=2)]
    trainer = make(plan)
    trainer.train()
    trainable = [record.trainable_parameters for record in trainer.stage_records]
    everything = sum(p.numel() for p in trainer.model.parameters())
    assert trainable[2] == everything > trainable[1] > trainable[3] > trainable[0]
    assert [group for group, change in trainer.stage_records[3].changes.items() if change] == ["block2", "head"]


def test_cached_is_live(make):
    """The frozen part below the first adapter, computed once or in each step."""
    plan = [Stage("adapters", 1, epochs=2, learning_rate=1e-2, lora=LORA, optimizer="sgd", augmentation="none")]
    cached, live = make(plan), make(plan, folder="live", cache_gb=0.0)
    for trainer in (cached, live):
        trainer.train()
    assert cached.stage_records[0].frozen_part["border"] == "encoder.layers.encoder_layer_2"
    assert cached.stage_records[0].frozen_part["cached"] == ["train", "validation"]
    wanted = live.model.state_dict()
    for name, tensor in cached.model.state_dict().items():
        torch.testing.assert_close(tensor, wanted[name], atol=2e-5, rtol=1e-3, msg=name)


def test_the_same_again(make):
    finals = []
    for folder in ("one", "two"):
        trainer = make(folder=folder, augmentation="medium")
        trainer.train()
        finals.append(trainer.model.state_dict())
    assert all(torch.equal(finals[0][name], finals[1][name]) for name in finals[0])


@pytest.mark.parametrize(
    ("event", "step"), [("on_step_end", 4), ("on_step_end", 6), ("on_save", 9), ("on_step_begin", 7)]
)
def test_an_interrupted_stage_goes_on_exactly(make, event, step):
    options = {"augmentation": "medium", "network": {"dropout": 0.1}, "gate": "best"}
    options |= {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    expected = make(folder="expected", **options)
    expected.train()
    trainer = make(callbacks=[Interrupt(event, step)], **options)
    with pytest.raises(InterruptionError):
        trainer.train()
    assert not adapter_parameters(trainer.model), "whoever catches it has torchvision's network"
    again = make(**options)
    again.train(resume_from_checkpoint=True)
    final = again.model.state_dict()
    assert [name for name, wanted in expected.model.state_dict().items() if not torch.equal(final[name], wanted)] == []
    timed = ("_runtime", "_per_second")

    def lines(trainer):
        history = trainer.state.log_history
        return [{key: line[key] for key in line if not key.endswith(timed)} for line in history]

    assert lines(again) == lines(expected)
    own = ("changes", "best_metric", "accepted", "trainable_parameters", "frozen_unchanged", "frozen_part")
    for one, other in zip(again.stage_records, expected.stage_records, strict=True):
        assert [getattr(one, key) for key in own] == [getattr(other, key) for key in own]


def test_a_run_of_other_adapters_is_not_gone_on_with(make):
    trainer = make(
        callbacks=[Interrupt("on_step_end", 5)], save_strategy="steps", save_steps=1, load_best_model_at_end=False
    )
    with pytest.raises(InterruptionError):
        trainer.train()
    other = Stage("adapters", "all", epochs=2, learning_rate=1e-2, lora={"rank": 2})
    again = make([PLAN[0], other], save_strategy="steps", save_steps=1, load_best_model_at_end=False)
    with pytest.raises(PlanError, match=r"plan\.stages\[1\]\.lora\.rank was 4 and is 2"):
        again.train(resume_from_checkpoint=True)


class Spoil(TrainerCallback):
    """Breaks the head once, in the second stage."""

    left = 1

    def on_step_begin(self, args, state, control, *, model, **_):
        if state.stage_name == "adapters" and state.global_step == 4 and self.left:
            self.left -= 1
            model.backbone.heads.head.bias.data[0] = float("nan")


def test_a_stage_that_breaks_down_runs_again_with_fresh_adapters(make):
    retried = Stage("adapters", "all", epochs=2, learning_rate=1e-2, lora=LORA, on_nan="retry")
    trainer = make([PLAN[0], retried], callbacks=[Spoil()])
    trainer.train()
    record = trainer.stage_records[1]
    assert record.accepted
    assert "the loss became nan" in record.ended_early
    assert record.changes["block1"] > 0
    assert all(tensor.isfinite().all() for tensor in trainer.model.state_dict().values())


def test_whatever_writes_to_a_frozen_weight_is_found(make):
    class Write(TrainerCallback):
        def on_step_end(self, args, state, control, *, model, **_):
            if state.global_step == 5:
                model.backbone.encoder.layers[1].self_attention._parameters["in_proj_weight"].data += 1e-3

    trainer = make(callbacks=[Write()])
    with pytest.raises(
        TrainingError, match=r"changed 1 frozen tensors: .*encoder_layer_1.self_attention.in_proj_weight"
    ):
        trainer.train()


def test_a_range_test_leaves_the_model_alone(make):
    trainer = make()
    before = {name: digest(tensor) for name, tensor in trainer.model.state_dict().items()}
    found = trainer.find_lr("adapters", steps=20)
    assert len(found.rates) > 5
    assert not adapter_parameters(trainer.model)
    assert {name: digest(tensor) for name, tensor in trainer.model.state_dict().items()} == before


def test_a_saved_model_is_like_any_other(make, tmp_path):
    """Of a network of full size, since a saved folder names the architecture."""
    config = TorchvisionConfig(architecture="swin_t", id2label=["ant", "bee", "cat"])
    torch.manual_seed(0)
    model = TorchvisionForImageClassification(config)
    stage = Stage("adapters", 1, steps=2, learning_rate=1e-2, lora={"rank": 2, "targets": ["qkv"]}, augmentation="none")
    trainer = make([stage], "swin_t", model=model, save_strategy="no", load_best_model_at_end=False)
    keys = list(model.state_dict())
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    again = TorchvisionForImageClassification.from_pretrained(tmp_path / "saved").eval()
    assert list(again.state_dict()) == keys
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(again(pixels).logits, trainer.model.eval()(pixels).logits)


@pytest.mark.parametrize("architecture", ["resnet18", "vgg11_bn", "efficientnet_b0"])
def test_networks_of_convolutions_are_refused(architecture, tmp_path):
    with torch.device("meta"):
        model = TorchvisionForImageClassification(TorchvisionConfig(architecture=architecture, num_labels=3))
    args = ThawTrainingArguments(output_dir=str(tmp_path), plan=PLAN, eval_strategy="no", load_best_model_at_end=False)
    with pytest.raises(
        PlanError, match=f"stage 'adapters' has lora.*{architecture} is made of convolutions; .*unfreeze: 1"
    ):
        ThawTrainer(model, args)


def test_targets_are_checked_before_anything_runs(make):
    with pytest.raises(PlanError, match="target 'qkv', which matches no linear layer"):
        make([Stage("adapters", "all", lora={"rank": 4, "targets": ["qkv"]})])


def test_without_peft_nothing_starts(make, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(PlanError, match=r"needs peft.*pip install 'torchthaw\[lora\]'"):
        make()


REGULARISERS = [{"average": "ema"}, {"average": "swa"}, {"wise_ft": True}, {"l2_sp": 0.1}]


@pytest.mark.parametrize("options", REGULARISERS, ids=lambda options: next(iter(options)))
def test_what_regularises_goes_together_with_adapters(make, options):
    """What is handed on is what was validated, and an interrupted run goes on exactly."""
    expected, plain = make(folder="expected", **options), make(folder="plain")
    expected.train()
    plain.train()
    trainer = make(callbacks=[Interrupt("on_step_end", 8)], **options)
    with pytest.raises(InterruptionError):
        trainer.train()
    again = make(**options)
    again.train(resume_from_checkpoint=True)
    final, wanted = again.model.state_dict(), expected.model.state_dict()
    assert all(torch.equal(final[name], wanted[name]) for name in wanted)
    output = expected.predict(expected.eval_dataset)
    np.testing.assert_array_equal(output.predictions, expected._progress.kept.measured.logits)
    # Adapters are pulled to nothing by weight decay as it is.
    same = all(torch.equal(tensor, wanted[name]) for name, tensor in plain.model.state_dict().items())
    assert same == ("l2_sp" in options or (expected.stage_records[1].wise_ft or {"alpha": 0})["alpha"] == 1)
