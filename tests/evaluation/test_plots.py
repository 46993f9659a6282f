import itertools

import matplotlib
import matplotlib.pyplot
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from torchthaw.evaluation.plots import (
    plot_confusion_matrix,
    plot_curves,
    plot_learning_rates,
    plot_reliability,
)

ODD = ["$\\frac{1}{0$", "_hidden", "a" * 300, "line\nbreak\x00", "Grüße $x_1^2$", "\udcff.bad", "<b>&amp;</b>", "{}%s"]
STAGES = [
    {"name": "head", "start_epoch": 0, "end_epoch": 2, "accepted": None},
    {"name": "$last_{block$", "start_epoch": 2, "end_epoch": 3, "accepted": True},
    {"name": "all", "start_epoch": 3, "end_epoch": 4, "accepted": False},
]


def make_log(groups=("_stem", "$mid_1$", "head"), steps_per_epoch=5):
    log = []
    for step in range(1, 4 * steps_per_epoch + 1):
        shown = groups if step > 2 * steps_per_epoch else groups[-1:]
        rates = {f"learning_rate/{group}": 1e-3 / 2**index for index, group in enumerate(shown)}
        log.append({"step": step, "epoch": step / steps_per_epoch, "loss": 2 / step, **rates})
        if step % steps_per_epoch == 0:
            evaluation = {"eval_loss": 1 / step, "eval_accuracy": 0.9, "eval_macro_f1": 0.8}
            log.append({"step": step, "epoch": step / steps_per_epoch, **evaluation})
    return log


@pytest.fixture
def saved(monkeypatch):
    """Figures that were written, in order."""
    figures = []
    write = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **kwargs: figures.append(self) or write(self, *args, **kwargs)
    )
    return figures


def texts(figure):
    return [text.get_text() for text in figure.findobj(matplotlib.text.Text)]


def inside_and_apart(figure, strings):
    """Whether each of the strings is drawn within the figure's border and none over another."""
    found = [text for text in figure.findobj(matplotlib.text.Text) if text.get_text() in strings]
    assert {text.get_text() for text in found} == set(strings)
    boxes = [text.get_window_extent() for text in found]
    within = all(
        figure.bbox.x0 <= b.x0 and b.x1 <= figure.bbox.x1 and figure.bbox.y0 <= b.y0 and b.y1 <= figure.bbox.y1
        for b in boxes
    )
    shrunk = [box.expanded(0.98, 0.9) for box in boxes]
    return within and not any(a.overlaps(b) for i, a in enumerate(shrunk) for b in shrunk[:i])


def check_png(file, at_least=500):
    with Image.open(file) as image:
        image.load()
        assert image.format == "PNG"
        assert min(image.size) >= at_least
        assert len(image.convert("RGB").getcolors(2**24)) > 20


def test_curves_show_losses_metrics_and_stages(tmp_path, saved):
    plot_curves(make_log(), STAGES, tmp_path / "plots" / "curves.png")
    check_png(tmp_path / "plots" / "curves.png")
    losses, metrics = saved[0].axes
    drawn = {line.get_label(): line.get_xydata() for axes in (losses, metrics) for line in axes.get_lines()}
    assert drawn["training loss"][:, 1] == pytest.approx([2 / step for step in range(1, 21)])
    assert drawn["validation loss"].tolist() == [[1, 0.2], [2, 0.1], [3, 1 / 15], [4, 0.05]]
    assert drawn["accuracy"][:, 1].tolist() == [0.9] * 4
    assert drawn["macro F1"][:, 1].tolist() == [0.8] * 4
    assert inside_and_apart(saved[0], ["1  head", "2  $last_{block$", "3  all (rolled back)", "validation loss"])


def test_learning_rates_show_every_group_with_gaps_where_it_was_frozen(tmp_path, saved):
    plot_learning_rates(make_log(), STAGES, tmp_path / "rates.png")
    check_png(tmp_path / "rates.png")
    (axes,) = saved[0].axes
    assert axes.get_yscale() == "log"
    stem, middle, head = [line.get_xydata() for line in axes.get_lines()[-3:]]
    assert np.isnan(stem[:10, 1]).all()
    assert stem[10:].tolist() == [[step, 1e-3] for step in range(11, 21)]
    assert middle[10:, 1].tolist() == [5e-4] * 10
    assert head[:, 1].tolist() == [1e-3] * 10 + [2.5e-4] * 10
    assert inside_and_apart(saved[0], ["_stem", "$mid_1$", "head"])


def test_many_groups_and_stages_stay_readable(tmp_path, saved):
    stages = [
        {"name": f"stage {n}", "start_epoch": n / 5, "end_epoch": (n + 1) / 5, "accepted": True} for n in range(20)
    ]
    groups = tuple(f"features.{index}" for index in range(50))
    plot_learning_rates(make_log(groups), stages, tmp_path / "rates.png")
    names = [
        *groups,
        *(f"{n + 1}  stage {n}" for n in range(20)),
        *(str(n + 1) for n in range(20) if n + 1 not in (5, 10, 15, 20)),
    ]
    assert inside_and_apart(saved[0], names)
    assert saved[0].axes[0].get_window_extent().width > saved[0].bbox.width / 3


@pytest.mark.parametrize(
    "log",
    [
        [],
        [{"step": 3, "epoch": 1.0, "loss": float("nan"), "learning_rate": 0.0}],
        [{"step": 3, "epoch": 1.0, "loss": float("inf"), "learning_rate": 1e-3, "eval_loss": 1.0}],
    ],
)
@pytest.mark.parametrize("stages", [[], STAGES])
def test_short_and_broken_logs_give_a_plot(tmp_path, log, stages):
    plot_curves(log, stages, tmp_path / "curves.png")
    plot_learning_rates(log, stages, tmp_path / "rates.png")
    for name in ("curves", "rates"):
        check_png(tmp_path / f"{name}.png")


@pytest.mark.parametrize("size", [2, 10, 100])
def test_confusion_matrix_counts_and_names(tmp_path, saved, size):
    random = np.random.default_rng(size)
    labels, predicted = random.integers(0, size, (2, 30 * size))
    labels[labels == 1] = 0
    names = [f"{index}: a long class name, {'x' * (index % 30)}" for index in range(size)]
    plot_confusion_matrix(labels, predicted, names, tmp_path / "confusion.png")
    check_png(tmp_path / "confusion.png")
    axes = saved[0].axes[0]
    expected = np.zeros((size, size))
    np.add.at(expected, (labels, predicted), 1)
    shares = axes.images[0].get_array()
    assert shares.mask[1].all()
    assert shares[0].data == pytest.approx(expected[0] / expected[0].sum())
    if size <= 15:
        assert [int(text.get_text()) for text in axes.texts] == expected.ravel().tolist()
    ticks = [*axes.get_xticklabels(), *axes.get_yticklabels()]
    assert len(ticks) == 2 * size
    boxes = [tick.get_window_extent().expanded(0.98, 0.9) for tick in axes.get_yticklabels()]
    assert not any(a.overlaps(b) for a, b in itertools.pairwise(boxes))
    assert all(saved[0].bbox.x0 <= box.x0 for box in boxes)


def test_odd_names_are_drawn_letter_by_letter(tmp_path, saved):
    size = len(ODD)
    labels = np.arange(4 * size) % size
    stages = [{"name": name, "start_epoch": n, "end_epoch": n + 1, "accepted": False} for n, name in enumerate(ODD)]
    with matplotlib.rc_context({"text.usetex": False, "text.parse_math": True}):
        plot_confusion_matrix(labels, labels[::-1], ODD, tmp_path / "confusion.png")
        plot_curves(make_log(), stages, tmp_path / "curves.png")
        plot_learning_rates(make_log(tuple(ODD)), stages, tmp_path / "rates.png")
    shown = ["$\\frac{1}{0$", "_hidden", "a" * 14 + "…" + "a" * 14, "line�break�", "Grüße $x_1^2$", "�.bad"]
    for figure, ending in zip(saved, ["", " (rolled back)", ""], strict=True):
        drawn = " | ".join(texts(figure))
        assert all(name + ending in drawn for name in shown)
        assert not any(text.get_parse_math() for text in figure.findobj(matplotlib.text.Text) if "$" in text.get_text())


@pytest.mark.parametrize("num_classes", [1, 2, 10, 100])
def test_reliability_shows_accuracy_and_images_per_bin(tmp_path, saved, num_classes):
    random = np.random.default_rng(0)
    probabilities = random.dirichlet(np.full(num_classes, 0.3), size=500)
    labels = random.integers(0, num_classes, 500)
    plot_reliability(probabilities, labels, tmp_path / "reliability.png")
    check_png(tmp_path / "reliability.png")
    upper, lower = saved[0].axes
    confidence, correct = probabilities.max(1), probabilities.argmax(1) == labels
    for number, (bar, images) in enumerate(zip(upper.patches, lower.patches, strict=True)):
        inside = (confidence > number / 15) & (confidence <= (number + 1) / 15)
        assert images.get_height() == inside.sum()
        assert bar.get_height() == pytest.approx(correct[inside].mean() if inside.any() else 0)


def test_plots_leave_the_global_state_of_matplotlib_alone(tmp_path):
    before = dict(matplotlib.rcParams)
    plot_curves(make_log(), STAGES, tmp_path / "curves.png")
    plot_reliability(np.eye(2), np.arange(2), tmp_path / "reliability.png")
    assert dict(matplotlib.rcParams) == before
    assert matplotlib.pyplot.get_fignums() == []
