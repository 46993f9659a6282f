"""Which of a stage's validated weights it proposes: the best, or the last that by one standard error are no worse."""

import copy

import numpy as np
import pytest
import torch
import transformers

from torchthaw import Stage, ThawTrainer, ThawTrainingArguments, TorchvisionForImageClassification
from torchthaw.training.callbacks import StageCallback

CLASSES = ["ant", "bee"]
LABELS = np.arange(20) % 2


def logits(wrong):
    """Logits of 20 images that are wrong for those that are named."""
    right = np.eye(2)[LABELS] * 2 - 1
    right[list(wrong)] *= -1
    return right


class Scripted(ThawTrainer):
    """Validates as it is told, so that each course of a stage can be had."""

    def evaluation_loop(self, *args, **kwargs):
        output = super().evaluation_loop(*args, **kwargs)
        wrong = self.script[min(self.calls, len(self.script) - 1)]
        self.calls += 1
        accuracy = 1 - len(wrong) / len(LABELS)
        metrics = {**output.metrics, "eval_accuracy": accuracy}
        self._validated["eval"] = (logits(wrong), LABELS)
        return output._replace(metrics=metrics)


class Weights(StageCallback):
    def __init__(self):
        self.after_epochs = []

    def on_epoch_end(self, args, state, control, *, model, **_):
        self.after_epochs.append(copy.deepcopy(model.state_dict()))


def run(tmp_path, script, *, selection="one_se", gate="best", epochs=3):
    torch.manual_seed(0)
    model = TorchvisionForImageClassification.from_torchvision("shufflenet_v2_x0_5", "builtin", id2label=CLASSES)
    samples = [{"pixel_values": torch.randn(3, 32, 32), "labels": torch.tensor(int(label))} for label in LABELS]
    weights = Weights()
    trainer = Scripted(
        model=model,
        args=ThawTrainingArguments(
            output_dir=str(tmp_path),
            plan=[Stage("all", "all", epochs=epochs, learning_rate=1e-3, selection=selection)],
            per_device_train_batch_size=10, gate=gate, use_cpu=True, disable_tqdm=True, report_to="none",
            metric_for_best_model="accuracy",
        ),
        train_dataset=samples,
        eval_dataset=samples,
        callbacks=[weights],
    )  # fmt: skip
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.script, trainer.calls = script, 0
    # There is something to go back to.
    trainer.model.head_is_new = False
    trainer.train()
    return trainer, weights


def epoch_of(trainer, weights):
    """The epoch whose weights the run ended with; 0 for those before it."""
    final = trainer.model.state_dict()
    same = [all(torch.equal(tensor, final[name]) for name, tensor in epoch.items()) for epoch in weights.after_epochs]
    return same.index(True) + 1 if True in same else 0


BEFORE = range(12)


@pytest.mark.parametrize(
    ("epochs", "selection", "chosen"),
    [
        # One image more is wrong, by chance as well as not.
        (([0, 1], [0, 1, 2], [0, 1, 2]), "one_se", 3),
        (([0, 1], [0, 1, 2], [0, 1, 2]), "best", 1),
        # Of equal ones.
        (([0, 1], [2, 3], [4, 5]), "one_se", 3),
        (([0, 1], [2, 3], [4, 5]), "best", 1),
        # Six images more, and none less: beyond chance. The test of the second epoch is with the best, not the first.
        (([0, 1, 2, 3], [0], range(7)), "one_se", 2),
        (([0], [0, 1, 2], range(6)), "one_se", 2),
        (([0, 1, 2, 3], [0, 1], [0]), "one_se", 3),
    ],
)
def test_the_epoch_whose_weights_are_proposed(tmp_path, epochs, selection, chosen):
    trainer, weights = run(tmp_path, [BEFORE, *epochs], selection=selection)
    assert epoch_of(trainer, weights) == chosen
    (record,) = trainer.stage_records
    assert record.best_epoch == chosen
    assert record.best_metric == pytest.approx(1 - len(epochs[chosen - 1]) / 20)
    assert (record.selection, record.accepted) == (selection, True)


def test_a_gain_over_the_weights_before_the_stage_is_not_given_up(tmp_path):
    """The last epoch is within a standard error of the best one, but no better than before the stage."""
    trainer, weights = run(tmp_path, [[0, 1], [0], [0, 1], [0, 2]])
    assert trainer.stage_records[0].accepted
    assert epoch_of(trainer, weights) == 1


def test_patience_counts_from_the_best(tmp_path):
    torch.manual_seed(0)
    trainer, _ = run(tmp_path, [BEFORE, [0], [0, 1], [0, 1], [0, 1]], epochs=4)
    assert trainer.stage_records[0].best_epoch == 4
    assert trainer._progress.validations_without_gain == 3
