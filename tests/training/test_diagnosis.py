"""What the curves of a run show, said in words: every rule on logs made for it, and none without cause."""

import dataclasses
import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchthaw import Stage
from torchthaw.stages.plan import StagePlan
from torchthaw.stages.presets import preset_plan
from torchthaw.training.diagnosis import ORDER, Course, diagnose, wants_training_accuracy
from torchthaw.training.records import StageRecord


def log_of(*rows, start=(2.3, 0.1), stage=0, gradients=()):
    """Returns log lines of (training loss, validation loss, accuracy), one an epoch, after those of a validation."""
    lines = []
    if start is not None:
        lines.append({"eval_loss": start[0], "eval_accuracy": start[1], "eval_balanced_accuracy": start[1],
                      "epoch": 0, "step": 0, "stage": 0})  # fmt: skip
    for epoch, (loss, eval_loss, accuracy) in enumerate(rows, start=1):
        place = {"epoch": epoch, "step": 10 * epoch, "stage": stage}
        norms = {f"grad_norm/{group}": norms[epoch - 1] for group, norms in dict(gradients).items()}
        lines.append({"loss": loss, "grad_norm": 1.0, **norms, **place})
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
    options.setdefault("learning_rate", 1e-3)
    return Course(log=log, records=records, class_counts=[images // 10] * 10, num_classes=10, **options)


def plan_of(**changed):
    return StagePlan((Stage(**{"name": "all", "epochs": 3, **changed}),))


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


def test_a_loss_that_rises_while_more_images_are_right_is_not_overfitting():
    log = log_of((1.0, 0.8, 0.7), (0.6, 0.6, 0.80), (0.3, 0.7, 0.84), (0.1, 0.9, 0.86))
    assert signals(course_of(log)) == ["working"]


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
    assert "the training loss stays at 2.300 although the head moved by 40%" in finding.evidence
    assert "what is frozen (stem) gives no features" in finding.evidence
    stem = course_of(GUESSING, record_of(learning_rates={"stem": 1e-3}), plan=plan_of(unfreeze=["stem"]))
    [finding] = diagnose(stem)
    assert finding.signal == "too much frozen"
    assert finding.advice == 'stages: [{name: "all", unfreeze: ["stem", "head"], epochs: 3}]'


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
    # Beyond chance, but by so little that nothing is said of it.
    assert signals(course_of(slightly, images=5000)) == []
    assert signals(course_of(slightly, record_of(changes={"head": 0.0}), images=100)) == ["rate too low"]


def test_of_a_few_validation_images_nothing_is_beyond_chance_and_nothing_said_of_labels():
    """Two classes; a perfect score on one image of each is what guessing reaches every fourth time."""
    perfect = log_of((0.1, 0.5, 1.0), (0.001, 0.4, 1.0), (0.001, 0.4, 1.0))
    for images, said in ((2, ["small validation"]), (4, ["small validation"]), (40, ["working"])):
        course = dataclasses.replace(course_of(perfect), num_classes=2, class_counts=[images // 2] * 2)
        assert signals(course) == said


# What is known beside the curves tells the reasons apart.

KNOWN_BY_HEART = {"balanced_accuracy": 0.6, "class_counts": [20] * 10}
NOT_LEARNED = {"balanced_accuracy": 0.11, "class_counts": [20] * 10}


def test_training_images_tell_labels_from_what_is_frozen():
    only_head = record_of(learning_rates={"head": 1e-3})
    by_heart = course_of(GUESSING, dataclasses.replace(only_head, train_accuracy=KNOWN_BY_HEART))
    [finding] = diagnose(by_heart)
    assert finding.signal == "labels"
    assert "of 200 training images, as validation would see them, 60.0% of a class on average" in finding.evidence
    [finding] = diagnose(course_of(GUESSING, dataclasses.replace(only_head, train_accuracy=NOT_LEARNED)))
    assert finding.signal == "too much frozen"
    assert "11.0% of a class are right on training images" in finding.evidence
    # What augmented images show of the training loss is worth less than what was measured.
    falling = log_of((2.3, 2.4, 0.10), (1.9, 2.5, 0.11))
    measured = course_of(falling, dataclasses.replace(only_head, train_accuracy=NOT_LEARNED))
    assert signals(measured) == ["too much frozen"]


def test_training_images_that_are_right_as_often_as_others_are_not_known_by_heart():
    slow = log_of((0.69, 0.66, 0.60), (0.69, 0.655, 0.61), (0.69, 0.65, 0.61), start=(0.69, 0.5))
    seen = {"balanced_accuracy": 0.62, "class_counts": [100, 100]}
    record = record_of(changes={"stem": 0, "head": 1e-5}, learning_rates={"head": 1e-7}, train_accuracy=seen)
    course = Course(log=slow, records=[record], class_counts=[75, 75], num_classes=2, learning_rate=1e-7)
    assert signals(course) == ["rate too low"]
    known = dataclasses.replace(record, train_accuracy={**seen, "balanced_accuracy": 0.9})
    assert signals(dataclasses.replace(course, records=[known])) == ["labels"]


def test_a_head_that_gets_nothing_to_move_by():
    still = record_of(learning_rates={"head": 1e-3}, changes={"stem": 0, "head": 0.004})
    [finding] = diagnose(course_of(GUESSING, still))
    assert finding.signal == "too much frozen"
    assert "in 30 steps at 1e-3 the head moved by 0.40% of its norm only" in finding.evidence
    # Plain gradient descent moves as far as its gradients are long; and lower rates move nothing.
    assert signals(course_of(GUESSING, still, optimizer="sgd")) == ["rate too low"]
    low = dataclasses.replace(still, learning_rates={"head": 1e-5})
    assert signals(course_of(GUESSING, low)) == ["rate too low"]


@pytest.mark.parametrize(("found", "signal"), [((30, 200), "labels"), ((3, 200), "too much frozen"),
                                               (None, "too much frozen")])  # fmt: skip
def test_the_audit_tells_labels_from_what_is_frozen(found, signal):
    course = course_of(GUESSING, record_of(learning_rates={"head": 1e-3}), suspicious_labels=found)
    [finding] = diagnose(course)
    assert finding.signal == signal
    if signal == "labels":
        assert "The audit finds 30 of 200 labels suspicious, which audit.json lists" in finding.evidence
        assert finding.advice == "label_smoothing: 0.1"


@pytest.mark.parametrize(("norms", "moved", "signal"), [
    ((1.0, 0.98, 0.97), 0.1, "rate too low"),
    ((1.0, 0.6, 0.4), 0.1, "labels"),
    ((1.0, 0.98, 0.97), 0.6, "labels"),
    ((1.0, 0.2, 0.1), 0.01, "rate too low"),
])  # fmt: skip
def test_gradients_tell_a_low_rate_from_bad_labels(norms, moved, signal):
    log = log_of((2.31, 2.31, 0.10), (2.30, 2.30, 0.11), (2.30, 2.31, 0.10), gradients={"head": norms})
    [finding] = diagnose(course_of(log, record_of(changes={"stem": 0.01, "head": moved})))
    assert finding.signal == signal
    assert (f"{norms[-1]:.0%} of its gradient is left" in finding.evidence) == (signal == "rate too low")


def test_a_network_without_gradients_was_killed_by_its_rate():
    rows = (2.31, 2.31, 0.10), (2.30, 2.30, 0.10), (2.30, 2.31, 0.10)
    norms = {"head": (1.0, 0.4, 0.4), "stem": (3.0, 1e-9, 0.0)}
    [finding] = diagnose(course_of(log_of(*rows, gradients=norms)))
    assert finding.signal == "rate too high"
    assert "the gradient of stem fell to 0e+00 of what it was" in finding.evidence
    assert finding.advice == "learning_rate: 1e-4"


def test_losses_that_hardly_fall_are_not_working():
    slow = log_of((0.69, 0.69, 0.55), (0.685, 0.685, 0.6), (0.68, 0.68, 0.62), start=(0.69, 0.5),
                  gradients={"head": (1.0, 0.99, 0.98)})  # fmt: skip
    record = record_of(changes={"stem": 0, "head": 0.05}, learning_rates={"head": 1e-5})
    course = Course(log=slow, records=[record], class_counts=[250, 250], num_classes=2, learning_rate=1e-5)
    [finding] = diagnose(course)
    assert finding.signal == "rate too low"
    assert "validation loss is 0.680 at best, where guessing has 0.693" in finding.evidence


def test_training_images_are_asked_only_where_validation_is_at_chance():
    assert wants_training_accuracy(course_of(GUESSING), 0)
    assert not wants_training_accuracy(course_of(GOOD), 0)
    assert not wants_training_accuracy(course_of(GOOD), 1)


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
    assert finding.advice == "learning_rate: 3.3e-4"
    own = course_of(log, record_of(batch_norm="train"), plan=plan_of(batch_norm="train"))
    assert diagnose(own)[0].advice == 'stages: [{name: "all", unfreeze: "all", epochs: 3, batch_norm: "eval"}]'
    preset = course_of(log, record_of(batch_norm="train"), plan=preset_plan("full"))
    assert diagnose(preset)[0].advice == "learning_rate: 3.3e-4"
    # The same jumps of fewer images are chance, and so is a fall that lasts.
    assert "erratic validation" not in signals(course_of(log, images=60))
    assert "erratic validation" not in signals(course_of(log_of((1, 1, 0.8), (1, 1, 0.6), (1, 1, 0.6))))


def flat(*accuracies, losses=None):
    losses = losses or [0.6] * len(accuracies)
    pairs = zip(losses, accuracies, strict=True)
    return log_of(*[(1.0 - 0.05 * number, loss, accuracy) for number, (loss, accuracy) in enumerate(pairs)])


def test_plateau():
    log = flat(0.7, 0.8, 0.79, 0.8, 0.78, 0.8)
    course = course_of(log, record_of(seconds=60.0, epochs=6), plan=plan_of(epochs=6))
    found = diagnose(course)
    assert [finding.signal for finding in found] == ["plateau", "working"]
    assert "after epoch 2, 4 more of 6 validations brought nothing better than accuracy 0.800" in found[0].evidence
    assert "in about 40 s" in found[0].evidence
    assert found[0].advice == 'stages: [{name: "all", unfreeze: "all", epochs: 6, patience: 2}]'
    preset = dataclasses.replace(course, plan=preset_plan("full", epochs=6))
    assert diagnose(preset)[0].advice == "epochs: 2"


@pytest.mark.parametrize(
    "log",
    [
        flat(0.7, 0.8, 0.79, 0.8, 0.78, 0.81),
        flat(*[0.8] * 6, losses=[0.6, 0.55, 0.5, 0.46, 0.43, 0.4]),
        flat(*[0.8] * 5),
    ],
    ids=["the accuracy still gains", "the loss still falls", "short"],
)  # fmt: skip
def test_what_is_no_plateau(log):
    assert "plateau" not in signals(course_of(log))


def test_small_validation():
    found = diagnose(course_of(GOOD, images=20))
    assert [finding.signal for finding in found] == ["working", "small validation"]
    assert "20 images: an accuracy of 0.82 may be anything from 0.58 to 0.92" in found[1].evidence
    assert found[1].advice == "cv: 5"


def test_waiting():
    slow = record_of(data_wait_share=0.4, seconds=100.0)
    found = diagnose(course_of(GOOD, slow, num_workers=2, cores=4))
    assert [finding.signal for finding in found] == ["waiting for data", "working"]
    assert "40% of the time of its steps went by waiting for images" in found[0].evidence
    assert found[0].advice == "num_workers: 4"
    busy = course_of(GOOD, slow, num_workers=4, cores=4, image_size=224)
    assert diagnose(busy)[0].advice == "image_size: 160"
    assert signals(course_of(GOOD, record_of(data_wait_share=0.4, seconds=5.0))) == ["working"]
    # Steps on what the frozen part gave are so short that some waiting is most of them.
    cached = dataclasses.replace(slow, frozen_part={"border": "fc", "dtype": "float32", "cached": ["train"]})
    assert signals(course_of(GOOD, cached)) == ["working"]


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


# Whatever a log holds

FIGURES = st.one_of(
    st.none(), st.booleans(), st.text(max_size=3), st.integers(-3, 20), st.floats(), st.lists(st.integers(), max_size=2)
)
KEYS = (
    "loss", "eval_loss", "eval_accuracy", "eval_balanced_accuracy", "epoch", "step", "stage", "grad_norm/head",
    "grad_norm/stem", "learning_rate/head",
)  # fmt: skip
LOGS = st.lists(st.dictionaries(st.sampled_from(KEYS), FIGURES), max_size=12)
RECORDS = st.lists(
    st.builds(
        record_of,
        changes=st.dictionaries(st.sampled_from(("stem", "head")), st.floats(0, 5)),
        learning_rates=st.dictionaries(st.sampled_from(("stem", "head")), st.floats(1e-9, 10)),
        data_wait_share=st.one_of(st.none(), st.floats(0, 1)),
        ended_early=st.one_of(st.none(), st.just("the loss became nan")),
        train_accuracy=st.sampled_from((None, KNOWN_BY_HEART, NOT_LEARNED)),
        accepted=st.booleans(),
        seconds=st.floats(0, 1e4),
    ),
    max_size=3,
)
SETTINGS = st.fixed_dictionaries(
    {
        "class_counts": st.lists(st.integers(0, 300), max_size=5),
        "num_classes": st.integers(1, 5),
        "over": st.booleans(),
        "plan": st.sampled_from((None, preset_plan("staged"), plan_of(learning_rate={"head": 1e-3}))),
        "learning_rate": st.one_of(st.none(), st.floats(1e-8, 1)),
        "suspicious_labels": st.one_of(st.none(), st.just((0, 0)), st.tuples(st.integers(0, 50), st.integers(50, 90))),
    }
)


def check(course):
    found = diagnose(course)
    assert json.loads(json.dumps([finding.to_dict() for finding in found])) == [f.to_dict() for f in found]
    assert all(finding.sentence.startswith(f"{finding.signal}: ") for finding in found)
    ranks = [ORDER.index(finding.signal) for finding in found]
    assert ranks == sorted(ranks)
    kinds = {finding.signal for finding in found}
    assert not ({"working"} & kinds and kinds - {"working", "plateau", "small validation", "waiting for data"})
    return found


@given(log=LOGS, records=RECORDS, options=SETTINGS)
@settings(deadline=None, max_examples=300)
def test_any_log_gives_sentences_in_their_order(log, records, options):
    check(Course(log=log, records=records, **options))


rows = st.lists(st.tuples(st.floats(0, 10), st.floats(0, 10), st.floats(0, 1)), max_size=8)


@given(rows=rows, images=st.integers(0, 500), over=st.booleans())
@settings(deadline=None, max_examples=200)
def test_any_curve_gives_sentences_in_their_order(rows, images, over):
    check(course_of(log_of(*rows), images=images, over=over))


@given(
    losses=st.lists(st.floats(0.5, 0.85), min_size=2, max_size=12),
    noise=st.lists(st.floats(-1, 1), min_size=12, max_size=12),
    images=st.integers(200, 5000),
)
@settings(deadline=None, max_examples=200)
def test_a_healthy_curve_never_gives_an_alarm(losses, noise, images):
    """Both losses fall by a share each epoch, and the accuracy rises but for what so many images explain."""
    training, validation, curve = 2.0, 2.1, []
    for epoch, factor in enumerate(losses):
        training, validation = training * factor, 0.2 + (validation - 0.2) * factor
        accuracy = 0.95 - 0.7 * math.prod(losses[: epoch + 1])
        error = math.sqrt(accuracy * (1 - accuracy) / images)
        curve.append((training, validation, min(1.0, accuracy + noise[epoch] * error)))
    log = log_of(*curve)
    for over in (False, True):
        assert set(signals(course_of(log, images=images, over=over))) <= {"working", "plateau"}
