"""The card's front matter: valid for the Hub, equal to the results, nothing invented, a person's changes kept."""

import json
import re
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results
from pydantic import ValidationError

from torchthaw.errors import SharingError
from torchthaw.sharing.card import write_card
from torchthaw.sharing.card_metadata import join_metadata, remembered
from torchthaw.sharing.card_options import CardOptions

SPLIT = {"num_images": 153, "accuracy": 0.9281045751633987, "macro_f1": 1 / 3, "balanced_accuracy": 0.1 + 0.2}


def write(folder: Path, **results: object) -> dict:
    """Writes a card for a folder with such results, and returns its front matter as huggingface_hub reads it."""
    folder.mkdir(exist_ok=True)
    config = {"architecture": "resnet18", "id2label": {"0": "no", "1": "yes"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "results.json").write_text(json.dumps(results))
    return read(write_card(folder))


def read(file: Path) -> dict:
    metadata = ModelCard.load(file).data.to_dict()
    # Nothing is lost or changed on the way through the Hub's own classes.
    assert metadata == yaml.safe_load(file.read_text().split("---\n")[1])
    return metadata


def edit(folder: Path, old: str, new: str) -> None:
    card = (folder / "README.md").read_text()
    assert old in card
    (folder / "README.md").write_text(card.replace(old, new, 1))


def test_what_every_card_says(tmp_path):
    assert write(tmp_path) == {
        "library_name": "transformers",
        "pipeline_tag": "image-classification",
        "tags": ["torchthaw", "torchvision", "image-classification", "resnet18"],
    }


def test_figures_are_those_of_the_results_unrounded(tmp_path):
    metadata = write(tmp_path, validation=SPLIT, test=SPLIT | {"accuracy": 0.875}, data={"source": "a/photos"})
    name, entries = model_index_to_eval_results(metadata["model-index"])
    assert name == "resnet18 fine-tuned on photos"
    found = {(entry.dataset_split, entry.metric_type): entry for entry in entries}
    assert {key: entry.metric_value for key, entry in found.items()} == {
        ("validation", "accuracy"): 0.9281045751633987,
        ("validation", "f1"): 1 / 3,
        ("validation", "balanced_accuracy"): 0.1 + 0.2,
        ("test", "accuracy"): 0.875,
        ("test", "f1"): 1 / 3,
        ("test", "balanced_accuracy"): 0.1 + 0.2,
    }
    assert {entry.task_type for entry in entries} == {"image-classification"}
    assert {(entry.dataset_type, entry.dataset_name) for entry in entries} == {("imagefolder", "photos")}
    assert found["test", "f1"].metric_args == {"average": "macro"}
    assert metadata["metrics"] == ["accuracy", "f1"]
    assert "datasets" not in metadata


def test_data_of_the_hub_is_linked_with_its_revision(tmp_path):
    data = {"source": "user/beans", "hub": True, "config": "small", "revision": "5503434ddd753f42"}
    metadata = write(tmp_path, test=SPLIT, data=data)
    assert metadata["datasets"] == ["user/beans"]
    assert metadata["model-index"][0]["results"][0]["dataset"] == {
        "type": "user/beans", "name": "user/beans", "config": "small", "split": "test", "revision": "5503434ddd753f42",
    }  # fmt: skip


@pytest.mark.parametrize(
    "weights", ["ResNet18_Weights.IMAGENET1K_V1", "DEFAULT", "weights.pth", "run1", "builtin", None]
)
def test_a_base_model_is_named_only_if_it_is_on_the_hub(tmp_path, weights):
    assert "base_model" not in write(tmp_path, weights=weights)
    assert write(tmp_path, weights="user/pets")["base_model"] == "user/pets"
    assert write(tmp_path, weights=weights, card={"base_model": "a/b"})["base_model"] == "a/b"


def test_the_author_s_metadata(tmp_path):
    card = {
        "license": "openrail++",
        "language": "no",
        "tags": ["insects", "torchthaw"],
        "datasets": ["user/ants", "user/bees"],
        "widget": [{"src": "https://example.org/a.jpg", "title": "An ant"}, {"src": "https://example.org/b.jpg"}],
    }
    metadata = write(tmp_path, card=card)
    assert metadata["license"] == "openrail++"
    assert metadata["language"] == ["no"]
    assert metadata["tags"] == ["torchthaw", "torchvision", "image-classification", "resnet18", "insects"]
    assert metadata["datasets"] == ["user/ants", "user/bees"]
    assert metadata["widget"] == [
        {"src": "https://example.org/a.jpg", "example_title": "An ant"}, {"src": "https://example.org/b.jpg"},
    ]  # fmt: skip


def test_emissions_are_grams_with_their_source(tmp_path):
    assert "co2_eq_emissions" not in write(tmp_path)
    metadata = write(tmp_path, emissions_kg=0.00123456789, hardware={"device": "NVIDIA H100", "cores": 2})
    assert metadata["co2_eq_emissions"] == {
        "emissions": 1.23457, "source": "codecarbon", "training_type": "fine-tuning", "hardware_used": "NVIDIA H100",
    }  # fmt: skip


def test_front_matter_cannot_be_left_by_a_name(tmp_path):
    for name in ("a\n---\nlicense: mit", "---", "{a: [", "'\"", "# x", "é\u2028\x85b", "- a", "null", "1.0"):
        tag = name.splitlines()[0]
        metadata = write(tmp_path, validation=SPLIT, card={"title": name, "tags": [tag]})
        assert set(metadata) == {"library_name", "pipeline_tag", "tags", "metrics", "model-index"}
        assert metadata["tags"][-1] == tag
        assert isinstance(metadata["model-index"][0]["name"], str)


# What a person changes


def test_license_language_and_tags_of_a_person_stay(tmp_path):
    write(tmp_path, card={"license": "mit", "language": "en"})
    edit(tmp_path, "license: mit", "license: apache-2.0")
    edit(tmp_path, "- en", "- no")
    edit(tmp_path, "- resnet18", "- resnet18\n- bees\n- torchvision")
    edit(tmp_path, "pipeline_tag: image-classification", "pipeline_tag: other\nthumbnail: https://example.org/a.png")
    for _ in range(2):
        metadata = read(write_card(tmp_path))
        assert metadata == {
            "library_name": "transformers",
            "pipeline_tag": "image-classification",
            "license": "apache-2.0",
            "language": ["no"],
            "tags": ["torchthaw", "torchvision", "image-classification", "resnet18", "bees"],
            "thumbnail": "https://example.org/a.png",
        }
    assert "under the license apache-2.0" in (tmp_path / "README.md").read_text()


def test_what_was_generated_goes_with_its_reason(tmp_path):
    write(tmp_path, validation=SPLIT, emissions_kg=1.0, data={"source": "a/b", "hub": True},
          card={"license": "mit", "tags": ["old"]})  # fmt: skip
    assert set(write(tmp_path)) == {"library_name", "pipeline_tag", "tags"}
    assert "- old" not in (tmp_path / "README.md").read_text()
    assert write(tmp_path, card={"license": "bsd-3-clause", "tags": ["old"]})["license"] == "bsd-3-clause"
    edit(tmp_path, "- old", "- old\n- own")
    assert write(tmp_path)["tags"][-2:] == ["resnet18", "own"]


def test_the_note_of_what_was_generated_stays_a_comment(tmp_path):
    write(tmp_path, card={"tags": ["--> <b>bold</b>"]})
    card = (tmp_path / "README.md").read_text()
    note = re.search(r"^<!-- torchthaw:metadata .*", card, re.MULTILINE)[0]
    assert note.index("-->") == len(note) - 3
    assert "--> <b>bold</b>" not in write(tmp_path)["tags"]


def test_what_a_person_adds_stays_where_nothing_is_generated(tmp_path):
    write(tmp_path)
    edit(tmp_path, "library_name", "license: mit\nbase_model: a/b\ndatasets: [c/d]\nyes_or: no\nlibrary_name")
    metadata = write(tmp_path, validation=SPLIT)
    assert (metadata["license"], metadata["base_model"], metadata["datasets"]) == ("mit", "a/b", ["c/d"])
    assert metadata["yes_or"] == "no"
    assert metadata["model-index"][0]["results"][0]["metrics"][0]["value"] == SPLIT["accuracy"]


def test_without_the_note_of_what_was_generated_a_person_s_values_count(tmp_path):
    write(tmp_path, card={"license": "mit"})
    card = (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").write_text("\n".join(x for x in card.split("\n") if "torchthaw:metadata" not in x))
    assert write(tmp_path, card={"license": "gpl-3.0"})["license"] == "mit"


def test_figures_of_a_person_do_not_replace_measured_ones():
    generated = {"model-index": [1], "tags": ["a"]}
    assert join_metadata(generated, {"model-index": [2]}, {}) == generated
    assert join_metadata({"tags": []}, {"model-index": [2]}, remembered(generated)) == {"tags": []}
    assert join_metadata({"tags": []}, {"model-index": [2]}, {}) == {"tags": [], "model-index": [2]}
    assert join_metadata({"tags": ["a"]}, {"tags": "b"}, {}) == {"tags": ["a", "b"]}
    assert join_metadata({"tags": ["a"]}, {"tags": None}, {}) == {"tags": ["a"]}


def test_front_matter_that_the_hub_s_classes_refuse_is_named(tmp_path):
    write(tmp_path)
    edit(tmp_path, "library_name", "model-index: 3\nlibrary_name")
    with pytest.raises(SharingError, match=r"front matter of .*README.md does not fit the Hub"):
        write_card(tmp_path)


# Options


@pytest.mark.parametrize(
    "options",
    [
        {"license": "Apache 2.0"},
        {"license": "other", "license_name": "mine"},
        {"license": "other", "license_name": "mine", "license_link": "javascript:x"},
        {"license": "mit", "license_name": "mine"},
        {"license_link": "https://example.org"},
        {"language": ["english"]},
        {"tags": [" a"]},
        {"tags": ["a\nb"]},
        {"tags": [""]},
        {"tags": ["a\x85b"]},
        {"datasets": ["/data/photos"]},
        {"base_model": "a/b/c"},
        {"repository": "a b"},
        {"widget": [{"src": "a.jpg"}]},
        {"unknown": 1},
    ],
)
def test_options_that_the_hub_would_refuse_are_refused(options):
    with pytest.raises(ValidationError):
        CardOptions(**options)


def test_options_survive_json():
    options = CardOptions(
        license="other",
        license_name="x",
        license_link="LICENSE",
        language="en",
        tags=("a b",),
        widget=[{"src": "https://x.y"}],
    )
    assert CardOptions.model_validate(json.loads(options.model_dump_json())) == options
