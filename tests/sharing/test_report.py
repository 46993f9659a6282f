"""The report in a real browser: it loads nothing, fits every width, and shows every name as text."""

import importlib.util
import json
import os
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from torchthaw.evaluation.gallery import Gallery
from torchthaw.evaluation.measuring import measure_split
from torchthaw.evaluation.mistakes import ActivationMaps, Mistake
from torchthaw.evaluation.near_copies import Copy, Pair
from torchthaw.evaluation.picture_plots import plot_mistakes
from torchthaw.evaluation.plots import plot_curves
from torchthaw.sharing.card_data import load_card_data
from torchthaw.sharing.markdown import one_line
from torchthaw.sharing.report import write_report

HOSTILE = [
    "<script>document.title = 'run'</script>", "\"><img src=x onerror=\"document.title='run'\">", "' onload='x",
    "</td></tr>",
    "$x^2$ {{ 7*7 }}", "\u202egnol\x00", "two\nlines", "x" * 120, "&lt;b&gt;", "שלום עולם",
]  # fmt: skip


def _test_card():
    spec = importlib.util.spec_from_file_location("card_tests", Path(__file__).with_name("test_card.py"))
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def picture(number, size=(80, 60)):
    pixels = np.random.default_rng(number).integers(0, 255, (size[1] // 10, size[0] // 10, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size)


def names_of(number):
    return [*HOSTILE, *(f"{index}: a long name of a class, the longest" for index in range(number))][:number]


def make_run(folder, number):
    """A run's folder with so many classes, all of whose names are trouble, and its report."""
    card, names = _test_card(), names_of(number)
    results = card.make_results(names, images=3 * number)
    results["diagnosis"] = [{"signal": "overfitting", "evidence": "0.4 to 0.7 <b>", "advice": "augmentation: medium"}]
    results["test"]["brier"] = 0.123456
    audit = {
        "name": HOSTILE[0],
        "verdict": "warn",
        "count": 1,
        "summary": HOSTILE[1],
        "advice": HOSTILE[3],
        "items": [],
    }
    card.make_folder(folder, results, names=names, recipe={"backbone": "mobilenet_v2", "card": {"title": HOSTILE[0]}})
    (folder / "audit.json").write_text(json.dumps({"verdict": "warn", "findings": [audit]}))
    labels = np.arange(3 * number) % number
    logits = np.random.default_rng(0).normal(size=(len(labels), number)) + np.eye(number)[labels]
    measure_split("test", logits, labels, names, folder)
    stages = [{"name": "head", "start_epoch": 0, "end_epoch": 1, "accepted": True}]
    plot_curves([{"step": 1, "epoch": 1.0, "eval_loss": 0.5}], stages, folder / "plots" / "curves.png")
    maps = ActivationMaps(picture(1), picture(2), picture(3), (4, 4))
    mistakes = [
        Mistake(
            f"photos/{name}.png", name, names[0], 0.75, 0.125, picture(index, (80, 120)), maps if index < 2 else None
        )
        for index, name in enumerate(names[1:9])
    ]
    copies = [Copy(f"{name}/1.png", "train", name, picture(index)) for index, name in enumerate(names[:2])]
    return write_report(folder, Gallery("validation", 9, tuple(mistakes), (Pair(*copies, 0.99),)))


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """Reports of runs with 2, 10 and 100 classes."""
    root = tmp_path_factory.mktemp("reports")
    return {number: make_run(root / str(number), number) for number in (2, 10, 100)}


@pytest.fixture(scope="module")
def browser():
    """Chromium without a window; where it is missing, a skip, or on CI=true a failure."""
    programs = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if not all(programs):
        reason = "the report needs chromium and chromedriver on PATH (on Debian: chromium chromium-driver)"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = programs[0]
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(programs[1]))
    yield driver
    driver.quit()


def show(browser, file, *, width, scheme="light"):
    """Opens a report; returns the addresses that were asked for."""
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    browser.get("about:blank")
    browser.get_log("performance"), browser.get_log("browser")
    browser.get(file.as_uri())
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]


@pytest.mark.parametrize("number", [2, 10, 100])
@pytest.mark.parametrize(("width", "scheme"), [(400, "dark"), (1400, "light")])
def test_a_browser_shows_all_of_it_and_loads_nothing(browser, reports, number, width, scheme):
    asked = show(browser, reports[number], width=width, scheme=scheme)
    assert [address for address in asked if not address.startswith("data:")] == [reports[number].as_uri()]
    assert browser.get_log("browser") == []
    assert browser.title == one_line(HOSTILE[0])
    across, seen = browser.execute_script(
        "const root = document.documentElement; return [root.scrollWidth, root.clientWidth]"
    )
    assert across <= seen
    # What is folded up is laid out, too.
    browser.execute_script("document.querySelectorAll('details').forEach(part => part.open = true)")
    across, images = browser.execute_script(
        "return [document.documentElement.scrollWidth, [...document.images].map(image => image.naturalWidth)]"
    )
    assert across <= seen
    assert len(images) > 10
    assert all(images)
    text = " ".join(browser.execute_script("return document.body.innerText").split())
    for name in names_of(number):
        assert " ".join(one_line(name).split()) in text
    assert browser.execute_script("return document.scripts.length") == 0
    light = browser.execute_script("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert light == (scheme == "light")


@pytest.mark.parametrize("width", [400, 1400])
def test_no_text_is_cut_or_lies_over_another(browser, reports, width):
    show(browser, reports[10], width=width)
    cut = browser.execute_script(
        """
        const out = [];
        for (const it of document.querySelectorAll('h1, h2, h3, p, li, figcaption, summary, .path')) {
            const box = it.getBoundingClientRect();
            if (box.right > document.documentElement.clientWidth + 1 || it.scrollWidth > it.clientWidth + 1
                && getComputedStyle(it).display != 'inline') out.push(it.textContent);
        }
        for (const row of document.querySelectorAll('tr')) {
            const cells = [...row.cells].map(cell => cell.getBoundingClientRect());
            cells.slice(1).forEach((box, i) => { if (box.left < cells[i].right - 1) out.push(row.textContent); });
            for (const cell of row.cells) if (cell.scrollWidth > cell.clientWidth + 1) out.push(cell.textContent);
        }
        return out;
        """
    )
    assert cut == []


class Outline(HTMLParser):
    """Headings, images and tables of a page."""

    def __init__(self, page):
        super().__init__()
        self.levels, self.images, self.cells, self.scopes, self.ids, self.links = [], [], 0, [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.ids += [given["id"]] if "id" in given else []
        if re.fullmatch("h[1-6]", tag):
            self.levels.append(int(tag[1]))
        if tag == "img":
            self.images.append(given)
        if tag == "th":
            self.scopes.append(given.get("scope"))
        if tag == "a":
            self.links.append(given["href"])


def test_it_is_made_for_screen_readers_and_keyboards(reports):
    page = Outline(reports[10].read_text(encoding="utf-8"))
    assert page.levels[0] == 1
    assert page.levels.count(1) == 1
    assert all(after <= before + 1 for before, after in zip(page.levels, page.levels[1:], strict=False))
    assert all(image["alt"] and image["src"].startswith("data:image/") for image in page.images)
    assert set(page.scopes) == {"col", "row"}
    assert len(set(page.ids)) == len(page.ids)
    assert all(link.removeprefix("#") in page.ids for link in page.links)


def test_it_says_what_was_measured_and_what_to_do(reports):
    text = reports[10].read_text(encoding="utf-8")
    results = json.loads((reports[10].parent / "results.json").read_text())
    low, high = results["test"]["accuracy_interval"]
    assert f"<strong>{results['test']['accuracy']:.3f}</strong> accuracy on 37 test images" in text
    assert f"95 % interval {low:.3f} to {high:.3f}" in text
    assert "0.1235" in text
    assert "<code>augmentation: medium</code>" in text
    assert "rolled back" in text
    assert text.index("Verdict") < text.index("Stages") < text.index("Mistakes")
    assert reports[100].stat().st_size < 3_000_000


def test_a_folder_with_little_in_it_has_a_report_too(tmp_path):
    card = _test_card()
    card.make_folder(tmp_path / "bare", None, names=["a", "b"])
    assert "how good it is, is not known" in write_report(tmp_path / "bare").read_text(encoding="utf-8")
    results = card.make_results(["a", "b"])
    del results["test"], results["stages"]
    folder = card.make_folder(tmp_path / "some", results, names=["a", "b"])
    plot_mistakes([Mistake(None, "a", "b", 0.9, 0.1, picture(0))], "validation", folder / "plots" / "mistakes.png")
    (folder / "plots" / "broken.png").write_bytes(b"no image")
    page = write_report(folder).read_text(encoding="utf-8")
    assert "No test split was measured" in page
    # Without pictures in memory, those in the folder are shown; the card, which may be pushed, never shows them.
    assert page.count("<img ") == 1
    assert load_card_data(folder).plots == ("broken.png",)
