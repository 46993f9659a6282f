"""Pushes of a saved folder, by the real client over HTTP, to a stand-in of the Hub with faults."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hub_stand_in import HubStandIn
from huggingface_hub import HfApi, constants
from model_code import CODE_FILES
from PIL import Image
from safetensors.numpy import save_file

import torchthaw
from torchthaw.errors import HubError, SharingError
from torchthaw.sharing.hub import push_folder
from torchthaw.sharing.pushed_files import saved_files

TOKEN = "hf_makerwrites"
CARD = (
    "---\nlibrary_name: transformers\npipeline_tag: image-classification\ntags:\n- torchthaw\n---\n\n# Ants and bees\n"
)
PUSHED = {
    *CODE_FILES, "config.json", "model.safetensors", "preprocessor_config.json", "README.md", "results.json",
    "recipe.yaml", "audit.json", "plots/curves.png", "LICENSE",
}  # fmt: skip


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The stand-in, which this process's client talks to, logged in as `maker`."""
    with HubStandIn() as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "home" / "token"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield running


@pytest.fixture
def waits(monkeypatch):
    """Pauses between tries are noted, not waited for."""
    noted = []
    monkeypatch.setattr(time, "sleep", noted.append)
    return noted


@pytest.fixture
def folder(tmp_path):
    """What a run leaves, in small; it must be the same after the test."""
    root = tmp_path / "run of maker"
    write_run(root)
    before = state_of(root)
    yield root
    assert state_of(root) == before, "a push changed the folder"


def write_run(root):
    for name in ("plots", "predictions", "stages/checkpoint-3", "runs/x", "checkpoint-9", ".cache"):
        (root / name).mkdir(parents=True)
    random = np.random.default_rng(0)
    save_file({"weight": random.random((300, 300), dtype=np.float32)}, root / "model.safetensors")
    config = {"model_type": "torchthaw", "auto_map": {"AutoModel": "modeling.M", "AutoConfig": "configuration.C"}}
    (root / "config.json").write_text(json.dumps(config))
    processor = {"auto_map": {"AutoImageProcessor": {"torchvision": "image_processing.P", "other": None}}}
    (root / "preprocessor_config.json").write_text(json.dumps(processor))
    for name in CODE_FILES:
        shutil.copy(Path(torchthaw.__file__).parent / "backbones" / name, root / name)
    (root / "README.md").write_text(CARD)
    digest = hashlib.sha256((root / "model.safetensors").read_bytes()).hexdigest()
    (root / "results.json").write_text(json.dumps({"model": {"sha256": digest}}))
    (root / "recipe.yaml").write_text("backbone: resnet18\n")
    (root / "audit.json").write_text("{}")
    (root / "LICENSE").write_text("do what you like\n")
    pixels = random.integers(0, 255, (60, 80, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(root / "plots" / "curves.png")
    others = (
        "predictions/test.jsonl", "report.html", "plots/mistakes.png", "stages/checkpoint-3/optimizer.pt",
        "stages/journal.json", "runs/x/events.tfevents",
        "checkpoint-9/model.safetensors", "training_args.bin", "optimizer.pt", ".env", "plots/.hidden.png",
        ".cache/secret", "my_notes.py", "passwords.txt",
    )  # fmt: skip
    for name in others:
        (root / name).write_bytes(b"not for others")


def state_of(root):
    return {
        str(file.relative_to(root)): (file.stat().st_mtime_ns, file.read_bytes() if file.is_file() else None)
        for file in sorted(root.rglob("*"))
    }


def run_push(folder, repo, hub, **options):
    """A push by a process of its own; returns it."""
    program = (
        # Shells start what runs in the background with this signal ignored.
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from torchthaw.errors import ThawError\n"
        "from torchthaw.sharing.hub import push_folder\n"
        "try: print(push_folder(sys.argv[1], sys.argv[2], say=print).commit)\n"
        "except ThawError as error: sys.exit(str(error))"
    )
    offline = {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    given = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HOME": str(folder.parent / "home"), **offline, **options}
    return subprocess.Popen(
        [sys.executable, "-c", program, str(folder), repo],
        env={**os.environ, **given},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


# What is pushed


def test_push_makes_the_repository_and_has_what_belongs_there_in_one_commit(hub, folder):
    lines = []
    pushed = push_folder(folder, "maker/ants", say=lines.append)
    files = hub.files("maker/ants")
    assert set(files) == PUSHED == set(pushed.files)
    assert all(content == (folder / name).read_bytes() for name, content in files.items())
    repository = hub.repositories["models", "maker/ants"]
    assert pushed.commit == repository.branches["main"]
    assert len(repository.commits) == 2
    assert not repository.private
    assert pushed.url == f"{hub.url}/maker/ants"
    assert repository.at("main").files["model.safetensors"].lfs
    assert f"uploading {len(PUSHED)} files" in lines[-1]
    assert "maker/ants" in lines[-1]
    assert all(request["headers"].get("authorization") == f"Bearer {TOKEN}" for request in hub.asked("^/api/models/"))


def test_names_of_images_are_pushed_only_when_asked_for_and_removed_when_not(hub, folder):
    push_folder(folder, "maker/ants", include_predictions=True)
    shown = ("plots/mistakes.png", "predictions/test.jsonl", "report.html")
    assert set(hub.files("maker/ants")) == PUSHED | set(shown)
    pushed = push_folder(folder, "maker/ants")
    assert pushed.removed == shown
    assert set(hub.files("maker/ants")) == PUSHED


def test_reports_of_other_weights_are_removed_and_files_of_others_stay(hub, folder, tmp_path):
    api = HfApi(endpoint=hub.url, token=TOKEN)
    api.create_repo("maker/ants")
    for name in ("plots/confusion_test.png", "notes.md", "docs/plots.txt"):
        api.upload_file(path_or_fileobj=b"from before", path_in_repo=name, repo_id="maker/ants")
    pushed = push_folder(folder, "maker/ants")
    assert pushed.removed == ("plots/confusion_test.png",)
    assert set(hub.files("maker/ants")) == PUSHED | {"notes.md", "docs/plots.txt"}


def test_same_push_again_uploads_nothing_and_makes_no_commit(hub, folder):
    first = push_folder(folder, "maker/ants")
    hub.requests.clear()
    assert push_folder(folder, "maker/ants").commit == first.commit
    assert not hub.asked("", "PUT")
    assert not hub.asked("/commit/")


def test_private_repository_is_seen_by_its_owner_only(hub, folder):
    push_folder(folder, "maker/ants", private=True)
    assert hub.repositories["models", "maker/ants"].private
    assert HfApi(endpoint=hub.url, token=TOKEN).model_info("maker/ants").private
    with pytest.raises(OSError, match="404"):
        HfApi(endpoint=hub.url, token="hf_otherwrites").model_info("maker/ants")


def test_what_is_to_be_private_is_never_put_where_everybody_reads_it(hub, folder):
    hub.create("maker/ants")
    with pytest.raises(SharingError, match=r"maker/ants is to be private, but .* everybody can read .*Nothing was upl"):
        push_folder(folder, "maker/ants", private=True)
    assert not hub.files("maker/ants")
    assert not hub.asked("", "PUT")


def test_push_to_a_branch_makes_it_and_leaves_main_as_it_was(hub, folder):
    for _ in range(2):
        pushed = push_folder(folder, "maker/ants", revision="trials/second")
    assert set(hub.files("maker/ants", "trials/second")) == PUSHED
    assert hub.files("maker/ants", "main") == {}
    assert pushed.url == f"{hub.url}/maker/ants/tree/trials/second"
    assert pushed.commit == hub.repositories["models", "maker/ants"].branches["trials/second"]


# Bad input


@pytest.mark.parametrize("name", ["ants", "maker/", "a/b/c", "https://huggingface.co/maker/ants", "", "maker/my ants"])
def test_names_that_are_no_repositories(hub, folder, name):
    with pytest.raises(SharingError, match=r"does not name a repository on the Hub.*write user/name, such as maker/\w"):
        push_folder(folder, name)
    assert not hub.requests


@pytest.mark.parametrize(
    ("revision", "said"), [("0123456789abcdef", "is a commit; write a branch"), ("a b", "no branch can be called")]
)
def test_revisions_that_are_no_branches(hub, folder, revision, said):
    with pytest.raises(SharingError, match=said):
        push_folder(folder, "maker/ants", revision=revision)
    assert not hub.requests


BROKEN = {
    "no folder": (lambda root: shutil.rmtree(root), "there is no folder .*; pass the folder of a saved model"),
    "no config": (lambda root: (root / "config.json").unlink(), "to its end; finish it with `torchthaw train .* --res"),
    "bad config": (lambda root: (root / "config.json").write_text("{"), "config.json cannot be read"),
    "other model": (
        lambda root: (root / "config.json").write_text('{"model_type": "resnet"}'),
        "of the type 'resnet'; pass one that torchthaw saved",
    ),
    "no processor": (lambda root: (root / "preprocessor_config.json").unlink(), "no preprocessor_config.json; save"),
    "no weights": (lambda root: (root / "model.safetensors").unlink(), "no model.safetensors; save it again"),
    "cut weights": (
        lambda root: os.truncate(root / "model.safetensors", 1000),
        "model.safetensors is damaged .*; save it again",
    ),
    "no code": (lambda root: (root / "modeling.py").unlink(), "its code modeling.py is missing; save model and image"),
    "no imported code": (lambda root: (root / "anatomy.py").unlink(), "its code anatomy.py is missing"),
    "no auto_map": (
        lambda root: (root / "config.json").write_text('{"model_type": "torchthaw"}'),
        "loads nowhere without torchthaw",
    ),
    "other weights": (
        lambda root: (root / "results.json").write_text('{"model": {"sha256": "00"}}'),
        "figures of other weights than model.safetensors",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_no_whole_saved_model_is_refused_before_anything_is_sent(hub, tmp_path, case):
    spoil, said = BROKEN[case]
    write_run(tmp_path / "run")
    spoil(tmp_path / "run")
    with pytest.raises(SharingError, match=said) as caught:
        push_folder(tmp_path / "run", "maker/ants")
    assert not isinstance(caught.value, HubError)
    assert caught.value.exit_code == 2
    assert not hub.requests


def test_models_without_card_and_results_can_be_pushed_and_that_is_said(hub, tmp_path):
    write_run(tmp_path / "run")
    for name in ("README.md", "results.json", "recipe.yaml", "audit.json", "LICENSE"):
        (tmp_path / "run" / name).unlink()
    lines = []
    push_folder(tmp_path / "run", "maker/ants", say=lines.append)
    assert "there is no model card (README.md) to push; `torchthaw card` writes one" in lines
    assert "config.json" in hub.files("maker/ants")


def test_sharded_weights_are_pushed_with_their_index(tmp_path):
    write_run(tmp_path / "run")
    root = tmp_path / "run"
    (root / "results.json").unlink()
    (root / "model.safetensors").rename(root / "model-00001-of-00001.safetensors")
    index = {"weight_map": {"weight": "model-00001-of-00001.safetensors"}}
    (root / "model.safetensors.index.json").write_text(json.dumps(index))
    assert {"model-00001-of-00001.safetensors", "model.safetensors.index.json"} <= set(saved_files(root))


@pytest.mark.parametrize(
    ("front", "said"),
    [
        ("license: my own", r"the Hub does not accept the metadata of .*README.md: \"license\" must be one of"),
        ("tags: [1, 2", r"the metadata of .*README.md is not valid"),
        ("model-index: [{name: a, results: [{task: {type: x}}]}]", "metadata of .*README.md"),
    ],
)
def test_cards_with_bad_metadata_are_refused_before_anything_is_made(hub, tmp_path, front, said):
    write_run(tmp_path / "run")
    (tmp_path / "run" / "README.md").write_text(f"---\n{front}\n---\n# Ants\n")
    with pytest.raises(SharingError, match=said):
        push_folder(tmp_path / "run", "maker/ants")
    assert not hub.repositories


# Refusals and faults


def test_read_token_is_told_from_a_wrong_one(hub, folder, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_makerreads")
    with pytest.raises(HubError) as caught:
        push_folder(folder, "maker/ants", private=False, revision="trial")
    assert "the token may not write to maker/ants (403)" in str(caught.value)
    assert "hf auth login" in str(caught.value)
    again = f"{folder} is whole; push it again with `torchthaw push '{folder}' maker/ants --revision trial`"
    assert str(caught.value).endswith(again)
    assert caught.value.exit_code == 1
    with pytest.raises(HubError, match=r"does not know the token, or it has expired \(401\)"):
        push_folder(folder, "maker/ants", token="hf_unknown")
    assert not hub.repositories


def test_token_comes_from_argument_environment_or_login(hub, folder, monkeypatch, tmp_path):
    push_folder(folder, "maker/one", token=f" {TOKEN}\n")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match=r"there is no token for the Hub; .*`hf auth login`, or set HF_TOKEN.* is whole"):
        push_folder(folder, "maker/two")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "token").write_text(TOKEN)
    push_folder(folder, "maker/three")
    assert {name for _, name in hub.repositories} == {"maker/one", "maker/three"}


def test_repository_of_others_is_refused(hub, folder):
    hub.create("other/ants")
    with pytest.raises(HubError, match=r"may not write to other/ants \(403\).*a repository of your own"):
        push_folder(folder, "other/ants")
    assert hub.files("other/ants") == {}


def test_two_503_then_success(hub, folder, waits):
    for part in ("repos/create", "preupload", "objects/batch", "^/lfs/.*signature", "/commit/"):
        hub.fault(part, status=503, times=2, message="Service Unavailable")
    lines = []
    push_folder(folder, "maker/ants", say=lines.append)
    assert set(hub.files("maker/ants")) == PUSHED
    assert all(not fault.times for fault in hub.faults)
    assert [line for line in lines if "trying again" in line] == [
        "the Hub is out of order (503); trying again in 1 s",
        "the Hub is out of order (503); trying again in 2 s",
    ] * 2


@pytest.mark.parametrize("part", ["validate-yaml", "repos/create", "/commit/", "/lfs/"])
@pytest.mark.parametrize("drop", ["before", "after", "close"])
def test_lost_connections_are_made_again(hub, folder, waits, part, drop):
    hub.fault(part, drop=drop, times=1, after_bytes=100)
    pushed = push_folder(folder, "maker/ants")
    assert set(hub.files("maker/ants")) == PUSHED
    assert pushed.commit == hub.repositories["models", "maker/ants"].branches["main"]
    # Also when the commit was made and only the answer was lost.
    assert len(hub.repositories["models", "maker/ants"].commits) == 2


@pytest.mark.parametrize("part", ["repos/create", "revision/main", "/commit/", "preupload", "/lfs/.*signature"])
def test_hub_that_stays_out_of_order_is_asked_a_bounded_number_of_times(hub, folder, waits, part):
    hub.fault(part, status=503, message="maintenance")
    with pytest.raises(HubError, match=r'out of order \(503\) \("maintenance"\).*is whole; push it again with `tor'):
        push_folder(folder, "maker/ants")
    asked = {request["path"] for request in hub.asked(part)}
    # `huggingface_hub` itself asks up to six times for some; that is not done over again.
    assert all(len(hub.asked(path.replace("?", r"\?"))) <= 6 for path in asked)
    assert len(hub.asked(part)) >= 4


def test_no_connection_at_all(hub, folder, waits, monkeypatch):
    hub.stop()
    with pytest.raises(HubError, match=r"the connection to the Hub was lost or could not be made .*check the network"):
        push_folder(folder, "maker/ants")
    assert waits == [1.0, 2.0, 4.0]


def test_hub_that_goes_away_in_the_middle(hub, folder, waits):
    def stop(seconds):
        waits.append(seconds)
        if len(waits) == 1:
            hub.stop()

    hub.fault("objects/batch", status=503, message="shutting down")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "sleep", stop)
        with pytest.raises(
            HubError, match=r"uploading to maker/ants failed: the connection to the Hub was lost .*whole"
        ):
            push_folder(folder, "maker/ants")
    assert hub.files("maker/ants") == {}


def test_offline_mode_is_named(hub, folder, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match=r"HF_HUB_OFFLINE is set; unset it.*is whole"):
        push_folder(folder, "maker/ants")


@pytest.mark.parametrize(
    ("status", "message", "part"),
    [
        (403, "Private repository storage limit reached, please upgrade your plan", "preupload"),
        (507, "Insufficient Storage", "objects/batch"),
        (413, "Payload Too Large", "/commit/"),
        (402, "Payment Required", "repos/create"),
    ],
)
def test_full_quota_is_told_from_missing_rights_and_not_tried_again(hub, folder, waits, status, message, part):
    hub.fault(part, status=status, message=message)
    with pytest.raises(HubError) as caught:
        push_folder(folder, "maker/ants")
    said = f'the Hub has no room for it, or the files are too large ({status}) ("{message}"); remove repositories of '
    assert said in str(caught.value)
    assert f"push it again with `torchthaw push '{folder}' maker/ants`" in str(caught.value)
    assert len(hub.asked(part)) == 1
    assert waits == []


def test_too_many_requests_wait_as_long_as_the_hub_asks(hub, folder, waits):
    hub.fault("repos/create", status=429, times=1, headers={"Retry-After": "17"}, message="slow down")
    lines = []
    push_folder(folder, "maker/ants", say=lines.append)
    assert waits == [17.0]
    assert "too many requests for the Hub (429); trying again in 17 s" in lines
    hub.fault("repos/create", status=429, headers={"RateLimit": '"api";r=0;t=4000'}, message="slow down")
    with pytest.raises(HubError, match=r"too many requests \(429\).*wait 4001 seconds"):
        push_folder(folder, "maker/ants")
    assert waits == [17.0, 60.0, 60.0, 60.0]


def test_commits_of_others_in_between_are_no_failure(hub, folder, waits):
    hub.fault("/commit/", status=412, times=1, message="A commit has happened since. Please refresh and try again.")
    push_folder(folder, "maker/ants")
    assert set(hub.files("maker/ants")) == PUSHED
    hub.fault("/commit/", status=409, message="another conflicting operation")
    (folder.parent / "second").mkdir()
    with pytest.raises(HubError, match=r"others change maker/bees at the same time \(409\)"):
        push_folder(folder, "maker/bees")


def test_other_refusals_are_passed_on(hub, folder):
    hub.fault("/commit/", status=400, times=1, message="we do not like\nplots/curves.png \x1b[31m")
    with pytest.raises(HubError, match=r"refuses it as it is \(400\) \(.*we do not like plots/curves.png") as caught:
        push_folder(folder, "maker/ants")
    assert "\x1b" not in str(caught.value)
    assert "\n" not in str(caught.value)
    hub.fault("/branch/", status=404, times=1, message="Repository not found")
    with pytest.raises(HubError, match=r"there is no repository maker/ants, or the token may not see it \(404\)"):
        push_folder(folder, "maker/ants", revision="trial")


# Kill and go on


@pytest.mark.parametrize("where", ["second object", "commit"])
def test_push_killed_in_the_middle_goes_on_and_sends_no_object_twice(hub, folder, where):
    plot = hashlib.sha256((folder / "plots/curves.png").read_bytes()).hexdigest()
    weights = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    held = plot if where == "second object" else "/commit/"
    fault = hub.fault(held, delay=120, times=1)
    process = run_push(folder, "maker/ants", hub)
    wait_for(lambda: hub.asked(held) and weights in hub.repositories["models", "maker/ants"].objects)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert hub.files("maker/ants") == {}, "nothing is there before all of it is"
    assert fault.times == 0
    hub.requests.clear()
    process = run_push(folder, "maker/ants", hub)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert {name: hashlib.sha256(content).hexdigest() for name, content in hub.files("maker/ants").items()} == {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in PUSHED
    }
    assert not hub.asked(weights), "the weights were there already"
    assert len(hub.asked(plot, "PUT")) == (1 if where == "second object" else 0)
    assert TOKEN not in out + err


def test_push_interrupted_by_the_user_leaves_everything_as_it_was(hub, folder):
    hub.fault("/commit/", delay=120, times=1)
    process = run_push(folder, "maker/ants", hub)
    wait_for(lambda: hub.asked("/commit/"))
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert hub.files("maker/ants") == {}


# Secrets


@pytest.mark.parametrize("fault", [None, {"status": 400}])
def test_token_is_in_no_file_and_no_output_after_a_push(hub, folder, fault):
    if fault:
        hub.fault("repos/create", message=f"what is Bearer {TOKEN}?", **fault)
    process = run_push(folder, "maker/ants", hub, HF_HUB_VERBOSITY="debug")
    out, err = process.communicate(timeout=120)
    assert process.returncode == (1 if fault else 0), err
    assert "push it again" in err if fault else out
    assert TOKEN.removeprefix("hf_") not in out + err
    written = [file for file in folder.parent.rglob("*") if file.is_file()]
    assert not [file for file in written if TOKEN.encode() in file.read_bytes()]


def test_tokens_that_the_hub_sends_back_are_not_shown(hub, folder):
    hub.tokens["plain-secret"] = ("maker", "write")
    hub.fault("/commit/", status=400, message="got plain-secret, Bearer of-others and hf_ofsomebody")
    with pytest.raises(HubError, match=r"got \*\*\*, Bearer \*\*\* and hf_\*\*\*"):
        push_folder(folder, "maker/ants", token="plain-secret")


@pytest.mark.parametrize("token", ["hf_bad token", "hf_bad\ntoken", "hf_bädtoken"])
def test_tokens_that_no_header_can_have_are_not_shown(hub, folder, token):
    with pytest.raises(HubError, match=r"the token has characters that no token has") as caught:
        push_folder(folder, "maker/ants", token=token)
    assert "bad" not in str(caught.value).replace(str(folder), "")
