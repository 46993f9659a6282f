"""WiSE-FT at the end of stages: what is tried, chosen, decided on and kept, measured anew by plain code."""

import copy
import dataclasses

import pytest
import torch
import transformers
from sklearn.metrics import average_precision_score
from torch.nn import functional as F

from torchthaw import Stage, ThawTrainer, ThawTrainingArguments, TorchvisionForImageClassification
from torchthaw.evaluation.metrics import compute_metrics
from torchthaw.training.callbacks import StageCallback

ARCHITECTURE = "shufflenet_v2_x0_5"
CLASSES = ["ant", "bee", "cat"]
ALPHAS = (0.2, 0.4, 0.6, 0.8, 1.0)
PLAN = [
    Stage("head", "head", epochs=1, learning_rate=1e-2),
    # Too fast, so that a part of the way is better than all of it.
    Stage("block", 1, epochs=2, learning_rate=0.06, warmup=0.0, batch_norm="train"),
]


def samples(number, seed, several=False):
    random = torch.Generator().manual_seed(seed)
    rows = []
    for index in range(number):
        label = torch.tensor(index % 3)
        pixels = 1.5 * torch.randn(3, 32, 32, generator=random) + 0.4 * (label - 1)
        labels = torch.tensor([float(label > 0), float(label == 1), float(label < 2)]) if several else label
        rows.append({"pixel_values": pixels, "labels": labels})
    return rows


@pytest.fixture(scope="module")
def untrained():
    torch.manual_seed(0)
    return TorchvisionForImageClassification.from_torchvision(ARCHITECTURE, weights="builtin", id2label=CLASSES)


@pytest.fixture
def make(untrained, tmp_path):
    """Returns a function that makes the trainer of a run in a folder, `run` by default."""

    def new_trainer(folder="run", *, several=False, sets=None, dropout=False, **options):
        defaults = {
            "plan": PLAN, "per_device_train_batch_size": 4, "metric_for_best_model": "loss", "use_cpu": True,
            "save_total_limit": None, "disable_tqdm": True, "report_to": "none", "wise_ft": True,
        }  # fmt: skip
        metrics = options.pop("compute_metrics", compute_metrics)
        model = copy.deepcopy(untrained)
        if several:
            model.config.problem_type = "multi_label_classification"
        trainer = ThawTrainer(
            model=model,
            args=ThawTrainingArguments(output_dir=str(tmp_path / folder), **{**defaults, **options}),
            train_dataset=samples(24, 1, several),
            eval_dataset=sets or samples(24, 2, several),
            compute_metrics=metrics,
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.add_callback(Weights())
        if dropout:
            # The architecture has none, and nothing else that draws random numbers in a step.
            trainer.model.backbone.fc.register_forward_pre_hook(
                lambda head, inputs: F.dropout(inputs[0], p=0.3, training=head.training)
            )
        return trainer

    return new_trainer


class Weights(StageCallback):
    """Notes the weights before each stage, at each of its validations, and after it."""

    def __init__(self):
        self.before, self.validated, self.after, self.lines = {}, {}, {}, []

    def on_stage_begin(self, args, state, control, *, model, stage, **_):
        self.before[stage.name], self.validated[stage.name] = copied(model), []

    def on_evaluate(self, args, state, control, *, model, metrics, **_):
        self.lines.append(state.global_step)
        if state.global_step:
            self.validated[state.stage_name].append(copied(model))

    def on_stage_end(self, args, state, control, *, model, stage, **_):
        self.after[stage.name] = copied(model)


def weights_of(trainer):
    return next(callback for callback in trainer.callback_handler.callbacks if isinstance(callback, Weights))


def copied(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def mixture(before, after, alpha):
    return {
        name: (alpha * tensor.double() + (1 - alpha) * before[name].double()).to(tensor.dtype)
        if tensor.is_floating_point()
        else tensor
        for name, tensor in after.items()
    }


def measure(trainer, weights, rows, metric):
    model = copy.deepcopy(trainer.model)
    model.load_state_dict(weights)
    model.eval()
    labels = torch.stack([row["labels"] for row in rows])
    with torch.no_grad():
        logits = model(pixel_values=torch.stack([row["pixel_values"] for row in rows])).logits
    if metric == "map":
        return average_precision_score(labels.numpy() > 0, logits.numpy(), average="macro")
    if metric == "accuracy":
        return (logits.argmax(dim=1) == labels).double().mean().item()
    return F.cross_entropy(logits, labels).item()


CASES = {
    "loss": ({}, "loss", None),
    "accuracy": ({"metric_for_best_model": "accuracy"}, "accuracy", None),
    "the loss of one of two sets": ({"metric_for_best_model": "far_loss", "average": "ema"}, "loss", "far"),
    "several labels": ({"metric_for_best_model": "map", "several": True}, "map", None),
}


@pytest.mark.parametrize("name", CASES)
def test_the_share_that_validates_best_is_proposed(make, name):
    options, metric, chosen = CASES[name]
    sets = None if chosen is None else {"near": samples(9, 3), chosen: samples(21, 4)}
    trainer = make(sets=sets, **options)
    trainer.train()
    seen, (head, block) = weights_of(trainer), trainer.stage_records
    rows = trainer.eval_dataset if chosen is None else sets[chosen]
    assert head.wise_ft is None, "a stage of the head alone is not mixed"
    sign = -1 if metric == "loss" else 1
    # With several sets, each has an event of its own.
    epochs = seen.validated["block"][:: 1 if chosen is None else 2]
    best = max(epochs, key=lambda weights: sign * measure(trainer, weights, rows, metric))
    mixtures = {alpha: mixture(seen.before["block"], best, alpha) for alpha in ALPHAS}
    expected = {alpha: measure(trainer, weights, rows, metric) for alpha, weights in mixtures.items()}
    assert block.wise_ft["metric"] == pytest.approx({f"{alpha:g}": expected[alpha] for alpha in ALPHAS}, rel=1e-3)
    alpha = max(ALPHAS, key=lambda share: (sign * round(expected[share], 6), share))
    assert block.wise_ft["alpha"] == alpha
    assert block.best_metric == block.wise_ft["metric"][f"{alpha:g}"] == block.comparison["after"]
    assert block.accepted == (sign * block.comparison["difference"] > 0)
    kept = mixtures[alpha] if block.accepted else seen.before["block"]
    assert [key for key in kept if not torch.equal(kept[key], seen.after["block"][key])] == []
    assert f"WiSE-FT took {100 * alpha:g} % of the stage's weights" in block.reason or alpha == 1
    # Callbacks and log follow the course of training: no trial of a mixture is told.
    lines = [0, 6, 12, 18] if chosen is None else [0, 0, 6, 6, 12, 12, 18, 18]
    assert seen.lines == lines
    assert sum("eval_runtime" in line or "eval_near_runtime" in line for line in trainer.state.log_history) == 4


def test_a_stage_may_give_the_share_itself(make):
    head, block = PLAN
    trainer = make(plan=[head, dataclasses.replace(block, wise_ft=0.3)], wise_ft=True, gate="off")
    trainer.train()
    seen, record = weights_of(trainer), trainer.stage_records[1]
    rows = trainer.eval_dataset
    best = min(seen.validated["block"], key=lambda weights: measure(trainer, weights, rows, "loss"))
    mixed = mixture(seen.before["block"], best, 0.3)
    assert record.wise_ft == {"alpha": 0.3, "metric": {"0.3": pytest.approx(measure(trainer, mixed, rows, "loss"))}}
    assert record.comparison["after"] == record.best_metric == record.wise_ft["metric"]["0.3"]
    assert "WiSE-FT took 30 % of the stage's weights" in record.reason
    assert [key for key in mixed if not torch.equal(mixed[key], seen.after["block"][key])] == []
    whole = make("whole", plan=[head, dataclasses.replace(block, wise_ft=1)], wise_ft=True)
    whole.train()
    assert whole.stage_records[1].wise_ft is None


def test_a_share_needs_no_validation(make):
    head, block = PLAN
    options = {"eval_strategy": "no", "load_best_model_at_end": False, "wise_ft": False, "save_strategy": "no"}
    runs = [make(str(share), plan=[head, dataclasses.replace(block, wise_ft=share)], **options) for share in (0.3, 1)]
    for trainer in runs:
        trainer.train()
    mixed, whole = (weights_of(trainer) for trainer in runs)
    expected = mixture(whole.before["block"], whole.after["block"], 0.3)
    assert [key for key in expected if not torch.equal(expected[key], mixed.after["block"][key])] == []
    assert runs[0].stage_records[1].wise_ft == {"alpha": 0.3, "metric": {}}
    assert runs[1].stage_records[1].wise_ft is None


def test_a_head_that_nothing_has_trained_is_not_mixed_in(make):
    trainer = make(plan=[PLAN[1]])
    trainer.train()
    assert trainer.stage_records[0].wise_ft is None


def test_a_part_of_the_way_is_better_where_a_stage_goes_too_far(make):
    """So that the tests of the choice are not all of the whole way."""
    trainer = make()
    trainer.train()
    block = trainer.stage_records[1]
    assert block.accepted
    assert 0 < block.wise_ft["alpha"] < 1
    assert block.comparison["after"] < block.wise_ft["metric"]["1"]


@pytest.mark.parametrize("call", [5, 8])
def test_a_run_that_is_interrupted_while_it_mixes_is_gone_on_with_exactly(make, call):
    """Calls 1 to 4 are validations of the course, 5 to 8 of mixtures."""
    calls = []

    def breaking(prediction):
        calls.append(None)
        if len(calls) == call:
            raise KeyboardInterrupt
        return compute_metrics(prediction)

    plan = [*PLAN, Stage("again", "head", epochs=1, learning_rate=1e-2)]
    expected = make("whole", plan=plan, dropout=True)
    expected.train()
    # Made only now, since that sets the seed.
    broken = make(plan=plan, dropout=True, compute_metrics=breaking)
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    trainer = make(plan=plan, dropout=True)
    trainer.train(resume_from_checkpoint=True)
    weights, wanted = copied(trainer.model), copied(expected.model)
    assert [name for name in wanted if not torch.equal(weights[name], wanted[name])] == []
    assert len(calls) == call
    timed = ("seconds", "_per_second", "data_wait_share", "peak_memory_mb")
    records = [[plain(record.to_dict(), timed) for record in run.stage_records] for run in (trainer, expected)]
    assert records[0] == records[1]


def plain(entries, without):
    return {key: value for key, value in entries.items() if not key.endswith(without)}
