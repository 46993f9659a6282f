"""Head stages that are linear probes, and stages that go by them, in whole runs."""

import copy
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from interruptions import Interrupt, InterruptionError
from sklearn.linear_model import LogisticRegression

from torchthaw import (
    Stage,
    ThawTrainer,
    ThawTrainingArguments,
    TorchvisionForImageClassification,
    TorchvisionImageProcessor,
    load_image_dataset,
    split_dataset,
)
from torchthaw.backbones.norm_shift import statistics_shift
from torchthaw.data.views import ImageView
from torchthaw.errors import PlanError, TrainingError
from torchthaw.stages import auto
from torchthaw.training import gate, probe_options
from torchthaw.training.callbacks import StageCallback
from torchthaw.training.resume import has_checkpoint

ARCHITECTURE = "shufflenet_v2_x0_5"
WITH_DROPOUT = "mobilenet_v3_small"  # and with a hidden layer in the classifier
CLASSES = ["ant", "bee", "cat"]
HEAD_WEIGHT = "backbone.fc.weight"
PROBE = Stage("head", "head", solver="probe")
ALL = Stage("all", "all", epochs=2, by_probe=True, selection="one_se")


class After(StageCallback):
    """Keeps the stages as they were run, and the weights after each."""

    def __init__(self):
        self.stages, self.weights = [], []

    def on_stage_end(self, args, state, control, *, model, stage, **_):
        self.stages.append(stage)
        self.weights.append({name: tensor.clone() for name, tensor in model.state_dict().items()})


@pytest.fixture
def splits(make_image_folder):
    return split_dataset(load_image_dataset(make_image_folder(per_class=16)), validation=0.25, seed=0)


def shuffled(images):
    labels = np.random.default_rng(0).permutation(images["label"]).tolist()
    feature = images.features["label"]
    return images.remove_columns("label").add_column("label", labels).cast_column("label", feature)


def new_model(architecture=ARCHITECTURE, **options):
    torch.manual_seed(0)
    weights = "builtin" if architecture == ARCHITECTURE else None
    return TorchvisionForImageClassification.from_torchvision(
        architecture, weights=weights, id2label=CLASSES, **options
    )


@pytest.fixture
def make(splits, tmp_path):
    """Returns a function that makes the trainer of a run in a folder, `run` by default."""

    def new_trainer(plan, folder="run", *, model=None, train=None, callbacks=(), kwargs=None, **options):
        model = new_model() if model is None else copy.deepcopy(model)
        defaults = {
            "plan": plan, "per_device_train_batch_size": 8, "gate": "off", "use_cpu": True, "disable_tqdm": True,
            "report_to": "none", "save_total_limit": None,
        }  # fmt: skip
        trainer = ThawTrainer(
            model=model,
            args=ThawTrainingArguments(output_dir=str(tmp_path / folder), **{**defaults, **options}),
            train_dataset=splits["train"] if train is None else train,
            eval_dataset=splits["validation"],
            processing_class=TorchvisionImageProcessor.from_torchvision(
                model.config.architecture, weights=None, image_size=32
            ),
            callbacks=list(callbacks),
            **(kwargs or {}),
        )
        trainer.remove_callback(transformers.PrinterCallback)
        return trainer

    return new_trainer


def features_of(trainer, layer="classifier.3"):
    """What the final layer gets for all training images, computed by the whole model, and their labels."""
    model, seen = trainer.model.eval(), []
    hook = model.backbone.get_submodule(layer).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    data = trainer.train_dataset
    pixels = torch.stack([trainer.processing_class(row["image"]["path"])["pixel_values"][0] for row in data.dataset])
    with torch.no_grad():
        model(pixel_values=pixels)
    hook.remove()
    return seen[0].double().numpy(), np.asarray(data.dataset["label"])


@pytest.mark.parametrize(
    ("options", "weights"),
    [
        ({}, None),
        ({"class_weights": {"ant": 3, "bee": 1, "cat": 0.5}}, {0: 3, 1: 1, 2: 0.5}),
        ({"gradient_accumulation_steps": 2, "augmentation": "strong"}, None),
    ],
    ids=["plain", "weights", "accumulated"],
)
def test_the_head_is_the_logistic_regression_of_the_features(make, splits, options, weights):
    # Hard to tell, so that the penalty matters.
    trainer = make([PROBE], train=shuffled(splits["train"]), model=new_model(WITH_DROPOUT), **options)
    before = copy.deepcopy(trainer.model.state_dict())
    trainer.train()
    (record,) = trainer.stage_records
    assert (record.steps, record.learning_rates) == (1, {"head": 0.0})
    features, labels = features_of(trainer)
    centered = features - features.mean(0)
    scaled = centered / np.sqrt((centered**2).mean())
    by_image = None if weights is None else np.array([weights[label] for label in labels])
    total = len(labels) if by_image is None else by_image.sum()
    expected = LogisticRegression(C=1 / (record.probe["penalty"] * total), tol=1e-8, max_iter=10_000)
    expected.fit(scaled, labels, sample_weight=by_image)
    head = trainer.model.backbone.classifier[3]
    found = (torch.from_numpy(features).float() @ head.weight.T + head.bias).detach().softmax(1)
    np.testing.assert_allclose(found.numpy(), expected.predict_proba(scaled), atol=2e-4)
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(tensor, before[name]) != ("classifier.3" in name), name
    (line,) = [line for line in trainer.state.log_history if "loss" in line]
    log_loss = -np.log(expected.predict_proba(scaled)[np.arange(len(labels)), labels])
    assert line["loss"] == pytest.approx(np.average(log_loss, weights=by_image), rel=1e-3)
    assert record.probe["held_out_images"] == len(labels)


def test_later_stages_go_by_the_probe(make, splits):
    """Classes that differ by colour are told by any network; of shuffled labels nothing can be learned."""
    seen = {}
    for name, train in {"near": splits["train"], "far": shuffled(splits["train"])}.items():
        after = After()
        trainer = make([PROBE, ALL], name, train=train, callbacks=[after])
        trainer.train()
        seen[name] = (after.stages[1], *trainer.stage_records)
    stage, probe, record = seen["near"]
    assert probe.probe["macro_f1"] > 0.85
    assert stage.learning_rate == 5e-4
    assert (record.chosen is not None, probe.chosen) == (True, None)
    assert (stage.wise_ft, record.wise_ft["alpha"]) == (0.5, 0.5)
    assert f"{probe.probe['macro_f1']:.3f}" in record.chosen
    stage, probe, record = seen["far"]
    assert probe.probe["macro_f1"] < 0.5
    assert stage.learning_rate == 1e-3
    assert record.learning_rates["head"] == 1e-3
    assert "larger steps" in record.chosen


@pytest.fixture
def everything_is_far(monkeypatch):
    """Lets few images in small batches count as far from those of pretraining."""
    for name, value in {
        "FAR_IMAGES": 8,
        "FAR_STEPS": 1,
        "FAR_SHIFT": 0.0,
        "FAR_PROBE": 0.0,
        "FAR_BITS": 1,
        "SMALL_BATCH": 8,
    }.items():
        monkeypatch.setattr(auto, name, value)


@pytest.fixture
def both_ways_are_tried(everything_is_far, monkeypatch):
    """Lets few images in small batches be worth a try, and no more."""
    for name, value in {
        "FAR_IMAGES": 10_000,
        "FEW_IMAGES": 8,
        "TRY_IMAGES": 8,
        "TRY_BATCH": 8,
        "TRY_STEPS": 1,
    }.items():
        monkeypatch.setattr(auto, name, value)


class Heads(StageCallback):
    """Keeps the weights of the head at the begin of each stage."""

    def __init__(self):
        self.weights = []

    def on_stage_begin(self, args, state, control, *, model, **_):
        self.weights.append(model.backbone.fc.weight.detach().clone())


def test_a_run_that_has_validation_choose_shares_has_it_choose_those_of_few_images_too(make):
    trainer = make([PROBE, ALL], wise_ft=True)
    trainer.train()
    assert len(trainer.stage_records[1].wise_ft["metric"]) == 5


@pytest.mark.usefixtures("everything_is_far")
def test_far_images_train_batch_norm_and_a_new_head(make, splits):
    after, heads = After(), Heads()
    trainer = make([PROBE, ALL], callbacks=[after, heads])
    view = ImageView(splits["train"], trainer.processing_class)
    expected = statistics_shift(trainer.model, [torch.stack([sample["pixel_values"] for sample in view])])
    trainer.train()
    record = trainer.stage_records[1]
    assert f"are {expected:.2f} from the pretrained ones" in record.chosen
    assert (record.batch_norm, after.stages[1].new_head, after.stages[1].learning_rate) == ("train", True, 1e-3)
    assert record.wise_ft is None
    probed, drawn, trained = after.weights[0][HEAD_WEIGHT], heads.weights[1], after.weights[1][HEAD_WEIGHT]
    # As torch draws linear layers: evenly between these bounds.
    assert drawn.abs().max() <= drawn.shape[1] ** -0.5 < probed.abs().max()
    assert drawn.std() == pytest.approx((3 * drawn.shape[1]) ** -0.5, rel=0.05)
    assert abs(torch.corrcoef(torch.stack([drawn.flatten(), probed.flatten()]))[0, 1]) < 0.1
    assert 0 < (trained - drawn).abs().max() < 0.1
    name = "backbone.conv5.1.running_var"
    assert not torch.equal(after.weights[0][name], after.weights[1][name])


@pytest.mark.usefixtures("everything_is_far")
def test_a_head_learned_anew_in_vain_gives_way_to_the_old_one(make, splits):
    after = After()
    last = Stage("all", "all", steps=1, by_probe=True)
    trainer = make([PROBE, last], gate="best", min_gain=0.5, callbacks=[after])
    trainer.train()
    assert not trainer.stage_records[1].accepted
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(tensor, after.weights[0][name]), name


@pytest.mark.usefixtures("both_ways_are_tried")
@pytest.mark.parametrize("min_gain", [0.0, 0.5])
def test_of_fewer_far_images_validation_chooses(make, splits, min_gain):
    after, heads = After(), Heads()
    # Of shuffled labels hardly anything is learned, so that stages differ.
    trainer = make(
        [PROBE, ALL], gate="best", min_gain=min_gain, train=shuffled(splits["train"]), callbacks=[after, heads]
    )
    trainer.train()
    _, everything, anew = trainer.stage_records
    assert [(r.name, r.batch_norm) for r in (everything, anew)] == [("all", "eval"), ("all anew", "train")]
    assert "a further stage has BatchNorm and a new head learn" in everything.chosen
    assert "is kept unless validation speaks against it" in anew.chosen
    assert (after.stages[2].new_head, after.stages[2].layer_decay, anew.steps) == (True, 1.0, everything.steps)
    assert heads.weights[2].std() == pytest.approx((3 * heads.weights[2].shape[1]) ** -0.5, rel=0.05)
    assert trainer.state.global_step == trainer.state.max_steps == 1 + 2 * everything.steps
    assert trainer.state.num_train_epochs == 5
    kept = [index for index, record in enumerate(trainer.stage_records) if record.accepted][-1]
    if min_gain:
        assert kept == 0
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(tensor, after.weights[kept][name]), name


@pytest.mark.usefixtures("both_ways_are_tried")
def test_a_further_stage_need_not_be_better_and_the_others_must(make, monkeypatch):
    monkeypatch.setattr(gate, "ONE_STANDARD_ERROR", 0.0)
    # Classes that differ by colour are told by the probe already, so that no stage can be better.
    trainer = make([PROBE, ALL], gate="best")
    trainer.train()
    _, everything, anew = trainer.stage_records
    assert (everything.accepted, anew.accepted) == (False, True)
    assert everything.comparison["before"] == anew.comparison["before"] == 1
    assert "no worse by more than one standard error, kept" in anew.reason


@pytest.mark.usefixtures("both_ways_are_tried")
def test_where_validation_decides_nothing_only_one_way_is_gone(make):
    trainer = make([PROBE, ALL], gate="off")
    trainer.train()
    assert [(record.name, record.batch_norm) for record in trainer.stage_records] == [("head", "eval"), ("all", "eval")]


@pytest.mark.usefixtures("both_ways_are_tried")
def test_a_plan_that_goes_on_after_the_stage_that_chooses_gets_no_further_one(make):
    trainer = make([PROBE, ALL, Stage("more", 1, epochs=1, learning_rate=1e-4)], gate="best")
    trainer.train()
    assert [record.name for record in trainer.stage_records] == ["head", "all", "more"]
    assert "further stage" not in trainer.stage_records[1].chosen


@pytest.mark.usefixtures("both_ways_are_tried")
@pytest.mark.parametrize(("event", "step"), [("on_save", 7), ("on_evaluate", 10), ("on_step_begin", 12)])
def test_an_interrupted_run_that_tries_both_ways_goes_on_bit_for_bit(make, splits, event, step):
    check_interrupted(make, shuffled(splits["train"]), event, step)


def test_what_is_given_for_batch_norm_stands(make, everything_is_far):
    after = After()
    make([PROBE, dataclasses.replace(ALL, epochs=1, batch_norm="eval")], callbacks=[after]).train()
    assert (after.stages[1].batch_norm, after.stages[1].new_head) == ("eval", False)


@pytest.mark.usefixtures("everything_is_far")
@pytest.mark.parametrize(("event", "step"), [("on_evaluate", 1), ("on_step_begin", 1), ("on_save", 3)])
def test_an_interrupted_run_on_far_images_goes_on_bit_for_bit(make, splits, event, step):
    check_interrupted(make, splits["train"], event, step)


@pytest.mark.parametrize(
    ("event", "step"),
    [("on_step_begin", 0), ("on_step_end", 1), ("on_evaluate", 1), ("on_save", 1), ("on_save", 3), ("on_evaluate", 6)],
)
def test_an_interrupted_run_goes_on_bit_for_bit(make, splits, event, step):
    # Shuffled, so that something else than the default is chosen.
    check_interrupted(make, shuffled(splits["train"]), event, step)


def check_interrupted(make, train, event, step):
    options = {
        "train": train, "save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1,
        "gate": "best",
    }  # fmt: skip
    whole = make([PROBE, ALL], "whole", **options)
    whole.train()
    broken = make([PROBE, ALL], callbacks=[Interrupt(event, step)], **options)
    with pytest.raises(InterruptionError):
        broken.train()
    resumed = make([PROBE, ALL], **options)
    resumed.train(resume_from_checkpoint=has_checkpoint(Path(broken.args.output_dir)))
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name
    told = [[(r.probe, r.chosen, r.batch_norm, r.best_step) for r in t.stage_records] for t in (resumed, whole)]
    assert told[0] == told[1]


def test_where_there_can_be_no_probe_the_head_takes_its_epochs(make):
    squeezed = make("auto", model=new_model("squeezenet1_1"), num_train_epochs=2)
    assert [stage.solver for stage in squeezed.plan.stages] == ["gradient", "gradient"]
    assert squeezed.plan.stages[0].epochs == 1
    squeezed.train()
    assert squeezed.stage_records[0].probe is None
    assert squeezed.stage_records[0].learning_rates == {"head": 1e-3}
    assert "without a linear probe" in squeezed.stage_records[1].chosen


def own_loss(outputs, labels, num_items_in_batch=None):
    return torch.nn.functional.cross_entropy(outputs.logits, labels)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "squeezenet1_1"}, "the head of squeezenet1_1 is no linear layer"),
        ({"loss": "focal"}, "the focal loss"),
        ({"kwargs": {"compute_loss_func": own_loss}}, "compute_loss_func was passed"),
        ({"kwargs": {"data_collator": transformers.default_data_collator}}, "data_collator was passed"),
        ({"train": "tensors"}, "gives tensors"),
        ({"plan": [Stage("head", "head", solver="probe", augmentation="light")]}, "write augmentation: none"),
    ],
    ids=["head", "loss", "own loss", "collator", "tensors", "augmentation"],
)
def test_a_probe_that_cannot_be_is_refused(make, options, message):
    options = dict(options)
    if "model" in options:
        options["model"] = new_model(options["model"])
    if "train" in options:
        options["train"] = [{"pixel_values": torch.zeros(3, 32, 32), "labels": 0}] * 12
    with pytest.raises(PlanError, match=f"stage 'head' has solver: probe, but .*{message}"):
        make(options.pop("plan", [PROBE]), **options).train()


def test_a_probe_that_would_take_long_is_no_probe(make, monkeypatch):
    assert make("auto", num_train_epochs=2).plan.stages[0].solver == "probe"
    monkeypatch.setattr(probe_options, "MOST_WORK", 36 * 1024 * 3 - 1)  # of images, features and classes
    assert make("auto", num_train_epochs=2).plan.stages[0].solver == "gradient"
    with pytest.raises(PlanError, match="for 36 images and 3 classes it would take longer"):
        make([PROBE])


def test_auxiliary_heads_and_several_labels(make):
    model = new_model("googlenet", aux_logits=True)
    with pytest.raises(PlanError, match="auxiliary heads"):
        make([PROBE], model=model)


def test_broken_features_are_said(make):
    model = new_model()
    with torch.no_grad():
        model.backbone.conv1[0].weight.fill_(float("nan"))
    with pytest.raises(TrainingError, match="features of 36 of 36 images are not finite"):
        make([PROBE], model=model, eval_on_start=False).train()


def test_a_range_test_of_a_probe_takes_gradient_steps(make):
    trainer = make([PROBE, ALL])
    found = trainer.find_lr("head", steps=20)
    assert len(found.rates) > 5
    assert found.recipe is None or "solver" not in found.recipe
    found = trainer.find_lr("all", steps=20, lead_steps=3)
    assert found.recipe is None or "by_probe" not in found.recipe


def test_what_a_run_saves_says_what_the_probe_found(make, tmp_path):
    trainer = make("auto", num_train_epochs=2)
    trainer.train()
    trainer.save_run(str(tmp_path / "saved"))
    results = json.loads((tmp_path / "saved" / "results.json").read_text())
    assert results["stages"][0]["probe"]["macro_f1"] == trainer.stage_records[0].probe["macro_f1"]
    card = " ".join((tmp_path / "saved" / "README.md").read_text().split())
    assert "head: linear probe" in card
    assert "was fitted at once, as a logistic regression" in card
    assert "Rates of stage all: the linear probe has macro F1" in card
