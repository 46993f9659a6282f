"""What folds say together, against computations by other means."""

import json
import statistics

import numpy as np
import pytest

from torchthaw.evaluation.folds import FIGURES, fold_figures, pool_folds, stage_votes
from torchthaw.evaluation.metrics import classification_metrics
from torchthaw.evaluation.predictions import read_predictions, write_predictions

NAMES = ["ant", "bee", "cat"]


def make_fold(folder, number, images):
    random = np.random.default_rng(number)
    labels = np.arange(images) % 3
    logits = (random.normal(size=(images, 3)) * 2 + np.eye(3)[labels]).astype(np.float32)
    paths = [f"fold {number}/{image}.png" for image in range(images)]
    write_predictions(folder / "predictions" / "validation.jsonl", paths, labels, logits, NAMES)
    return paths, labels, logits


def test_mean_and_sample_standard_deviation():
    random = np.random.default_rng(0)
    folds = [dict(zip(FIGURES, random.random(5), strict=True)) for _ in range(4)]
    found = fold_figures(folds)
    assert list(found) == ["accuracy", "macro_f1", "balanced_accuracy", "loss", "ece"]
    for name, figures in found.items():
        values = [fold[name] for fold in folds]
        assert figures["values"] == values
        assert figures["mean"] == pytest.approx(statistics.mean(values))
        assert figures["std"] == pytest.approx(statistics.stdev(values))
    json.dumps(found)


def test_pooled_figures_are_those_of_all_logits_together(tmp_path):
    folders = [tmp_path / str(number) for number in range(3)]
    made = [make_fold(folder, number, 7 + number) for number, folder in enumerate(folders)]
    found = pool_folds(folders, NAMES, tmp_path / "out")
    paths, labels, logits = (np.concatenate(parts) for parts in zip(*made, strict=True))
    expected = classification_metrics(logits, labels, NAMES)
    for key in ("accuracy", "macro_f1", "balanced_accuracy", "accuracy_interval", "macro_f1_interval", "num_images"):
        assert found[key] == expected[key], key
    assert found["per_class"] == expected["per_class"]
    for key in ("loss", "ece"):
        assert found[key] == pytest.approx(expected[key], rel=1e-5)
    rows = read_predictions(tmp_path / "out" / "predictions" / "out_of_fold.jsonl")
    assert [row["path"] for row in rows] == paths.tolist()
    assert rows == [row for folder in folders for row in read_predictions(folder / "predictions" / "validation.jsonl")]
    assert (tmp_path / "out" / "plots" / "confusion_out_of_fold.png").is_file()


def test_pooled_intervals_are_over_groups_where_these_are_known(tmp_path):
    folders = [tmp_path / str(number) for number in range(3)]
    made = [make_fold(folder, number, 8) for number, folder in enumerate(folders)]
    paths, labels, logits = (np.concatenate(parts) for parts in zip(*made, strict=True))
    groups = {path: f"patient {number % 6}" for number, path in enumerate(paths)}
    found = pool_folds(folders, NAMES, tmp_path / "out", groups=dict(reversed(groups.items())))
    expected = classification_metrics(logits, labels, NAMES, groups=list(groups.values()))
    for key in ("accuracy_interval", "macro_f1_interval", "interval_method"):
        assert found[key] == expected[key], key
    assert found["interval_method"] == "mid-P with a jackknife over 6 groups"


def test_scores_that_were_rounded_to_zero_have_a_finite_loss(tmp_path):
    write_predictions(
        tmp_path / "predictions" / "validation.jsonl", ["a", "b"], [0, 1], [[0, 500.0], [0, 9.0]], NAMES[:2]
    )
    found = pool_folds([tmp_path], NAMES[:2], tmp_path / "out")
    # The smallest float32 above 0 is 2 ** -149.
    assert found["loss"] == pytest.approx(149 * np.log(2) / 2, rel=1e-3)


def test_votes_on_stages():
    def stage(name, accepted, best_epoch, best_step):
        return {"name": name, "accepted": accepted, "epochs": 4, "steps": 40, "best_epoch": best_epoch,
                "best_step": best_step}  # fmt: skip

    folds = [
        [stage("head", True, 3.0, 30)],
        [stage("head", True, 2.0, 20), stage("all", False, 1.0, 10)],
        [stage("head", False, 1.0, 10), stage("all", True, None, None)],
    ]
    assert stage_votes(folds) == [
        {"name": "head", "kept": [True, True, False], "best_epochs": [3.0, 2.0], "best_steps": [30, 20]},
        {"name": "all", "kept": [False, False, True], "best_epochs": [4], "best_steps": [40]},
    ]
