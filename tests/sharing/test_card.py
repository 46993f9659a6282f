"""The card says what the files say, to the digit, shows every text as text, and keeps what people add."""

import hashlib
import json
import re
import shutil
import tempfile
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from torchthaw.errors import SharingError
from torchthaw.evaluation.metrics import classification_metrics
from torchthaw.sharing.card import render_card, template_folder, write_card
from torchthaw.sharing.card_data import load_card_data
from torchthaw.sharing.card_sections import BEGIN, END
from torchthaw.sharing.markdown import code_block, inline, line, shell_command

WEIGHTS = b"weights of the run"
HOSTILE = [
    "<script>alert(1)</script>", "a|b", "{{ 7*7 }}", "---", "`code`", "*bold* _it_", "[x](http://evil.example)",
    "![i](x.png)", "<!-- torchthaw:end -->", "1. first", "# head", "two\nlines", "&lt;b&gt;", "\\(x\\) $$y$$",
    "https://evil.example", "www.evil.example", "a@b.example", "~~gone~~", "{% raw %}", "Ω 猫 🐈", "\u202egnol\x00",
    "| - |", "- item", "> quote", "+", "====", "[^1]", "<img src=x onerror=y>", "</td></tr>", "```", "&#60;b>", ": x",
]  # fmt: skip


def figures(names: list[str], images: int, seed: int) -> dict:
    random = np.random.default_rng(seed)
    labels = np.arange(images) % len(names)
    logits = random.normal(size=(images, len(names))) + 1.5 * np.eye(len(names))[labels]
    return classification_metrics(logits, labels, names)


def make_results(names: list[str], *, images: int = 60) -> dict:
    comparison = {
        "metric": "accuracy", "before": 0.6470588235294118, "after": 0.8169934640522876, "difference": 0.1699346405,
        "interval": [0.10448022977930321, 0.20088170241116765], "p_value": 2.556e-06,
        "method": "exact McNemar test", "wins": 29, "losses": 3,
    }  # fmt: skip
    stage = {
        "name": "head", "epochs": 3, "steps": 21, "seconds": 5.277, "train_images_per_second": 41.88,
        "trainable_parameters": 2562, "best_metric": 0.8169934640522876, "learning_rates": {"head": 0.001},
        "batch_norm": "eval", "accepted": True, "reason": "better, kept", "comparison": comparison, "changes": {},
        "frozen_unchanged": True, "ended_early": None,
    }  # fmt: skip
    worse = {"before": 0.8169934640522876, "after": 0.7712418300653595, "difference": -0.0457516339869281,
             "interval": [-0.0912, 0.0159], "p_value": 0.0308837890625}  # fmt: skip
    last = stage | {
        "name": "all", "learning_rates": {"stem": 7.29e-07, "stage1": 2.43e-06, "head": 3e-4}, "accepted": False,
        "reason": "validation accuracy 0.8170 -> 0.7712: worse, not kept", "comparison": comparison | worse,
    }  # fmt: skip
    counts = {name: 10 + index for index, name in enumerate(names)}
    return {
        "backbone": "mobilenet_v2",
        "weights": "MobileNet_V2_Weights.IMAGENET1K_V2",
        "seed": 3,
        "metric": "accuracy",
        "num_images": {"train": sum(counts.values()), "validation": images, "test": images + 7},
        "dropped_images": [{"path": "train/ants/broken.gif", "reason": "is empty (0 bytes)"}],
        "classes": names,
        "validation": figures(names, images, seed=1),
        "test": figures(names, images + 7, seed=2),
        "gate": {"gate": "best", "min_gain": 0.0, "on_reject": "continue"},
        "stages": [stage, last],
        "seconds_total": 1232.631,
        "peak_memory_mb": 1250.5,
        "versions": {"torchthaw": "0.1.0", "python": "3.11.7", "torch": "2.15.0"},
        "model": {
            "sha256": hashlib.sha256(WEIGHTS).hexdigest(), "parameters": 2226434, "image_size": 128, "plan": "staged",
        },
        "data": {
            "source": "/home/someone/photos", "hub": False, "revision": None,
            "splits": {
                "train": {"origin": "the rest", "share": None, "counts": counts},
                "validation": {"origin": "given", "share": None, "counts": {}},
                "test": {"origin": "cut off", "share": 0.1, "counts": {}},
            },
            "split_by": "image", "method": "stratified by class, seed 3",
        },
        "test_reads": 1,
        "command": "torchthaw train staged --data /home/someone/photos --set output=/tmp/run1",
        "date": "2026-11-21",
        "hardware": {"device": "cpu", "cores": 2, "platform": "Linux"},
        "saved_folder": {"images": 32, "largest_difference": 0.0},
    }  # fmt: skip


def make_folder(folder: Path, results: dict | None, *, names: list[str], recipe: dict | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architecture": "mobilenet_v2",
        "id2label": {str(index): name for index, name in enumerate(names)},
        "image_size": 128,
        "auto_map": {"AutoConfig": "configuration.TorchvisionConfig"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    if results is not None:
        (folder / "results.json").write_text(json.dumps(results))
    if recipe is not None:
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    names = ["ants", "bees", "wasps"]
    recipe = {"backbone": "mobilenet_v2", "data": {"path": "/home/someone/photos"}, "card": {"title": "Insects"}}
    folder = make_folder(tmp_path / "run", make_results(names), names=names, recipe=recipe)
    (folder / "plots").mkdir()
    for name in ("curves.png", "reliability_test.png"):
        (folder / "plots" / name).write_bytes(b"png")
    return folder


def change(folder: Path, file: str = "results.json", **values: object) -> Path:
    document = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(document | values))
    return folder


def remove(folder: Path, *keys: str) -> Path:
    document = json.loads((folder / "results.json").read_text())
    (folder / "results.json").write_text(json.dumps({k: v for k, v in document.items() if k not in keys}))
    return folder


class Page(HTMLParser):
    """What a reader of a card sees: tables by head, text without code blocks, tags, links."""

    def __init__(self, card: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.links: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.text = ""
        self.in_block = self.in_cell = False
        html = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render(body_of(card))
        self.html = html
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.add(tag)
        self.links += [value for key, value in attrs if key in ("href", "src")]
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self.in_cell = True
        self.in_block |= tag == "pre"

    def handle_endtag(self, tag: str) -> None:
        if tag == "pre":
            self.in_block = False
        if tag in ("td", "th"):
            self.in_cell = False
        self.text += "" if tag in ("strong", "code") else " "

    def handle_data(self, data: str) -> None:
        if not self.in_block:
            self.text += data
        if self.in_cell:
            self.tables[-1][-1][-1] += data

    def table(self, *head: str) -> list[list[str]]:
        [found] = [table for table in self.tables if tuple(table[0][: len(head)]) == head]
        return [[cell.strip() for cell in row] for row in found[1:]]


def body_of(card: str) -> str:
    return card.split("\n---\n", 1)[1]


def metadata_of(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


def page(folder: Path) -> Page:
    return Page(render_card(load_card_data(folder)))


def shown(value: float) -> str:
    return f"{value:.4f}"


def between(limits: list[float]) -> str:
    return f"{limits[0]:.4f} to {limits[1]:.4f}"


# Figures


def check_tables(seen: Page, results: dict) -> None:
    """Compares every table of figures with results.json."""
    splits = [split for split in ("validation", "test") if split in results]
    assert seen.table("split", "images", "accuracy") == [
        [split, f"{of['num_images']:,}", shown(of["accuracy"]), between(of["accuracy_interval"]),
         shown(of["macro_f1"]), between(of["macro_f1_interval"])]
        for split in splits for of in [results[split]]
    ]  # fmt: skip
    keys = ["accuracy", "macro_f1", "balanced_accuracy", "loss", "ece"]
    assert [row[1:] for row in seen.table("metric")] == [[shown(results[s][key]) for s in splits] for key in keys]
    reported = results[splits[-1]]["per_class"]
    rows = {
        name: [*(shown(of[key]) if of["support"] else "-" for key in ("precision", "recall", "f1")), str(of["support"])]
        for name, of in reported.items()
    }
    assert {row[0]: row[1:] for row in seen.table("class", "precision")} == rows


def test_tables_hold_the_figures_of_the_results(run):
    results = json.loads((run / "results.json").read_text())
    seen = page(run)
    check_tables(seen, results)
    assert seen.table("split", "images", "how it came about") == [
        ["train", "33", "the rest"], ["validation", "60", "given"], ["test", "67", "cut off (0.1 of the images)"],
    ]  # fmt: skip
    supports = [[str(results[split]["per_class"][name]["support"]) for split in ("validation", "test")] for name in
                results["classes"]]  # fmt: skip
    train = results["data"]["splits"]["train"]["counts"]
    assert seen.table("class", "train") == [
        [name, str(train[name]), *support] for name, support in zip(results["classes"], supports, strict=True)
    ]
    assert seen.table("stage") == [
        ["head", "head 0.001", "3", "eval", "0.6471 → 0.8170", "+0.1699 (0.1045 to 0.2009)", "< 0.001", "yes"],
        ["all", "stem 7.29e-07, stage1 2.43e-06, head 0.0003", "3", "eval", "0.8170 → 0.7712",
         "-0.0458 (-0.0912 to 0.0159)", "0.031", "no, rolled back"],
    ]  # fmt: skip
    assert seen.table("what") == [
        ["hardware", "cpu, 2 cores, Linux"], ["time", "1,232.6 seconds in all"], ["peak memory", "1,250.5 MiB"],
        ["torchthaw", "0.1.0"], ["python", "3.11.7"], ["torch", "2.15.0"],
    ]  # fmt: skip


def leaves(value: object) -> list:
    if isinstance(value, dict):
        return [leaf for item in value.values() for leaf in leaves(item)]
    return [leaf for item in value for leaf in leaves(item)] if isinstance(value, list) else [value]


def test_no_figure_comes_from_elsewhere(run):
    results = json.loads((run / "results.json").read_text())
    allowed = set()
    for leaf in leaves(results):
        if isinstance(leaf, (int, float)):
            allowed |= {f"{abs(leaf):.4f}", f"{abs(leaf):.3g}", f"{leaf:,}", f"{abs(leaf):.2g}", f"{leaf:,.1f}"}
        else:
            allowed |= set(re.findall(r"\d[\d,.]*\d|\d", str(leaf)))
    allowed |= {f"{number:,}" for number in map(len, (results["classes"],))}
    supports = [of["support"] for of in results["test"]["per_class"].values()]
    allowed.add(shown(max(supports) / sum(supports)))
    # 95 % intervals, 15 bins, F1, p < 0.001, resolution 128 x 128, SHA-256
    allowed |= {"95", "15", "1", "0.001", "128", "256", "60", "67"}
    text = re.sub(r"[0-9a-f]{64}|\d[\d.]*e-\d+|\w+_\w+", "", page(run).text)
    found = re.findall(r"\d[\d,.]*\d|\d", text)
    assert len(found) > 80
    assert set(found) <= allowed


share = st.floats(0, 1)
limits = st.tuples(share, share).map(sorted)
of_class = st.fixed_dictionaries({"precision": share, "recall": share, "f1": share, "support": st.integers(0, 10**6)})
of_split = st.fixed_dictionaries(
    {
        "accuracy": share, "macro_f1": share, "balanced_accuracy": share, "loss": st.floats(0, 1e4), "ece": share,
        "num_images": st.integers(0, 10**6), "accuracy_interval": limits, "macro_f1_interval": limits,
        "per_class": st.fixed_dictionaries({"ants": of_class, "bees": of_class}),
    }
)  # fmt: skip


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(validation=of_split, test=of_split)
def test_any_figures_are_shown_as_they_are(validation, test):
    results = {"validation": validation, "test": test}
    with tempfile.TemporaryDirectory() as folder:
        make_folder(Path(folder), results, names=["ants", "bees"])
        card = render_card(load_card_data(folder))
    seen = Page(card)
    for table in seen.tables:
        for row in table:
            row[:] = [cell.replace(",", "") if re.fullmatch(r"[\d,]+", cell) else cell for cell in row]
    head = seen.table("split", "images", "accuracy")
    assert [row[2:] for row in head] == [
        [shown(of["accuracy"]), between(of["accuracy_interval"]), shown(of["macro_f1"]),
         between(of["macro_f1_interval"])] for of in results.values()
    ]  # fmt: skip
    assert [row[1] for row in head] == [str(of["num_images"]) for of in results.values()]
    rows = {
        name: [*(shown(of[key]) if of["support"] else "-" for key in ("precision", "recall", "f1")), str(of["support"])]
        for name, of in results["test"]["per_class"].items()
    }
    assert {row[0]: row[1:] for row in seen.table("class", "precision")} == rows
    entries = metadata_of(card)["model-index"][0]["results"]
    for entry in entries:
        of = results[entry["dataset"]["split"]]
        assert [metric["value"] for metric in entry["metrics"]] == [
            of["accuracy"], of["macro_f1"], of["balanced_accuracy"]
        ]  # fmt: skip


def test_classes_are_listed_worst_first_and_those_without_images_last(run):
    results = json.loads((run / "results.json").read_text())
    per_class = results["test"]["per_class"]
    per_class["bees"] = {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 0}
    per_class["ants"]["f1"], per_class["wasps"]["f1"] = 0.9, 0.3
    seen = page(change(run, test=results["test"]))
    assert [row[0] for row in seen.table("class", "precision")] == ["wasps", "ants", "bees"]
    assert seen.table("class", "precision")[2] == ["bees", "-", "-", "-", "0"]
    assert "The test split has no images of bees: how well it is found is not known." in seen.text


def test_weights_that_were_not_measured_get_no_card(run):
    (run / "model.safetensors").write_bytes(b"others")
    with pytest.raises(SharingError, match=r"not those that results.json measured[\s\S]*remove results.json"):
        write_card(run)
    assert not (run / "README.md").exists()
    (run / "model.safetensors").unlink()
    with pytest.raises(SharingError, match=r"no model.safetensors"):
        write_card(run)


# Honesty


def test_what_is_not_known_is_said_and_nothing_else(tmp_path):
    seen = page(make_folder(tmp_path, None, names=["ants", "bees"]))
    for sentence in (
        "No figures were recorded for this model",
        "Where the images came from was not recorded",
        "No audit of the data was run",
        "None was stated for these weights",
        "Whether the folder loads without torchthaw was not checked",
        "Every image gets one of the 2 labels",
    ):
        assert sentence in seen.text
    for word in ("None.", "null", "Undefined", "No image was left out", "stage ", "random weights", "Plots"):
        assert word not in seen.text
    assert seen.tables == []


@pytest.mark.parametrize(
    ("reads", "said"),
    [
        (1, "The test images were used once, after everything was chosen."),
        (3, "The test images were used 3 times, so they may have had a say"),
        (None, "How often the test images were used was not recorded."),
    ],
)
def test_how_often_the_test_split_was_read(run, reads, said):
    assert said in page(change(run, test_reads=reads)).text


def test_without_a_test_split_the_card_says_so_and_shows_validation(run):
    results = json.loads((run / "results.json").read_text())
    seen = page(remove(run, "test"))
    assert "No test split was measured." in seen.text
    check_tables(seen, {key: value for key, value in results.items() if key != "test"})


def test_limits_follow_from_the_figures(run):
    text = page(run).text
    results = json.loads((run / "results.json").read_text())
    assert f"from {between(results['test']['accuracy_interval'])}" in text
    assert "The smallest class, ants, has 10 images for training." in text
    assert "figures on them are somewhat too good" in text
    assert "Nothing kept images of the same object, person or scene in one split" in text
    sure = results["validation"] | {"accuracy_interval": [0.9, 0.94]}
    data = results["data"] | {"split_by": "patient"}
    text = page(remove(change(run, validation=sure, data=data), "test")).text
    assert "accuracy is not known well" not in text
    assert "Splits were made by patient." in text
    assert "Nothing kept images" not in text
    given = {split: described | {"origin": "given"} for split, described in data["splits"].items()}
    text = page(change(run, data=data | {"splits": given})).text
    assert "The splits came with the data; whether a patient is in two of them" in text


def test_a_stage_that_was_not_kept_is_explained(run):
    text = page(run).text
    assert "Stage all was rolled back: validation accuracy 0.8170 -> 0.7712: worse, not kept." in text
    assert "Stage head" not in text


def test_a_stage_that_was_kept_without_being_better_is_explained(run):
    stages = json.loads((run / "results.json").read_text())["stages"]
    reason = "validation accuracy 0.8170 -> 0.8105: no worse by more than one standard error, kept"
    further = stages[-1] | {"name": "all anew", "accepted": True, "reason": reason}
    text = page(change(run, stages=[*stages, further])).text
    assert f"Stage all anew, which the linear probe added, was kept without being better: {reason}." in text
    assert text.count("without being better") == 1


@pytest.mark.parametrize(
    ("imbalance", "said"),
    [
        ({"loss": "logit_adjusted", "logit_adjustment": 0.5}, "by a logit adjusted loss (tau 0.5)."),
        ({"class_weights": "balanced", "loss": "focal"}, "by class weights (balanced)."),
        ({"class_weights": "given", "sampling": "sqrt"}, "class weights of the author's choice and drawing images by"),
        ({"loss": "cross_entropy", "class_weights": None, "logit_adjustment": None}, None),
    ],
)
def test_what_was_done_against_imbalance_is_said(run, imbalance, said):
    text = page(change(run, imbalance=imbalance)).text
    assert ("made up for it" in text) == (said is not None)
    assert (said or "") in text


def test_findings_are_shown(run):
    findings = [{"name": "duplicates", "verdict": "fail", "count": 25, "summary": "in both splits", "advice": "split"}]
    (run / "audit.json").write_text(json.dumps({"verdict": "fail", "findings": findings}))
    diagnosis = [{"signal": "overfitting", "evidence": "loss 0.1 against 0.9", "advice": "augmentation: medium"}]
    text = page(change(run, diagnosis=diagnosis, emissions_kg=0.0012345678)).text
    assert "duplicates, fail, 25: in both splits. Advice: split" in text
    assert "overfitting: loss 0.1 against 0.9 Advice: augmentation: medium" in text
    assert "1.23457 g CO2eq (codecarbon)" in text


def test_what_calibration_did_is_shown_by_split(run):
    calibration = {
        "method": "temperature", "temperature": 1.25, "problem": None, "fitted_on": "validation", "num_images": 60,
        "ece": {
            "validation": {"before": 0.2, "cross_fitted": 0.1, "after": 0.05},
            "test": {"before": 0.125, "after": 0.0625},
        },
        "loss": {"test": {"before": 0.5, "after": 0.4}},
    }  # fmt: skip
    seen = page(change(run, calibration=calibration))
    assert "calibrated by temperature with 1.2500, fitted on 60 images of the validation split" in seen.text
    assert "All other figures and plots here are of the calibrated scores." in seen.text
    assert seen.table("split", "metric", "before") == [
        ["test", "log loss", "0.5000", "0.4000", "-"],
        ["validation", "expected calibration error", "0.2000", "0.0500", "0.1000"],
        ["test", "expected calibration error", "0.1250", "0.0625", "-"],
    ]
    problem = calibration | {"temperature": 1.0, "problem": "their log loss is least at a temperature of 0.1 or below"}
    text = page(change(run, calibration=problem)).text
    assert "Scores are not calibrated: temperature was asked for" in text
    assert "0.1 or below" in text
    assert "cross-fitted" not in text


def test_paths_of_a_machine_do_not_reach_the_card(run):
    card = write_card(run).read_text()
    assert "someone" not in card
    assert "torchthaw train staged --data photos --set output=run1" in card
    assert "  path: photos" in card


def test_the_recipe_is_the_one_of_the_run_without_the_author_s_texts(run):
    block = re.search(r"```yaml\n(.*?)```", write_card(run).read_text(), re.DOTALL)[1]
    assert yaml.safe_load(block) == {"backbone": "mobilenet_v2", "data": {"path": "photos"}}


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ("MobileNet_V2_Weights.IMAGENET1K_V2", "from torchvision's weights MobileNet_V2_Weights.IMAGENET1K_V2."),
        ("/data/mobilenet.safetensors", "from weights in a file, mobilenet.safetensors."),
        ("run1", "from a model in a folder, run1."),
        ("user/name", "from a model on the Hub, user/name."),
        ("builtin", "from the small backbone that comes with torchthaw"),
    ],
)
def test_where_it_started_is_named(run, weights, said):
    assert said in page(change(run, weights=weights)).text


def test_random_weights_are_named_where_the_recipe_says_so(run):
    assert "It started" not in page(change(run, weights=None)).text
    (run / "recipe.yaml").write_text("backbone: mobilenet_v2\nweights: null\n")
    assert "It started from random weights." in page(run).text


def test_how_splits_were_cut_is_said_where_some_were(run):
    assert "cut off: stratified by class, seed 3." in page(run).text
    results = json.loads((run / "results.json").read_text())
    given = {split: {"origin": "given"} for split in ("train", "validation", "test")}
    assert "stratified" not in page(change(run, data=results["data"] | {"splits": given})).text


def test_the_examples_are_python(run):
    for name in (None, "user/ants"):
        card = render_card(load_card_data(change(run, card={"repository": name})))
        examples = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
        assert len(examples) == 3
        for example in examples:
            compile(example, "example", "exec")
            assert f'"{name or "MODEL"}"' in example


def test_a_folder_without_code_asks_for_torchthaw(run):
    assert "trust_remote_code" in page(run).html
    change(run, "config.json", auto_map=None)
    assert "trust_remote_code" not in page(run).html
    assert "torchthaw has to be installed" in page(run).text


def test_plots_that_exist_are_shown_with_words(run):
    (run / "plots" / "a](b) c.png").write_bytes(b"png")
    card = write_card(run).read_text()
    assert Page(card).links == ["plots/curves.png", "plots/reliability_test.png", "plots/a%5D%28b%29%20c.png"]
    assert "![Accuracy against confidence on the test images](plots/reliability_test.png)" in card


def test_the_author_s_words(run):
    said = {
        "title": "Ants *or* bees",
        "description": "First.\n\n- Second.",
        "intended_use": "For <b>gardens</b>.",
        "out_of_scope": "No hospitals.",
        "limits": "No night.",
        "license": "other",
        "license_name": "mine",
        "license_link": "https://example.org/a_(b)",
        "repository": "user/ants",
    }
    card = render_card(load_card_data(change(run, card=said)))
    seen = Page(card)
    for words in ("Ants *or* bees", "First.", "- Second.", "For <b>gardens</b>.", "No hospitals.", "No night."):
        assert words in seen.text
    assert "https://example.org/a_%28b%29" in seen.links
    assert 'model="user/ants"' in card
    assert metadata_of(card)["model-index"][0]["name"] == "Ants *or* bees"


def test_the_author_speaks_in_the_recipe_and_in_the_results(run):
    assert load_card_data(run).options.title == "Insects"
    change(run, card={"license": "mit"})
    assert (load_card_data(run).options.title, load_card_data(run).options.license) == ("Insects", "mit")
    assert load_card_data(change(run, card={"title": "Bugs"})).options.title == "Bugs"
    (run / "recipe.yaml").write_text("card: {licence: mit}\n")
    with pytest.raises(SharingError, match=r"recipe.yaml does not fit[\s\S]*card.licence"):
        load_card_data(run)


# Text is text

ALLOWED_TAGS = {
    "h1", "h2", "h3", "p", "table", "thead", "tbody", "tr", "th", "td", "ul", "li", "code", "pre", "strong", "img",
}  # fmt: skip


def as_one_line(text: str) -> str:
    return " ".join(text.replace("\u202e", "\\u202e").replace("\x00", "\\x00").split())


def test_hostile_text_everywhere_comes_out_as_text(tmp_path):
    results = make_results(HOSTILE, images=3 * len(HOSTILE))
    results["dropped_images"] = [{"path": text, "reason": text} for text in HOSTILE[:10]]
    results["stages"] = [stage | {"name": text, "reason": text, "ended_early": text, "batch_norm": text}
                         for stage in results["stages"][1:] for text in HOSTILE]  # fmt: skip
    for stage in results["stages"]:
        stage["learning_rates"] = {stage["name"]: 0.5}
    results["diagnosis"] = [{"signal": text, "evidence": text, "advice": text} for text in HOSTILE]
    results["audit"] = {"verdict": HOSTILE[0], "findings": [
        {"name": text, "verdict": text, "count": 1, "summary": text, "advice": text} for text in HOSTILE]}  # fmt: skip
    for key, text in zip(("source", "method", "split_by"), HOSTILE, strict=False):
        results["data"][key] = text
    results["versions"] = {text: text for text in HOSTILE}
    results["hardware"] = {"device": HOSTILE[0], "platform": HOSTILE[1]}
    results["command"] = "torchthaw " + " ".join(HOSTILE)
    results["date"] = HOSTILE[0]
    results["metric"] = HOSTILE[2]
    results["weights"] = HOSTILE[0]
    words = "\n\n".join(HOSTILE)
    results["card"] = dict.fromkeys(("description", "intended_use", "out_of_scope", "limits"), words)
    results["card"]["tags"] = ["---", "a: b", "{{ x }}"]
    recipe = {"note": HOSTILE, "```": "````"}
    for title in HOSTILE:
        results["card"]["title"] = title
        folder = make_folder(tmp_path / "run", results, names=HOSTILE, recipe=recipe)
        card = render_card(load_card_data(folder))
        assert card == render_card(load_card_data(folder), card)
        assert Page(card).tags <= ALLOWED_TAGS, Page(card).tags - ALLOWED_TAGS
    seen = Page(card)
    assert seen.links == []
    rows = {row[0] for row in seen.table("class", "precision")} | {row[0] for row in seen.table("class", "train")}
    assert {" ".join(row.split()) for row in rows} <= {as_one_line(text) for text in HOSTILE}
    for text in HOSTILE:
        assert as_one_line(text) in " ".join(seen.text.split()), text
    assert {row[0] for row in seen.table("stage")} == {as_one_line(text) for text in HOSTILE}
    block = re.search(r"`{4,}yaml\n(.*?)\n`{4,}", card, re.DOTALL)[1]
    assert yaml.safe_load(block)["```"] == "````"


@settings(max_examples=150, deadline=None)
@given(st.text(st.sampled_from("ab1 .`*_{}[]()<>&|~$#+-=!\\/:;\"'@^%\n\t\u202e☃"), max_size=12))
def test_any_text_is_shown_as_it_is(text):
    expected = " ".join(text.replace("\u202e", "\\u202e").split())
    markdown = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])

    def read(source: str) -> str:
        parser = HTMLParser()
        found: list[str] = []
        parser.handle_data = found.append
        parser.handle_starttag = lambda tag, attributes: found.append(f"<{tag}>")
        parser.feed(markdown.render(source))
        return "".join(found)

    assert read(f"{line(text)}\n").replace("<p>", "").strip() == expected
    assert read(f"x {inline(text)} y").replace("<p>", "").strip() == f"x {expected} y"
    cells = read(f"|a|b|\n|---|---|\n| {inline(text)} | z |\n")
    assert cells.split("<td>")[1:][0].strip() == expected
    assert cells.split("<td>")[2].strip() == "z"
    assert markdown.parse(code_block(text))[0].content.rstrip() == text.rstrip()
    assert "\n" not in shell_command(text)


@pytest.mark.parametrize("classes", [2, 10, 1000])
def test_length_stays_sensible(tmp_path, classes):
    names = [f"class {number}" for number in range(classes)]
    results = make_results(names, images=2 * classes)
    results["dropped_images"] *= 500
    card = render_card(load_card_data(make_folder(tmp_path, results, names=names)))
    assert len(card) < 18_000
    seen = Page(card)
    assert len(seen.table("class", "precision")) == len(seen.table("class", "train")) == min(classes, 30)
    if classes == 1000:
        assert "and 990 more" in seen.text
        assert "The other 970 have 10 to 979 train images each." in seen.text
        assert "The other 970 classes are in results.json." in seen.text
        assert "and 490 more, in results.json" in seen.text


# A person's own parts


def test_made_again_it_is_the_same(run):
    first = write_card(run).read_bytes()
    assert write_card(run).read_bytes() == first
    assert [file.name for file in run.iterdir() if "tmp" in file.name] == []
    shutil.copytree(run, run.parent / "elsewhere" / "other name")
    assert write_card(run.parent / "elsewhere" / "other name").read_bytes() == first


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_what_a_person_wrote_above_and_below_stays(run, newline):
    card = write_card(run).read_text()
    above, below = "\n# Thanks\n\nto *all* <b>of you</b>.\n\n", "\n\n## More\n\n---\n\n| a |\n|---|\n| {{ x }} |\n"
    edited = card.replace(BEGIN, above + BEGIN).replace(f"{END}\n", END + below)
    (run / "README.md").write_bytes(edited.replace("\n", newline).encode())
    change(run, date="2027-01-01")
    again = write_card(run).read_text()
    assert above in again
    assert again.endswith(END + below)
    assert "2027-01-01" in again
    assert "2026-11-21" not in again
    assert again.count(BEGIN) == 1
    assert write_card(run).read_text() == again


def test_text_of_others_is_not_overwritten(run):
    for text in ("# My model\n", "---\nlicense: mit\n---\n# My model\n"):
        (run / "README.md").write_text(text)
        with pytest.raises(SharingError, match=r"text of others is never overwritten[\s\S]*torchthaw:begin"):
            write_card(run)
        assert (run / "README.md").read_text() == text
        # The message says what to do; doing it works and keeps the text.
        (run / "README.md").write_text(f"{text}\n{BEGIN}\n{END}\nBye.\n")
        card = write_card(run).read_text()
        assert "\n# My model\n" in card
        assert card.endswith(f"{END}\nBye.\n")
        assert metadata_of(card).get("license") == ("mit" if "mit" in text else None)


@pytest.mark.parametrize("text", ["", "\n", "---\nlicense: mit\n---\n"])
def test_empty_cards_and_those_that_the_hub_makes_are_filled(run, text):
    (run / "README.md").write_text(text)
    card = write_card(run).read_text()
    assert metadata_of(card).get("license") == ("mit" if text.strip() else None)
    assert ("license mit." in card) == bool(text.strip())


@pytest.mark.parametrize(
    ("old", "new"), [(BEGIN, ""), (END, ""), (END, f"{END}\n{END}"), (BEGIN, f"{BEGIN}\n{END}\n{BEGIN}")]
)
def test_markers_that_do_not_pair_are_refused(run, old, new):
    broken = write_card(run).read_text().replace(old, new)
    (run / "README.md").write_text(broken)
    with pytest.raises(SharingError, match=r"needs one pair"):
        write_card(run)
    assert (run / "README.md").read_text() == broken


def test_a_card_that_is_no_text_or_no_yaml_is_left_alone(run):
    (run / "README.md").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SharingError, match="UTF-8"):
        write_card(run)
    for matter, problem in (("a: [", "not valid YAML"), ("- a", "no mapping"), ("1: a", "no mapping")):
        (run / "README.md").write_text(f"---\n{matter}\n---\n{BEGIN}\n{END}\n")
        with pytest.raises(SharingError, match=problem):
            write_card(run)


# Reading the folder


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("seconds_total", "long", r"seconds_total is 'long'"),
        ("validation", {"accuracy": True, "num_images": 3}, r"validation.accuracy is True"),
        ("validation", {"num_images": 3}, r"validation.accuracy is"),
        ("test", {"accuracy": 0.5, "num_images": -1}, r"test.num_images is -1"),
        ("stages", {"a": 1}, r"stages is"),
        ("card", {"licence": "mit"}, r"card.licence is 'mit'"),
        ("card", {"license": "Apache 2.0"}, r"card.license is 'Apache 2.0'.*apache-2.0"),
        ("card", {"license": "other"}, r"license_name and license_link"),
        ("card", {"datasets": ["/home/photos"]}, r"card.datasets.0 is '/home/photos'"),
    ],
)
def test_wrong_types_are_named(run, key, value, said):
    with pytest.raises(SharingError, match=said):
        load_card_data(change(run, **{key: value}))


@pytest.mark.parametrize("file", ["results.json", "recipe.yaml", "audit.json", "config.json"])
@pytest.mark.parametrize("text", ["{", "[1]", "- 1\n-"])
def test_files_that_are_damaged_are_named(run, file, text):
    (run / file).write_text(text)
    with pytest.raises(SharingError, match=re.escape(file)):
        load_card_data(run)


def test_a_folder_without_model_is_named(tmp_path):
    with pytest.raises(SharingError, match="holds no config.json"):
        write_card(tmp_path)


def test_every_part_but_the_configuration_may_be_absent(run):
    for key in json.loads((run / "results.json").read_text()):
        folder = run.parent / f"without {key}"
        shutil.copytree(run, folder)
        assert BEGIN in write_card(remove(folder, key)).read_text()


def test_the_template_is_found():
    assert (template_folder() / "model_card.md.jinja").is_file()
