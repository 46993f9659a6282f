"""What is saved loads where torchthaw is not installed, and gives the same.

The processes here see copies of nothing but torch, torchvision, transformers and what these require, as after
`pip install torch torchvision transformers`.
"""

import json
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import pipeline

import torchthaw
from torchthaw import TorchvisionForImageClassification, TorchvisionImageProcessor, TorchvisionModel
from torchthaw.errors import SavedModelError
from torchthaw.sharing.fresh_process import check_saved_folder

ONE_OF_EACH_FAMILY = [
    "alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "googlenet", "inception_v3", "maxvit_t", "mnasnet0_5",
    "mobilenet_v2", "mobilenet_v3_small", "regnet_y_400mf", "resnet18", "shufflenet_v2_x0_5", "squeezenet1_1", "swin_t",
    "swin_v2_t", "vgg11_bn", "vit_b_16",
]  # fmt: skip
CLASSES = ["ant", "bee", "häßlich <b>"]

CLASSIFY = """
import importlib.util, json, sys
assert importlib.util.find_spec("torchthaw") is None
assert importlib.util.find_spec("datasets") is None
import torch
from PIL import Image
from transformers import pipeline
torch.set_num_threads(1)
found = {}
for folder in sys.argv[2:]:
    classify = pipeline("image-classification", model=folder, trust_remote_code=True)
    found[folder] = classify(Image.open(sys.argv[1]), top_k=3)
print(json.dumps(found))
"""


@pytest.fixture(scope="session")
def plain_environment(tmp_path_factory):
    """A folder with links to the installed packages that torch, torchvision and transformers need, and no others."""
    folder = tmp_path_factory.mktemp("site-packages")
    wanted, seen = ["torch", "torchvision", "transformers", "pillow"], set()
    while wanted:
        name = wanted.pop()
        try:
            found = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        key = re.sub(r"[-_.]+", "-", found.metadata["Name"]).lower()
        if key in seen:
            continue
        seen.add(key)
        required = [line for line in found.requires or [] if "extra ==" not in line]
        wanted += [re.split(r"[^\w.-]", line, maxsplit=1)[0] for line in required]
        for top in {
            Path(file).parts[0] for file in found.files or [] if Path(file).parts[0] not in ("..", "__pycache__")
        }:
            link, target = folder / top, Path(found.locate_file(top))
            if not link.exists() and target.exists():
                link.symlink_to(target)
    assert "torchthaw" not in seen
    return folder


def run_without_torchthaw(plain_environment, program, *arguments, cwd):
    environment = {key: os.environ[key] for key in ("PATH", "HOME", "SYSTEMROOT") if key in os.environ}
    environment |= {
        "PYTHONPATH": str(plain_environment), "HF_HUB_OFFLINE": "1", "HF_HOME": str(cwd / "cache"),
        "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1",
    }  # fmt: skip
    # -S: without the packages of this environment.
    done = subprocess.run(
        [sys.executable, "-S", "-c", program, *arguments],
        cwd=cwd, env=environment, capture_output=True, text=True, encoding="utf-8", timeout=550,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def save(architecture, folder, seed=0):
    torch.manual_seed(seed)
    weights = "builtin" if architecture == "shufflenet_v2_x0_5" else None
    model = TorchvisionForImageClassification.from_torchvision(architecture, weights, id2label=CLASSES)
    model.save_pretrained(folder)
    TorchvisionImageProcessor.from_torchvision(architecture, weights).save_pretrained(folder)
    return model


@pytest.fixture
def photo(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, size=(300, 240, 3), dtype=np.uint8)
    file = tmp_path / "photo.png"
    Image.fromarray(pixels).save(file)
    return file


@pytest.mark.parametrize("part", range(3))
def test_every_family_gives_the_same_scores_without_torchthaw(part, plain_environment, tmp_path, photo):
    folders = [tmp_path / name for name in ONE_OF_EACH_FAMILY[part::3]]
    for folder in folders:
        save(folder.name, folder)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        expected = {str(f): pipeline("image-classification", model=str(f))(Image.open(photo), top_k=3) for f in folders}
    finally:
        torch.set_num_threads(threads)
    found = run_without_torchthaw(plain_environment, CLASSIFY, str(photo), *map(str, folders), cwd=tmp_path)
    for folder, scores in expected.items():
        assert {score["label"] for score in found[folder]} == set(CLASSES)
        assert {s["label"]: s["score"] for s in found[folder]} == pytest.approx(
            {s["label"]: s["score"] for s in scores}, abs=1e-5
        ), folder


def test_auto_classes_and_saving_again_without_torchthaw(plain_environment, tmp_path, photo):
    model = save("shufflenet_v2_x0_5", tmp_path / "first")
    program = """
import json, sys, torch
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification
options = {"trust_remote_code": True}
first = sys.argv[1]
assert AutoConfig.from_pretrained(first, **options).architecture == "shufflenet_v2_x0_5"
model = AutoModelForImageClassification.from_pretrained(first, **options)
processor = AutoImageProcessor.from_pretrained(first, **options)
model.save_pretrained("second")
processor.save_pretrained("second")
features = AutoModel.from_pretrained("second", **options)
pixels = processor(Image.open(sys.argv[2]), return_tensors="pt")
again = AutoModelForImageClassification.from_pretrained("second", **options)
with torch.inference_mode():
    print(json.dumps({
        "logits": [m(**pixels).logits.tolist() for m in (model, again)],
        "features": list(features(**pixels).pooler_output.shape),
        "groups": list(again.layer_groups()),
    }))
"""
    found = run_without_torchthaw(plain_environment, program, str(tmp_path / "first"), str(photo), cwd=tmp_path)
    processor = TorchvisionImageProcessor.from_pretrained(tmp_path / "first")
    with torch.inference_mode():
        logits = model(**processor(Image.open(photo), return_tensors="pt")).logits
    for got in found["logits"]:
        assert torch.tensor(got) == pytest.approx(logits, abs=1e-5)
    assert found["features"] == [1, 1024]
    assert found["groups"] == list(model.layer_groups())
    # What was saved there is a folder as torchthaw saves it.
    back = TorchvisionForImageClassification.from_pretrained(tmp_path / "second")
    assert all(torch.equal(a, b) for a, b in zip(back.state_dict().values(), model.state_dict().values(), strict=True))
    code = Path(torchthaw.__file__).parent / "backbones"
    for file in (tmp_path / "second").glob("*.py"):
        assert file.read_bytes() == (code / file.name).read_bytes()


def test_with_torchthaw_the_packaged_code_is_used_and_no_flag_is_needed(tmp_path):
    save("shufflenet_v2_x0_5", tmp_path / "saved")
    for file in (tmp_path / "saved").glob("*.py"):
        file.write_text("raise RuntimeError('this copy must not be run')\n")
    program = """
import builtins, sys, torchthaw
from transformers import AutoModelForImageClassification, pipeline
def ask(question):
    sys.exit(f"asked: {question}")
builtins.input = ask
for options in ({}, {"trust_remote_code": True}):
    found = pipeline("image-classification", model=sys.argv[1], **options)
    assert type(found.model) is torchthaw.TorchvisionForImageClassification, type(found.model)
    assert type(found.image_processor) is torchthaw.TorchvisionImageProcessor
"""
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "saved")], check=True, timeout=300)


def test_features_alone_are_saved_with_their_code(tmp_path):
    save("shufflenet_v2_x0_5", tmp_path / "classifier")
    TorchvisionModel.from_pretrained(tmp_path / "classifier").save_pretrained(tmp_path / "features")
    assert json.loads((tmp_path / "features" / "config.json").read_text())["auto_map"]["AutoModel"]
    assert (tmp_path / "features" / "modeling.py").is_file()


def test_a_model_from_the_hub_is_saved_with_its_own_code(tmp_path):
    save("shufflenet_v2_x0_5", tmp_path / "saved")
    file = tmp_path / "saved" / "config.json"
    config = json.loads(file.read_text())
    # So transformers names classes that it loads from a repository.
    config["auto_map"] = {key: f"user/name--{value}" for key, value in config["auto_map"].items()}
    file.write_text(json.dumps(config))
    TorchvisionForImageClassification.from_pretrained(tmp_path / "saved").save_pretrained(tmp_path / "again")
    assert "user/name" not in (tmp_path / "again" / "config.json").read_text()


# The check that a run ends with


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    model = save("shufflenet_v2_x0_5", folder)
    random = np.random.default_rng(0)
    images = [Image.fromarray(random.integers(0, 255, (50, 60, 3), dtype=np.uint8)) for _ in range(3)]
    processor = TorchvisionImageProcessor.from_pretrained(folder)
    with torch.inference_mode():
        logits = model(**processor(images, return_tensors="pt")).logits.double().numpy()
    return folder, images, logits


def test_check_passes_and_tells_the_difference(saved):
    folder, images, logits = saved
    checked = check_saved_folder(folder, images, logits, CLASSES)
    assert checked["images"] == 3
    assert 0 <= checked["largest_difference"] < 1e-5


def test_check_sees_other_logits_names_and_pixels(saved, tmp_path):
    folder, images, logits = saved
    with pytest.raises(SavedModelError, match="logits that differ by up to 0.01 on 3 validation images"):
        check_saved_folder(folder, images, logits + 0.01 * np.eye(3)[1], CLASSES)
    with pytest.raises(SavedModelError, match="class names"):
        check_saved_folder(folder, images, logits, CLASSES[::-1])
    with pytest.raises(SavedModelError, match="logits that differ"):
        check_saved_folder(folder, images[::-1], logits, CLASSES)


def test_check_fails_where_code_is_missing(saved, tmp_path):
    folder, images, logits = saved
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in folder.iterdir():
        if file.name != "network.py":
            (broken / file.name).write_bytes(file.read_bytes())
    with pytest.raises(SavedModelError, match=r"cannot load it without torchthaw:[\s\S]*network"):
        check_saved_folder(broken, images, logits, CLASSES)
