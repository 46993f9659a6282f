import json
import multiprocessing
import os
import pickle
import resource
import signal
import subprocess
import sys
import textwrap
import threading
import time
from contextlib import suppress
from importlib.metadata import version

import numpy as np
import pytest
from safetensors.numpy import load_file

from torchthaw.data.caches.location import default_cache_folder
from torchthaw.data.caches.store import ArrayStore

MB = 1_000_000
TWO = {"features": ((5, 3), "float32"), "labels": ((5,), "int64"), "mask": ((5,), "bool")}


def never(arrays):
    raise AssertionError("made again")


def fill_with(number):
    def fill(arrays):
        for array in arrays.values():
            array[...] = number

    return fill


def megabytes(count):
    return {"pixels": ((int(count * MB) - 4096,), "uint8")}


def make(store, name, count, number=1, **options):
    return store.open_or_make({"name": name}, megabytes(count), fill_with(number), **options)


def on_disk(folder):
    sizes = []
    for path in folder.iterdir():
        with suppress(FileNotFoundError):
            sizes.append(path.stat().st_size)
    return sum(sizes)


def parts(folder):
    return list(folder.glob("*.part"))


def in_new_process(code, folder, **options):
    # The store alone, without torch: many processes are started here.
    start = """
        import importlib.util, sys, time, types
        package = types.ModuleType("torchthaw")
        package.__path__ = list(importlib.util.find_spec("torchthaw").submodule_search_locations)
        sys.modules["torchthaw"] = package
        from torchthaw.data.caches.store import ArrayStore
        folder = sys.argv[1]
    """
    code = textwrap.dedent(start) + textwrap.dedent(code)
    return subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, text=True, **options)


def test_arrays_come_back_in_another_process_without_being_made_again(tmp_path):
    def fill(arrays):
        assert not any(array.any() for array in arrays.values())
        arrays["features"][:] = np.arange(15).reshape(5, 3) / 7
        arrays["labels"][:] = [4, 3, 2, 1, 2**40]
        arrays["mask"][2] = True

    store = ArrayStore(tmp_path)
    made = store.open_or_make({"split": "train"}, TWO, fill)
    assert isinstance(made["features"], np.memmap)
    assert not made["features"].flags.writeable
    with pytest.raises(ValueError, match="read-only"):
        made["labels"][0] = 1
    code = """
        store = ArrayStore(folder)
        arrays = store.open_or_make({"split": "train"}, {"features": ((5, 3), "float32"), "labels": ((5,), "int64"),
            "mask": ((5,), "bool")}, lambda arrays: 1 / 0)
        print(arrays["features"].tobytes().hex(), arrays["labels"].tolist(), arrays["mask"].tolist())
    """
    process = in_new_process(code, tmp_path)
    features = (np.arange(15, dtype=np.float32).reshape(5, 3) / np.float32(7)).astype(np.float32)
    expected = f"{made['features'].tobytes().hex()} [4, 3, 2, 1, {2**40}] [False, False, True, False, False]\n"
    assert process.communicate()[0] == expected
    np.testing.assert_allclose(made["features"], features, rtol=1e-6)
    (file,) = tmp_path.glob("*.safetensors")
    for name, array in load_file(file).items():
        np.testing.assert_array_equal(array, made[name])
    assert parts(tmp_path) == []


def test_other_keys_and_other_shapes_are_other_entries(tmp_path):
    store = ArrayStore(tmp_path)
    shapes = {"a": ((2,), "uint8")}
    for number, key in enumerate(({"x": 1}, {"x": 2}, {"x": 1, "y": [0.5, None]}), start=1):
        store.open_or_make(key, shapes, fill_with(number))
    assert store.open_or_make({"y": [0.5, None], "x": 1}, shapes, never)["a"].tolist() == [3, 3]
    assert store.find({"x": 1}, shapes)["a"].tolist() == [1, 1]
    assert store.find({"x": 1}, {"a": ((3,), "uint8")}) is None
    assert store.find({"x": 3}, shapes) is None
    assert store.open_or_make({"x": 1}, {"a": ((1, 2), "uint8")}, fill_with(9))["a"].tolist() == [[9, 9]]
    with pytest.raises(TypeError, match=r"'a' has the dtype complex64"):
        store.open_or_make({}, {"a": ((1,), "complex64")}, never)


def test_an_upgrade_makes_the_arrays_again(tmp_path, monkeypatch):
    store = ArrayStore(tmp_path)
    make(store, "a", 1)
    from torchthaw.data.caches import store as module

    monkeypatch.setattr(module, "version", lambda name: "99" if name == "pillow" else "1")
    assert store.find({"name": "a"}, megabytes(1)) is None


def test_arrays_without_elements_and_of_odd_sizes(tmp_path):
    shapes = {"none": ((0, 4), "float32"), "odd": ((3,), "uint8"), "wide": ((2,), "float64"), "one": ((), "int16")}
    arrays = ArrayStore(tmp_path).open_or_make({}, shapes, fill_with(1))
    assert {name: array.shape for name, array in arrays.items()} == {name: shape for name, (shape, _) in shapes.items()}
    assert all(array.flags.aligned for array in arrays.values())
    assert arrays["wide"].tolist() == [1, 1]


def test_what_the_filling_raises_passes_through_and_leaves_nothing(tmp_path, caplog):
    store = ArrayStore(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        store.open_or_make({}, TWO, lambda arrays: (_ for _ in ()).throw(KeyboardInterrupt))
    assert on_disk(tmp_path) == 0
    with pytest.raises(OSError, match="of the filling"):
        store.open_or_make({}, TWO, lambda arrays: (_ for _ in ()).throw(OSError("of the filling")))
    assert on_disk(tmp_path) == 0
    assert caplog.text == ""
    assert store.open_or_make({}, TWO, fill_with(1)) is not None


def test_a_damaged_entry_is_made_again(tmp_path):
    store = ArrayStore(tmp_path)
    make(store, "a", 1)
    (file,) = tmp_path.glob("*.safetensors")
    content = file.read_bytes()
    for damaged in (content[:-1], b"\0" * len(content), b""):
        file.write_bytes(damaged)
        assert make(store, "a", 1, number=7)["pixels"][-1] == 7


def test_the_entry_that_was_used_longest_ago_gives_way(tmp_path):
    store = ArrayStore(tmp_path, budget_gb=0.003)
    for name in "abc":
        make(store, name, 1)
        time.sleep(0.02)
    make(store, "a", 1)
    time.sleep(0.02)
    make(store, "d", 1)
    assert [name for name in "abcd" if store.find({"name": name}, megabytes(1)) is not None] == ["a", "c", "d"]
    assert on_disk(tmp_path) <= 3 * MB


def test_what_is_in_use_stays_and_what_does_not_fit_is_said_once(tmp_path, caplog):
    store = ArrayStore(tmp_path, budget_gb=0.003)
    held = make(store, "held", 2, number=5)
    make(store, "idle", 1)
    assert store.room() == pytest.approx(MB, abs=5000)
    assert make(store, "new", 1.5) is None
    assert store.find({"name": "idle"}, megabytes(1)) is not None, "nothing is deleted in vain"
    assert make(store, "new", 1.6) is None
    assert make(store, "new", 4) is None
    assert caplog.text.count("Not cached") == 1
    assert "0.0015 GB do not fit beside what is in use of the 0.003 GB" in caplog.text
    row = held["pixels"][10:20]
    del held
    assert make(store, "new", 1.5) is None, "a part of an array uses the entry too"
    assert row.tolist() == [5] * 10
    del row
    assert store.room() == 3 * MB
    assert make(store, "new", 1.5) is not None
    assert on_disk(tmp_path) <= 3 * MB


def test_an_entry_beyond_the_whole_budget_deletes_nothing(tmp_path, caplog):
    store = ArrayStore(tmp_path, budget_gb=0.002)
    make(store, "a", 1)
    assert make(store, "b", 2.1) is None
    assert "0.0021 GB are more than the 0.002 GB that all caches may take" in caplog.text
    assert store.find({"name": "a"}, megabytes(1)) is not None


def test_another_process_keeps_what_it_uses_and_its_death_frees_it(tmp_path):
    make(ArrayStore(tmp_path), "a", 2)
    code = """
        arrays = ArrayStore(folder, 0.003).find({"name": "a"}, {"pixels": ((2_000_000 - 4096,), "uint8")})
        print("has it", flush=True)
        time.sleep(60)
    """
    process = in_new_process(code, tmp_path)
    assert process.stdout.readline() == "has it\n"
    store = ArrayStore(tmp_path, budget_gb=0.003)
    assert make(store, "b", 2) is None
    process.kill()
    process.wait()
    assert make(store, "b", 2) is not None
    assert store.find({"name": "a"}, megabytes(2)) is None


def _sum_in_worker(arrays, queue):
    queue.put(int(arrays["pixels"][:100].sum()))
    time.sleep(60)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_map_the_same_file_and_keep_it_in_use(tmp_path, method):
    store = ArrayStore(tmp_path, budget_gb=0.003)
    arrays = make(store, "a", 2, number=3)
    assert len(pickle.dumps(arrays)) < 2000
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    worker = context.Process(target=_sum_in_worker, args=(arrays, queue))
    worker.start()
    assert queue.get(timeout=60) == 300
    del arrays
    assert make(store, "b", 2) is None
    worker.kill()
    worker.join()
    assert make(store, "b", 2) is not None


def test_arrays_whose_entry_is_gone_cannot_be_unpickled(tmp_path):
    pickled = pickle.dumps(make(ArrayStore(tmp_path), "a", 1))
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(FileNotFoundError, match="the cache entry was deleted"):
        pickle.loads(pickled)


@pytest.mark.parametrize("after", [0, 1, 20])
def test_a_process_killed_while_filling_leaves_no_entry_and_its_leftovers_are_deleted(tmp_path, after):
    code = f"""
        def fill(arrays):
            for row in range({after}):
                arrays["pixels"][row * 50_000 : (row + 1) * 50_000] = 9
            print("half", flush=True)
            time.sleep(60)
        ArrayStore(folder).open_or_make({{"name": "a"}}, {{"pixels": ((2_000_000 - 4096,), "uint8")}}, fill)
    """
    process = in_new_process(code, tmp_path)
    assert process.stdout.readline() == "half\n"
    store = ArrayStore(tmp_path, budget_gb=0.003)
    assert store.find({"name": "a"}, megabytes(2)) is None
    assert make(store, "other", 2) is None, "what is being made counts, and is not deleted"
    assert len(parts(tmp_path)) == 1
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert make(store, "a", 2, number=4)["pixels"].tolist() == [4] * (2 * MB - 4096)
    assert parts(tmp_path) == []


def test_kills_at_any_moment_leave_whole_entries_within_the_budget(tmp_path):
    code = """
        store = ArrayStore(folder, 0.0045)
        for number in range(1000):
            def fill(arrays):
                for row in range(0, 1_000_000, 100_000):
                    arrays["pixels"][row : row + 100_000] = 1 + number % 7
            arrays = store.open_or_make({"name": number % 7}, {"pixels": ((1_000_000,), "uint8")}, fill)
            assert arrays is None or (arrays["pixels"] == 1 + number % 7).all()
            del arrays
            print(number, flush=True)
    """
    random = np.random.default_rng(0)
    for _ in range(4):
        processes = [in_new_process(code, tmp_path) for _ in range(2)]
        for process in processes:
            process.stdout.readline()
        deadline = time.monotonic() + random.uniform(0.05, 0.3)
        while time.monotonic() < deadline:
            assert on_disk(tmp_path) <= 4.5 * MB
        assert all(process.poll() is None for process in processes)
        for process in processes:
            process.kill()
            process.wait()
        for number in range(7):
            found = ArrayStore(tmp_path).find({"name": number}, {"pixels": ((1_000_000,), "uint8")})
            assert found is None or (found["pixels"] == 1 + number).all()
            del found
    assert make(ArrayStore(tmp_path, 0.0045), "last", 4.4) is not None
    assert on_disk(tmp_path) <= 4.5 * MB


@pytest.mark.parametrize("wait", [False, True])
def test_two_processes_make_the_same_entry(tmp_path, wait):
    code = f"""
        def fill(arrays):
            print("fills", flush=True)
            sys.stdin.readline()
            arrays["pixels"][:] = 8
        arrays = ArrayStore(folder).open_or_make(
            {{"name": "a"}}, {{"pixels": ((1_000_000 - 4096,), "uint8")}}, fill, wait={wait})
        print(int(arrays["pixels"].min()), flush=True)
    """
    first = in_new_process(code, tmp_path, stdin=subprocess.PIPE)
    assert first.stdout.readline() == "fills\n"
    second = in_new_process(code, tmp_path, stdin=subprocess.PIPE)
    if not wait:
        assert second.stdout.readline() == "fills\n"
        second.stdin.write("\n")
        second.stdin.flush()
        assert second.stdout.readline() == "8\n"
        (before,) = (path.stat().st_ino for path in tmp_path.glob("*.safetensors"))
    else:
        time.sleep(0.5)
        assert second.poll() is None
    assert first.communicate("\n")[0] == "8\n"
    assert second.communicate()[0] == ("8\n" if wait else "")
    (file,) = tmp_path.glob("*.safetensors")
    assert wait or file.stat().st_ino == before, "a file that others have mapped would go on taking space, uncounted"
    assert parts(tmp_path) == []


def test_who_waits_takes_over_when_the_maker_dies(tmp_path):
    code = """
        def fill(arrays):
            print("fills", flush=True)
            time.sleep(60)
        ArrayStore(folder).open_or_make({"name": "a"}, {"pixels": ((1_000_000 - 4096,), "uint8")}, fill)
    """
    process = in_new_process(code, tmp_path)
    assert process.stdout.readline() == "fills\n"
    threading.Timer(0.3, process.kill).start()
    assert make(ArrayStore(tmp_path), "a", 1, number=2, wait=True)["pixels"][0] == 2
    process.wait()


def test_threads_share_a_store(tmp_path):
    store = ArrayStore(tmp_path)
    found = []
    threads = [threading.Thread(target=lambda: found.append(make(store, "a", 1, wait=True))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [int(arrays["pixels"].sum()) for arrays in found] == [MB - 4096] * 4
    assert len(list(tmp_path.glob("*.safetensors"))) == 1


def test_a_full_disk_is_said_once_and_the_caller_goes_on(tmp_path, caplog):
    """Files may not grow beyond a limit, as on a full disk; a mapped file without space would end in a signal."""
    store = ArrayStore(tmp_path, budget_gb=1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10 * MB, before[1]))
    try:
        assert make(store, "a", 20) is None
        assert make(store, "a", 20) is None
        assert make(store, "b", 5) is not None
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caplog.text.count("Not cached") == 1
    assert f"the disk of {tmp_path} is full (File too large)" in caplog.text
    assert parts(tmp_path) == []
    assert make(store, "a", 20) is not None


@pytest.fixture
def small_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)], capture_output=True)
    if mount.returncode:
        pytest.skip("may not mount a small disk here")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_small_disk_is_never_filled(small_disk, caplog):
    store = ArrayStore(small_disk / "cache", budget_gb=1)
    assert make(store, "a", 3) is not None
    assert make(store, "b", 3) is not None
    assert make(store, "c", 3) is not None, "the oldest gives way"
    assert store.find({"name": "a"}, megabytes(3)) is None
    assert make(store, "d", 8.3) is None
    assert f"the disk of {small_disk / 'cache'} is full" in caplog.text
    (small_disk / "other").write_bytes(bytes(1 * MB))
    assert make(store, "e", 7.3) is None
    assert store.find({"name": "c"}, megabytes(3)) is not None


def test_a_disk_that_fills_up_meanwhile_does_not_kill_the_process(small_disk, caplog, monkeypatch):
    store = ArrayStore(small_disk / "cache", budget_gb=1)
    monkeypatch.setattr(store, "_spare_disk", lambda: 100 * MB)
    assert make(store, "a", 20) is None
    assert f"the disk of {small_disk / 'cache'} is full (No space left on device)" in caplog.text
    assert parts(small_disk / "cache") == []


@pytest.mark.parametrize("broken", ["a file", "read-only"])
def test_a_folder_that_cannot_be_written_is_said_once(tmp_path, caplog, broken):
    folder = tmp_path / "folder" / "cache"
    if broken == "a file":
        (tmp_path / "folder").write_text("")
    elif os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    else:
        (tmp_path / "folder").mkdir(mode=0o500)
    store = ArrayStore(folder)
    assert make(store, "a", 1) is None
    assert make(store, "b", 1) is None
    assert store.find({"name": "a"}, megabytes(1)) is None
    assert store.room() == 0
    assert caplog.text.count("Not cached") == 1
    assert f"the folder {folder} cannot be used" in caplog.text


def test_the_folder_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHTHAW_CACHE", str(tmp_path / "chosen"))
    assert default_cache_folder() == tmp_path / "chosen"
    make(ArrayStore(), "a", 1)
    assert len(list((tmp_path / "chosen" / "arrays").glob("*.safetensors"))) == 1
    monkeypatch.delenv("TORCHTHAW_CACHE")
    if sys.platform == "linux":
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
        assert default_cache_folder() == tmp_path / "xdg" / "torchthaw"


def test_the_key_is_in_the_file(tmp_path):
    ArrayStore(tmp_path).open_or_make({"split": "train"}, TWO, fill_with(1))
    (file,) = tmp_path.glob("*.safetensors")
    content = file.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    key = json.loads(header["__metadata__"]["key"])
    assert key["key"] == {"split": "train"}
    assert key["versions"]["torch"] == version("torch")
