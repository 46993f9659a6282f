"""Imports go one way, and nothing heavy is imported before it is needed."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import torchthaw

PACKAGE = Path(torchthaw.__file__).parent
# Each layer may import itself and what stands before it; backbones and stages know nothing of each other.
LAYERS = [
    {"_version", "errors"},
    {"backbones", "stages"},
    {"data"},
    {"evaluation"},
    {"sharing"},
    {"training"},
    {"recipe", "console"},
    {"auditing", "user_errors", "figure_tables", "plan_rows"},
    {"data_preparation", "preparation"},
    {"source_tasks"},
    {"single_run"},
    {"run_console"},
    {"cross_validation"},
    {"run", "dry_run"},
    {"use", "audits", "rate_search"},
    {"evaluations", "soups"},
    {"cli_options", "cli_sharing"},
    {"cli_find_lr"},
    {"cli"},
    {"__main__"},
]


def layer_of(part: str) -> int:
    return next(number for number, names in enumerate(LAYERS) if part in names)


def imports_of(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("torchthaw."):
            found.add(node.module.split(".")[1])
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("torchthaw.")}
    return found


@pytest.mark.parametrize(
    "file", [f for f in sorted(PACKAGE.rglob("*.py")) if f != PACKAGE / "__init__.py"], ids=lambda f: f.stem
)
def test_imports_go_one_way(file):
    own = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for imported in imports_of(file):
        assert layer_of(imported) < layer_of(own) or imported == own, f"{own} imports {imported}"


def test_backbones_and_stages_know_nothing_of_the_trainer():
    for folder in ("backbones", "stages"):
        for file in (PACKAGE / folder).glob("*.py"):
            assert "Trainer" not in {
                alias.name
                for node in ast.walk(ast.parse(file.read_text()))
                if isinstance(node, ast.ImportFrom)
                for alias in node.names
            }, file


def test_help_answers_without_torch():
    code = "import runpy, sys; sys.argv = ['torchthaw', '--help']; runpy.run_module('torchthaw', run_name='__main__')"
    watch = "import atexit, sys; atexit.register(lambda: sys.stderr.write('TORCH' * ('torch' in sys.modules))); "
    done = subprocess.run([sys.executable, "-c", watch + code], capture_output=True, text=True)
    assert "train" in done.stdout
    assert "TORCH" not in done.stderr


def test_importing_registers_the_auto_classes_and_prints_nothing():
    code = (
        "import torchthaw; from transformers import AutoConfig; "
        "print(type(AutoConfig.for_model('torchthaw', architecture='resnet18')).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "TorchvisionConfig\n"
