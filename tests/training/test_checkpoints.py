"""Checkpoints are whole or passed over: real folders, real damage, real kills."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest

from torchthaw.errors import PlanError, TrainingError
from torchthaw.training import checkpoints
from torchthaw.training.checkpoints import (
    MANIFEST,
    checkpoints_in,
    last_complete,
    prune,
    remove_incomplete,
    seal,
    step_of,
    why_incomplete,
)

FILES = ("model.safetensors", "optimizer.pt", "nested/rng_state.pth", "empty.txt")


def content(step, name):
    return b"" if name == "empty.txt" else f"{name} at step {step};".encode() * 20


def write(output_dir, step, *, run_id="run", files=FILES, pause=0.0, sealed=True):
    folder = output_dir / f"checkpoint-{step}"
    for name in files:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        data = content(step, name)
        with file.open("wb") as stream:
            for start in range(0, len(data), 100):
                stream.write(data[start : start + 100])
                stream.flush()
                time.sleep(pause)
    if sealed:
        seal(folder, run_id=run_id)
    return folder


def steps(folders):
    return [step_of(folder) for folder in folders]


# Whole or not


def test_a_sealed_checkpoint_is_whole(tmp_path):
    folder = write(tmp_path, 3)
    assert why_incomplete(folder) is None
    assert why_incomplete(folder, run_id="run") is None
    manifest = json.loads((folder / MANIFEST).read_text())
    assert manifest["run_id"] == "run"
    assert set(manifest["files"]) == set(FILES)
    assert manifest["files"]["model.safetensors"]["size"] == len(content(3, "model.safetensors"))
    assert sorted(path.name for path in folder.iterdir() if path.is_file()) == sorted(
        [MANIFEST, "empty.txt", "model.safetensors", "optimizer.pt"]
    )


def test_a_whole_checkpoint_can_be_moved_and_gets_other_files(tmp_path):
    folder = write(tmp_path, 3)
    (folder / "notes.txt").write_text("not listed")
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(folder, elsewhere)
    assert why_incomplete(folder) is None
    assert why_incomplete(elsewhere) is None


def test_without_a_manifest_it_is_not_whole(tmp_path):
    folder = write(tmp_path, 3, sealed=False)
    assert why_incomplete(folder) == f"it has no {MANIFEST}, so it was not written to its end"
    assert MANIFEST in why_incomplete(tmp_path / "checkpoint-99")


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(tmp_path, name):
    folder = write(tmp_path, 3)
    (folder / name).unlink()
    assert why_incomplete(folder) == f"{name} is missing"
    (folder / name).mkdir()
    assert why_incomplete(folder) == f"{name} is missing"


@pytest.mark.parametrize("name", FILES)
def test_another_size_is_named(tmp_path, name):
    folder = write(tmp_path, 3)
    size = len(content(3, name))
    with (folder / name).open("ab") as stream:
        stream.write(b"x")
    assert why_incomplete(folder) == f"{name} has {size + 1} bytes instead of {size}"
    if size:
        os.truncate(folder / name, size - 1)
        assert why_incomplete(folder) == f"{name} has {size - 1} bytes instead of {size}"


@pytest.mark.parametrize("name", ["model.safetensors", "nested/rng_state.pth"])
def test_any_flipped_byte_is_seen(tmp_path, name):
    folder = write(tmp_path, 3)
    data = content(3, name)
    for position in range(0, len(data), 7):
        broken = bytearray(data)
        broken[position] ^= 1
        (folder / name).write_bytes(broken)
        assert why_incomplete(folder) == f"{name} has other bytes than were written"
    (folder / name).write_bytes(data)
    assert why_incomplete(folder) is None


def test_a_file_larger_than_what_is_read_at_once_is_seen_to_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "_CHUNK", 64)
    folder = write(tmp_path, 3)
    data = bytearray(content(3, "optimizer.pt"))
    assert len(data) > 3 * 64
    data[-1] ^= 1
    (folder / "optimizer.pt").write_bytes(data)
    assert why_incomplete(folder) == "optimizer.pt has other bytes than were written"


def test_a_manifest_that_was_cut_off_anywhere_is_no_manifest(tmp_path):
    folder = write(tmp_path, 3)
    whole = (folder / MANIFEST).read_bytes()
    for length in range(len(whole)):
        (folder / MANIFEST).write_bytes(whole[:length])
        assert why_incomplete(folder, run_id="run") == f"its {MANIFEST} cannot be read"


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "null",
        "{}",
        '{"run_id": "run"}',
        '{"run_id": 3, "files": {}}',
        '{"run_id": "run", "files": ["model.safetensors"]}',
        '{"run_id": "run", "files": {"model.safetensors": null}}',
        '{"run_id": "run", "files": {"model.safetensors": {"size": 1}}}',
        '{"run_id": "run", "files": {"model.safetensors": {"size": "1", "blake2b": ""}}}',
        "[" * 100_000,
        "\udcff\udcfe",
    ],
    ids=range(11),
)
def test_a_manifest_of_anything_else_cannot_be_read(tmp_path, text):
    folder = write(tmp_path, 3)
    (folder / MANIFEST).write_bytes(text.encode(errors="surrogateescape"))
    assert why_incomplete(folder) == f"its {MANIFEST} cannot be read"


def test_a_manifest_is_no_way_out_of_the_folder(tmp_path):
    folder = write(tmp_path, 3)
    outside = tmp_path / "outside.txt"
    outside.write_bytes(content(3, "optimizer.pt"))
    manifest = json.loads((folder / MANIFEST).read_text())
    for name in ("../outside.txt", str(outside)):
        manifest["files"] = {name: manifest["files"].popitem()[1]}
        (folder / MANIFEST).write_text(json.dumps(manifest))
        assert why_incomplete(folder) == f"{name} is missing"


def test_a_checkpoint_of_another_run_is_told_apart(tmp_path):
    folder = write(tmp_path, 3, run_id="other")
    assert why_incomplete(folder) is None
    assert why_incomplete(folder, run_id="run") == "it belongs to another run"


def test_nothing_to_vouch_for_is_an_error(tmp_path):
    for folder in (tmp_path / "checkpoint-1", tmp_path / "checkpoint-2"):
        with pytest.raises(TrainingError, match=f"{folder.name} has no files"):
            seal(folder, run_id="run")
        assert not (folder / MANIFEST).exists()
        (tmp_path / "checkpoint-2").mkdir(exist_ok=True)


def test_a_checkpoint_can_be_sealed_again(tmp_path):
    folder = write(tmp_path, 3)
    (folder / "optimizer.pt").write_bytes(b"other")
    # What is left of a manifest whose process was killed.
    (folder / f".{MANIFEST}.tmp").write_text("{")
    assert why_incomplete(folder) is not None
    seal(folder, run_id="second")
    assert why_incomplete(folder, run_id="second") is None


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="looks at Linux's list of open files")
def test_all_bytes_are_on_the_disk_before_the_manifest_counts(tmp_path, monkeypatch):
    folder = write(tmp_path, 3, sealed=False)
    flushed, real = [], os.fsync

    def spy(descriptor):
        flushed.append((Path(f"/proc/self/fd/{descriptor}").readlink(), (folder / MANIFEST).exists()))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", spy)
    seal(folder, run_id="run")
    before = [path for path, sealed in flushed if not sealed]
    needed = {*(folder / name for name in FILES), folder / "nested", folder, tmp_path}
    assert needed <= set(before)
    assert before[-1].name.startswith(f".{MANIFEST}.")
    assert [path for path, sealed in flushed if sealed] == [folder]


# Which ones there are


def test_checkpoints_are_sorted_by_step_and_nothing_else_is_one(tmp_path):
    for step in (100, 20, 3):
        write(tmp_path, step)
    for name in (
        "checkpoint-",
        "checkpoint-x",
        "checkpoint-1.5",
        "checkpoint-007",
        "old-checkpoint-5",
        "checkpoint-5~",
    ):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-٣").mkdir()
    (tmp_path / "checkpoint-6").write_text("a file")
    assert steps(checkpoints_in(tmp_path)) == [3, 20, 100]
    assert checkpoints_in(tmp_path / "missing") == []
    assert checkpoints_in(tmp_path / "checkpoint-6") == []


def test_step_of_other_names_is_an_error():
    assert step_of(Path("runs/checkpoint-12")) == 12
    with pytest.raises(PlanError, match="best is not named as a checkpoint is.*checkpoint-500"):
        step_of(Path("runs/best"))


def test_the_last_whole_checkpoint_is_found_and_the_others_are_explained(tmp_path):
    for step in (2, 10, 30):
        write(tmp_path, step)
    write(tmp_path, 40, sealed=False)
    write(tmp_path, 100, run_id="other")
    (tmp_path / "checkpoint-30" / "optimizer.pt").unlink()
    found, passed_over = last_complete(tmp_path, run_id="run")
    assert found == tmp_path / "checkpoint-10"
    assert [(folder.name, problem) for folder, problem in passed_over] == [
        ("checkpoint-100", "it belongs to another run"),
        ("checkpoint-40", f"it has no {MANIFEST}, so it was not written to its end"),
        ("checkpoint-30", "optimizer.pt is missing"),
    ]
    assert last_complete(tmp_path) == (tmp_path / "checkpoint-100", [])


def test_without_a_whole_checkpoint_there_is_none(tmp_path):
    assert last_complete(tmp_path) == (None, [])
    assert last_complete(tmp_path / "missing") == (None, [])
    write(tmp_path, 4, sealed=False)
    found, passed_over = last_complete(tmp_path)
    assert found is None
    assert steps(folder for folder, _ in passed_over) == [4]


# Removing


def test_only_half_written_checkpoints_are_removed(tmp_path):
    write(tmp_path, 1)
    write(tmp_path, 2, run_id="other")
    damaged = write(tmp_path, 3)
    (damaged / "optimizer.pt").unlink()
    unreadable = write(tmp_path, 4)
    (unreadable / MANIFEST).write_text("{")
    write(tmp_path, 5, sealed=False)
    (tmp_path / "checkpoint-6").mkdir()
    write(tmp_path, 7, files=("notes.txt",), sealed=False).rename(tmp_path / "best")
    assert steps(remove_incomplete(tmp_path, run_id="run")) == [5, 6]
    assert {path.name for path in tmp_path.iterdir()} == {"best", *(f"checkpoint-{step}" for step in (1, 2, 3, 4))}
    assert remove_incomplete(tmp_path, run_id="run") == []


def test_the_first_checkpoint_of_a_run_may_be_half_written(tmp_path):
    write(tmp_path, 5, sealed=False)
    assert steps(remove_incomplete(tmp_path, run_id="run")) == [5]
    assert remove_incomplete(tmp_path / "missing", run_id="run") == []


def test_what_another_run_may_be_writing_stays(tmp_path):
    write(tmp_path, 4, run_id="other")
    write(tmp_path, 5, sealed=False)
    assert remove_incomplete(tmp_path, run_id="run") == []
    assert (tmp_path / "checkpoint-5").is_dir()


def test_the_oldest_checkpoints_go_first(tmp_path):
    for step in (9, 10, 100, 2, 30):
        write(tmp_path, step)
    assert prune(tmp_path, limit=5, keep=[]) == []
    assert steps(prune(tmp_path, limit=3, keep=[])) == [2, 9]
    assert steps(checkpoints_in(tmp_path)) == [10, 30, 100]
    assert steps(prune(tmp_path, limit=1, keep=[])) == [10, 30]
    assert why_incomplete(tmp_path / "checkpoint-100") is None


@pytest.mark.parametrize("limit", [None, 0, -1])
def test_without_a_limit_all_stay(tmp_path, limit):
    for step in (1, 2, 3):
        write(tmp_path, step)
    assert prune(tmp_path, limit=limit, keep=[]) == []
    assert steps(checkpoints_in(tmp_path)) == [1, 2, 3]


def test_what_is_to_be_kept_stays(tmp_path, monkeypatch):
    for step in (1, 2, 3, 4):
        write(tmp_path, step)
    monkeypatch.chdir(tmp_path)
    assert steps(prune(tmp_path, limit=2, keep=[Path("checkpoint-1")])) == [2, 3]
    assert prune(tmp_path, limit=1, keep=[tmp_path / "." / "checkpoint-1"]) == []
    assert steps(checkpoints_in(tmp_path)) == [1, 4]


def test_the_last_whole_checkpoint_stays_though_a_half_written_one_is_newer(tmp_path):
    for step in (1, 2, 3):
        write(tmp_path, step)
    write(tmp_path, 9, sealed=False)
    assert steps(prune(tmp_path, limit=1, keep=[])) == [1, 2]
    assert last_complete(tmp_path)[0] == tmp_path / "checkpoint-3"


def test_chosen_checkpoints_can_be_pruned(tmp_path):
    for step in (1, 2, 3, 4):
        write(tmp_path, step)
    write(tmp_path, 9, run_id="other")
    mine = [tmp_path / f"checkpoint-{step}" for step in (3, 2, 4)]
    assert steps(prune(mine, limit=1, keep=[tmp_path / "checkpoint-2"])) == [3]
    assert steps(checkpoints_in(tmp_path)) == [1, 2, 4, 9]


def test_a_removal_that_is_cut_off_leaves_nothing_that_looks_whole(tmp_path, monkeypatch):
    for step in (1, 2):
        write(tmp_path, step)

    def cut_off(folder):
        raise OSError("cut off")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", cut_off)
        with pytest.raises(OSError, match="cut off"):
            prune(tmp_path, limit=1, keep=[])
    assert all((tmp_path / "checkpoint-1" / name).is_file() for name in FILES)
    assert MANIFEST in why_incomplete(tmp_path / "checkpoint-1")
    assert steps(remove_incomplete(tmp_path, run_id="run")) == [1]


# Links


@pytest.fixture
def linked(tmp_path):
    """A run's folder with a whole checkpoint 3, and links named checkpoint-1 and checkpoint-7 to a folder outside."""
    outside = write(tmp_path / "elsewhere", 7, sealed=False)
    output_dir = tmp_path / "run"
    write(output_dir, 3)
    try:
        for step in (1, 7):
            (output_dir / f"checkpoint-{step}").symlink_to(outside, target_is_directory=True)
    except OSError:
        pytest.skip("links cannot be made here")
    return output_dir, outside


def test_links_named_as_checkpoints_are_never_followed(linked):
    output_dir, outside = linked
    assert steps(checkpoints_in(output_dir)) == [3]
    assert remove_incomplete(output_dir, run_id="run") == []
    seal(outside, run_id="run")
    assert last_complete(output_dir) == (output_dir / "checkpoint-3", [])
    write(output_dir, 8)
    assert steps(prune(output_dir, limit=1, keep=[])) == [3]
    assert prune(sorted(output_dir.iterdir()), limit=1, keep=[]) == []
    assert why_incomplete(outside) is None


def test_links_in_a_checkpoint_are_never_followed_when_it_is_removed(linked):
    output_dir, outside = linked
    (output_dir / "checkpoint-3" / "data").symlink_to(outside, target_is_directory=True)
    write(output_dir, 8)
    assert steps(prune(output_dir, limit=1, keep=[])) == [3]
    assert sorted(path.name for path in outside.iterdir()) == [
        "empty.txt",
        "model.safetensors",
        "nested",
        "optimizer.pt",
    ]


def test_a_link_that_leads_nowhere_does_not_matter(linked):
    output_dir, _ = linked
    folder = output_dir / "checkpoint-3"
    (folder / "nowhere").symlink_to(output_dir / "missing")
    seal(folder, run_id="run")
    assert why_incomplete(folder) is None
    assert "nowhere" not in json.loads((folder / MANIFEST).read_text())["files"]


def test_a_checkpoint_in_a_linked_output_folder_is_found(linked, tmp_path):
    output_dir, _ = linked
    (tmp_path / "link").symlink_to(output_dir, target_is_directory=True)
    write(output_dir, 5)
    assert last_complete(tmp_path / "link")[0] == tmp_path / "link" / "checkpoint-5"
    assert prune(tmp_path / "link", limit=1, keep=[output_dir / "checkpoint-3"]) == []


# Kills


def complete_in(output_dir):
    return [folder for folder in checkpoints_in(output_dir) if why_incomplete(folder) is None]


def save_without_end(output_dir, first):
    for step in range(first, first + 10_000):
        write(output_dir, step, pause=0.0005)
        prune(output_dir, limit=2, keep=[])


@pytest.mark.skipif(
    "fork" not in multiprocessing.get_all_start_methods(), reason="a new interpreter for each kill would take too long"
)
def test_kills_at_any_time_leave_a_whole_checkpoint_and_no_false_one(tmp_path):
    times, context = random.Random(0), multiprocessing.get_context("fork")
    first, half_written = 1, 0
    for kill in range(25):
        child = context.Process(target=save_without_end, args=(tmp_path, first))
        child.start()
        # Every second child completes a checkpoint, also where starting it takes longer than the pause.
        while child.is_alive() and kill % 2 == 0 and first not in map(step_of, complete_in(tmp_path)):
            time.sleep(0.001)
        time.sleep(times.uniform(0, 0.06))
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        found, _ = last_complete(tmp_path, run_id="run")
        assert found is not None
        for folder in checkpoints_in(tmp_path):
            if why_incomplete(folder) is None:
                assert all((folder / name).read_bytes() == content(step_of(folder), name) for name in FILES)
        half_written += len(remove_incomplete(tmp_path, run_id="run"))
        assert checkpoints_in(tmp_path)[-1] == found
        first = step_of(found) + 1
    assert half_written > 0
    assert first > 10
