"""Some files travel with saved models as their code, so they must work without the rest of the package."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from model_code import CODE_FILES

import torchthaw.backbones

SOURCE = Path(torchthaw.backbones.__file__).parent


@pytest.mark.parametrize("name", CODE_FILES)
def test_imports(name: str):
    allowed = {"torch", "torchvision", "transformers", "PIL", "numpy", *sys.stdlib_module_names}
    for node in ast.walk(ast.parse((SOURCE / name).read_text())):
        if isinstance(node, ast.Import):
            assert {alias.name.split(".")[0] for alias in node.names} <= allowed
        elif isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1
            assert f"{node.module}.py" in CODE_FILES
        elif isinstance(node, ast.ImportFrom):
            assert str(node.module).split(".")[0] in allowed


def test_copies_work_where_torchthaw_is_not_installed(tmp_path: Path):
    package = tmp_path / "travelled"
    package.mkdir()
    (package / "__init__.py").touch()
    for name in CODE_FILES:
        shutil.copy(SOURCE / name, package)
    program = """
import sys
sys.modules["torchthaw"] = None
import torch
from PIL import Image
from travelled.image_processing import TorchvisionImageProcessor
from travelled.modeling import TorchvisionForImageClassification

model = TorchvisionForImageClassification.from_torchvision("shufflenet_v2_x0_5", None, id2label=["ant", "bee"])
model.save_pretrained("saved")
model = TorchvisionForImageClassification.from_pretrained("saved")
pixels = TorchvisionImageProcessor.from_torchvision("shufflenet_v2_x0_5", None)(Image.new("RGB", (60, 50)), "pt")
print(tuple(model(**pixels).logits.shape))
"""
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.stdout.strip() == "(1, 2)", result.stderr[-2000:]
