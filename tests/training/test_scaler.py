"""The fp16 loss scaler lives as long as the run: over stages, over a step whose gradients overflow, over a resume.

On the CPU, accelerate refuses fp16, so the trainer is given what it would make on a GPU: fp16 autocast and torch's own
scaler. With a GPU, it makes them itself.
"""

import copy

import pytest
import torch
import transformers
from torch import nn

from torchthaw import Stage, ThawTrainer, ThawTrainingArguments, TorchvisionForImageClassification
from torchthaw.training.callbacks import StageCallback

PLAN = [
    Stage("head", "head", epochs=1, learning_rate=1e-2),
    Stage("last block", 1, epochs=2, learning_rate=3e-3),
    Stage("all", "all", epochs=1, learning_rate=1e-3),
]
SCALER = {"init_scale": 2.0**6, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 3}
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")),
]


class HalfPrecision(ThawTrainer):
    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        if self.args.use_cpu:
            self.accelerator.native_amp = True
            self.accelerator.state._mixed_precision = "fp16"
        self.accelerator.scaler = torch.amp.GradScaler(self.args.device.type, **SCALER)


class Scales(StageCallback):
    """Notes the scale after each step; makes the gradients of one step overflow; can raise after another."""

    def __init__(self, overflow_at=None, stop_at=None):
        self.trainer, self.overflow_at, self.stop_at = None, overflow_at, stop_at
        self.scales, self.weights, self.dtypes = {}, {}, set()

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        self.weights[state.global_step + 1] = model.backbone.fc.weight.detach().clone()

    def on_step_begin(self, args, state, control, model=None, **_):
        if state.global_step + 1 == self.overflow_at:
            handle = model.backbone.fc.weight.register_hook(lambda gradient: (handle.remove(), gradient * torch.inf)[1])

    def on_step_end(self, args, state, control, **_):
        self.scales[state.global_step] = self.trainer.accelerator.scaler.get_scale()
        if state.global_step == self.stop_at:
            raise KeyboardInterrupt


@pytest.fixture(autouse=True)
def _forget_precision():
    yield
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()


@pytest.fixture(scope="module")
def untrained():
    torch.manual_seed(0)
    return TorchvisionForImageClassification.from_torchvision(
        "shufflenet_v2_x0_5", weights="builtin", id2label=["ant", "bee", "cat"]
    )


def samples(number, seed):
    random = torch.Generator().manual_seed(seed)
    labels = [torch.tensor(index % 3) for index in range(number)]
    return [{"pixel_values": torch.randn(3, 32, 32, generator=random) + label - 1, "labels": label} for label in labels]


def make(untrained, folder, device, callback, **options):
    half = {"use_cpu": True} if device == "cpu" else {"fp16": True}
    trainer = HalfPrecision(
        model=copy.deepcopy(untrained),
        args=ThawTrainingArguments(
            output_dir=str(folder), plan=PLAN, per_device_train_batch_size=4, metric_for_best_model="loss",
            save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1, gate="off", disable_tqdm=True,
            report_to="none", **half, **options,
        ),
        train_dataset=samples(12, 0),
        eval_dataset=samples(9, 1),
        callbacks=[callback],
    )  # fmt: skip
    trainer.remove_callback(transformers.PrinterCallback)
    callback.trainer = trainer

    def note(module: nn.Module, inputs: object, output: torch.Tensor) -> None:
        callback.dtypes.add(output.dtype)

    trainer.model.backbone.fc.register_forward_hook(note)
    return trainer


@pytest.mark.parametrize("device", DEVICES)
def test_scale_lives_over_stages_and_an_overflow_skips_one_step(untrained, tmp_path, device):
    notes = Scales(overflow_at=5)
    trainer = make(untrained, tmp_path, device, notes)
    trainer.train()
    scales = [notes.scales[step] for step in range(1, 13)]
    assert notes.dtypes == {torch.float16}
    # Step 5 (of the second stage) halves the scale and leaves the weights; the scale of the stage before goes on.
    assert scales[4] == scales[3] / 2
    assert torch.equal(notes.weights[5], notes.weights[6])
    assert not torch.equal(notes.weights[6], notes.weights[7])
    assert [record.name for record in trainer.stage_records] == ["head", "last block", "all"]
    assert all(parameter.dtype == torch.float32 for parameter in trainer.model.parameters())
    # Doubled after each three good steps, whatever stage they are in.
    factors = [1, 1, 2, 2, 1, 1, 1, 2, 2, 2, 4, 4]
    assert scales == [factor * SCALER["init_scale"] for factor in factors]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("step", [3, 7])
def test_scale_comes_back_on_resume(untrained, tmp_path, device, step):
    expected = Scales(overflow_at=2)
    undisturbed = make(untrained, tmp_path / "undisturbed", device, expected)
    undisturbed.train()
    with pytest.raises(KeyboardInterrupt):
        make(untrained, tmp_path / "run", device, Scales(overflow_at=2, stop_at=step + 1)).train()
    resumed = Scales()
    trainer = make(untrained, tmp_path / "run", device, resumed)
    trainer.train(resume_from_checkpoint=True)
    assert min(resumed.scales) == step + 1
    assert resumed.scales == {number: expected.scales[number] for number in range(step + 1, 13)}
    if device == "cpu":
        for name, tensor in undisturbed.model.state_dict().items():
            assert torch.equal(tensor, trainer.model.state_dict()[name]), name
