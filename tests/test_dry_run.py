"""`torchthaw train --dry-run` shows what a run would do, and does nothing of it."""

import json
import re
import sys

import pytest
import torch
import torchvision
from torch import nn

from torchthaw import Stage, StagePlan, TorchvisionConfig, TorchvisionForImageClassification, cli
from torchthaw.errors import PlanError
from torchthaw.plan_rows import RunSettings, plan_rows
from torchthaw.stages.presets import fill_defaults

SETTINGS = RunSettings(batch_size=32, optimizer="adamw_torch", max_grad_norm=1.0, image_size=224)
SMALL = ["--backbone", "shufflenet_v2_x0_5", "--set", "weights=null", "--set", "image_size=32"]
SMALL += ["--set", "batch_size=8", "--set", "num_workers=0"]


def stages(*texts):
    return ["--set", "plan=null", "--set", "epochs=null", "--set", f"stages=[{', '.join(texts)}]"]


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Runs a dry run in this process and an empty folder; returns its exit code, stdout and stderr."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["torchthaw", "train", *map(str, arguments), "--dry-run"])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        assert not list(folder.iterdir()), "a dry run writes nothing"
        captured = capsys.readouterr()
        return exit_.value.code or 0, captured.out, captured.err

    return call


def on_meta(architecture, **options):
    with torch.device("meta"):
        return TorchvisionForImageClassification(TorchvisionConfig(architecture=architecture, num_labels=3, **options))


def cells(stderr):
    """Reads tables, a header above a rule and the lines below it: what stands between wide spaces, by line."""
    rows, columns = [], None
    lines = [line.strip() for line in stderr.splitlines()]
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        parts = re.split(r"\s{2,}", line)
        if set(following) == {"─"}:
            columns = len(parts)
        if columns == len(parts) and set(line) != {"─"}:
            rows.append(parts)
        elif set(line) != {"─"}:
            columns = None
    return rows


def test_the_quickstart_is_shown_with_its_parameters_steps_and_rates(run):
    code, stdout, stderr = run("quickstart", "--json")
    assert code == 0, stderr
    document = json.loads(stdout)
    # A quarter of the 1797 digits each for validation and test; batches of 32; 4, 3 and 5 epochs.
    assert document["num_images"] == {"train": 899, "validation": 449, "test": 449}
    assert [stage["steps"] for stage in document["stages"]] == [4 * 29, 3 * 29, 5 * 29]
    assert document["total_steps"] == 12 * 29
    assert [stage["epochs"] for stage in document["stages"]] == [4, 3, 5]
    assert [stage["warmup_steps"] for stage in document["stages"]] == [12, 9, 14]

    network = torchvision.models.shufflenet_v2_x0_5(weights=None, num_classes=10)
    total = sum(p.numel() for p in network.parameters())
    decayed = sum(m.weight.numel() for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear))
    head, last, everything = (stage["groups"] for stage in document["stages"])
    for groups in (head, last, everything):
        assert [group["group"] for group in groups] == ["stem", "stage2", "stage3", "stage4", "head"]
        assert sum(group["parameters"] for group in groups) == total
    assert sum(group["trainable_parameters"] for group in everything) == total
    assert sum(group["not_decayed_parameters"] for group in everything) == total - decayed
    assert [group["trainable_parameters"] for group in head] == [0, 0, 0, 0, 1024 * 10 + 10]
    assert [group["not_decayed_parameters"] for group in head] == [0, 0, 0, 0, 10]
    assert [group["learning_rate"] for group in head] == [None, None, None, None, 1e-2]
    assert [group["learning_rate"] for group in last] == [None, None, None, 3e-3, 5e-3]
    assert [group["learning_rate"] for group in everything] == pytest.approx([5e-3 * 0.7**d for d in (4, 3, 2, 1, 0)])
    assert [group["weight_decay"] for group in last] == [None, None, None, 0.01, 0.01]
    assert [group["batch_norm"] for group in last] == ["frozen", "frozen", "frozen", "train", None]
    assert {group["batch_norm"] for group in everything} == {"train", None}


def test_the_table_shows_patterns_ranges_steps_and_what_a_stage_has_of_its_own(run, make_image_folder):
    data = make_image_folder(per_class=12)
    code, stdout, stderr = run(
        "staged", "--data", data, *SMALL, "--set", "data.validation=0.25",
        *stages(
            '{name: by pattern, unfreeze: ["stage[34]", head], learning_rate: 1e-5..1e-3, steps: 10, warmup: 4}',
            "{name: top, unfreeze: 1, epochs: 3, learning_rate: 2e-4, batch_norm: freeze_affine, optimizer: sgd, "
            "batch_size: 4, image_size: 64, weight_decay: 0.3, patience: 2, schedule: linear}",
        ),
    )  # fmt: skip
    assert code == 0, stderr
    assert stdout == ""
    rows = cells(stderr)
    # 27 training images are 4 batches of 8, or 7 of 4; 10 steps are two and a half epochs.
    assert rows[:3] == [
        ["stage", "epochs", "steps", "warmup steps", "schedule", "optimizer", "batch size", "image size", "patience"],
        ["by pattern", "2.5", "10", "4", "cosine", "adamw_torch_fused", "8", "32", "-"],
        ["top", "3", "21", "2", "linear", "sgd", "4", "64", "2"],
    ]
    # BatchNorm of random weights may not keep its statistics.
    groups = on_meta("shufflenet_v2_x0_5").layer_groups()
    sizes = {name: sum(p.numel() for p in group.parameters.values()) for name, group in groups.items()}
    norms = {
        name: sum(
            p.numel()
            for root in group.modules.values()
            for module in root.modules()
            if isinstance(module, nn.BatchNorm2d)
            for p in module.parameters()
        )
        for name, group in groups.items()
    }
    header = ["layer group", "parameters", "train", "learning rate", "weight decay", "not decayed", "BatchNorm"]

    def frozen(name):
        return [name, f"{sizes[name]:,}", "0", "-", "-", "-", "frozen"]

    def live(name, rate, decay, norm, trained, not_decayed):
        return [name, f"{sizes[name]:,}", f"{trained:,}", rate, decay, f"{not_decayed:,}", norm]

    assert rows[3:] == [
        header,
        frozen("stem"),
        frozen("stage2"),
        live("stage3", "1.00e-05", "0.01", "train", sizes["stage3"], norms["stage3"]),
        live("stage4", "1.00e-04", "0.01", "train", sizes["stage4"], norms["stage4"]),
        live("head", "1.00e-03", "0.01", "-", sizes["head"], 3),
        header,
        frozen("stem"),
        frozen("stage2"),
        frozen("stage3"),
        live("stage4", "2.00e-04", "0.3", "freeze_affine", sizes["stage4"] - norms["stage4"], 0),
        live("head", "2.00e-04", "0.3", "-", sizes["head"], 3),
    ]
    trained = sizes["stage3"] + sizes["stage4"] + sizes["head"]
    assert f"by pattern: {trained:,} of {sum(sizes.values()):,} parameters train" in stderr
    assert "adamw_torch_fused, gradients clipped to 1, batches of 8, images of 32 pixels" in stderr
    assert (
        "Frozen groups are in eval mode as a whole: BatchNorm statistics, dropout and stochastic depth are those of "
        "inference." in stderr
    )
    assert "In all 31 steps on one process; images: 27 train, 9 validation." in stderr


def test_columns_that_no_stage_needs_are_left_out(run, make_image_folder):
    photos = make_image_folder(per_class=12)
    code, _, stderr = run("staged", "--data", photos, *SMALL, "--set", "max_grad_norm=0")
    assert code == 0, stderr
    assert cells(stderr)[0] == ["stage", "epochs", "steps", "warmup steps", "schedule", "augmentation"]
    assert [row[-1] for row in cells(stderr)[1:4]] == ["none", "-", "-"]
    assert "no clipping" in stderr
    asked = ["--set", "augmentation=light"]
    _, _, stderr = run("staged", "--data", photos, *SMALL, *asked)
    assert cells(stderr)[0] == ["stage", "epochs", "steps", "warmup steps", "schedule"]


def test_rates_and_decay_of_the_recipe_count(run, make_image_folder):
    options = ["--set", "learning_rate=1e-2", "--set", "weight_decay=0.2", "--set", "epochs=3"]
    code, stdout, stderr = run("two_phase", "--data", make_image_folder(per_class=12), *SMALL, *options, "--json")
    assert code == 0, stderr
    head, everything = (stage["groups"] for stage in json.loads(stdout)["stages"])
    assert head[-1]["learning_rate"] == 1e-2
    assert [group["learning_rate"] for group in everything] == pytest.approx([3e-3 * 0.3**d for d in (4, 3, 2, 1, 0)])
    assert {group["weight_decay"] for group in everything} == {0.2}


def test_a_linear_probe_and_what_it_chooses(run, make_image_folder):
    line = [*SMALL, "--data", make_image_folder(per_class=16), "--set", "plan=auto", "--set", "epochs=3"]
    code, stdout, stderr = run("staged", *line, "--json")
    assert code == 0, stderr
    head, everything = json.loads(stdout)["stages"]
    assert [(s["solver"], s["by_probe"], s["steps"]) for s in (head, everything)] == [
        ("probe", False, 1),
        ("gradient", True, 2 * 6),
    ]
    assert {group["learning_rate"] for group in head["groups"]} == {None}
    _, _, stderr = run("staged", *line)
    assert ["head", "linear probe", "1", "0", "cosine", "none"] in cells(stderr)
    assert (
        "The linear probe chooses the rates of all, and what BatchNorm does; shown is what stands without one."
        in stderr
    )
    assert "all anew" not in stderr


@pytest.mark.parametrize("gate", ["best", "off"])
def test_a_stage_that_the_probe_may_add(run, make_image_folder, gate):
    line = [*SMALL, "--data", make_image_folder(per_class=152), "--set", "plan=auto", "--set", f"gate={gate}"]
    line += ["--set", "batch_size=16", "--set", "weights=builtin"]
    code, stdout, stderr = run("staged", *line, "--json")
    assert code == 0, stderr
    document = json.loads(stdout)
    steps = document["stages"][1]["steps"]
    assert document["total_steps"] == 1 + steps
    assert document["added_stage"] == ({"name": "all anew", "steps": steps} if gate == "best" else None)
    _, _, stderr = run("staged", *line)
    assert (f"BatchNorm and a new head learn in {steps} further steps, a stage 'all anew'" in stderr) is (
        gate == "best"
    )


@pytest.mark.parametrize(
    ("gate", "line"),
    [
        ([], "keeps a stage if validation accuracy is better than before it; otherwise the stage is rolled back, and "
             "the run goes on with the next one from the best weights so far."),
        (["gate=significant", "min_gain=0.01", "on_reject=stop", "metric=macro_f1"],
         "keeps a stage if validation macro F1 is better beyond noise than before it and by at least 0.01; otherwise "
         "the stage is rolled back, and the run ends."),
        (["gate=off"], "The gate is off: every stage is kept."),
    ],
)  # fmt: skip
def test_what_the_gate_will_do_is_said_in_one_line(run, make_image_folder, gate, line):
    options = [part for text in gate for part in ("--set", text)]
    code, _, stderr = run("staged", "--data", make_image_folder(per_class=12), *SMALL, *options)
    assert code == 0, stderr
    assert any(text.endswith(line) for text in stderr.splitlines())


def test_a_stage_whose_frozen_groups_keep_dropout_is_named(run, make_image_folder):
    code, _, stderr = run(
        "staged", "--data", make_image_folder(per_class=12), *SMALL,
        *stages("{name: one, unfreeze: head}", "{name: two, unfreeze: 1, frozen_dropout: true}"),
    )  # fmt: skip
    assert code == 0, stderr
    assert "those of inference, except for dropout and stochastic depth in two." in stderr


def test_a_dry_run_says_what_the_run_then_does(run, make_image_folder, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    command = [
        "staged", "--data", make_image_folder(per_class=12), *SMALL, "--output", out, "--json",
        *stages(
            "{name: head, unfreeze: head, epochs: 1}",
            '{name: pattern, unfreeze: ["stage[24]", head], learning_rate: 1e-5..1e-3, steps: 6, batch_size: 4}',
            "{name: norms, unfreeze: 1, batch_norm: freeze_affine, augmentation: none}",
        ),
    ]  # fmt: skip
    code, stdout, stderr = run(*command)
    assert code == 0, stderr
    assert not out.exists()
    planned = json.loads(stdout)

    monkeypatch.setattr(sys, "argv", ["torchthaw", "train", *map(str, command)])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    captured = capsys.readouterr()
    assert not exit_.value.code, captured.err
    done = json.loads(captured.out)
    assert planned["num_images"] == done["num_images"]
    assert planned["gate"] == done["gate"]
    assert planned["metric"] == done["metric"]
    for plan, stage in zip(planned["stages"], done["stages"], strict=True):
        assert plan["name"] == stage["name"]
        assert plan["steps"] == stage["steps"]
        assert plan["trainable_parameters"] == stage["trainable_parameters"]
        rates = {group["group"]: group["learning_rate"] for group in plan["groups"] if group["learning_rate"]}
        assert rates == pytest.approx(stage["learning_rates"])
        live = {group["batch_norm"] for group in plan["groups"]} - {"frozen", None}
        assert live <= {stage["batch_norm"]}
    assert planned["total_steps"] == sum(stage["steps"] for stage in done["stages"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--set", "batch_size=100"], "the batch size is 100, but there are"),
        (stages("{name: a, batch_size: 100}"), "the batch size is 100, but there are"),
        (stages("{name: a, unfreeze: layer9}"), "'layer9', which matches no layer group"),
        (stages("{name: a, optimizer: adamm}"), "stage 'a': unknown optimizer 'adamm'"),
        (["--set", "optimizer=adamm"], "adamm"),
        (stages("{name: a, lora: 4}"), "stage 'a' has lora, which adapts the linear layers of transformers"),
        (["--set", "weights=IMAGENET1K_V9"], "IMAGENET1K_V9"),
        (["--backbone", "vit_b_16", "--set", "image_size=224", *stages("{name: a, image_size: 32}")], "one size only"),
    ],
)
def test_what_the_run_would_refuse_the_dry_run_refuses(run, make_image_folder, options, message):
    code, stdout, stderr = run("staged", "--data", make_image_folder(), *SMALL, *options)
    assert code == 2, stderr
    assert message in stderr
    assert stdout == ""
    assert "Traceback" not in stderr


def test_bad_images_are_reported(run, make_image_folder):
    data = make_image_folder()
    (data / "ant" / "empty.png").touch()
    code, _, stderr = run("staged", "--data", data, *SMALL)
    assert code == 2
    assert "ant/empty.png" in stderr


def test_weights_need_no_download_and_give_the_image_size(run, make_image_folder):
    code, stdout, stderr = run(
        "staged", "--data", make_image_folder(per_class=12), "--backbone", "vit_b_16",
        "--weights", "IMAGENET1K_SWAG_E2E_V1", "--set", "image_size=null", "--set", "batch_size=8", "--json",
    )  # fmt: skip
    assert code == 0, stderr
    document = json.loads(stdout)
    assert document["image_size"] == 384
    with torch.device("meta"):
        network = torchvision.models.vit_b_16(weights=None, num_classes=3, image_size=384)
    for stage in document["stages"]:
        assert stage["parameters"] == sum(p.numel() for p in network.parameters())
        assert {group["batch_norm"] for group in stage["groups"]} == {None}
    rates = [group["learning_rate"] for group in document["stages"][-1]["groups"]]
    assert rates == pytest.approx([2e-4 * 0.75 ** (len(rates) - 1 - index) for index in range(len(rates))])


def test_statistics_are_kept_for_small_data_and_learned_for_large():
    plan = fill_defaults(StagePlan((Stage("a"), Stage("small batches", batch_size=16))), transformer=False)
    model = on_meta("resnet18")
    policies = {
        num_images: [
            stage["groups"][0]["batch_norm"]
            for stage in plan_rows(model, plan, num_images=num_images, settings=SETTINGS)
        ]
        for num_images in (500, 50_000)
    }
    assert policies == {500: ["eval", "eval"], 50_000: ["train", "eval"]}


def test_norms_in_eval_do_not_train_and_a_stage_that_does_not_fit_is_refused():
    model = on_meta("resnet18")
    plan = fill_defaults(StagePlan((Stage("a", batch_norm="eval"),)), transformer=False)
    (stage,) = plan_rows(model, plan, num_images=100, settings=SETTINGS)
    norms = sum(p.numel() for m in model.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters())
    assert stage["parameters"] - stage["trainable_parameters"] == norms > 0
    assert sum(group["not_decayed_parameters"] for group in stage["groups"]) == 3, "the bias of the head"
    with pytest.raises(PlanError, match="'layer9', which matches no layer group"):
        plan_rows(model, StagePlan((Stage("a", "layer9", learning_rate=1.0),)), num_images=9, settings=SETTINGS)


def test_adapters_are_counted_and_taken_off_again():
    model = on_meta("swin_t")
    plan = fill_defaults(StagePlan((Stage("a", lora=8), Stage("b"))), transformer=True)
    keys = list(model.state_dict())
    adapters, everything = plan_rows(model, plan, num_images=100, settings=SETTINGS)
    own = sum(p.numel() for p in model.parameters())
    assert everything["parameters"] == everything["trainable_parameters"] == own
    head = adapters["groups"][-1]["trainable_parameters"]
    assert head == 3 * 768 + 3
    assert adapters["parameters"] - own == adapters["trainable_parameters"] - head
    assert [group["group"] for group in adapters["groups"] if not group["trainable_parameters"]] == ["stem"]
    assert {group["learning_rate"] for group in adapters["groups"]} == {None, 1e-3}
    assert list(model.state_dict()) == keys
    assert len(list(model.parameters())) == len(keys) - sum(1 for _ in model.buffers())
