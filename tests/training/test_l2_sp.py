"""L2-SP in runs: the steps against those computed by hand, whatever the stage, and through interruptions."""

import copy

import pytest
import torch
import transformers

from torchthaw import Stage, ThawTrainer, ThawTrainingArguments, TorchvisionForImageClassification
from torchthaw.errors import PlanError
from torchthaw.stages.param_groups import is_decayed
from torchthaw.training.callbacks import StageCallback
from torchthaw.training.stage_copies import StageCopyTrainer, copy_for_stage

ARCHITECTURE = "shufflenet_v2_x0_5"
CLASSES = ["ant", "bee", "cat"]
PULL, DECAY = 20.0, 0.5
SGD = {"optimizer": "sgd", "optimizer_args": {"momentum": 0.0}, "schedule": "constant", "max_grad_norm": 0.0}
# 3 steps an epoch of 2 batches each; the last block moves before everything trains.
PLAN = [
    Stage("last block", 1, epochs=1, learning_rate=1e-2, weight_decay=DECAY, batch_norm="train", **SGD),
    Stage("all", "all", epochs=2, learning_rate={"head": 1e-2, "backbone": 3e-3}, weight_decay=DECAY, **SGD),
]


def samples(number=24, seed=0):
    random = torch.Generator().manual_seed(seed)
    labels = [torch.tensor(index % 3) for index in range(number)]
    return [{"pixel_values": torch.randn(3, 32, 32, generator=random) + label - 1, "labels": label} for label in labels]


@pytest.fixture(scope="module")
def untrained():
    torch.manual_seed(0)
    return TorchvisionForImageClassification.from_torchvision(ARCHITECTURE, weights="builtin", id2label=CLASSES)


@pytest.fixture
def make(untrained, tmp_path):
    def new_trainer(callbacks=(), *, folder="run", model=None, **options):
        defaults = {
            "plan": PLAN, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "gate": "off",
            "metric_for_best_model": "loss", "use_cpu": True, "disable_tqdm": True, "report_to": "none",
            "load_best_model_at_end": False, "save_strategy": "steps", "save_steps": 1, "save_total_limit": None,
        }  # fmt: skip
        trainer = ThawTrainer(
            model=copy.deepcopy(model or untrained),
            args=ThawTrainingArguments(output_dir=str(tmp_path / folder), **{**defaults, **options}),
            train_dataset=samples(),
            eval_dataset=samples(9, seed=1),
            callbacks=list(callbacks),
        )
        trainer.remove_callback(transformers.PrinterCallback)
        return trainer

    return new_trainer


class Steps(StageCallback):
    """Notes weights and gradients before each step of the optimizer, and weights after it."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **_):
        rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        self.steps.append(
            {
                name: (p.detach().clone(), p.grad.clone(), rates[id(p)])
                for name, p in model.named_parameters()
                if p.requires_grad
            }
        )

    def on_step_end(self, args, state, control, model=None, **_):
        self.after = {name: p.detach().clone() for name, p in model.named_parameters()}
        self.steps[-1] = {name: (*known, self.after[name]) for name, known in self.steps[-1].items()}


class Stop(StageCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def weights(trainer):
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def test_steps_are_those_computed_by_hand_and_the_start_is_the_runs(make, untrained):
    notes = Steps()
    trainer = make([notes], l2_sp=PULL)
    trainer.train()
    start = dict(untrained.named_parameters())
    owners = {id(p): module for module in trainer.model.modules() for p in module.parameters(recurse=False)}
    kinds = {name: is_decayed(name, p, owners[id(p)]) for name, p in trainer.model.named_parameters()}
    assert len(notes.steps) == 9
    for step in notes.steps:
        for name, (before, gradient, rate, after) in step.items():
            expected = before.double() - rate * gradient.double()
            if kinds[name] and "backbone.fc" in name:
                expected -= rate * DECAY * before.double()
            elif kinds[name]:
                expected -= rate * PULL * (before.double() - start[name].double())
            torch.testing.assert_close(after.double(), expected, rtol=1e-5, atol=1e-6)
    name = "backbone.conv5.0.weight"
    moved = (notes.steps[3][name][0] - start[name]).abs().max()
    assert moved > 1e-5, "the second stage begins elsewhere than the run, so that the test tells the two apart"


def test_what_is_pulled_ends_nearer_to_where_it_began(make):
    free, held = make(folder="free"), make(folder="held", l2_sp=100.0)
    free.train(), held.train()
    far, near = free.distance_from_start(), held.distance_from_start()
    assert near["backbone"] < 0.8 * far["backbone"]
    assert near["groups"]["stem"] < far["groups"]["stem"]


def test_a_head_alone_is_trained_as_without(make):
    plan = [Stage("head", "head", epochs=1, learning_rate=1e-2)]
    plain, pulled = make(folder="plain", plan=plan), make(folder="pulled", plan=plan, l2_sp=PULL)
    plain.train(), pulled.train()
    assert_same(weights(plain), weights(pulled))
    assert set(pulled.distance_from_start()["groups"].values()) == {0.0}


@pytest.mark.parametrize("step", [2, 3, 7])
def test_an_interrupted_run_ends_as_the_undisturbed_one(make, step):
    options = {"l2_sp": PULL, "optim": "adamw_torch_fused"}
    plan = [Stage("last block", 1, epochs=1, learning_rate=1e-2), Stage("all", "all", epochs=2, learning_rate=3e-3)]
    undisturbed = make(folder="undisturbed", plan=plan, **options)
    undisturbed.train()
    with pytest.raises(KeyboardInterrupt):
        make([Stop(step + 1)], plan=plan, **options).train()
    resumed = make(plan=plan, **options)
    resumed.train(resume_from_checkpoint=True)
    assert_same(weights(undisturbed), weights(resumed))
    assert resumed.distance_from_start() == undisturbed.distance_from_start()


def test_the_trainer_that_was_interrupted_goes_on_itself(make):
    undisturbed = make(folder="undisturbed", l2_sp=PULL)
    undisturbed.train()
    stop = Stop(5)
    trainer = make([stop], l2_sp=PULL)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.remove_callback(stop)
    trainer.train(resume_from_checkpoint=True)
    assert_same(weights(undisturbed), weights(trainer))


def test_a_run_is_not_resumed_towards_other_weights(make, untrained):
    with pytest.raises(KeyboardInterrupt):
        make([Stop(4)], l2_sp=PULL).train()
    with pytest.raises(PlanError, match="l2_sp was 20.0 and is null"):
        make().train(resume_from_checkpoint=True)
    other = copy.deepcopy(untrained)
    with torch.no_grad():
        other.backbone.conv1[0].weight.add_(1e-3)
    with pytest.raises(PlanError, match=r"l2_sp is 20, .* holds other ones"):
        make(model=other, l2_sp=PULL).train(resume_from_checkpoint=True)


def test_without_a_pull_a_run_goes_on_with_other_weights_but_knows_no_distance(make, untrained):
    with pytest.raises(KeyboardInterrupt):
        make([Stop(4)]).train()
    other = copy.deepcopy(untrained)
    with torch.no_grad():
        other.backbone.conv1[0].weight.add_(1e-3)
    trainer = make(model=other)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.distance_from_start() is None


def test_a_second_run_begins_where_the_first_ended(make):
    trainer = make(l2_sp=PULL)
    trainer.train()
    first = trainer.distance_from_start()
    trainer.args.l2_sp = 300.0
    trainer.train()
    assert trainer.distance_from_start()["backbone"] < first["backbone"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"l2_sp": 0.0}, "l2_sp is 0.0; write a positive number"),
        ({"l2_sp": float("nan")}, "l2_sp is nan"),
        ({"l2_sp": 200.0}, "stage 'last block' has a learning rate of 0.01: .* must not be above 1; write l2_sp=1e"),
        ({"l2_sp": 1.0, "plan": "full", "optim": "schedule_free_adamw"}, "schedule_free_adamw does not let it do"),
    ],
)
def test_what_cannot_work_is_refused(make, options, message):
    with pytest.raises(PlanError, match=message):
        make(**options)


def test_a_copy_for_a_range_test_pulls_to_the_start_of_the_run(make, untrained):
    trainer, elsewhere = make(l2_sp=PULL), copy.deepcopy(untrained)
    with torch.no_grad():
        elsewhere.backbone.conv1[0].weight.add_(1)
    twin = copy_for_stage(StageCopyTrainer, trainer, elsewhere, index=1, steps=2, on_step=lambda _: None)
    twin.run()
    # Two steps of a rate of 3e-3 go 12 % of the way back.
    first = untrained.backbone.conv1[0].weight
    assert (twin.model.backbone.conv1[0].weight - first).abs().max() < 0.92
