"""`torchthaw push` and `train --push`, as commands in processes of their own, to a stand-in of the Hub."""

import json
import os
import subprocess
import sys

import pytest

TOKEN = "hf_makerwrites"
TINY = [
    "train", "two_phase", "--backbone", "shufflenet_v2_x0_5", "--weights", "builtin", "--set", "image_size=32",
    "--set", "epochs=2", "--set", "batch_size=8", "--set", "num_workers=0", "--set", "data.validation=0.25",
]  # fmt: skip


@pytest.fixture
def command(hub, tmp_path):
    """Runs a command line, or a program, logged in to the stand-in."""

    def run(*arguments, token=TOKEN, program=("-m", "torchthaw")):
        environment = {key: value for key, value in os.environ.items() if key != "HF_TOKEN"}
        environment |= {
            "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1", **({"HF_TOKEN": token} if token else {}),
        }  # fmt: skip
        return subprocess.run(
            [sys.executable, *program, *map(str, arguments)],
            env=environment, capture_output=True, text=True, timeout=400, cwd=tmp_path,
        )  # fmt: skip

    return run


def test_train_pushes_what_loads_from_the_hub_and_the_token_is_nowhere(hub, command, make_image_folder, tmp_path):
    photos = make_image_folder(per_class=8)
    done = command(*TINY, "--data", photos, "--output", "run", "--push", "maker/insects", "--set", "push.private=true")
    assert done.returncode == 0, done.stderr
    assert "pushed to" in done.stderr
    files = hub.files("maker/insects")
    assert {"config.json", "model.safetensors", "modeling.py", "README.md", "results.json", "recipe.yaml"} <= set(files)
    assert "plots/curves.png" in files
    assert not any(name.startswith(("stages/", "predictions/")) for name in files)
    assert files["model.safetensors"] == (tmp_path / "run" / "model.safetensors").read_bytes()

    # Somebody who may read it, and has torchthaw; the processes without it are tested with folders.
    program = """
import json, sys, torchthaw
from transformers import pipeline
classify = pipeline("image-classification", model="maker/insects")
print(json.dumps(classify(sys.argv[1], top_k=3)))
"""
    photo = photos / "ant" / "000.png"
    loaded = command(photo, program=("-c", program))
    assert loaded.returncode == 0, loaded.stderr[-2000:]
    from_hub = {found["label"]: found["score"] for found in json.loads(loaded.stdout)}
    local = command("predict", tmp_path / "run", photo, "--json")
    assert from_hub == pytest.approx(json.loads(local.stdout)[0]["scores"], abs=1e-6)

    for text in (done.stdout, done.stderr, loaded.stdout, loaded.stderr):
        assert TOKEN not in text
    for file in [*tmp_path.rglob("*")]:
        assert not file.is_file() or TOKEN.encode() not in file.read_bytes(), file
    assert all(TOKEN.encode() not in content for content in files.values())


def test_a_refused_push_leaves_the_run_whole_and_can_be_given_again(hub, command, make_image_folder, tmp_path):
    photos = make_image_folder(per_class=8)
    hub.fault("/commit/", status=403, times=1)
    done = command(*TINY, "--data", photos, "--output", "run", "--push", "maker/insects", "--quiet")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "push it again with `torchthaw push run maker/insects`" in done.stderr
    assert (tmp_path / "run" / "results.json").is_file()
    assert (tmp_path / "run" / "README.md").is_file()

    again = command("push", "run", "maker/insects", "--json")
    assert again.returncode == 0, again.stderr
    document = json.loads(again.stdout)
    assert document["repository"] == "maker/insects"
    assert "model.safetensors" in document["files"]
    assert set(hub.files("maker/insects")) >= set(document["files"])
    # The weights had been uploaded already.
    assert len(hub.asked("/lfs", "PUT") or hub.asked(".*", "PUT")) >= 1

    # `train --resume --push` of a finished run only pushes.
    resumed = command(*TINY, "--data", photos, "--output", "run", "--push", "maker/other", "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert "nothing is left to train" in resumed.stderr
    assert "model.safetensors" in hub.files("maker/other")


@pytest.mark.parametrize(
    ("repository", "token", "message"),
    [
        ("insects", TOKEN, "'insects' does not name a repository on the Hub; write user/name"),
        ("maker/insects", None, "there is no token for the Hub"),
    ],
)
def test_what_cannot_be_pushed_is_told_before_training(
    command, make_image_folder, tmp_path, repository, token, message
):
    photos = make_image_folder(per_class=8)
    done = command(*TINY, "--data", photos, "--output", "run", "--push", repository, token=token)
    assert done.returncode in (1, 2)
    assert message in done.stderr
    assert not (tmp_path / "run").exists()
