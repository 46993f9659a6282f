"""Hyperparameter search: each trial is a whole staged run, and is judged by the model that it ends with."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from transformers import TrainerCallback

from torchthaw import Stage, ThawTrainer, ThawTrainingArguments, TorchvisionForImageClassification
from torchthaw.errors import PlanError

optuna = pytest.importorskip("optuna")

ARCHITECTURE = "shufflenet_v2_x0_5"
STEPS = 3  # of an epoch
PLAN = [Stage("head", "head", epochs=2), Stage("wreck", "all", epochs=1, learning_rate=0.05, warmup=0.0)]


@pytest.fixture(scope="module")
def data():
    """Noise in which the class shows as a shift of one channel."""
    random = torch.Generator().manual_seed(0)
    rows = []
    for row in range(4 * STEPS + 9):
        pixels = torch.randn(3, 32, 32, generator=random)
        pixels[row % 3] += 0.3
        rows.append({"pixel_values": pixels, "labels": torch.tensor(row % 3)})
    return rows[: 4 * STEPS], rows[4 * STEPS :]


def new_model():
    torch.manual_seed(0)
    return TorchvisionForImageClassification.from_torchvision(ARCHITECTURE, "builtin", id2label=["a", "b", "c"])


def new_trainer(data, folder, *, callbacks=(), model=None, **options):
    """Makes a trainer; without a model, one that draws its own for each run."""
    defaults = {"per_device_train_batch_size": 4, "report_to": "none", "use_cpu": True, "disable_tqdm": True}
    trainer = ThawTrainer(
        model,
        ThawTrainingArguments(str(folder), plan=PLAN, **{**defaults, **options}),
        train_dataset=data[0],
        eval_dataset=data[1],
        callbacks=list(callbacks),
        model_init=None if model else new_model,
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


class Finals(TrainerCallback):
    """Keeps what each run of a search was made with, and the weights that it ended with."""

    def __init__(self):
        self.runs = []

    def on_train_end(self, args, state, control, *, model, **kwargs):
        weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        settings = (args.learning_rate, args.weight_decay, args.label_smoothing_factor)
        self.runs.append({"settings": settings, "weights": weights, "steps": state.global_step})


def searching(data, folder, **options):
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    finals = Finals()
    return new_trainer(data, folder, callbacks=[finals], **options), finals


def test_a_search_compares_the_models_that_its_runs_end_with(tmp_path, data):
    trainer, finals = searching(data, tmp_path, metric_for_best_model="loss")
    best = trainer.hyperparameter_search(
        direction="minimize", n_trials=3, compute_objective=lambda metrics: metrics["eval_loss"],
        sampler=optuna.samplers.RandomSampler(seed=1),
    )  # fmt: skip
    assert [run["steps"] for run in finals.runs] == [3 * STEPS] * 3
    assert best.hyperparameters.keys() == {"learning_rate", "weight_decay", "label_smoothing_factor"}
    assert [record.accepted for record in trainer.stage_records] == [True, False]
    chosen = finals.runs[int(best.run_id)]
    assert chosen["settings"] == tuple(best.hyperparameters.values())
    assert len({run["settings"] for run in finals.runs}) == 3
    # What the wrecked last epoch would have given is far worse, and is not what is compared.
    model = new_model()
    losses = []
    for run in finals.runs:
        model.load_state_dict(run["weights"])
        judge = new_trainer(data, tmp_path / "judge", model=model, label_smoothing_factor=run["settings"][2])
        losses.append(judge.evaluate()["eval_loss"])
    assert best.objective == pytest.approx(min(losses), rel=1e-5)
    assert int(best.run_id) == losses.index(min(losses))
    for number in range(3):
        assert json.loads((tmp_path / f"run-{number}" / "journal.json").read_text())["finished"] is True


def test_every_value_that_is_searched_reaches_the_run(tmp_path, data):
    """The head's rate moves the rates that the plan leaves open; the smoothing is in the loss."""
    seen = []

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, *, optimizer, **kwargs):
            if state.global_step == 1:
                group = optimizer.param_groups[0]
                seen.append((group["initial_lr"], group["weight_decay"], trainer.training_loss))

    values = [(1e-3, 0.01, 0.0), (2e-3, 0.2, 0.1), (5e-4, 0.0, 0.0)]
    trainer, _ = searching(data, tmp_path)
    trainer.add_callback(Watch())
    names = ("learning_rate", "weight_decay", "label_smoothing_factor")
    trainer.hyperparameter_search(
        lambda trial: dict(zip(names, values[trial.number], strict=True)), direction="maximize", n_trials=3
    )
    assert [(rate, decay) for rate, decay, _ in seen] == [(rate, decay) for rate, decay, _ in values]
    assert [loss and loss.smoothing for _, _, loss in seen] == [None, 0.1, None]


def test_a_trial_equals_a_run_with_its_values(tmp_path, data):
    space = [{"learning_rate": 3e-3}, {"learning_rate": 1e-3, "weight_decay": 0.3, "label_smoothing_factor": 0.2}]
    trainer, finals = searching(data, tmp_path / "search")
    trainer.hyperparameter_search(lambda trial: space[trial.number], direction="maximize", n_trials=2)
    single, alone = searching(data, tmp_path / "single", **space[1])
    single.train()
    found, expected = finals.runs[1]["weights"], alone.runs[0]["weights"]
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_pruned_trial_leaves_the_next_one_alone(tmp_path, data):
    class PruneSecond(optuna.pruners.BasePruner):
        def prune(self, study, trial):
            return trial.number == 1 and max(trial.intermediate_values) == STEPS

    trainer, finals = searching(data, tmp_path)
    study = []
    trainer.hyperparameter_search(
        lambda trial: study.append(trial.study) or {"learning_rate": 1e-3},
        direction="maximize", n_trials=3, pruner=PruneSecond(),
    )  # fmt: skip
    assert [trial.state.name for trial in study[0].trials] == ["COMPLETE", "PRUNED", "COMPLETE"]
    assert [run["steps"] for run in finals.runs] == [3 * STEPS, STEPS, 3 * STEPS]
    first, _, third = finals.runs
    assert all(torch.equal(first["weights"][name], third["weights"][name]) for name in first["weights"])
    assert study[0].trials[0].value == study[0].trials[2].value


def test_a_search_can_choose_the_plan_and_refuses_what_has_no_effect(tmp_path, data):
    trainer, finals = searching(data, tmp_path)
    plans = [[Stage("head", "head", epochs=1)], "two_phase"]
    trainer.hyperparameter_search(lambda trial: {"plan": plans[trial.number]}, direction="maximize", n_trials=2)
    assert [run["steps"] for run in finals.runs] == [STEPS, 7 * STEPS]
    for values, message in (
        ({"num_train_epochs": 3}, "the search space has num_train_epochs, but the plan gives the length"),
        ({"lerning_rate": 1e-3}, "'lerning_rate', which is no argument of training. Did you mean 'learning_rate'"),
    ):
        with pytest.raises(PlanError, match=message):
            trainer.hyperparameter_search(lambda trial, values=values: values, n_trials=1)


def test_checkpoints_of_a_search_lie_in_the_folder_of_their_run(tmp_path, data):
    trainer, _ = searching(data, tmp_path, metric_for_best_model="loss")
    trainer.hyperparameter_search(n_trials=1, direction="maximize")
    folders = {path.relative_to(tmp_path).parts[0] for path in tmp_path.rglob("checkpoint-*")}
    assert folders == {"run-0"}
    assert Path(trainer.state.best_model_checkpoint).parent == tmp_path / "run-0"
