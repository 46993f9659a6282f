"""Two gloo processes, as `torchrun` starts them, against one process on the same global batches.

The runs are those of staged_worker.py; each start of processes takes long, so that a few of them serve all tests.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import torchthaw
from torchthaw import ThawTrainingArguments
from torchthaw.errors import PlanError

WORKER = Path(__file__).with_name("staged_worker.py")
LIMIT = 300  # seconds for one start of processes, on a busy machine
# Sums over halves of a batch round differently from sums over all of it, and AdamW divides small gradients by their
# own size; the largest difference that was seen is 5e-7.
WEIGHT_TOLERANCE = 1e-5
LOG_TOLERANCE = 1e-4
TIMINGS = ("runtime", "per_second", "total_flos")
TIMED = ("seconds", "train_images_per_second", "step_images_per_second", "data_wait_share", "peak_memory_mb")

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux" or not dist.is_gloo_available(), reason="gloo is tested on Linux"),
    pytest.mark.timeout(900),
]


def start(processes, *command):
    """Runs Python with a command line in one process or, by torchrun, in several; kills all of them if they hang."""
    package = str(Path(torchthaw.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": package, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    with subprocess.Popen(
        [sys.executable, *(launcher if processes > 1 else []), *map(str, command)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as child:
        try:
            stdout, stderr = child.communicate(timeout=LIMIT)
        finally:
            # torchrun ends its processes, by force if need be.
            child.terminate()
    return child.returncode, stdout, stderr


class Reports:
    """What scenarios came to, read from the files of the processes."""

    def __init__(self, folder, outcome):
        self.folder, (self.code, self.stdout, self.stderr) = folder, outcome

    def of(self, scenario):
        files = sorted(self.folder.glob(f"{scenario}-[01].pt"))
        assert files, f"{scenario} did not end:\n{self.stderr}"
        return [torch.load(file, weights_only=True) for file in files]

    def good(self, scenario):
        reports = self.of(scenario)
        assert [report["error"] for report in reports] == [None] * len(reports), reports[0]["error"]["trace"]
        return reports

    def failures(self, scenario):
        return [(report["error"]["kind"], report["error"]["message"]) for report in self.of(scenario)]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Two processes, that run many scenarios and are killed in the last one."""
    folder = tmp_path_factory.mktemp("two")
    scenarios = [
        "plain", "batch_norm", "averaged", "weighted_draws", "pulled", "adapters", "probe", "far", "both_ways",
        "own_heads", "stream", "stream_read_by_each",
        "change_weight", "change_frozen_weight", "freeze", "other_plan", "broken_image",
        "broken_image_settled_later", "missing_checkpoint",
        "synchronized_batch_norm", "stock_callback", "stock_second_train", "kill",
    ]  # fmt: skip
    return Reports(folder, start(2, WORKER, folder, 6, *scenarios))


@pytest.fixture(scope="module")
def one(two, tmp_path_factory):
    """One process with twice the batch size, that also goes on with the run that was killed."""
    folder = tmp_path_factory.mktemp("one")
    shutil.copytree(two.folder / "killed", folder / "killed")
    scenarios = [
        "plain", "averaged", "weighted_draws", "pulled", "adapters", "probe", "far", "stream",
        "resumed_with_other_batches", "resumed",
    ]  # fmt: skip
    return Reports(folder, start(1, WORKER, folder, 12, *scenarios))


@pytest.fixture(scope="module")
def again(two, one, tmp_path_factory):
    """Two processes, that go on with the run that was killed; then the first one breaks."""
    folder = tmp_path_factory.mktemp("again")
    shutil.copytree(two.folder / "killed", folder / "killed")
    return Reports(folder, start(2, WORKER, folder, 6, "resumed", "break_first"))


def largest_difference(some, others):
    assert some.keys() == others.keys()
    return max((some[name].double() - others[name].double()).abs().max().item() for name in some)


def bit_equal(some, others):
    return some.keys() == others.keys() and all(torch.equal(some[name], others[name]) for name in some)


def without_timings(entries):
    return [{key: value for key, value in entry.items() if not key.endswith(TIMINGS)} for entry in entries]


def decisions(report):
    return [{key: value for key, value in record.items() if key not in TIMED} for record in report["records"]]


def assert_close(some, others, tolerance):
    """Compares plain data: numbers to a tolerance, the rest exactly."""
    if isinstance(some, dict):
        assert some.keys() == others.keys()
        for key in some:
            if key != "reason":  # has the figures in words
                assert_close(some[key], others[key], tolerance)
    elif isinstance(some, list):
        assert len(some) == len(others)
        for item, other in zip(some, others, strict=True):
            assert_close(item, other, tolerance)
    elif isinstance(some, float):
        assert some == pytest.approx(others, rel=tolerance, abs=tolerance)
    else:
        assert some == others


# Two processes and one come to the same


def test_weights_after_every_stage_are_those_of_one_process(two, one):
    first, second = two.good("plain")
    (alone,) = one.good("plain")
    assert len(first["weights"]) == len(alone["weights"]) == 3
    for stage in range(3):
        assert bit_equal(first["weights"][stage], second["weights"][stage])
        assert largest_difference(first["weights"][stage], alone["weights"][stage]) < WEIGHT_TOLERANCE
    assert largest_difference(first["weights"][2], first["weights"][0]) > 10 * WEIGHT_TOLERANCE, "it was training"


def test_decisions_and_log_are_those_of_one_process(two, one):
    first, second = two.good("plain")
    (alone,) = one.good("plain")
    assert [record["accepted"] for record in alone["records"]] == [True, False, True]
    assert decisions(first) == decisions(second)
    assert without_timings(first["log"]) == without_timings(second["log"])
    assert_close(decisions(first), decisions(alone), LOG_TOLERANCE)
    assert_close(without_timings(first["log"]), without_timings(alone["log"]), LOG_TOLERANCE)
    assert bit_equal(first["weights"][1], first["weights"][0]), "the second stage was rolled back"


def global_batches(reports):
    """Digests of the images of each step over all processes: (stage, epoch, step) -> digests."""
    batches = {}
    for report in reports:
        for stage, epoch, step, digests in report["seen"]:
            batches.setdefault((stage, epoch, step), []).extend(digests)
    return {where: sorted(digests) for where, digests in batches.items()}


def test_the_images_of_every_step_are_those_of_one_process(two, one):
    """Augmentation goes on from epoch to epoch in both processes: accelerate does not tell the data set the epoch."""
    together, alone = global_batches(two.good("plain")), global_batches(one.good("plain"))
    assert together == alone
    epochs = {}
    for (_, epoch, _), digests in alone.items():
        epochs.setdefault(epoch, set()).update(digests)
    assert [len(digests) for digests in epochs.values()] == [24] * 5
    assert len(set.union(*epochs.values())) == 5 * 24, "every epoch shows other views"


@pytest.mark.parametrize("scenario", ["stream", "stream_read_by_each"])
def test_each_image_of_a_stream_is_read_by_one_process(two, one, scenario):
    """The first process reads for both, or both read and take their share."""
    together, alone = global_batches(two.good(scenario)), global_batches(one.good("stream"))
    assert together == alone
    assert [(stage, step) for stage, _, step in together] == [(step >= 5, step) for step in range(8)]
    assert [len(digests) for digests in together.values()] == [12] * 8
    assert len(set().union(*together.values())) == 8 * 12, "each image comes once in a pass, and looks new in the next"
    first, second = two.good(scenario)
    assert bit_equal(first["final"], second["final"])
    assert largest_difference(first["final"], one.good("stream")[0]["final"]) < WEIGHT_TOLERANCE


def test_averages_and_mixtures_are_those_of_one_process(two, one):
    """BatchNorm that trains sees other batches in one process, so that the last stage is only compared between two."""
    first, second = two.good("averaged")
    (alone,) = one.good("averaged")
    for stage in range(3):
        assert bit_equal(first["weights"][stage], second["weights"][stage])
    for stage in range(2):
        assert largest_difference(first["weights"][stage], alone["weights"][stage]) < WEIGHT_TOLERANCE
    assert decisions(first) == decisions(second)
    assert_close(decisions(first)[:2], decisions(alone)[:2], LOG_TOLERANCE)
    assert [record["average"]["updates"] for record in alone["records"]] == [4, 2, 2]
    assert [record["wise_ft"] is None for record in alone["records"]] == [True, False, False]


def test_draws_by_class_and_weighted_losses_are_those_of_one_process(two, one):
    first, second = two.good("weighted_draws")
    (alone,) = one.good("weighted_draws")
    batches = global_batches([alone])
    assert global_batches([first, second]) == batches
    assert sum(map(len, batches.values())) == 3 * 24, "as many draws as images"
    for stage in range(2):
        assert bit_equal(first["weights"][stage], second["weights"][stage])
        assert largest_difference(first["weights"][stage], alone["weights"][stage]) < WEIGHT_TOLERANCE
    assert without_timings(first["log"]) == without_timings(second["log"])
    assert_close(without_timings(first["log"]), without_timings(alone["log"]), LOG_TOLERANCE)


def test_a_linear_probe_and_what_goes_by_it_are_those_of_one_process(two, one):
    first, second = two.good("probe")
    (alone,) = one.good("probe")
    assert [record["steps"] for record in alone["records"]] == [1, 4]
    assert alone["records"][0]["probe"]["held_out_images"] == 24
    assert "the linear probe has macro F1" in alone["records"][1]["chosen"]
    assert decisions(first) == decisions(second)
    assert_close(decisions(first), decisions(alone), LOG_TOLERANCE)
    # The fit ends where its gradient is as good as 0, from features that differ in their last digits.
    for stage in range(2):
        assert bit_equal(first["weights"][stage], second["weights"][stage])
        assert largest_difference(first["weights"][stage], alone["weights"][stage]) < 10 * WEIGHT_TOLERANCE


def test_far_images_are_far_in_all_processes(two, one):
    """The shift is measured in one process and the head drawn in each; BatchNorm has the first one's statistics."""
    first, second = two.good("far")
    (alone,) = one.good("far")
    assert first["records"][1]["batch_norm"] == "train"
    assert "BatchNorm trains, and the head anew" in first["records"][1]["chosen"]
    assert first["records"][1]["chosen"] == alone["records"][1]["chosen"]
    assert decisions(first) == decisions(second)
    assert bit_equal(first["final"], second["final"])
    head = "backbone.fc.weight"
    assert largest_difference({head: first["weights"][0][head]}, {head: first["final"][head]}) > 0.01


def test_both_ways_are_tried_in_all_processes(two):
    first, second = two.good("both_ways")
    assert [record["name"] for record in first["records"]] == ["head", "all", "all anew"]
    assert [record["batch_norm"] for record in first["records"][1:]] == ["eval", "train"]
    assert decisions(first) == decisions(second)
    assert bit_equal(first["final"], second["final"])


def test_low_rank_adapters_are_those_of_one_process(two, one):
    first, second = two.good("adapters")
    (alone,) = one.good("adapters")
    for stage in range(2):
        assert bit_equal(first["weights"][stage], second["weights"][stage])
        assert largest_difference(first["weights"][stage], alone["weights"][stage]) < WEIGHT_TOLERANCE
    moved = {name for name, tensor in first["final"].items() if not torch.equal(tensor, first["weights"][0][name])}
    assert "backbone.encoder.layers.encoder_layer_0.self_attention.in_proj_weight" in moved
    assert len(moved) == 3 * 4 + 2, "four maps of each block, and the head"
    assert decisions(first) == decisions(second)
    assert_close(decisions(first), decisions(alone), LOG_TOLERANCE)


def test_weights_that_are_pulled_to_their_start_are_those_of_one_process(two, one):
    first, second = two.good("pulled")
    (alone,) = one.good("pulled")
    for stage in range(2):
        assert bit_equal(first["weights"][stage], second["weights"][stage])
        assert largest_difference(first["weights"][stage], alone["weights"][stage]) < WEIGHT_TOLERANCE
    assert_close(decisions(first), decisions(alone), LOG_TOLERANCE)


def test_processes_may_draw_heads_of_their_own(two):
    """The first one's counts, as under DDP, also where a stage is rolled back to it."""
    first, second = two.good("own_heads")
    assert [record["accepted"] for record in first["records"]] == [False]
    assert bit_equal(first["final"], second["final"])


def test_every_stage_is_wrapped_anew_and_looks_for_no_unused_parameters(two, one):
    fresh = [{"kind": "DistributedDataParallel", "same as": stage, "finds unused": False} for stage in range(3)]
    assert [report["wraps"] for report in two.good("plain")] == [fresh, fresh]
    assert {wrap["kind"] for wrap in one.good("plain")[0]["wraps"]} == {"TorchvisionForImageClassification"}


@pytest.mark.parametrize("scenario", ["stock_callback", "stock_second_train"])
def test_trap_d_trainer_lets_processes_drift_apart_after_unfreezing(two, scenario):
    """DDP reduces the gradients of what could be trained when it was wrapped around the model, and of nothing else.

    `find_unused_parameters=True` does not help. ThawTrainer, in the tests above, keeps both processes bit-equal.
    """
    first, second = two.of(scenario)
    assert largest_difference(first["final"], second["final"]) > 0.1


def test_only_the_first_process_writes(two):
    def files(rank):
        folder = two.folder / f"plain-{rank}"
        return {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}

    # Trainer keeps the random state of each process.
    assert {Path(name).name for name in files(1)} == {"rng_state_1.pth"}
    assert {"journal.json", "checkpoint-10/model.safetensors", "checkpoint-10/complete.json"} <= files(0)
    assert sum("tfevents" in name for name in files(0)) == 1


def test_batch_norm_statistics_are_the_same_in_both_processes(two):
    first, second = two.good("batch_norm")
    start = first["weights"][0]
    moved = {name for name in start if not torch.equal(start[name], first["weights"][1][name])}
    assert sum("running_mean" in name for name in moved) == 56
    for stage in range(2):
        assert bit_equal(first["weights"][stage], second["weights"][stage])


def test_synchronized_batch_norm_needs_a_gpu(two):
    """torch has no SyncBatchNorm for the CPU; that it says so in every process is all that can be seen here."""
    failures = two.failures("synchronized_batch_norm")
    assert failures == [("ValueError", "SyncBatchNorm layers only work with GPU modules")] * 2


# What differs between the processes is found, by all of them


@pytest.mark.parametrize(
    ("scenario", "name"), [("change_weight", "fc.bias"), ("change_frozen_weight", "conv5.0.weight")]
)
def test_a_weight_that_differs_is_found_at_the_end_of_the_stage(two, scenario, name):
    (kind, message), other = two.failures(scenario)
    assert (kind, message) == other
    assert kind == "TrainingError"
    assert "at the end of stage 'head', 1 of 338 tensors are not the same in all 2 processes: " in message
    assert f"backbone.{name} (rank 1)" in message


def test_what_trains_must_be_the_same_before_the_first_step(two):
    (kind, message), other = two.failures("freeze")
    assert (kind, message) == other
    assert kind == "TrainingError"
    assert "what trains in stage 'wreck' is not the same in all 2 processes: backbone.fc.bias." in message


def test_processes_with_other_plans_are_told(two):
    (kind, message), other = two.failures("other_plan")
    assert (kind, message) == other
    assert kind == "PlanError"
    assert "process 1 was given another run than process 0" in message
    assert "steps was [4, 4, 2] and is [4, 4]" in message


def test_an_error_of_the_first_process_is_raised_in_both(two):
    (kind, message), other = two.failures("missing_checkpoint")
    assert (kind, message) == other
    assert kind == "PlanError"
    assert "there is no whole checkpoint" in message


@pytest.mark.parametrize("scenario", ["broken_image", "broken_image_settled_later"])
def test_a_broken_image_in_one_process_ends_the_stage_in_both(two, scenario):
    first, second = two.good(scenario)
    assert decisions(first) == decisions(second)
    assert [record["accepted"] for record in first["records"]] == [True, False, True]
    assert [record["steps"] for record in first["records"]] == [4, 1, 2]
    why = first["records"][1]["ended_early"]
    assert "the loss became nan in stage 'wreck' at step 6;" in why
    assert "images with values that are not finite (rows [2]): mend these images (process 1)" in why
    for stage in range(3):
        assert bit_equal(first["weights"][stage], second["weights"][stage])
    assert bit_equal(first["weights"][0], first["weights"][1])
    assert all(tensor.isfinite().all() for tensor in first["final"].values())


def test_a_process_that_breaks_ends_the_run(again):
    """torchrun ends the other one, which would wait for it."""
    assert again.code not in (0, None)
    assert "something broke in the first process" in again.stderr
    assert not (again.folder / "break_first-0.pt").exists()


# Killed and gone on with


def test_a_killed_run_is_gone_on_with_exactly(two, again):
    assert two.code != 0
    assert not list(two.folder.glob("kill-*.pt")), "both processes were killed"
    whole, _ = two.good("plain")
    first, second = again.good("resumed")
    assert first["seen"][0][:3] == (1, 3, 6), "from the checkpoint, not from the start"
    assert bit_equal(first["final"], second["final"])
    assert bit_equal(first["final"], whole["final"])
    assert decisions(first) == decisions(whole)
    assert without_timings(first["log"]) == without_timings(whole["log"])


def test_one_process_goes_on_with_the_run_of_two_if_the_global_batches_are_the_same(two, one):
    (report,) = one.good("resumed")
    whole, _ = two.good("plain")
    assert report["seen"][0][:3] == (1, 3, 6)
    assert largest_difference(report["final"], whole["final"]) < WEIGHT_TOLERANCE
    assert_close(decisions(report), decisions(whole), LOG_TOLERANCE)
    assert_close(without_timings(report["log"]), without_timings(whole["log"]), LOG_TOLERANCE)


def test_one_process_with_other_global_batches_is_refused(one):
    ((kind, message),) = one.failures("resumed_with_other_batches")
    assert kind == "PlanError"
    assert "belongs to another run" in message
    assert "images_per_step[0] was 12 and is 6" in message
    assert "steps[0] was 4 and is 8" in message


# What stages cannot run under


@pytest.mark.parametrize(
    "options",
    [
        {"fsdp": "full_shard"},
        {"fsdp": ["full_shard", "auto_wrap"]},
        {"fsdp": True},
        {"deepspeed": "zero2.json"},
        {"deepspeed": {"zero_optimization": {"stage": 2}}},
    ],
)
def test_fsdp_and_deepspeed_are_refused(tmp_path, options):
    (name,) = options
    with pytest.raises(PlanError, match=rf"^{name} is .* which {name} does not allow in one run; .* use DDP"):
        ThawTrainingArguments(output_dir=str(tmp_path), **options)


@pytest.mark.parametrize("name", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_MEGATRON_LM"])
def test_what_accelerate_launch_asks_for_is_refused_too(tmp_path, monkeypatch, name):
    monkeypatch.setenv(name, "true")
    with pytest.raises(PlanError, match=f"the environment has {name}=true.* choose multi-GPU"):
        ThawTrainingArguments(output_dir=str(tmp_path))
    monkeypatch.setenv(name, "false")
    ThawTrainingArguments(output_dir=str(tmp_path))


# The command line


def test_the_command_line_gives_one_document_and_one_folder(make_image_folder, tmp_path):
    data, out = make_image_folder(per_class=12), tmp_path / "out"
    code, stdout, stderr = start(
        2, "-m", "torchthaw", "train", "two_phase", "--data", data, "--output", out, "--json",
        "--backbone", "shufflenet_v2_x0_5", "--weights", "builtin", "--set", "image_size=32", "--set", "epochs=2",
        "--set", "batch_size=4", "--set", "num_workers=0", "--set", "data.test=0.25",
    )  # fmt: skip
    assert code == 0, stderr
    results = json.loads(stdout)
    assert results == json.loads((out / "results.json").read_text())
    assert [stage["name"] for stage in results["stages"]] == ["head", "all"]
    assert results["test"]["num_images"] == results["num_images"]["test"] == 9
    # Each step takes the batches of both processes: 22 images are 3 steps of 8, not 6 of 4.
    assert [stage["steps"] for stage in results["stages"]] == [3, 3]
    assert [path.name for path in tmp_path.iterdir() if path != data] == ["out"]
    assert {path.name for path in out.iterdir()} >= {"config.json", "model.safetensors", "recipe.yaml", "stages"}
    assert json.loads((out / "stages" / "journal.json").read_text())["finished"] is True


def test_processes_that_are_done_end_well(tmp_path):
    """Left to the end of Python, gloo's threads abort one of two processes every other time."""
    script = tmp_path / "done.py"
    script.write_text(
        "from torchthaw.training import processes\n"
        "processes.join()\n"
        "assert processes.gather(processes.place()[0]) == [0, 1]\n"
    )
    for _ in range(4):
        code, _, stderr = start(2, script)
        assert code == 0, stderr


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are looked up in /proc")
def test_no_thread_of_gloo_is_left_by_a_trainer_that_is_done(tmp_path):
    """What wraps a model holds the group, and trainers refer to themselves, so that nothing ends with its last name."""
    script = tmp_path / "done.py"
    script.write_text(
        "import atexit\n"
        "from pathlib import Path\n"
        "def threads():\n"
        "    names = (Path(task, 'comm').read_text() for task in Path('/proc/self/task').iterdir())\n"
        "    return sum('gloo' in name for name in names)\n"
        "atexit.register(lambda: print(f'left {threads()}\\n', end='', flush=True))\n"
        "import torch\n"
        "from torchthaw.training import processes\n"
        "processes.join()\n"
        "model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))\n"
        "model.itself = [model]\n"
        "del model\n"
        "assert threads() > 0\n"
    )
    code, stdout, stderr = start(2, script)
    assert code == 0, stderr
    assert stdout.split() == ["left", "0"] * 2
