"""Real staged runs on drawn images with a small network."""

import gc
import json
import math
import weakref

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import HfArgumentParser, Trainer, TrainerCallback, TrainingArguments

from torchthaw import (
    Stage,
    ThawTrainer,
    ThawTrainingArguments,
    TorchvisionForImageClassification,
    TorchvisionImageProcessor,
    load_image_dataset,
    split_dataset,
)
from torchthaw.data.views import ImageView, collate
from torchthaw.errors import PlanError, ThawError, TrainingError

ARCHITECTURE = "shufflenet_v2_x0_5"
PLAN = [
    Stage("head", unfreeze="head", epochs=1, learning_rate=1e-2),
    Stage("last block", unfreeze=1, epochs=2, learning_rate={"head": 3e-3, "backbone": 1e-3}),
    Stage("all", unfreeze="all", epochs=1, learning_rate=1e-3, layer_decay=0.5),
]


@pytest.fixture
def splits(make_image_folder):
    return split_dataset(load_image_dataset(make_image_folder(per_class=16)), validation=0.25, seed=0)


@pytest.fixture
def processor():
    return TorchvisionImageProcessor.from_torchvision(ARCHITECTURE, weights=None, image_size=32)


def new_model(classes=("ant", "bee", "cat")):
    torch.manual_seed(0)
    return TorchvisionForImageClassification.from_torchvision(ARCHITECTURE, weights=None, id2label=list(classes))


def arguments(tmp_path, **options):
    defaults = {"plan": PLAN, "per_device_train_batch_size": 8, "disable_tqdm": True, "use_cpu": True}
    return ThawTrainingArguments(output_dir=str(tmp_path / "out"), **{**defaults, **options})


def new_trainer(tmp_path, splits, processor, *, model=None, callbacks=None, **options):
    return ThawTrainer(
        model=model or new_model(),
        args=arguments(tmp_path, **options),
        train_dataset=splits["train"],
        eval_dataset=splits["validation"],
        processing_class=processor,
        callbacks=callbacks,
    )


class Watcher(TrainerCallback):
    """Notes events, and the weights when each epoch begins."""

    def __init__(self):
        self.events = []
        self.weights = []
        self.optimizers = []

    def on_train_begin(self, args, state, control, **kwargs):
        self.events.append("train_begin")

    def on_train_end(self, args, state, control, **kwargs):
        self.events.append("train_end")

    def on_epoch_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.weights.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        self.optimizers.append(optimizer)

    def on_epoch_end(self, args, state, control, model=None, **kwargs):
        if state.epoch == args.num_train_epochs:
            self.weights.append({name: tensor.clone() for name, tensor in model.state_dict().items()})


def test_each_stage_moves_its_groups_only_and_the_run_is_one(tmp_path, splits, processor):
    watcher = Watcher()
    trainer = new_trainer(tmp_path, splits, processor, callbacks=[watcher], load_best_model_at_end=False, gate="off")
    groups = {name: set(group.parameters) for name, group in trainer.model.layer_groups().items()}
    trainer.train()

    def moved(before, after):
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        statistics = {name for name in changed if "running" in name or "num_batches" in name}
        assert not statistics, "BatchNorm statistics of small data stay the pretrained ones"
        return {group for group, names in groups.items() if names & changed}

    start, after_head, _, after_block, end = watcher.weights
    assert moved(start, after_head) == {"head"}
    assert moved(after_head, after_block) == {"stage5" if "stage5" in groups else list(groups)[-2], "head"}
    assert moved(after_block, end) == set(groups)

    assert watcher.events == ["train_begin", "train_end"]
    assert len({id(optimizer) for optimizer in watcher.optimizers}) == 3, "one optimizer a stage"
    steps = [entry["step"] for entry in trainer.state.log_history]
    epochs = [entry["epoch"] for entry in trainer.state.log_history]
    assert steps == sorted(steps)
    assert epochs == sorted(epochs)
    assert trainer.state.global_step == trainer.state.max_steps == 4 * 5
    assert sum("train_runtime" in entry for entry in trainer.state.log_history) == 1


def test_each_log_line_names_its_stage_and_every_groups_rate(tmp_path, splits, processor):
    trainer = new_trainer(tmp_path, splits, processor, logging_strategy="steps", logging_steps=1)
    trainer.train()
    lines = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [line["stage_name"] for line in lines] == ["head"] * 5 + ["last block"] * 10 + ["all"] * 5
    rates = [{k.split("/")[1] for k in line if k.startswith("learning_rate/")} for line in lines]
    assert rates[0] == {"head"}
    assert len(rates[5]) == 2
    assert rates[-1] == set(trainer.model.layer_groups())


def test_warmup_then_cosine_within_each_stage(tmp_path, splits, processor):
    plan = [PLAN[0], Stage("b", unfreeze="head", epochs=2, learning_rate=1.0e-3, warmup=0.2)]
    trainer = new_trainer(tmp_path, splits, processor, plan=plan, logging_strategy="steps", logging_steps=1)
    trainer.train()
    rates = [entry["learning_rate/head"] for entry in trainer.state.log_history if "loss" in entry][5:]
    # 10 steps, 2 of them warmup.
    expected = [0.0, 0.5e-3, *(0.5e-3 * (1 + math.cos(math.pi * step / 8)) for step in range(8))]
    assert rates == pytest.approx(expected)


def test_the_best_weights_of_all_stages_are_loaded_at_the_end(tmp_path, splits, processor):
    # The last stage wrecks the network.
    plan = [PLAN[0], Stage("wreck", epochs=1, learning_rate=0.3, warmup=0.0)]
    trainer = new_trainer(tmp_path, splits, processor, plan=plan)
    trainer.train()
    best = max(entry["eval_accuracy"] for entry in trainer.state.log_history if "eval_accuracy" in entry)
    assert trainer.evaluate()["eval_accuracy"] == best


def test_a_frozen_tensor_that_moves_fails_the_run(tmp_path, splits, processor):
    class Meddler(TrainerCallback):
        def on_epoch_end(self, args, state, control, model=None, **kwargs):
            model.backbone.conv1[1].running_mean += 1e-6

    trainer = new_trainer(tmp_path, splits, processor, callbacks=[Meddler()])
    with pytest.raises(TrainingError, match=r"stage 'head' changed 1 frozen tensors: backbone\.conv1\.1\.running_mean"):
        trainer.train()


def test_records_describe_the_stages(tmp_path, splits, processor):
    trainer = new_trainer(tmp_path, splits, processor)
    trainer.train()
    assert [(r.name, r.epochs, r.frozen_unchanged, r.batch_norm) for r in trainer.stage_records] == [
        ("head", 1, True, "eval"),
        ("last block", 2, True, "eval"),
        ("all", 1, True, "eval"),
    ]
    sizes = [r.trainable_parameters for r in trainer.stage_records]
    head = sum(p.numel() for p in trainer.model.layer_groups()["head"].parameters.values())
    assert sizes[0] == head
    assert sizes == sorted(sizes)
    json.dumps([record.to_dict() for record in trainer.stage_records])


def test_the_same_seed_gives_the_same_weights(tmp_path, splits, processor):
    def final(folder, workers):
        trainer = new_trainer(folder, splits, processor, augmentation="strong", dataloader_num_workers=workers)
        trainer.train()
        return trainer.model.state_dict()

    one, two = final(tmp_path / "a", 0), final(tmp_path / "b", 2)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_label_smoothing_works_with_mixed_labels(tmp_path, splits, processor):
    trainer = new_trainer(tmp_path, splits, processor, augmentation="strong", label_smoothing_factor=0.1)
    images = next(iter(trainer.get_train_dataloader()))
    images = {key: value.cpu() for key, value in images.items()}
    trainer.model.train()
    loss, output = trainer.compute_loss(trainer.model, images, return_outputs=True)
    expected = torch.nn.functional.cross_entropy(output.logits, images["labels"], label_smoothing=0.1)
    assert torch.allclose(loss, expected)


def test_a_loss_that_is_not_finite_ends_the_run_and_says_where(tmp_path, splits, processor):
    plan = [Stage("explodes", epochs=2, learning_rate=1e30, warmup=0.0, batch_norm="train")]
    trainer = new_trainer(tmp_path, splits, processor, plan=plan, max_grad_norm=0.0)
    with pytest.raises(TrainingError, match=r"(loss became|gradient is not finite).* in stage 'explodes' at step \d+"):
        trainer.train()
    assert all(torch.isfinite(tensor).all() for tensor in trainer.model.state_dict().values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"plan": [Stage("a", unfreeze="layer9")]}, "'layer9', which matches no layer group"),
        ({"per_device_train_batch_size": 500}, "batch size is 500, but there are 36 training images"),
        ({"max_steps": 10}, "max_steps is 10"),
        ({"num_train_epochs": 2.5}, "num_train_epochs is 2.5"),
        ({"num_train_epochs": 9}, "4 epochs long in all, but 9"),
        ({"augmentation": "hard"}, "unknown augmentation 'hard'"),
    ],
)
def test_bad_arguments_are_named(tmp_path, splits, processor, options, message):
    with pytest.raises(ThawError, match=message):
        new_trainer(tmp_path, splits, processor, **options)


def test_what_stages_cannot_use_is_refused(tmp_path, splits, processor):
    model = new_model()
    with pytest.raises(PlanError, match="every stage makes its own optimizer"):
        ThawTrainer(model, arguments(tmp_path), optimizers=(torch.optim.SGD(model.parameters(), 1e-3), None))
    with pytest.raises(PlanError, match="args is a TrainingArguments, which has no stage plan"):
        ThawTrainer(model, TrainingArguments(output_dir=str(tmp_path)))
    with pytest.raises(PlanError, match="there is no image processor"):
        ThawTrainer(model, arguments(tmp_path), train_dataset=splits["train"], eval_dataset=splits["validation"])
    with pytest.raises(PlanError, match="there is no eval_dataset"):
        ThawTrainer(model, arguments(tmp_path), train_dataset=splits["train"])
    with pytest.raises(ThawError, match="bee"):
        new_trainer(tmp_path, splits, processor, model=new_model(("ant", "wasp", "cat")))


def test_a_head_rate_and_a_number_of_epochs_stretch_a_preset(tmp_path, splits, processor):
    trainer = new_trainer(
        tmp_path, splits, processor, plan="staged", num_train_epochs=3, learning_rate=5e-3, weight_decay=0.2
    )
    assert [stage.epochs for stage in trainer.plan.stages] == [1, 1, 1]
    assert trainer.plan.stages[0].learning_rates(list(trainer.model.layer_groups())) == {"head": 5e-3}
    assert {stage.weight_decay for stage in trainer.plan.stages} == {0.2}


def test_model_init_and_a_second_run_start_afresh(tmp_path, splits, processor):
    trainer = ThawTrainer(
        args=arguments(tmp_path),
        train_dataset=splits["train"],
        eval_dataset=splits["validation"],
        processing_class=processor,
        model_init=lambda: new_model(),
    )
    trainer.train()
    once = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    trainer.train()
    assert all(torch.equal(once[name], tensor) for name, tensor in trainer.model.state_dict().items())
    assert [(r.name, r.epochs) for r in trainer.stage_records] == [("head", 1), ("last block", 2), ("all", 1)]


def test_arguments_are_read_from_a_command_line(tmp_path):
    line = f"--output_dir {tmp_path} --plan two_phase --augmentation light --num_train_epochs 5 --learning_rate 0.01"
    (arguments,) = HfArgumentParser(ThawTrainingArguments).parse_args_into_dataclasses(line.split())
    assert [stage["epochs"] for stage in arguments.plan["stages"]] == [2, 3]
    assert (arguments.augmentation, arguments.learning_rate) == ("light", 0.01)
    json.loads(arguments.to_json_string())


def test_a_data_set_of_tensors_needs_no_processor(tmp_path):
    torch.manual_seed(0)
    images = [{"pixel_values": torch.randn(3, 32, 32), "labels": torch.tensor(i % 3)} for i in range(16)]
    trainer = ThawTrainer(new_model(), arguments(tmp_path), train_dataset=images, eval_dataset=images)
    trainer.train()
    assert len(trainer.stage_records) == 3


def test_stock_trainer_trains_the_wrapped_model(tmp_path, splits, processor):
    model = new_model()
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(tmp_path / "stock"),
            num_train_epochs=1,
            per_device_train_batch_size=8,
            remove_unused_columns=False,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=ImageView(splits["train"], processor),
        eval_dataset=ImageView(splits["validation"], processor),
        data_collator=collate,
        processing_class=processor,
    )
    before = model.backbone.fc.weight.clone()
    trainer.train()
    assert not torch.equal(before, model.backbone.fc.weight)
    assert trainer.evaluate()["eval_loss"] > 0
    trainer.save_model(str(tmp_path / "saved"))
    again = TorchvisionForImageClassification.from_pretrained(tmp_path / "saved")
    pixels = ImageView(splits["validation"], processor)[0]["pixel_values"][None]
    model.eval()
    # Loaded tensors lie elsewhere in memory, for which some kernels round differently.
    torch.testing.assert_close(again(pixel_values=pixels).logits, model(pixel_values=pixels).logits)
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


@pytest.fixture
def nothing_frozen():
    """Puts the collector of garbage into the state that it has in a script."""
    frozen = gc.get_freeze_count() > 0
    gc.unfreeze()
    yield
    if frozen:
        gc.collect()
        gc.freeze()


@pytest.mark.usefixtures("nothing_frozen")
def test_an_earlier_trainer_is_gone_when_the_next_one_trains(tmp_path, splits, processor):
    alive = []

    class Look(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            alive.append(earlier() is not None)

    gc.disable()
    try:
        trainer = new_trainer(tmp_path / "first", splits, processor)
        trainer.train()
        earlier = weakref.ref(trainer.model)
        del trainer
        assert earlier() is not None, "it is part of a circle"
        new_trainer(tmp_path / "second", splits, processor, callbacks=[Look()]).train()
    finally:
        gc.enable()
    assert alive == [False]
    assert gc.get_freeze_count() == 0


def test_a_compiled_model_trains_alike(tmp_path, splits, processor):
    plan = [Stage("head", "head", epochs=1, learning_rate=1e-2), Stage("all", "all", epochs=1, learning_rate=1e-3)]
    options = {"plan": plan, "gate": "off", "augmentation": "none", "max_grad_norm": 1.0}
    plain = new_trainer(tmp_path / "plain", splits, processor, **options)
    plain.train()
    # Traced and cut into graphs as for any backend, but run by torch's own kernels: the others want a C++ compiler.
    compiled = new_trainer(
        tmp_path / "compiled", splits, processor, torch_compile=True, torch_compile_backend="eager", **options
    )
    compiled.train()
    assert counters["frames"]["ok"] > 0, "graphs were made"
    wanted = plain.model.state_dict()
    assert list(compiled.model.state_dict()) == list(wanted)
    for name, tensor in compiled.model.state_dict().items():
        torch.testing.assert_close(tensor, wanted[name], atol=1e-5, rtol=1e-3, msg=name)
