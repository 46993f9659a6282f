"""Pushes by the trainer, in processes of their own, to a stand-in of the Hub; run as a script, this file trains."""

import copy
import hashlib
import json
import os
import pickle
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from model_code import CODE_FILES

from torchthaw import Stage, ThawTrainer, ThawTrainingArguments, TorchvisionForImageClassification
from torchthaw.backbones.image_processing import TorchvisionImageProcessor
from torchthaw.errors import ThawError
from torchthaw.training.checkpoints import why_incomplete

TOKEN = "hf_makerwrites"
ARCHITECTURE = "shufflenet_v2_x0_5"
MODEL = {*CODE_FILES, "config.json", "model.safetensors", "preprocessor_config.json", "README.md"}
PLAN = [
    Stage("head", unfreeze="head", epochs=1, learning_rate=1e-2),
    Stage("<all>", unfreeze="all", epochs=1, learning_rate=1e-3),
]


def images(number, seed):
    from datasets import ClassLabel, Dataset, Features, Image, Value
    from PIL import Image as Picture

    random = np.random.default_rng(seed)
    rows = {"image": [], "label": [], "path": []}
    for index in range(number):
        pixels = random.integers(0, 120, (32, 32, 3), dtype=np.uint8)
        pixels[..., index % 3] += 100
        rows["image"].append(Picture.fromarray(pixels))
        rows["label"].append(index % 3)
        rows["path"].append(f"{seed}/{index}.png")
    features = Features(image=Image(), label=ClassLabel(names=["ant", "bee", "cat"]), path=Value("string"))
    return Dataset.from_dict(rows, features=features)


def train(output_dir, *, resume=None, push=True, **options):
    """What a process does: trains two stages, pushes if asked, and says what came out."""
    torch.manual_seed(0)
    model = TorchvisionForImageClassification.from_torchvision(
        ARCHITECTURE, weights=None, id2label=["ant", "bee", "cat"]
    )
    trainer = ThawTrainer(
        model=model,
        args=ThawTrainingArguments(
            output_dir=output_dir, plan=PLAN, gate="off", per_device_train_batch_size=8, disable_tqdm=True,
            **{"use_cpu": True, "push_to_hub": True, "hub_model_id": "maker/ants", **options},
        ),
        train_dataset=images(24, 0),
        eval_dataset=images(9, 1),
        processing_class=TorchvisionImageProcessor.from_torchvision(ARCHITECTURE, weights=None, image_size=32),
    )  # fmt: skip
    print(repr(trainer.args), trainer.args)
    trainer.train(resume_from_checkpoint=resume)
    print("TRAINED")
    if push:
        commit = trainer.push_to_hub(license="mit")
        print(f"PUSHED {commit.oid}")


def load(_folder, **_):
    """What another process does: loads the model from the Hub by its name, and says what it gives."""
    model = TorchvisionForImageClassification.from_pretrained("maker/ants").eval()
    processor = TorchvisionImageProcessor.from_pretrained("maker/ants")
    pixels = processor(list(images(4, 7)["image"]), return_tensors="pt")
    with torch.inference_mode():
        print("LOGITS", json.dumps(model(**pixels).logits.tolist()))


def download(folder, **options):
    """What a third one does: downloads a commit."""
    from huggingface_hub import snapshot_download

    snapshot_download("maker/ants", local_dir=folder, **options)


if __name__ == "__main__":
    try:
        {"train": train, "load": load, "download": download}[sys.argv[1]](sys.argv[2], **json.loads(sys.argv[3]))
    except ThawError as refused:
        sys.exit(f"{type(refused).__name__}: {refused}")


@pytest.fixture
def run(hub, tmp_path):
    """Runs a part of this file in a process whose client talks to the stand-in; returns the finished process."""

    def start(part, folder, token=TOKEN, expect=0, **options):
        known = {name: value for name, value in os.environ.items() if name not in ("HF_TOKEN", "HF_HUB_OFFLINE")}
        known |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
        known |= {"HF_TOKEN": token} if token else {}
        done = subprocess.run(
            [sys.executable, __file__, part, str(folder), json.dumps(options)],
            env={**known, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            timeout=500,
        )
        assert done.returncode == expect, done.stdout + done.stderr
        return done

    return start


def digest(content):
    return hashlib.sha256(content).hexdigest()


def parts_of(file):
    """A file's bytes, and those of what is in it if it is an archive, as PyTorch's files are."""
    yield file.read_bytes()
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            yield from (archive.read(name) for name in archive.namelist())


# A whole run


def test_run_with_all_checkpoints_pushed_and_the_end(run, hub, tmp_path):
    out = tmp_path / "out"
    done = run("train", out, token=None, hub_token=TOKEN, hub_strategy="all_checkpoints", hub_private_repo=True)
    repository = hub.repositories["models", "maker/ants"]
    assert repository.private
    titles = [commit.title for commit in repository.commits.values()]
    assert titles[1:] == ["Training in progress, step 3", "Training in progress, step 6", "End of training"]
    assert f"PUSHED {repository.branches['main']}" in done.stdout

    # While training went on: the checkpoint's weights with their code, and a card that says what they are.
    first = {path: blob.content for path, blob in list(repository.commits.values())[1].files.items()}
    assert {path for path in first if "/" not in path} == {*MODEL, ".gitattributes"}
    assert first["model.safetensors"] == first["checkpoint-3/model.safetensors"]
    card = first["README.md"].decode()
    assert "Training in progress" in card
    assert "step 3 of 6, in stage 'head'" in card
    # At the end: the model, its figures and its own card, and no other files of the run.
    files = hub.files("maker/ants")
    top = {path for path in files if not path.startswith("checkpoint-")}
    assert {"results.json", *MODEL} <= top
    assert all(path in MODEL or path == "results.json" or path.startswith("plots/") for path in top)
    assert "Training in progress" not in files["README.md"].decode()
    assert "license: mit" in files["README.md"].decode()
    assert json.loads(files["results.json"])["model"]["sha256"] == digest(files["model.safetensors"])
    assert all((out / path).read_bytes() == files[path] for path in top)
    assert not (out / ".push").exists() or not list((out / ".push").iterdir())

    # Both checkpoints are whole after a download, although one was removed here meanwhile.
    run("download", tmp_path / "copy")
    assert [path.name for path in sorted(out.glob("checkpoint-*"))] == ["checkpoint-6"]
    for name in ("checkpoint-3", "checkpoint-6"):
        assert why_incomplete(tmp_path / "copy" / name) is None

    # No secret anywhere.
    assert TOKEN not in done.stdout + done.stderr
    assert "<HUB_TOKEN>" in done.stdout
    places = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert any(file.name == "training_args.bin" for file in places)
    assert not [file for file in places for part in parts_of(file) if TOKEN.encode() in part]

    # What was pushed is what was trained.
    model = TorchvisionForImageClassification.from_pretrained(out).eval()
    processor = TorchvisionImageProcessor.from_pretrained(out)
    with torch.inference_mode():
        logits = model(**processor(list(images(4, 7)["image"]), return_tensors="pt")).logits
    loaded = json.loads(run("load", out).stdout.split("LOGITS", 1)[1])
    assert torch.equal(torch.tensor(loaded), logits)


def test_last_checkpoint_on_the_hub_goes_on_exactly(run, hub, tmp_path):
    run("train", tmp_path / "out", hub_strategy="checkpoint", hub_revision="trial", push=False)
    repository = hub.repositories["models", "maker/ants"]
    assert hub.files("maker/ants") == {}, "main is not the branch"
    half, end = list(repository.commits.values())[1:]
    assert {path.split("/")[0] for path in end.files if "/" in path} == {"last-checkpoint"}
    assert set(end.files) == set(half.files), "nothing of an earlier checkpoint stays"
    run("download", tmp_path / "copy", revision=half.oid)
    last = tmp_path / "copy" / "last-checkpoint"
    run("train", tmp_path / "again", resume=str(last), push_to_hub=False, push=False)
    resumed = (tmp_path / "again" / "checkpoint-6" / "model.safetensors").read_bytes()
    assert digest(resumed) == end.files["model.safetensors"].sha256
    assert half.files["model.safetensors"].sha256 != end.files["model.safetensors"].sha256


# Faults


def test_failed_pushes_are_told_and_training_goes_on(run, hub, tmp_path):
    hub.fault("preupload", status=403, message="not now")
    out = tmp_path / "out"
    done = run("train", out, expect=1, hub_strategy="every_save")
    assert "TRAINED" in done.stdout
    reason = "the token may not write to maker/ants (403)"
    for name in ("checkpoint-3", "checkpoint-6"):
        assert (
            f"{name} was not pushed to maker/ants; it is saved. uploading to maker/ants failed: {reason}" in done.stderr
        )
    said = f"The end of the run is not on the Hub. Nothing is lost: all of it is saved in {out}. Push the last weights "
    assert f"{said}with `torchthaw push {out}/checkpoint-6 maker/ants`" in done.stderr
    # The push of the finished model is what the process ends with.
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"HubError: uploading to maker/ants failed: {reason}")
    assert last.endswith(f"{out} is whole; push it again with `torchthaw push {out} maker/ants`")
    assert hub.files("maker/ants") == {}
    # And both lines do what they say.
    hub.faults.clear()
    for folder in (out / "checkpoint-6", out):
        push_by_process(hub, folder)
        assert hub.files("maker/ants")["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    assert "results.json" in hub.files("maker/ants")


def push_by_process(hub, folder):
    program = f"from torchthaw.sharing.hub import push_folder; push_folder({str(folder)!r}, 'maker/ants')"
    known = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    subprocess.run([sys.executable, "-c", program], env={**os.environ, **known}, check=True, capture_output=True)


def test_push_that_failed_or_was_skipped_is_made_up_for_at_the_end(run, hub, tmp_path):
    # The first push is held up until the second checkpoint is there, and then refused.
    hub.fault("preupload", status=403, message="not now", delay=8, times=1)
    done = run("train", tmp_path / "out", hub_strategy="every_save", push=False)
    titles = [commit.title for commit in hub.repositories["models", "maker/ants"].commits.values()]
    assert titles == ["initial commit", "Training in progress, step 6"]
    assert "checkpoint-3 was not pushed to maker/ants; it is saved." in done.stderr
    assert "The end of the run is not on the Hub" not in done.stderr


def test_nothing_is_trained_if_the_repository_cannot_be_made(run, hub, tmp_path):
    done = run("train", tmp_path / "out", expect=1, hub_model_id="other/ants")
    assert "TRAINED" not in done.stdout
    last = done.stderr.strip().splitlines()[-1]
    assert "HubError: making the repository other/ants failed: the token may not write to other/ants (403)" in last
    assert last.endswith("Nothing was trained; leave out push_to_hub to train without the Hub, and push later")
    assert not hub.repositories


# Arguments


def test_arguments_show_and_pickle_no_token_and_copies_keep_it(tmp_path):
    args = ThawTrainingArguments(output_dir=str(tmp_path), hub_token="hf_secretsecret", use_cpu=True)
    for text in (repr(args), str(args), args.to_json_string(), str(args.to_dict()), str(args.to_sanitized_dict())):
        assert "secretsecret" not in text
    assert b"secretsecret" not in pickle.dumps(args)
    torch.save({"args": args}, tmp_path / "file.bin")
    assert not [part for part in parts_of(tmp_path / "file.bin") if b"secretsecret" in part]
    back = pickle.loads(pickle.dumps(args))
    assert back.hub_token is None
    assert (back.plan, back.seed, back.output_dir) == (args.plan, args.seed, args.output_dir)
    assert copy.copy(args).hub_token == copy.deepcopy(args).hub_token == "hf_secretsecret"
    twin = copy.deepcopy(args)
    twin.label_names.append("other")
    assert args.label_names == ["labels"]
