"""Tables of figures on a terminal: no word of a class name is torn apart."""

import pytest

from torchthaw.evaluation.metrics import classification_metrics
from torchthaw.figure_tables import show_figures


@pytest.mark.parametrize(("classes", "is_matrix"), [(2, True), (10, False)])
def test_a_confusion_matrix_that_would_tear_names_apart_is_a_list(classes, is_matrix, monkeypatch, capsys):
    monkeypatch.setattr("torchthaw.figure_tables._WIDTH_OF_FILES", 80)
    names = [f"{number} verylongclassname" for number in range(classes)]
    labels = [number % classes for number in range(3 * classes)]
    logits = [[float((label + (row == 0)) % classes == column) for column in range(classes)]
              for row, label in enumerate(labels)]  # fmt: skip
    figures = classification_metrics(logits, labels, names)
    show_figures({"split": "validation", **figures}, confusion=True)
    shown = capsys.readouterr().out
    assert ("true class" in shown) == is_matrix
    assert ("taken for" in shown) != is_matrix
    assert shown.count("verylongclassname") == 2 + 2 * is_matrix
