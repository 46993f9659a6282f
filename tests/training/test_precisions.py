"""What trains is computed in the precision that was chosen: near the exact one, remembered, and without a trace."""

import copy
import dataclasses

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F
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
from torchthaw.backbones.borders import find_border
from torchthaw.backbones.folding import put_on_fast_form
from torchthaw.backbones.precision import Precision, has_bfloat16
from torchthaw.stages.freezing import freeze_for_stage
from torchthaw.training import precisions
from torchthaw.training.precisions import training_steps

ARCHITECTURE = "shufflenet_v2_x0_5"  # with strided depthwise convolutions
CLASSES = ["ant", "bee", "cat"]
HEAD = Stage("head", "head", epochs=1, learning_rate=0.05, optimizer="sgd")
PARTIAL = Stage("partial", 1, epochs=2, learning_rate=0.02, optimizer="sgd")
ALL = Stage("all", "all", epochs=2, learning_rate=0.02, optimizer="sgd")


@pytest.fixture
def train(make_image_folder, tmp_path, monkeypatch):
    """Returns a function that trains and gives back the trainer."""
    monkeypatch.setenv("TORCHTHAW_CACHE", str(tmp_path / "cache"))
    splits = split_dataset(load_image_dataset(make_image_folder(per_class=16)), validation=0.25, seed=0)

    def run(plan, folder="run", *, callbacks=(), resume=None, **options):
        torch.manual_seed(0)
        defaults = {
            "plan": plan, "per_device_train_batch_size": 8, "gate": "off", "use_cpu": True, "disable_tqdm": True,
            "report_to": "none", "logging_strategy": "steps", "logging_steps": 1,
        }  # fmt: skip
        trainer = ThawTrainer(
            TorchvisionForImageClassification.from_torchvision(ARCHITECTURE, weights="builtin", id2label=CLASSES),
            ThawTrainingArguments(output_dir=str(tmp_path / folder), **{**defaults, **options}),
            train_dataset=splits["train"],
            eval_dataset=splits["validation"],
            processing_class=TorchvisionImageProcessor.from_torchvision(ARCHITECTURE, weights="builtin", image_size=64),
            callbacks=list(callbacks),
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    return run


def losses(trainer, key="loss"):
    return [line[key] for line in trainer.state.log_history if key in line]


class Kinds(TrainerCallback):
    """Notes in which types a layer within the network gave its results, by whether it trained."""

    def on_stage_begin(self, args, state, control, *, model, **kwargs):
        self.seen = {True: set(), False: set()}
        self.handle = model.backbone.maxpool.register_forward_hook(self.note)

    def note(self, module, inputs, output):
        self.seen[module.training].add(output.dtype)


# Statistics of batches of 8 make much of little.
@pytest.mark.parametrize(("batch_norm", "tolerance"), [("eval", 0.02), ("train", 0.1)])
def test_training_and_validation_are_near_those_in_float32(train, batch_norm, tolerance):
    stage = Stage("all", "all", epochs=2, learning_rate=0.02, optimizer="sgd", batch_norm=batch_norm)
    exact = train([stage], "exact", live_precision="float32")
    fast = train([stage], "fast", live_precision="bfloat16")
    assert [record.live_dtype for record in (*exact.stage_records, *fast.stage_records)] == ["float32", "bfloat16"]
    for key in ("loss", "eval_loss"):
        assert losses(fast, key) != losses(exact, key)
        assert losses(fast, key) == pytest.approx(losses(exact, key), rel=tolerance)
    assert {parameter.dtype for parameter in fast.model.parameters()} == {torch.float32}


@pytest.mark.parametrize(("precision", "kind"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_training_is_in_it_and_validation_is_not(train, precision, kind):
    kinds = Kinds()
    train([ALL], callbacks=[kinds], live_precision=precision)
    assert kinds.seen == {True: {kind}, False: {torch.float32}}
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("stage", [HEAD, PARTIAL, ALL], ids=["head", "partial", "all"])
def test_what_validation_says_is_what_the_saved_model_gives(train, stage):
    trainer = train([stage], frozen_precision="bfloat16", live_precision="bfloat16")
    if stage is not ALL:
        assert trainer.stage_records[0].frozen_part["dtype"] == "bfloat16"
    # Before this evaluation is logged too.
    during = losses(trainer, "eval_loss")
    saved = trainer.evaluate()["eval_loss"]
    assert any(loss == pytest.approx(saved, rel=1e-5) for loss in during)


def test_mixed_precision_of_trainer_is_validated_in_it(train):
    kinds = Kinds()
    train([ALL], callbacks=[kinds], bf16=True)
    assert kinds.seen == {True: {torch.bfloat16}, False: {torch.bfloat16}}


def test_the_head_is_not_rounded(train):
    seen = []

    class Logits(TrainerCallback):
        def on_stage_begin(self, args, state, control, *, model, **kwargs):
            model.backbone.fc.register_forward_hook(lambda module, inputs, output: seen.append(output.detach()))

    train([ALL], callbacks=[Logits()], live_precision="bfloat16")
    assert {logits.dtype for logits in seen} == {torch.float32}
    assert not all(torch.equal(logits, logits.bfloat16().float()) for logits in seen)


def test_small_stages_are_not_measured_and_exact(train, monkeypatch):
    monkeypatch.setattr(precisions, "live_dtype", None)
    assert [r.live_dtype for r in train([HEAD, PARTIAL, ALL]).stage_records] == ["float32"] * 3


@pytest.fixture
def decided(monkeypatch):
    """Lets every stage be worth a choice, which is bfloat16; notes what it was made by."""
    keys = []

    def decide(works, device, *, key, folder):
        keys.append(key)
        return Precision(torch.bfloat16, 2.0, 0.1, "")

    monkeypatch.setattr(precisions, "live_dtype", decide)
    monkeypatch.setattr(precisions, "_WORTH_MEASURING", 1)
    monkeypatch.setattr(precisions, "_WORTH_STEPS", 1)
    return keys


def test_the_choice_is_by_what_trains(train, decided):
    trainer = train([HEAD, PARTIAL, ALL], frozen_precision="float32")
    # The head alone is not worth it.
    assert [record.live_dtype for record in trainer.stage_records] == ["float32", "bfloat16", "bfloat16"]
    assert [key["live"] for key in decided] == ["stage4, head", "stem, stage2, stage3, stage4, head"]
    assert [key["from"] for key in decided] == ["stage4", ""]
    assert {key["side"] for key in decided} == {"64"}
    assert {key["architecture"] for key in decided} == {ARCHITECTURE}
    # BatchNorm that trains is not folded, and makes other steps.
    train([dataclasses.replace(ALL, batch_norm="train")], "other")
    assert int(decided[2]["folded"]) < int(decided[1]["folded"])


@pytest.mark.parametrize("options", [{"bf16": True}, {"live_precision": "bfloat16"}, {"live_precision": "float32"}])
def test_who_asks_for_one_gets_it(train, decided, options):
    records = train([PARTIAL, ALL], **options).stage_records
    assert decided == []
    wanted = "float32" if options.get("live_precision") == "float32" else "bfloat16"
    assert [record.live_dtype for record in records] == [wanted] * 2


def test_an_interrupted_stage_goes_on_as_it_was_decided(train, decided, monkeypatch):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 13:
                raise KeyboardInterrupt

    options = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    undisturbed = train([PARTIAL, ALL], "undisturbed", **options)
    with pytest.raises(KeyboardInterrupt):
        train([PARTIAL, ALL], "disturbed", callbacks=[Stop()], **options)
    # The machine would decide otherwise now.
    monkeypatch.setattr(precisions, "live_dtype", lambda *_, **__: Precision(torch.float32, 1.0, 0.0, ""))
    resumed = train([PARTIAL, ALL], "disturbed", resume=True, **options)
    assert [record.live_dtype for record in resumed.stage_records] == ["bfloat16"] * 2
    weights = undisturbed.model.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in resumed.model.state_dict().items())
    assert losses(resumed) == losses(undisturbed)
    assert losses(resumed, "eval_loss") == losses(undisturbed, "eval_loss")


def prepared(stage, batch_norm):
    torch.manual_seed(0)
    model = TorchvisionForImageClassification.from_torchvision(ARCHITECTURE, weights=None, id2label=CLASSES)
    freeze_for_stage(model, stage, batch_norm)
    model.train()
    images = torch.randn(8, 3, 64, 64)
    return model, find_border(model, stage.live_groups(list(model.layer_groups())), images[:2]), images


@pytest.mark.parametrize("batch_norm", ["eval", "train"])
@pytest.mark.parametrize("stage", [PARTIAL, ALL], ids=["partial", "all"])
def test_probing_a_step_leaves_no_trace(stage, batch_norm):
    model, border, images = prepared(stage, batch_norm)
    assert (border is None) == (stage is ALL)
    put_on_fast_form(model)
    model.config.dropout = 0.5
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    random = torch.get_rng_state()
    step, gradient = training_steps(model, border, images)
    for work in (step, gradient):
        work(torch.autocast("cpu", torch.bfloat16))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("stage", [PARTIAL, ALL], ids=["partial", "all"])
def test_the_probed_gradient_is_that_of_the_whole_network(stage):
    model, border, images = prepared(stage, "eval")
    _, gradient = training_steps(model, border, images)
    found = gradient(torch.autocast("cpu", enabled=False))
    model.eval()
    F.cross_entropy(model(pixel_values=images).logits, torch.arange(8) % 3).backward()
    wanted = [parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]
    torch.testing.assert_close(found, torch.cat(wanted), rtol=1e-4, atol=1e-6)


def test_a_network_that_synchronizes_is_not_probed():
    model, _, _ = prepared(ALL, "train")
    assert not precisions._synchronizes(model)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert precisions._synchronizes(model.train())
    assert not precisions._synchronizes(model.eval())


@pytest.mark.skipif(not has_bfloat16(torch.device("cpu")), reason="this CPU has no bfloat16 instructions")
def test_a_real_step_is_measured():
    model, _, images = prepared(ALL, "eval")
    put_on_fast_form(model)
    step, gradient = training_steps(model, None, images)
    found = precisions.live_dtype(lambda: (step, gradient), torch.device("cpu"), key={}, folder=None)
    assert found.difference > 0
    assert found.gain > 0
    assert "changes the gradient by" in found.why
