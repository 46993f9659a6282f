"""Data sets of a stand-in of the Hub, loaded by processes of their own; run as a script, this file loads one."""

import hashlib
import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Image, Value, load_dataset
from PIL import Image as Picture

from torchthaw import load_image_dataset
from torchthaw.data.hub_datasets import loaded_revision, resolve_revision
from torchthaw.data.streamed_splits import as_streams
from torchthaw.errors import DataError

CLASSES = ["ant", "bee", "cat"]
TOKEN = "hf_makerwrites"
NO_COMMIT = "0" * 40


def show(source, *requests):
    """What a process does: loads, with each of several sets of options, and says what it got."""
    found = []
    for options in requests:
        try:
            found.append(load(source, **options))
        except DataError as refused:
            found.append(f"DataError: {refused}")
    print("FOUND", json.dumps(found))


def load(source, *, streaming=False, **options):
    splits = load_image_dataset(source, streaming=streaming, **options)
    rows = {split: list(images) for split, images in splits.items()}
    return {
        "rows": {split: [[content(row["image"]), row["label"]] for row in images] for split, images in rows.items()},
        "paths": {split: [row.get("path") for row in images] for split, images in rows.items()},
        "classes": {split: images.features["label"].names for split, images in splits.items()},
        "loaded": None if streaming else loaded_revision(splits),
        "resolved": resolve_revision(source, options.get("revision")),
    }


def content(image):
    return hashlib.sha256(image["bytes"] or Path(image["path"]).read_bytes()).hexdigest()


def learn(source, output_dir):
    """What another process does: trains on a stream."""
    import torch

    from torchthaw import Stage, ThawTrainer, ThawTrainingArguments, TorchvisionForImageClassification
    from torchthaw.backbones.image_processing import TorchvisionImageProcessor

    splits = load_image_dataset(source, streaming=True)
    torch.manual_seed(0)
    trainer = ThawTrainer(
        model=TorchvisionForImageClassification.from_torchvision("shufflenet_v2_x0_5", weights=None, id2label=CLASSES),
        args=ThawTrainingArguments(
            output_dir=output_dir, plan=[Stage("head", unfreeze="head", steps=3)], per_device_train_batch_size=4,
            use_cpu=True, disable_tqdm=True, save_strategy="no", load_best_model_at_end=False, eval_strategy="no",
        ),
        train_dataset=splits["train"],
        processing_class=TorchvisionImageProcessor.from_torchvision("shufflenet_v2_x0_5", weights=None, image_size=32),
    )  # fmt: skip
    trainer.train()
    print("FOUND", json.dumps({"steps": trainer.state.global_step}))


if __name__ == "__main__":
    # The pauses between tries, the client's own ones too.
    time.sleep = lambda seconds: None
    {"show": show, "learn": learn}[sys.argv[1]](*json.loads(sys.argv[2]))


@pytest.fixture
def ask(hub, tmp_path):
    """Runs a part of this file in a process whose client talks to the stand-in, with a home in `tmp_path`."""

    def start(part, *arguments, token=None, **environment):
        known = {name: value for name, value in os.environ.items() if name not in ("HF_TOKEN", "HF_HUB_OFFLINE")}
        known |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
        known |= {"HF_TOKEN": token} if token else {}
        done = subprocess.run(
            [sys.executable, __file__, part, json.dumps(arguments)],
            env={**known, **environment},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.split("FOUND", 1)[1])

    return start


def png(seed):
    buffer = io.BytesIO()
    Picture.fromarray(np.random.default_rng(seed).integers(0, 255, (20, 24, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def parquet(seeds, *, names=CLASSES, label=None):
    """A shard, and what must come out of it: digest and label of every image."""
    labels = [seed % 3 for seed in seeds]
    features = Features(image=Image(), label=ClassLabel(names=names) if label is None else label)
    rows = {
        "image": [{"bytes": png(seed), "path": None} for seed in seeds],
        "label": labels if label is None else [names[number] for number in labels],
    }
    buffer = io.BytesIO()
    Dataset.from_dict(rows, features=features).to_parquet(buffer)
    return buffer.getvalue(), [[hashlib.sha256(png(seed)).hexdigest(), seed % 3] for seed in seeds]


def publish(hub, start=0, **options):
    """Puts two shards for training and one for validation on the Hub; returns the commit and what is in them."""
    shards = [parquet(range(start, start + 6)), parquet(range(start + 6, start + 12)), parquet(range(90, 93))]
    names = ("train-00000-of-00002", "train-00001-of-00002", "validation-00000-of-00001")
    files = {f"data/{name}.parquet": shard for name, (shard, _) in zip(names, shards, strict=True)}
    commit = hub.put("maker/photos", {**files, "README.md": b"---\nlicense: mit\n---\n"}, **options)
    return commit, {"train": shards[0][1] + shards[1][1], "validation": shards[2][1]}


# Loading


def test_parquet_shards_whole_streamed_and_from_the_cache(hub, ask):
    commit, expected = publish(hub)
    found, streamed = ask("show", "maker/photos", {}, {"streaming": True})
    assert found["rows"] == streamed["rows"] == expected
    assert found["classes"] == streamed["classes"] == {"train": CLASSES, "validation": CLASSES}
    assert found["paths"]["validation"] == ["validation/0", "validation/1", "validation/2"]
    assert found["loaded"] == found["resolved"] == commit

    # Another process without the Hub has it from the cache, and knows which commit it is.
    hub.stop()
    *found, said = ask("show", "maker/photos", {}, {"revision": "main"}, {"streaming": True}, HF_HUB_OFFLINE="1")
    for cached in found:
        assert cached["rows"] == expected
        assert (cached["loaded"], cached["resolved"]) == (commit, None)
    assert "Cannot reach the data set 'maker/photos' on the Hub, from which it is to be streamed" in said
    assert "leave streaming out to take it from the cache" in said


def test_revisions_are_pinned_and_never_mixed_up_without_the_hub(hub, ask):
    first, expected = publish(hub)
    hub.repositories["datasets", "maker/photos"].branches["summer"] = first
    second, changed = publish(hub, start=12)
    wanted = [{"revision": first}, {"revision": "summer"}, {"revision": "summer", "streaming": True}, {}]
    pinned, branch, streamed, newest, said = ask("show", "maker/photos", *wanted, {"revision": "winter"})
    assert (pinned["rows"], pinned["loaded"], pinned["resolved"]) == (expected, first, first)
    assert (branch["rows"], branch["loaded"], branch["resolved"]) == (expected, first, first)
    assert streamed["rows"] == expected
    assert (newest["rows"], newest["loaded"]) == (changed, second)
    assert "has no revision 'winter'; write a branch, a tag or a commit" in said

    # `datasets` alone would take the newest of the cache for any of these.
    hub.stop()
    wanted = [first, "summer", "winter", NO_COMMIT]
    found, short, *refused = ask(
        "show", "maker/photos", *({"revision": revision} for revision in (second, second[:8], *wanted)),
        HF_HUB_OFFLINE="1",
    )  # fmt: skip
    assert found["rows"] == short["rows"] == changed
    for revision, said in zip(wanted, refused, strict=True):
        assert f"at the commit {second}, not at revision '{revision}', and the Hub cannot be asked" in said
        assert f"write revision '{second}'" in said


def test_image_folders_on_the_hub(hub, ask):
    images = {
        f"{split}/{label}/{number}.png": png(100 * place + 10 * number + rank)
        for place, split in enumerate(("train", "test"))
        for rank, label in enumerate(CLASSES)
        for number in range(2)
    }
    commit = hub.put("maker/folders", images)
    (found,) = ask("show", "maker/folders", {})
    assert found["loaded"] == commit
    for split in ("train", "test"):
        expected = {
            hashlib.sha256(file).hexdigest(): CLASSES.index(name.split("/")[1])
            for name, file in images.items()
            if name.startswith(split)
        }
        assert dict(found["rows"][split]) == expected
        assert sorted(found["paths"][split]) == sorted(name for name in images if name.startswith(split))


def test_training_on_a_stream_of_the_hub(hub, ask, tmp_path):
    publish(hub)
    assert ask("learn", "maker/photos", str(tmp_path / "out")) == {"steps": 3}
    # Nothing but parts of the training files was asked for.
    assert hub.asked(r"resolve/.*train-.*parquet", "GET")
    assert not hub.asked(r"resolve/.*validation-.*parquet", "GET")


# Rights and faults


def test_private_data_sets_need_their_owners_token(hub, ask):
    commit, expected = publish(hub, private=True)
    for token, status in ((None, 401), ("hf_otherwrites", 404)):
        for said in ask("show", "maker/photos", {}, {"streaming": True}, token=token):
            assert f"There is no data set 'maker/photos' on the Hub, or it is private and not yours ({status})" in said
            assert "hf auth login" in said
    (said,) = ask("show", "maker/photos", {}, token="hf_bogus")
    assert "The Hub does not know the token" in said
    assert "hf_bogus" not in said
    (found,) = ask("show", "maker/photos", {}, token="hf_makerreads")
    assert (found["rows"], found["resolved"]) == (expected, commit)


def test_data_sets_that_do_not_exist(hub, ask):
    (said,) = ask("show", "maker/fotos", {})
    assert "There is no data set 'maker/fotos' on the Hub, or it is private and not yours (401); check the name" in said
    assert "there is no such folder here" in said


def test_connections_lost_in_the_middle_of_a_download_are_made_again(hub, ask):
    _, expected = publish(hub)
    hub.fault("parquet", method="GET", drop="before", after_bytes=700, times=1)
    (found,) = ask("show", "maker/photos", {})
    assert found["rows"] == expected, found
    assert not [fault for fault in hub.faults if fault.times]


def test_hub_that_cannot_be_reached_or_stays_out_of_order(hub, ask):
    hub.fault("resolve|api.datasets", status=503)
    (said,) = ask("show", "maker/photos", {})
    assert "there is no such folder here: the Hub is out of order (503). Check the network, and try again" in said
    hub.stop()
    (said,) = ask("show", "maker/photos", {})
    assert "Cannot reach the data set 'maker/photos' on the Hub, and there is no such folder here" in said
    assert "Check the network" in said


# Without the Hub


def streams(**splits):
    return {
        split: Dataset.from_dict(rows, features=features).to_iterable_dataset()
        for split, (rows, features) in splits.items()
    }


def rows_of(label, *, image="image"):
    return {image: [{"bytes": png(1), "path": "a.png"}], label: [0]}


def test_streams_get_the_usual_columns_and_are_not_decoded(tmp_path):
    features = Features(photo=Image(), kind=ClassLabel(names=CLASSES), path=Value("string"), width=Value("int64"))
    rows = {"photo": [{"bytes": png(1), "path": None}], "kind": [2], "path": ["a/b.png"], "width": [3]}
    found = as_streams(streams(train=(rows, features)), "it", label_column="kind")["train"]
    assert list(next(iter(found))) == ["image", "label", "path"]
    assert next(iter(found)) == {"image": {"bytes": png(1), "path": None}, "label": 2, "path": "a/b.png"}
    assert found.features["label"].names == CLASSES


def test_classes_that_streams_state_are_checked_before_anything_is_read():
    good, bad = (Features(image=Image(), label=ClassLabel(names=names)) for names in (CLASSES, ["ant", "bea"]))
    splits = streams(train=(rows_of("label"), good), validation=(rows_of("label"), bad))
    with pytest.raises(DataError, match=r"it states classes in validation .*'bea'.* Did you mean 'bee'"):
        as_streams(splits, "it")
    with pytest.raises(DataError, match=r"states classes in train .*'cat'"):
        as_streams(splits, "it", class_names=["ant", "bee", "bea"])
    assert set(as_streams(splits, "it", class_names=[*CLASSES, "bea"])) == {"train", "validation"}


def test_streams_that_cannot_be_used():
    features = Features(image=Image(), label=ClassLabel(names=CLASSES))
    stream = streams(train=(rows_of("label"), features))["train"]
    with pytest.raises(DataError, match=r"it \(train\) does not say what its columns are.*load it without streaming"):
        as_streams({"train": stream.map(lambda row: row)}, "it")
    with pytest.raises(DataError, match="label"):
        as_streams({"train": stream.remove_columns("label")}, "it")


def test_only_data_sets_of_the_hub_are_streamed(make_image_folder):
    root = make_image_folder()
    for source in (root, str(root), load_dataset("imagefolder", data_dir=str(root))):
        with pytest.raises(DataError, match=r"streaming is for data sets on the Hub \(user/name\)"):
            load_image_dataset(source, streaming=True)


def test_local_data_has_no_commit(make_image_folder):
    assert loaded_revision(load_image_dataset(make_image_folder())) is None
