"""What processes tell each other: alone, and as two real gloo processes that run this file as a program."""

import contextlib
import json
import os
import subprocess
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from torchthaw.errors import DataError, PlanError
from torchthaw.training import processes

RANKS = 2
TIMEOUT = 120.0


class OddError(DataError):
    """An error of torchthaw with a class of its own, that takes other arguments."""

    def __init__(self, file, line):
        super().__init__(f"{file} is odd in line {line}")


class Buffers(nn.Module):
    def __init__(self, rank):
        super().__init__()
        torch.manual_seed(rank)
        self.norm = nn.BatchNorm2d(3)
        self.norm(torch.randn(5, 3, 2, 2))
        self.register_buffer("brief", torch.randn(3).to(torch.bfloat16))
        self.register_buffer("flags", torch.tensor([rank == 0, True, False]))
        self.register_buffer("steps", torch.tensor(7 + rank, dtype=torch.int16), persistent=False)
        self.register_buffer("across", torch.randn(4, 3).t())
        self.register_buffer("wave", torch.randn(2, dtype=torch.complex64))
        self.register_buffer("empty", torch.zeros(0))
        self.register_buffer("same", self.brief)
        self.linear = nn.Linear(2, 2)


def buffers_as_lists(module):
    return {
        name: torch.view_as_real(b).tolist() if b.is_complex() else b.tolist() for name, b in module.named_buffers()
    }


# What each of the two processes does; what it returns is reported, an error by kind and message.


def check_state(rank):
    return processes.is_distributed(), processes.is_main()


def check_wait(rank):
    file = Path(sys.argv[2], "first process was here")
    if rank == 0:
        time.sleep(0.5)
        file.touch()
    processes.wait()
    return file.exists()


def check_share(rank):
    shared = processes.share({"rank": rank, "path": Path("runs") / str(rank), "tensor": torch.full((2,), rank)})
    return [shared["rank"], str(shared["path"]), shared["tensor"].tolist(), processes.share(None)]


def check_share_what_cannot_be_pickled(rank):
    return processes.share((lambda: rank) if rank == 0 else "fine")


def check_gather(rank):
    return processes.gather({"rank": rank, "words": ["x"] * (rank + 1)})


def check_any_process(rank):
    return [processes.any_process(flag) for flag in (False, rank == 0, rank == 1, True)]


def check_share_buffers(rank):
    module = Buffers(rank)
    before, weights = buffers_as_lists(module), module.linear.weight.tolist()
    places = {name: buffer.data_ptr() for name, buffer in module.named_buffers()}
    processes.share_buffers(module)
    return {
        "before": before,
        "after": buffers_as_lists(module),
        "in place": places == {name: buffer.data_ptr() for name, buffer in module.named_buffers()},
        "weights unchanged": weights == module.linear.weight.tolist(),
        "types": [str(buffer.dtype) for buffer in module.buffers()],
    }


def check_share_no_buffers(rank):
    processes.share_buffers(nn.Linear(2, 2))
    return "fine"


def tensors(rank, different):
    made = {f"layer{number}.weight": torch.arange(6.0) for number in range(8)}
    for number in range(different):
        made[f"layer{number}.weight"][3] += rank * 1e-6
    return made


def check_equal(rank):
    processes.check_equal_on_all({**tensors(rank, 0), "nan": torch.tensor(float("nan"))}, "here")
    return "fine"


def check_one_different(rank):
    processes.check_equal_on_all(tensors(rank, 1), "at the end of stage 'head'")


def check_many_different(rank):
    processes.check_equal_on_all(tensors(rank, 7), "here")


def check_one_missing(rank):
    processes.check_equal_on_all({"first": torch.ones(1), **({"second": torch.ones(1)} if rank else {})}, "here")


def check_on_main(rank):
    ran = []
    result = processes.on_main(lambda: ran.append(rank) or {"made by": rank})
    return [result, ran]


def check_on_main_gives_nothing(rank):
    return processes.on_main(lambda: None)


def raising(error):
    def function():
        raise error

    return lambda rank: processes.on_main(function)


def check_going_on_after_an_error(rank):
    with contextlib.suppress(KeyError, RuntimeError):
        processes.on_main(lambda: {}["missing"])
    return processes.gather(rank)


CHECKS = {
    "state": check_state,
    "wait": check_wait,
    "share": check_share,
    "share what cannot be pickled": check_share_what_cannot_be_pickled,
    "gather": check_gather,
    "any_process": check_any_process,
    "share_buffers": check_share_buffers,
    "share no buffers": check_share_no_buffers,
    "equal": check_equal,
    "one different": check_one_different,
    "many different": check_many_different,
    "one missing": check_one_missing,
    "on_main": check_on_main,
    "on_main gives nothing": check_on_main_gives_nothing,
    "PlanError": raising(PlanError("no group 'haed'")),
    "OddError": raising(OddError("a.png", 3)),
    "KeyError": raising(KeyError("missing")),
    "OSError": raising(OSError(28, "No space left on device")),
    "error named as one of torchthaw": raising(type("DataError", (Exception,), {})("of another library")),
    "after an error": check_going_on_after_an_error,
}


def main(rank, folder):
    dist.init_process_group(
        "gloo",
        init_method=(folder / "meeting").as_uri(),
        rank=rank,
        world_size=RANKS,
        timeout=timedelta(seconds=TIMEOUT),
    )
    report = {}
    for name, check in CHECKS.items():
        try:
            report[name] = {"result": check(rank)}
        except Exception as error:  # noqa: BLE001
            report[name] = {"error": type(error).__name__, "message": str(error), "trace": traceback.format_exc()}
    (folder / f"{rank}.json").write_text(json.dumps(report))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """What each check came to in both processes, by rank."""
    if sys.platform != "linux" or not dist.is_available():
        pytest.skip("gloo is tested on Linux")
    folder = tmp_path_factory.mktemp("processes")
    package = str(Path(processes.__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": package, "OMP_NUM_THREADS": "1"}
    children = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(folder)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(RANKS)
    ]
    try:
        outputs = [child.communicate(timeout=3 * TIMEOUT)[0] for child in children]
    finally:
        for child in children:
            child.kill()
    for child, output in zip(children, outputs, strict=True):
        assert child.returncode == 0, output
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(RANKS)]


def results(reports, name):
    for report in reports:
        assert "result" in report[name], report[name].get("trace")
    return [report[name]["result"] for report in reports]


def failures(reports, name):
    return [(report[name].get("error"), report[name].get("message")) for report in reports]


def test_each_process_knows_its_place(reports):
    assert results(reports, "state") == [[True, True], [True, False]]


def test_wait_waits_for_all(reports):
    assert results(reports, "wait") == [True, True]


def test_share_gives_the_first_processs_value(reports):
    assert results(reports, "share") == [[0, "runs/0", [0, 0], None]] * 2


def test_a_value_that_cannot_be_pickled_fails_everywhere(reports):
    (_, message), (kind, other) = failures(reports, "share what cannot be pickled")
    assert "pickle" in message
    assert kind == "RuntimeError"
    assert message in other


def test_gather_gives_all_values_by_rank(reports):
    assert results(reports, "gather") == [[{"rank": 0, "words": ["x"]}, {"rank": 1, "words": ["x", "x"]}]] * 2


def test_any_process_is_true_everywhere_if_it_is_anywhere(reports):
    assert results(reports, "any_process") == [[False, True, True, True]] * 2


def test_share_buffers_gives_the_first_processs_buffers_in_place(reports):
    first, second = results(reports, "share_buffers")
    different = {name for name in first["before"] if first["before"][name] != second["before"][name]}
    assert different == {
        "norm.running_mean", "norm.running_var", "brief", "flags", "steps", "across", "wave"
    }  # fmt: skip
    assert first["after"] == second["after"] == first["before"]
    for report in (first, second):
        assert report["in place"]
        assert report["weights unchanged"]
    assert first["types"] == second["types"]
    assert results(reports, "share no buffers") == ["fine", "fine"]


def test_equal_tensors_pass(reports):
    assert results(reports, "equal") == ["fine", "fine"]


def test_tensors_that_differ_are_named_with_their_ranks_in_every_process(reports):
    (kind, message), other = failures(reports, "one different")
    assert (kind, message) == other
    assert kind == "TrainingError"
    assert message.startswith(
        "at the end of stage 'head', 1 of 8 tensors are not the same in all 2 processes: layer0.weight (rank 1). "
    )
    _, many = failures(reports, "many different")[0]
    assert "7 of 8 tensors" in many
    assert "layer4.weight (rank 1) ..." in many
    assert "layer5" not in many
    _, missing = failures(reports, "one missing")[0]
    assert "1 of 2 tensors" in missing
    assert "second (rank 1)" in missing


def test_on_main_runs_once_and_shares_the_result(reports):
    assert results(reports, "on_main") == [[{"made by": 0}, [0]], [{"made by": 0}, []]]
    assert results(reports, "on_main gives nothing") == [None, None]


def test_errors_of_torchthaw_are_raised_in_every_process(reports):
    assert failures(reports, "PlanError") == [("PlanError", "no group 'haed'")] * 2
    assert failures(reports, "OddError") == [(kind, "a.png is odd in line 3") for kind in ("OddError", "DataError")]


def test_other_errors_are_raised_in_every_process(reports):
    assert failures(reports, "KeyError") == [
        ("KeyError", "'missing'"),
        ("RuntimeError", "the first process failed with KeyError: 'missing'"),
    ]
    assert failures(reports, "OSError") == [
        ("OSError", "[Errno 28] No space left on device"),
        ("RuntimeError", "the first process failed with OSError: [Errno 28] No space left on device"),
    ]
    assert failures(reports, "error named as one of torchthaw")[1] == (
        "RuntimeError",
        "the first process failed with DataError: of another library",
    )
    assert results(reports, "after an error") == [[0, 1], [0, 1]]


# One process


def test_one_process_needs_no_process_group():
    assert not dist.is_initialized()
    value, module = object(), Buffers(0)
    before = buffers_as_lists(module)
    assert processes.is_main()
    assert not processes.is_distributed()
    processes.wait()
    assert processes.share(value) is value
    assert processes.gather(value) == [value]
    assert [processes.any_process(flag) for flag in (False, True)] == [False, True]
    processes.share_buffers(module)
    assert buffers_as_lists(module) == before
    processes.check_equal_on_all({"weight": torch.ones(2)}, "here")
    assert processes.on_main(lambda: value) is value
    with pytest.raises(KeyError):
        processes.on_main(lambda: {}["missing"])
    with pytest.raises(OddError, match=r"a.png is odd in line 3"):
        processes.on_main(lambda: (_ for _ in ()).throw(OddError("a.png", 3)))


def test_a_process_group_of_one_is_one_process(tmp_path):
    dist.init_process_group("gloo", init_method=(tmp_path / "meeting").as_uri(), rank=0, world_size=1)
    try:
        value = object()
        assert not processes.is_distributed()
        assert processes.is_main()
        assert processes.share(value) is value
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
