"""The cards of real runs in `model_cards/` are what torchthaw makes of the results beside them, and nothing else."""

import json
import shutil
from pathlib import Path

import pytest

from torchthaw.sharing import card_data
from torchthaw.sharing.card import write_card

ROOT = Path(__file__).resolve().parents[2] / "model_cards"
RUNS = sorted(folder.name for folder in ROOT.iterdir() if folder.is_dir())


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """Returns a function that copies a run's folder, of which the weights are not in the repository."""

    def copied(name):
        folder = tmp_path / name
        shutil.copytree(ROOT / name, folder)
        (folder / "README.md").unlink()
        (folder / "model.safetensors").touch()
        measured = json.loads((folder / "results.json").read_text(encoding="utf-8"))["model"]["sha256"]
        monkeypatch.setattr(card_data, "_sha256", lambda file: measured)
        return folder

    return copied


def test_there_are_cards_of_real_runs():
    assert {"quickstart", "staged-hymenoptera", "two_phase-trashnet"} <= set(RUNS)


@pytest.mark.parametrize("name", RUNS)
def test_a_card_made_anew_is_the_same(name, copy):
    assert write_card(copy(name)).read_bytes() == (ROOT / name / "README.md").read_bytes()


@pytest.mark.parametrize("name", RUNS)
def test_a_card_follows_its_results(name, copy):
    file = copy(name) / "results.json"
    results = json.loads(file.read_text(encoding="utf-8"))
    results["validation"]["accuracy"] = 0.123456
    file.write_text(json.dumps(results), encoding="utf-8")
    card = write_card(file.parent).read_text(encoding="utf-8")
    assert "value: 0.123456\n" in card
    assert "| accuracy | 0.1235 |" in card
