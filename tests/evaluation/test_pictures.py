"""Pictures of mistakes and near duplicates: the right ones, with every name as it is, within their figures."""

from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from torchthaw import TorchvisionForImageClassification, TorchvisionImageProcessor, load_image_dataset
from torchthaw.data.views import ImageView
from torchthaw.evaluation.class_plots import plot_class_scores, plot_score_histogram
from torchthaw.evaluation.gallery import make_gallery
from torchthaw.evaluation.mistakes import ActivationMaps, Mistake, overlaid, worst_mistakes
from torchthaw.evaluation.near_copies import Copy, Pair, show_near_copies
from torchthaw.evaluation.picture_plots import plot_activation_maps, plot_mistakes, plot_near_copies

ODD = ["<script>alert(1)</script>", "$\\frac{1}{0$", "\u202egnol\nname\x00", "W" * 80, "Ω ü", "_a^b"]


@pytest.fixture
def saved(monkeypatch):
    """Figures that were written, in order."""
    figures = []
    write = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **kwargs: figures.append(self) or write(self, *args, **kwargs)
    )
    return figures


def texts_apart(figure):
    """Texts of a figure; fails if one leaves the figure or lies over another."""
    # Ticks beyond the axes' limits are not drawn.
    hidden = {
        label
        for axes in figure.axes
        for axis in (axes.xaxis, axes.yaxis)
        for tick in axis.get_major_ticks()
        if not min(axis.get_view_interval()) <= tick.get_loc() <= max(axis.get_view_interval())
        for label in (tick.label1, tick.label2)
    }
    texts = figure.findobj(matplotlib.text.Text)
    found = [text for text in texts if text.get_text() and text.get_visible() and text not in hidden]
    boxes = [text.get_window_extent() for text in found]
    for text, box in zip(found, boxes, strict=True):
        assert figure.bbox.x0 <= box.x0, text.get_text()
        assert box.x1 <= figure.bbox.x1, text.get_text()
        assert figure.bbox.y0 <= box.y0, text.get_text()
        assert box.y1 <= figure.bbox.y1, text.get_text()
    shrunk = [box.expanded(0.98, 0.85) for box in boxes]
    for number, box in enumerate(shrunk):
        assert not any(box.overlaps(other) for other in shrunk[:number]), found[number].get_text()
    return [text.get_text() for text in found]


def picture(number, size=(60, 40)):
    return Image.fromarray(np.random.default_rng(number).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8))


def make_mistake(number, *, maps=True):
    label, predicted = ODD[number % len(ODD)], ODD[(number + 1) % len(ODD)]
    shown = ActivationMaps(picture(1), picture(2), picture(3), (4, 4)) if maps else None
    size = (60, 40) if number % 2 else (30, 90)
    return Mistake(f"some folder/{label} {number}.png", label, predicted, 0.9, 0.05, picture(number, size), shown)


def test_the_worst_mistakes_are_the_surest_ones():
    logits = np.array([[2.0, 0, 0], [0, 3, 0], [0, 0, 4], [9, 0, 0], [0, 3, 0]])
    labels = np.array([1, 0, 2, 2, 0])
    assert worst_mistakes(logits, labels) == [3, 1, 4, 0]
    assert worst_mistakes(logits, labels, limit=2) == [3, 1]
    assert worst_mistakes(logits, logits.argmax(1)) == []


def test_a_map_is_brightest_where_it_is_highest():
    heat = np.zeros((4, 4))
    heat[0, 3] = 5
    pixels = np.asarray(overlaid(Image.new("RGB", (80, 80), "gray"), heat)).astype(int)
    # viridis goes from dark blue to yellow.
    yellow = pixels[..., 0] + pixels[..., 1] - pixels[..., 2]
    assert yellow[:10, -10:].mean() > yellow[40:, :40].mean() + 100
    assert np.ptp(np.asarray(overlaid(Image.new("RGB", (8, 8), "gray"), np.zeros((2, 2)))), axis=(0, 1)).max() == 0


@pytest.mark.parametrize("number", [1, 5, 12])
def test_grids_of_pictures_cut_and_cover_no_name(tmp_path, saved, number):
    mistakes = [make_mistake(index, maps=index < 5) for index in range(number)]
    pairs = [
        Pair(
            Copy(f"x/{ODD[i % 6]}.png", "train", ODD[i % 6], picture(i)), Copy("b.png", "test", "cat", picture(9)), 0.98
        )
        for i in range(number)
    ]
    plot_mistakes(mistakes, "validation", tmp_path / "mistakes.png")
    plot_activation_maps(mistakes, "validation", tmp_path / "maps.png")
    plot_near_copies(pairs, tmp_path / "pairs.png")
    drawn = [texts_apart(figure) for figure in saved]
    assert "true: <script>alert(1)</script>" in drawn[0]
    assert sum(text.startswith("predicted: ") for text in drawn[0]) == number
    assert drawn[1].count("(true)") == min(number, 5)
    assert sum(text.startswith("train: ") for text in drawn[2]) == number
    assert not any(text.get_parse_math() for figure in saved for text in figure.findobj(matplotlib.text.Text))


def test_without_mistakes_or_copies_earlier_plots_go(tmp_path):
    for name, plot in (("m", plot_mistakes), ("a", plot_activation_maps)):
        (tmp_path / name).write_bytes(b"of another run")
        plot([], "validation", tmp_path / name)
    (tmp_path / "n").write_bytes(b"of another run")
    plot_near_copies([], tmp_path / "n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", [2, 10, 100, 130])
def test_class_scores_show_every_class_the_worst_first(tmp_path, saved, size):
    random = np.random.default_rng(size)
    names = [f"{index}: a long class name, {'x' * (index % 30)}" for index in range(size)]
    names[0] = "$\\frac{1}{0$"
    per_class = {name: {"f1": random.random(), "support": int(random.integers(1, 9999))} for name in names}
    per_class[names[1]]["support"] = 0
    plot_class_scores(per_class, tmp_path / "classes.png")
    texts = texts_apart(saved[0])
    axes = saved[0].axes[0]
    heights = [bar.get_width() for bar in axes.patches]
    expected = sorted(figures["f1"] for figures in per_class.values() if figures["support"])
    assert heights[: min(size, 100) - 1] == pytest.approx(expected[: min(size, 100) - 1])
    assert len(axes.get_yticklabels()) == min(size, 100)
    assert ("no images" in texts) == (size <= 100)
    assert any("100 worst of 130" in text for text in texts) == (size == 130)


def test_scores_of_right_and_wrong_predictions_are_counted_apart(tmp_path, saved):
    random = np.random.default_rng(0)
    probabilities = random.dirichlet(np.full(3, 0.4), size=200)
    labels = random.integers(0, 3, 200)
    plot_score_histogram(probabilities, labels, tmp_path / "scores.png")
    score, right = probabilities.max(1), probabilities.argmax(1) == labels
    for axes, of_these in zip(saved[0].axes, (right, ~right), strict=True):
        expected, _ = np.histogram(score[of_these], bins=20, range=(0, 1))
        assert [bar.get_height() for bar in axes.patches] == expected.tolist()
    texts_apart(saved[0])
    plot_score_histogram(np.eye(3), np.arange(3), tmp_path / "scores.png")
    assert "0 wrong predictions" in texts_apart(saved[1])


@pytest.fixture
def view(make_image_folder):
    return ImageView(
        load_image_dataset(make_image_folder())["train"],
        TorchvisionImageProcessor.from_torchvision("shufflenet_v2_x0_5", "builtin", image_size=64),
    )


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    names = ["ant", "bee", "cat"]
    return TorchvisionForImageClassification.from_torchvision("shufflenet_v2_x0_5", "builtin", id2label=names)


def test_a_gallery_shows_the_files_that_were_wrong(model, view, tmp_path):
    labels = np.asarray(view.dataset["label"])
    logits = 5.0 * np.eye(3)[labels]
    logits[[4, 16]] = [[0, 2, 0], [0, 9, 0]]
    paths = view.dataset["path"][:]
    audit = {
        "findings": [
            {"name": "near duplicates within a split", "items": [_pair(paths[0], paths[1])]},
            {
                "name": "near duplicates across splits",
                "items": [_pair(paths[2], "gone.png"), _pair(paths[5], paths[9])],
            },
            {"name": "near duplicates under different labels", "items": [_pair(paths[5], paths[9])]},
        ]
    }
    gallery = make_gallery(model, {"validation": view}, {"validation": (logits, labels)}, audit, tmp_path)
    assert (gallery.split, gallery.wrong) == ("validation", 2)
    worst, other = gallery.mistakes
    assert (worst.path, worst.label, worst.predicted) == (paths[16], "cat", "bee")
    assert worst.score == pytest.approx(np.exp(9) / (np.exp(9) + 2))
    assert worst.label_score == pytest.approx(1 / (np.exp(9) + 2))
    assert other.path == paths[4]
    assert np.array_equal(np.asarray(worst.picture), np.asarray(Image.open(view.value(16)).convert("RGB")))
    # What the network saw is the middle of the picture, and as blue as it.
    seen = np.asarray(worst.maps.seen).reshape(-1, 3).mean(0)
    assert seen == pytest.approx(np.asarray(worst.picture)[:, 4:44].reshape(-1, 3).mean(0), abs=3)
    assert [(pair.first.path, pair.second.path) for pair in gallery.near_copies] == [
        (paths[5], paths[9]), (paths[0], paths[1]),
    ]  # fmt: skip
    assert {file.name for file in (tmp_path / "plots").iterdir()} == {
        "mistakes.png", "activation_maps.png", "near_duplicates.png",
    }  # fmt: skip


def _pair(first, second):
    images = [{"path": path, "split": "train", "label": "ant"} for path in (first, second)]
    return {"likeness": 0.99, "images": images}


def test_test_images_are_shown_only_where_there_is_no_validation(model, view, tmp_path):
    labels = np.asarray(view.dataset["label"])
    measured = {"test": (np.eye(3)[(labels + 1) % 3], labels), "validation": (np.eye(3)[labels], labels)}
    views = {"test": view, "validation": view}
    assert make_gallery(model, views, measured, None, tmp_path).wrong == 0
    only_test = make_gallery(model, {"test": view}, measured, None, tmp_path)
    assert (only_test.split, only_test.wrong, len(only_test.mistakes)) == ("test", 18, 12)
    tensors = make_gallery(model, {"validation": [1, 2, 3]}, measured, None, tmp_path)
    assert tensors.mistakes == ()
    assert not (tmp_path / "plots" / "mistakes.png").exists()


def test_a_file_that_is_gone_since_the_audit_leaves_its_pair_out(view):
    paths = view.dataset["path"][:]
    audit = {"findings": [{"name": "near duplicates across splits", "items": [_pair(paths[0], paths[1])]}]}
    assert len(show_near_copies(audit, [view])) == 1
    Path(view.value(1)).unlink()
    assert show_near_copies(audit, [view]) == []
    assert show_near_copies({}, [view]) == []
