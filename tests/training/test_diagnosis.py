"""What the curves of a run show, said in words: each signal by real training that makes it, and none without cause."""

import dataclasses
import json

import numpy as np
import pytest
import torch
import transformers
from datasets import Dataset, DatasetDict
from hypothesis import given, settings
from hypothesis import strategies as st

from torchthaw import (
    Stage,
    ThawTrainer,
    ThawTrainingArguments,
    TorchvisionForImageClassification,
    TorchvisionImageProcessor,
)
from torchthaw.data.builtin import load_builtin_dataset
from torchthaw.training.callbacks import DiagnosisCallback
from torchthaw.training.diagnosis import Course, diagnose
from torchthaw.training.records import StageRecord

DIGITS = [str(digit) for digit in range(10)]


def log_of(*rows, start=(2.3, 0.1), stage=0):
    """Returns log lines of (training loss, validation loss, accuracy), one an epoch, after those of a validation."""
    lines = []
    if start is not None:
        lines.append({"eval_loss": start[0], "eval_accuracy": start[1], "eval_balanced_accuracy": start[1],
                      "epoch": 0, "step": 0, "stage": 0})  # fmt: skip
    for epoch, (loss, eval_loss, accuracy) in enumerate(rows, start=1):
        place = {"epoch": epoch, "step": 10 * epoch, "stage": stage}
        lines.append({"loss": loss, "grad_norm": 1.0, **place})
        lines.append({"eval_loss": eval_loss, "eval_accuracy": accuracy, "eval_balanced_accuracy": accuracy, **place})
    return lines


def record_of(**changed):
    record = StageRecord(
        name="all", epochs=3, steps=30, seconds=30.0, train_images_per_second=50.0, trainable_parameters=100,
        best_metric=0.9, learning_rates={"stem": 1e-5, "head": 1e-3}, batch_norm="eval", accepted=True, reason="better",
        changes={"stem": 0.01, "head": 0.4}, data_wait_share=0.05,
    )  # fmt: skip
    return dataclasses.replace(record, **changed)


def course_of(log, *records, images=500, **options):
    records = records or (record_of(),)
    return Course(log=log, records=records, class_counts=[images // 10] * 10, num_classes=10, **options)


def signals(course):
    return [finding.signal for finding in diagnose(course)]


GOOD = log_of((1.5, 1.2, 0.6), (0.9, 0.8, 0.75), (0.6, 0.6, 0.82))


def test_a_healthy_run_works_and_nothing_else_is_said():
    [finding] = diagnose(course_of(GOOD))
    assert finding.signal == "working"
    assert finding.evidence == (
        "training loss 1.500 to 0.600, validation loss 2.300 to 0.600 (accuracy 0.100 to 0.820)"
    )
    assert finding.advice is None


def test_overfitting():
    log = log_of((1.0, 0.8, 0.7), (0.6, 0.6, 0.80), (0.3, 0.7, 0.80), (0.1, 0.9, 0.79))
    [finding] = diagnose(course_of(log))
    assert finding.signal == "overfitting"
    assert "from epoch 2 to 4 the training loss fell from 0.600 to 0.100" in finding.evidence
    assert "the validation loss rose from 0.600 to 0.900 (accuracy 0.800 to 0.790)" in finding.evidence
    assert finding.advice.startswith("augmentation: strong")


@pytest.mark.parametrize(
    "rows",
    [
        # Both get worse, one worse validation only, within noise, and the training loss hardly falls.
        [(1.0, 0.8, 0.7), (0.6, 0.6, 0.80), (0.7, 0.7, 0.80), (0.8, 0.9, 0.79)],
        [(1.0, 0.8, 0.7), (0.6, 0.6, 0.80), (0.1, 0.9, 0.80)],
        [(1.0, 0.8, 0.7), (0.6, 0.6, 0.80), (0.3, 0.62, 0.80), (0.1, 0.64, 0.80)],
        [(1.0, 0.8, 0.7), (0.6, 0.6, 0.80), (0.59, 0.7, 0.80), (0.58, 0.9, 0.80)],
    ],
)
def test_what_is_not_clearly_overfitting_is_not_called_so(rows):
    assert "overfitting" not in signals(course_of(log_of(*rows)))


def test_a_stage_that_begins_anew_is_not_compared_with_the_one_before():
    first = log_of((1.0, 0.8, 0.7), (0.6, 0.6, 0.8), (0.5, 0.5, 0.85))
    second = log_of((0.4, 0.65, 0.8), (0.3, 0.6, 0.8), start=None, stage=1)
    assert signals(course_of([*first, *second], record_of(), record_of())) == ["working"]


def test_a_rate_that_destroys():
    second = log_of((1.5, 1.2, 0.5), (1.2, 1.0, 0.6), start=None, stage=1)
    course = course_of([*GOOD, *second], record_of(), record_of(name="last", learning_rates={"head": 0.03}))
    [finding] = diagnose(course)
    assert finding.signal == "rate too high"
    assert finding.evidence == (
        "stage 'last': validation loss 1.000 at best, where it was before it 0.600, at rates up to 3e-2"
    )
    assert finding.advice == "learning_rate: 3e-3"
    # What was before it is what was kept.
    rejected = course_of([*GOOD, *second], record_of(accepted=False), record_of())
    assert "rate too high" not in signals(rejected)


def test_worse_than_guessing():
    [finding] = diagnose(course_of(log_of((8.0, 9.0, 0.1), (7.0, 6.0, 0.1))))
    assert finding.signal == "rate too high"
    assert "guessing gives 2.303" in finding.evidence


@pytest.mark.parametrize(
    "ended", ["a gradient is not finite in stage 'all'", "the loss became nan at step 3", "the loss became inf"]
)
def test_not_finite(ended):
    [finding] = diagnose(course_of(GOOD, record_of(ended_early=ended)))
    assert finding.signal == "not finite"
    assert ended in finding.evidence
    assert finding.advice == "learning_rate: 1e-4"
    assert "not finite" not in signals(course_of(GOOD, record_of(ended_early="2 validations without a better one")))


GUESSING = log_of((2.31, 2.31, 0.10), (2.30, 2.30, 0.11), (2.30, 2.31, 0.10))


def test_nothing_learned_since_nothing_moved():
    [finding] = diagnose(course_of(GUESSING, record_of(changes={"stem": 0, "head": 0.001})))
    assert finding.signal == "rate too low"
    assert "the head moved by 0.10% of its norm only" in finding.evidence
    assert finding.advice == "learning_rate: 1e-2"


def test_nothing_learned_since_too_much_is_frozen():
    only_head = record_of(learning_rates={"head": 1e-3})
    [finding] = diagnose(course_of(GUESSING, only_head))
    assert (finding.signal, finding.advice) == ("too much frozen", "plan: full")
    [finding] = diagnose(course_of(GUESSING, record_of(learning_rates={"stem": 1e-3})))
    assert (finding.signal, finding.advice) == ("too much frozen", "unfreeze: head")


def test_nothing_learned_although_everything_trains():
    [finding] = diagnose(course_of(GUESSING))
    assert finding.signal == "labels"
    assert "although every layer trains" in finding.evidence


def test_learned_by_heart():
    by_heart = log_of((2.3, 2.4, 0.10), (1.5, 2.5, 0.11), (0.9, 2.6, 0.10))
    [finding] = diagnose(course_of(by_heart))
    assert finding.signal == "labels"
    assert "although the training loss fell from 2.300 to 0.900" in finding.evidence


def test_chance_depends_on_the_number_of_images():
    slightly = log_of((2.3, 2.29, 0.13), (2.2, 2.28, 0.13))
    assert signals(course_of(slightly, images=5000)) == ["working"]
    assert signals(course_of(slightly, record_of(changes={"head": 0.0}), images=100)) == ["rate too low"]


def test_before_the_end_nothing_is_said_that_later_stages_may_change():
    assert diagnose(course_of(GUESSING, over=False)) == []
    assert diagnose(course_of(GOOD, over=False)) == []
    early = course_of(log_of((8.0, 9.0, 0.1)), over=False)
    assert signals(early) == ["rate too high"]


def test_erratic():
    log = log_of((1.0, 0.8, 0.80), (0.7, 0.7, 0.60), (0.6, 0.6, 0.82))
    [finding] = diagnose(course_of(log))
    assert finding.signal == "erratic validation"
    assert "accuracy 0.800, 0.600, 0.820 in epochs 1 to 3, where 500 images explain jumps of 0.09" in finding.evidence
    assert finding.advice == "learning_rate: 3.3e-4 in the stage"
    [finding] = diagnose(course_of(log, record_of(batch_norm="train")))
    assert finding.advice == "batch_norm: eval in the stage"
    # The same jumps of fewer images are chance, and so is a fall that lasts.
    assert "erratic validation" not in signals(course_of(log, images=60))
    assert "erratic validation" not in signals(course_of(log_of((1, 1, 0.8), (1, 1, 0.6), (1, 1, 0.6))))


def test_plateau():
    log = log_of(
        *[(1.0 - 0.05 * epoch, 0.6, accuracy) for epoch, accuracy in enumerate([0.7, 0.8, 0.79, 0.8, 0.78, 0.8])]
    )
    found = diagnose(course_of(log, record_of(seconds=60.0)))
    assert [finding.signal for finding in found] == ["plateau", "working"]
    assert "accuracy 0.800 in epoch 2 was not reached again in 4 more, about 40 s" in found[0].evidence


def test_small_validation():
    found = diagnose(course_of(GOOD, images=20))
    assert [finding.signal for finding in found] == ["working", "small validation"]
    assert "20 images: an accuracy of 0.82 may be anything from 0.58 to 0.92" in found[1].evidence
    assert found[1].advice == "cv: 5"


def test_waiting():
    slow = record_of(data_wait_share=0.4, seconds=100.0)
    found = diagnose(course_of(GOOD, slow, num_workers=2))
    assert [finding.signal for finding in found] == ["waiting for data"]
    assert found[0].advice == "num_workers: 4"
    assert signals(course_of(GOOD, record_of(data_wait_share=0.4, seconds=5.0))) == ["working"]


@pytest.mark.parametrize(
    "course",
    [
        Course(log=[]),
        Course(log=[{"loss": 1.0, "step": 1}]),
        Course(log=GOOD),
        Course(log=[{"eval_loss": 0.6, "step": 3}], records=[record_of(changes={})]),
        Course(log=[{"eval_photos_loss": 1.0, "step": 3}], records=[record_of()]),
    ],
    ids=["nothing", "no validation", "no stage", "own metrics", "several sets"],
)
def test_where_little_is_known_little_is_said(course):
    assert signals(course) == []


rows = st.lists(st.tuples(st.floats(0, 10), st.floats(0, 10), st.floats(0, 1)), max_size=8)


@given(rows=rows, images=st.integers(0, 500), over=st.booleans())
@settings(deadline=None, max_examples=200)
def test_any_curve_gives_plain_sentences(rows, images, over):
    found = diagnose(course_of(log_of(*rows), images=images, over=over))
    assert json.loads(json.dumps([finding.to_dict() for finding in found])) == [f.to_dict() for f in found]
    assert all(finding.sentence.startswith(f"{finding.signal}: ") for finding in found)
    kinds = {finding.signal for finding in found}
    assert not ({"working"} & kinds and kinds - {"working", "plateau", "small validation"})


# Real training: scikit-learn's digits, on the small backbone that comes with the package.


@pytest.fixture(scope="module")
def digits():
    images = load_builtin_dataset("digits")["train"].shuffle(seed=0)
    return images.select(range(300)), images.select(range(300, 600))


def train(splits, folder, stage, *, said=None, **options):
    torch.manual_seed(0)
    data = DatasetDict(train=splits[0], validation=splits[1])
    trainer = ThawTrainer(
        TorchvisionForImageClassification.from_torchvision("shufflenet_v2_x0_5", weights="builtin", id2label=DIGITS),
        ThawTrainingArguments(
            output_dir=str(folder), plan=stage if isinstance(stage, list) else [stage], augmentation="none", gate="off",
            use_cpu=True, disable_tqdm=True, report_to="none", save_strategy="no", load_best_model_at_end=False,
            **options,
        ),
        train_dataset=data["train"], eval_dataset=data["validation"],
        processing_class=TorchvisionImageProcessor.from_torchvision(
            "shufflenet_v2_x0_5", weights="builtin", image_size=32
        ),
    )  # fmt: skip
    trainer.remove_callback(transformers.PrinterCallback)
    if said is not None:
        trainer.add_callback(DiagnosisCallback(trainer.diagnose, said.append))
    trainer.train()
    return trainer


def shuffled(images: Dataset, seed):
    labels = np.random.default_rng(seed).permutation(images["label"]).tolist()
    return images.remove_columns("label").add_column("label", labels).cast(images.features)


FULL = Stage("all", "all", epochs=6, learning_rate=3e-3, layer_decay=0.7, batch_norm="train")


def test_real_training_that_works(digits, tmp_path):
    said = []
    trainer = train(digits, tmp_path, [Stage("head", "head", epochs=3, learning_rate=1e-2), FULL], said=said)
    assert [finding.signal for finding in trainer.diagnose()] == ["working"]
    assert said == []


def test_real_training_at_too_high_a_rate(digits, tmp_path):
    said = []
    head = Stage("head", "head", epochs=3, learning_rate=1e-2)
    wreck = Stage("wreck", "all", epochs=2, learning_rate=0.03, layer_decay=1.0, batch_norm="eval")
    trainer = train(digits, tmp_path, [head, wreck], said=said)
    assert [finding.signal for finding in trainer.diagnose()] == ["rate too high"]
    assert said == [finding.sentence for finding in trainer.diagnose()]


def test_real_training_that_breaks(digits, tmp_path):
    head = Stage("head", "head", epochs=3, learning_rate=1e-2)
    wreck = Stage("wreck", "all", epochs=2, learning_rate=3.0, optimizer="sgd", layer_decay=1.0, batch_norm="eval")
    trainer = train(digits, tmp_path, [head, wreck], max_grad_norm=0.0)
    assert [finding.signal for finding in trainer.diagnose()] == ["not finite"]


def test_real_training_at_too_low_a_rate(digits, tmp_path):
    trainer = train(digits, tmp_path, Stage("head", "head", epochs=3, learning_rate=1e-7))
    assert [finding.signal for finding in trainer.diagnose()] == ["rate too low"]


def test_real_training_on_shuffled_labels(digits, tmp_path):
    splits = [shuffled(images, 1) for images in digits]
    trainer = train(splits, tmp_path, dataclasses.replace(FULL, epochs=8))
    assert [finding.signal for finding in trainer.diagnose()] == ["labels"]


def test_real_training_without_a_head(digits, tmp_path):
    stage = Stage("stem", ["stem"], epochs=2, learning_rate=1e-6)
    trainer = train(digits, tmp_path, stage)
    assert [finding.signal for finding in trainer.diagnose()] == ["too much frozen"]


def test_real_overfitting(digits, tmp_path):
    # A fifth of the training labels is wrong, and nothing keeps the network from learning them by heart.
    few = digits[0].select(range(150))
    wrong = shuffled(few.select(range(50)), 2)["label"]
    labels = [*wrong, *few["label"][50:]]
    noisy = few.remove_columns("label").add_column("label", labels).cast(few.features)
    trainer = train((noisy, digits[1]), tmp_path, dataclasses.replace(FULL, epochs=20))
    assert [finding.signal for finding in trainer.diagnose()] == ["overfitting"]


def test_real_training_with_few_validation_images(digits, tmp_path):
    head = Stage("head", "head", epochs=1, learning_rate=1e-2)
    trainer = train((digits[0], digits[1].select(range(20))), tmp_path, head)
    assert trainer.diagnose()[-1].signal == "small validation"


def test_results_and_card_have_it(digits, tmp_path):
    trainer = train(digits, tmp_path / "checkpoints", Stage("head", "head", epochs=1, learning_rate=1e-7))
    results = trainer.save_run(tmp_path / "run", prove=False)
    assert [finding["signal"] for finding in results["diagnosis"]] == ["rate too low"]
    assert json.loads((tmp_path / "run" / "results.json").read_text())["diagnosis"] == results["diagnosis"]
    card = (tmp_path / "run" / "README.md").read_text()
    assert "**rate too low**" in card
    assert "Advice: learning\\_rate: 1e-6" in card or "Advice: learning_rate: 1e-6" in card
