"""Settings against imbalance: their checks, the proposal by counts, and what they do to a run."""

import copy
import json
import sys

import datasets
import numpy as np
import pytest
import torch
import transformers
from interruptions import Interrupt, InterruptionError
from torch.nn import functional as F

from torchthaw import (
    Stage,
    ThawTrainer,
    ThawTrainingArguments,
    TorchvisionForImageClassification,
    TorchvisionImageProcessor,
    cli,
    load_image_dataset,
)
from torchthaw.data.class_balance import class_probabilities, count_weights
from torchthaw.errors import PlanError, ThawError, TrainingError
from torchthaw.recipe import load_recipe
from torchthaw.training.imbalance import Balance, ImbalanceSettings, propose, settle

ARCHITECTURE = "shufflenet_v2_x0_5"
CLASSES = ["ant", "bee", "cat"]
COUNTS = [20, 2, 2]  # three steps of 8
LABELS = [0] * 20 + [1] * 2 + [2] * 2
PLAN = [Stage("head", "head", epochs=2, learning_rate=1e-2), Stage("more", "head", epochs=1, learning_rate=1e-3)]
BY_NAME = {"bee": 2.0, "cat": 5.0}


# Settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"imbalance": "on"}, "unknown imbalance 'on'"),
        (
            {"class_weights": "balance"},
            r"unknown class_weights 'balance'. Did you mean 'balanced'\? .* each class name",
        ),
        ({"class_weights": {}}, "class_weights is an empty mapping"),
        ({"class_weights": {"ant": 0}}, r"class_weights gives 'ant' the weight 0.*; write a positive number"),
        ({"class_weights": {"ant": float("nan")}}, "class_weights gives 'ant' the weight nan"),
        ({"sampling": "squareroot"}, "unknown sampling 'squareroot'.* There are balanced, sqrt"),
        ({"loss": "focl"}, r"unknown loss 'focl'. Did you mean 'focal'\?"),
        ({"loss": None}, "unknown loss None"),
        ({"loss": "focal", "focal_gamma": -1}, "focal_gamma is -1.*; write 0 or a positive number"),
        ({"loss": "logit_adjusted", "logit_adjustment": 0}, "logit_adjustment is 0.*; write a positive number"),
        ({"focal_gamma": 3}, "focal_gamma is 3.*, but loss is 'cross_entropy', which has none; write loss: focal"),
        ({"loss": "focal", "logit_adjustment": 0.5}, "logit_adjustment is 0.5, but loss is 'focal'.*logit_adjusted"),
        ({"imbalance": "auto", "sampling": "sqrt"}, "imbalance is 'auto', .* but sampling: sqrt was given too"),
        ({"imbalance": "auto", "class_weights": BY_NAME}, "imbalance is 'auto', .*class_weights: {bee: 2, cat: 5}"),
        (
            {"loss": "logit_adjusted", "sampling": "balanced"},
            "sampling: balanced and loss: logit_adjusted each make up",
        ),
        ({"class_weights": "sqrt", "sampling": "sqrt"}, "class_weights: sqrt and sampling: sqrt each make up"),
        ({"class_weights": "balanced", "loss": "logit_adjusted"}, "class_weights: balanced and loss: logit_adjusted"),
    ],
)
def test_bad_settings_are_named_in_recipes_and_arguments(tmp_path, settings, message):
    with pytest.raises(PlanError, match=message):
        ThawTrainingArguments(output_dir=str(tmp_path), **settings)
    recipe = {"backbone": "resnet18", "data": {"path": "photos"}}
    with pytest.raises(ThawError, match="loss is None" if settings == {"loss": None} else message):
        load_recipe({**recipe, **settings})


@pytest.mark.parametrize(
    "settings",
    [
        {"class_weights": BY_NAME, "sampling": "sqrt", "loss": "focal", "focal_gamma": 0},
        {"class_weights": BY_NAME, "loss": "logit_adjusted", "logit_adjustment": 0.5},
        {"class_weights": "balanced", "loss": "focal"},
        {"sampling": "balanced", "loss": "focal", "focal_gamma": 1.5},
        {"imbalance": "auto"},
        {"imbalance": "off", "class_weights": "sqrt"},
    ],
)
def test_settings_that_fit_together_are_taken(tmp_path, settings):
    arguments = ThawTrainingArguments(output_dir=str(tmp_path), **settings)
    recipe = load_recipe({"backbone": "resnet18", "data": {"path": "photos"}, **settings})
    assert ImbalanceSettings.of(arguments) == ImbalanceSettings.of(recipe) == ImbalanceSettings(**settings)


def test_sampling_and_another_strategy_are_refused(tmp_path):
    with pytest.raises(PlanError, match="sampling is 'sqrt', and train_sampling_strategy 'sequential'"):
        ThawTrainingArguments(output_dir=str(tmp_path), sampling="sqrt", train_sampling_strategy="sequential")


def settled(*, labels=LABELS, several_labels=False, **settings):
    return settle(ImbalanceSettings(**settings), labels=labels, class_names=CLASSES, several_labels=several_labels)


def test_weights_by_name():
    assert settled(class_weights=BY_NAME).weights == {"ant": 1.0, "bee": 2.0, "cat": 5.0}
    assert settled(class_weights="balanced").weights == pytest.approx(
        dict(zip(CLASSES, [24 / 60, 24 / 6, 24 / 6], strict=True))
    )
    assert settled(class_weights={"ant": 2}, labels=None).weights == {"ant": 2.0, "bee": 1.0, "cat": 1.0}
    numbers = settle(ImbalanceSettings(class_weights={7: 3}), labels=None, class_names=["6", "7"], several_labels=False)
    assert numbers.weights == {"6": 1.0, "7": 3.0}, "in YAML a name may look like a number"
    with pytest.raises(PlanError, match=r"names the class 'bees', which does not exist. Did you mean 'bee'\?"):
        settled(class_weights={"bees": 2})


BY_COUNTS = [{"class_weights": "sqrt"}, {"sampling": "sqrt"}, {"loss": "logit_adjusted"}, {"imbalance": "auto"}]


@pytest.mark.parametrize("settings", BY_COUNTS)
def test_what_goes_by_counts_needs_them(settings):
    line = ": ".join(*settings.items())
    with pytest.raises(PlanError, match=f"{line} goes by the number of training images.*not known of a stream"):
        settled(labels=None, **settings)
    with pytest.raises(PlanError, match=f"{line} goes by the one class of each image"):
        settled(labels=None, several_labels=True, **settings)


def test_logit_adjustment_needs_an_image_of_every_class():
    with pytest.raises(PlanError, match=r"there are none of 'bee'; add some"):
        settled(labels=[0, 0, 2], loss="logit_adjusted")
    assert settled(labels=[0, 0, 2], class_weights="balanced").weights["bee"] == 0


def test_the_proposal_is_a_function_of_the_counts():
    adjusted = ImbalanceSettings(loss="logit_adjusted")
    assert propose(np.array([99, 20, 10])) == ImbalanceSettings()
    assert propose(np.array([100, 20, 10])) == adjusted
    assert propose(np.array([3000, 1])) == propose(np.array([1, 3000])) == adjusted
    assert propose(np.array([10, 3, 0])) == ImbalanceSettings(class_weights="sqrt"), "no images have no logarithm"
    balance = settled(imbalance="auto")
    assert (balance.settings, balance.requested, balance.weights) == (adjusted, "auto", None)
    assert balance.to_dict()["logit_adjustment"] == 1.0
    absent = settled(labels=[0] * 10 + [2], imbalance="auto")
    assert list(absent.weights.values()) == pytest.approx(count_weights(np.array([10, 0, 1]), "sqrt").tolist())


def test_what_is_said():
    def said(metric="macro_f1", **settings):
        return settled(**settings).sentences(metric)

    uneven = "Classes are uneven: 20 training images of ant, 2 of bee (ratio 10.0); "
    chosen = "macro F1, to which every class counts the same, chooses the best weights."
    proposed = "loss: logit_adjusted"
    advice = f"To train against it, write {proposed} (imbalance: auto does; imbalance: off hides this)."
    assert said() == [f"{uneven}{chosen} {advice}"]
    assert said("accuracy") == [f"{uneven}accuracy chooses the best weights. {advice}"]
    assert said(imbalance="off") == []
    assert said(imbalance="off", loss="focal") == ["Against imbalance: loss: focal."]
    assert said(imbalance="auto") == [f"{uneven}{chosen} Against imbalance: {proposed} (imbalance: auto)."]
    assert said(class_weights="sqrt") == [f"{uneven}{chosen} Against imbalance: class_weights: sqrt."]
    # From a ratio of 2 on macro F1 chooses, from 10 on something is proposed.
    a_little = "Classes are uneven: 5 training images of ant, 2 of bee (ratio 2.5); "
    assert said(labels=[0] * 5 + [1] * 2 + [2] * 3) == [f"{a_little}{chosen}"]
    assert said("accuracy", labels=[0, 0, 0, 1, 1, 2, 2]) == []
    assert said("accuracy", labels=[0, 1, 2], imbalance="auto") == [
        "Below a ratio of 10, imbalance: auto trains plainly."
    ]
    assert said("accuracy", labels=[0, 1, 2], loss="focal", focal_gamma=1.5) == [
        "Against imbalance: loss: focal, focal_gamma: 1.5."
    ]
    assert said(labels=None) == []
    assert said(labels=None, class_weights=BY_NAME) == ["Against imbalance: class_weights: {bee: 2, cat: 5}."]


# Runs


@pytest.fixture(scope="module")
def untrained():
    torch.manual_seed(0)
    return TorchvisionForImageClassification.from_torchvision(ARCHITECTURE, weights="builtin", id2label=CLASSES)


@pytest.fixture(scope="module")
def samples():
    random = torch.Generator().manual_seed(0)
    order = np.random.default_rng(0).permutation(LABELS)
    return [
        {"pixel_values": torch.randn(3, 32, 32, generator=random) + int(label), "labels": torch.tensor(int(label))}
        for label in order
    ]


@pytest.fixture
def make(untrained, samples, tmp_path):
    """Returns a function that makes the trainer of a run in a folder."""

    def new_trainer(
        folder="run", *, train=None, model=None, cls=ThawTrainer, trainer_options=(), model_init=None, **options
    ):
        defaults = {
            "plan": PLAN, "per_device_train_batch_size": 8, "use_cpu": True, "disable_tqdm": True, "report_to": "none",
            "gate": "off", "load_best_model_at_end": False,
        }  # fmt: skip
        trainer = cls(
            model=None if model_init else copy.deepcopy(model or untrained),
            model_init=model_init,
            args=ThawTrainingArguments(output_dir=str(tmp_path / folder), **{**defaults, **options}),
            train_dataset=samples if train is None else train,
            eval_dataset=samples[:9],
            processing_class=TorchvisionImageProcessor.from_torchvision(ARCHITECTURE, "builtin", image_size=32),
            **dict(trainer_options),
        )
        trainer.remove_callback(transformers.PrinterCallback)
        return trainer

    return new_trainer


class Watched(ThawTrainer):
    """Notes the labels of each step, and the logits of each batch as they are trained on."""

    def training_step(self, model, inputs, *args, **kwargs):
        if not hasattr(self, "seen"):
            self.seen = []
        self.seen.append((self.state.stage_index, self.state.global_step, inputs["labels"].tolist()))
        return super().training_step(model, inputs, *args, **kwargs)


def final(trainer):
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def equal(some, others):
    return all(torch.equal(some[name], others[name]) for name in some)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"class_weights": "balanced"}, {"weight": torch.tensor([24 / 60, 24 / 6, 24 / 6])}),
        ({"class_weights": BY_NAME, "label_smoothing_factor": 0.2}, {"weight": torch.tensor([1.0, 2.0, 5.0])}),
        ({"class_weights": "sqrt"}, {"weight": torch.tensor(count_weights(np.array(COUNTS), "sqrt")).float()}),
        ({"imbalance": "auto"}, {"shift": (torch.tensor(COUNTS) / 24).log()}),
        ({"loss": "logit_adjusted", "logit_adjustment": 0.5}, {"shift": 0.5 * (torch.tensor(COUNTS) / 24).log()}),
    ],
)
def test_training_minimises_what_was_asked_for_and_validation_measures_cross_entropy(make, samples, options, expected):
    trainer = make(**options)
    batch = {key: torch.stack([sample[key] for sample in samples[:9]]) for key in ("pixel_values", "labels")}
    trainer.model.train()
    loss, output = trainer.compute_loss(trainer.model, dict(batch), return_outputs=True)
    torch.testing.assert_close(
        loss,
        F.cross_entropy(
            output.logits + expected.pop("shift", 0), batch["labels"], **expected,
            label_smoothing=options.get("label_smoothing_factor", 0.0),
        ),
    )  # fmt: skip
    metrics = trainer.evaluate()
    with torch.no_grad():
        logits = trainer.model.eval()(pixel_values=batch["pixel_values"]).logits
        plain = F.cross_entropy(logits, batch["labels"])
        torch.testing.assert_close(trainer.compute_loss(trainer.model, batch), plain)
    assert metrics["eval_loss"] == pytest.approx(plain.item(), rel=1e-5)


def test_focal_loss_is_trained_with(make, samples):
    trainer = make(loss="focal", focal_gamma=1.5)
    batch = {key: torch.stack([sample[key] for sample in samples[:9]]) for key in ("pixel_values", "labels")}
    trainer.model.train()
    loss, output = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    p = output.logits.softmax(dim=1)[torch.arange(9), batch["labels"]]
    torch.testing.assert_close(loss, (-((1 - p) ** 1.5) * p.log()).mean())


@pytest.mark.parametrize("options", [{"class_weights": BY_NAME}, {"loss": "focal"}, {"label_smoothing_factor": 0.1}])
def test_accumulated_batches_train_like_one(make, options):
    """The weights of all images of a step are what its losses are divided by, not those of each batch."""
    whole, parts = (
        make("whole", **options),
        make("parts", per_device_train_batch_size=2, gradient_accumulation_steps=4, **options),
    )
    losses = []
    for trainer in (whole, parts):
        trainer.train()
        losses.append([line["loss"] for line in trainer.state.log_history if "loss" in line])
    assert whole.state.global_step == parts.state.global_step == 9
    some, others = final(whole), final(parts)
    assert max((some[name].double() - others[name].double()).abs().max().item() for name in some) < 1e-5
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_log_line_has_the_weighted_mean_of_its_steps(make):
    """With one step an epoch, the loss before it is that of the untrained head on all images."""
    trainer = make(class_weights=BY_NAME, per_device_train_batch_size=24, logging_strategy="steps", logging_steps=1)
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        logits = trainer.model.eval()(pixel_values=batch["pixel_values"]).logits
    expected = F.cross_entropy(logits, batch["labels"], weight=torch.tensor([1.0, 2.0, 5.0])).item()
    trainer.train()
    first = next(line for line in trainer.state.log_history if "loss" in line)
    assert first["loss"] == pytest.approx(expected, rel=1e-3)


def test_every_epoch_and_stage_draws_anew(make):
    trainer = make(cls=Watched, sampling="balanced")
    trainer.train()
    epochs = [
        [label for _, step, labels in trainer.seen if step // 3 == epoch for label in labels] for epoch in range(3)
    ]
    assert [len(labels) for labels in epochs] == [24] * 3, "as many draws as there are images"
    assert len({tuple(labels) for labels in epochs}) == 3
    assert [stage for stage, _, _ in trainer.seen] == [0] * 6 + [1] * 3
    shares = np.bincount(np.concatenate(epochs), minlength=3) / 72
    np.testing.assert_allclose(shares, class_probabilities(np.array(COUNTS), "balanced"), atol=0.15)


@pytest.fixture
def images(make_image_folder):
    """Uneven classes, as images: 20, 2 and 2."""
    every = load_image_dataset(make_image_folder(per_class=20))["train"]
    labels = np.array(every["label"])
    return every.select(np.concatenate([np.flatnonzero(labels == k)[:n] for k, n in enumerate(COUNTS)]))


@pytest.mark.parametrize("step", [5, 7])
def test_a_run_goes_on_in_mid_epoch_with_the_same_draws(make, images, step):
    options = {
        "train": images, "sampling": "sqrt", "class_weights": BY_NAME, "augmentation": "light",
        "save_strategy": "steps", "save_steps": 1, "cls": Watched, "logging_strategy": "steps", "logging_steps": 2,
    }  # fmt: skip
    undisturbed = make("undisturbed", **options)
    undisturbed.train()
    broken = make("broken", **options)
    broken.add_callback(Interrupt("on_step_end", step))
    with pytest.raises(InterruptionError):
        broken.train()
    resumed = make("broken", **options, dataloader_num_workers=2)
    resumed.train(resume_from_checkpoint=True)
    assert broken.seen[: step - 1] + resumed.seen == undisturbed.seen
    assert equal(final(resumed), final(undisturbed))
    losses = [[line.get("loss") for line in run.state.log_history] for run in (undisturbed, resumed)]
    assert losses[0] == losses[1]


def test_a_run_is_not_gone_on_with_otherwise_weighted(make):
    broken = make(save_strategy="steps", save_steps=1, class_weights=BY_NAME)
    broken.add_callback(Interrupt("on_step_end", 2))
    with pytest.raises(InterruptionError):
        broken.train()
    other = make(save_strategy="steps", save_steps=1, class_weights={"bee": 3.0, "cat": 5.0}, sampling="sqrt")
    with pytest.raises(PlanError, match=r"class_weights.bee was 2.0 and is 3.0\n.*sampling was null and is \"sqrt\""):
        other.train(resume_from_checkpoint=True)


def test_each_draw_of_an_image_looks_different(make, images):
    trainer = make(train=images, sampling="balanced", augmentation="light")
    batches = list(trainer.get_train_dataloader())
    pixels, labels = (torch.cat([batch[key] for batch in batches]) for key in ("pixel_values", "labels"))
    rare = pixels[labels == 2]
    assert len(rare) > COUNTS[2], "more draws than images"
    assert len({image.numpy().tobytes() for image in rare}) == len(rare)


def test_mixed_labels_are_weighted(make, images):
    trainer = make(train=images, class_weights=BY_NAME, augmentation={"mixup": 1.0})
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    loss, output = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    weights = torch.tensor([1.0, 2.0, 5.0])
    per_image = -(weights * batch["labels"] * output.logits.log_softmax(dim=1)).sum(dim=1)
    torch.testing.assert_close(loss, per_image.sum() / (weights * batch["labels"]).sum())


def test_nothing_of_it_is_in_the_model(make, tmp_path):
    plain, trainer = make("plain"), make(loss="logit_adjusted", label_smoothing_factor=0.1)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    plain.save_model(str(tmp_path / "plain"))
    assert json.loads((tmp_path / "saved/config.json").read_text()) == json.loads(
        (tmp_path / "plain/config.json").read_text()
    )
    model = TorchvisionForImageClassification.from_pretrained(tmp_path / "saved")
    pixels, labels = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 2])
    for mode in (True, False):
        output = model.train(mode)(pixel_values=pixels, labels=labels)
        torch.testing.assert_close(output.loss, F.cross_entropy(output.logits, labels))


def test_results_say_what_was_done(make, images):
    trainer = make(train=images, sampling="sqrt", loss="focal")
    trainer.train()
    results = trainer.save_run(prove=False)
    assert results["imbalance"] == {
        "ratio": 10.0, "requested": None, "class_weights": None, "weights": None, "sampling": "sqrt", "loss": "focal",
        "focal_gamma": 2.0, "logit_adjustment": None,
    }  # fmt: skip
    given = settled(class_weights=BY_NAME).to_dict()
    assert (given["class_weights"], given["weights"]) == ("given", {"ant": 1.0, "bee": 2.0, "cat": 5.0})
    assert isinstance(trainer.balance, Balance)


def stream_of(images):
    return images.to_iterable_dataset().cast_column("image", datasets.Image())


def test_a_stream_takes_weights_by_name_and_focal_loss_only(make, images):
    plan = [Stage("head", "head", steps=2, learning_rate=1e-2)]
    options = {"plan": plan, "train": stream_of(images), "augmentation": "light"}
    make(**options, class_weights=BY_NAME, loss="focal").train()
    for settings in BY_COUNTS:
        with pytest.raises(PlanError, match="not known of a stream"):
            make(**options, **settings)


def test_several_labels_take_weights_by_name_and_focal_loss_only(make, untrained):
    model = copy.deepcopy(untrained)
    model.config.problem_type = "multi_label_classification"
    labels = torch.randint(2, (16, 3), generator=torch.Generator().manual_seed(0)).float()
    train = [{"pixel_values": torch.randn(3, 32, 32), "labels": row} for row in labels]
    options = {"model": model, "train": train, "eval_strategy": "no"}
    trainer = make(**options, class_weights=BY_NAME, loss="focal")
    trainer.train()
    trainer.compute_metrics = None
    measured = trainer.evaluate(train[:8])["eval_loss"]
    with torch.no_grad():
        logits = trainer.model.eval()(torch.stack([sample["pixel_values"] for sample in train[:8]])).logits
    assert measured == pytest.approx(F.binary_cross_entropy_with_logits(logits, labels[:8]).item(), rel=1e-5)
    for settings in BY_COUNTS:
        with pytest.raises(PlanError, match="may have several labels"):
            make(**options, **settings)


def test_samples_without_class_ids_cannot_be_counted(make):
    train = [{"pixel_values": torch.zeros(3, 32, 32), "labels": torch.tensor([0.5, 0.5, 0.0])}] * 16
    with pytest.raises(PlanError, match=r"labels such as \[0.5, 0.5, 0.0\]; pass samples whose `labels` is a class id"):
        make(train=train, sampling="sqrt")
    make(train=train, class_weights=BY_NAME)


def test_labels_that_no_class_has_fail_as_such(make):
    trainer = make(
        train=[{"pixel_values": torch.zeros(3, 32, 32), "labels": torch.ones(2)}] * 16, class_weights=BY_NAME
    )
    with pytest.raises(TrainingError, match="do not fit logits"):
        trainer.train()


def test_a_loss_of_ones_own_excludes_these_losses(make):
    own = {"compute_loss_func": lambda outputs, labels, num_items_in_batch=None: outputs.logits.sum()}
    with pytest.raises(PlanError, match="compute_loss_func was passed, but loss: focal asks for another loss"):
        make(loss="focal", trainer_options=own)
    make(sampling="sqrt", label_smoothing_factor=0.1, trainer_options=own)


def test_a_search_can_choose_the_loss(make, untrained):
    pytest.importorskip("optuna")
    space = [{"loss": "focal"}, {"loss": "cross_entropy", "class_weights": "balanced"}]
    trainer, seen = make(model_init=lambda: copy.deepcopy(untrained)), []

    class Watch(transformers.TrainerCallback):
        def on_train_begin(self, args, state, control, **_):
            seen.append((trainer.training_loss.gamma, trainer.training_loss.weights is None))

    trainer.add_callback(Watch())
    trainer.hyperparameter_search(
        lambda trial: space[trial.number], direction="maximize", n_trials=2,
        compute_objective=lambda metrics: metrics["eval_loss"],
    )  # fmt: skip
    assert seen == [(2.0, True), (0.0, False)]


# The command line


def test_a_dry_run_says_and_records_it(monkeypatch, capsys, tmp_path, make_image_folder):
    photos = make_image_folder(per_class=30)
    for kind, number in zip(CLASSES, [30, 2, 2], strict=True):
        for file in sorted((photos / kind).iterdir())[number:]:
            file.unlink()
    command = [
        "torchthaw", "train", "staged", "--data", str(photos), "--backbone", ARCHITECTURE, "--set", "weights=null",
        "--set", "image_size=32", "--set", "batch_size=4", "--set", "data.validation=3", "--dry-run", "--json",
    ]  # fmt: skip

    def run(*settings):
        monkeypatch.setattr(sys, "argv", [*command, *(part for text in settings for part in ("--set", text))])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        captured = capsys.readouterr()
        return exit_.value.code or 0, captured.out, captured.err

    code, stdout, stderr = run()
    assert code == 0, stderr
    assert json.loads(stdout)["imbalance"]["class_weights"] is None
    assert "Classes are uneven:" in stderr
    assert "To train against it, write loss: logit_adjusted (" in stderr
    code, stdout, stderr = run("imbalance=auto")
    assert json.loads(stdout)["imbalance"]["loss"] == "logit_adjusted"
    assert "Against imbalance: loss: logit_adjusted (imbalance: auto)." in stderr
    code, stdout, stderr = run("class_weights={cat: 3}", "imbalance=off")
    assert json.loads(stdout)["imbalance"]["weights"] == {"ant": 1.0, "bee": 1.0, "cat": 3.0}
    code, _, stderr = run("class_weights={dog: 3}")
    assert code == 2
    assert "names the class 'dog', which does not exist" in stderr
