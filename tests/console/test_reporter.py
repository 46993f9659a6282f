"""Lines, tables and the messages of libraries, at several widths and encodings."""

import io
import logging
import warnings

import pytest
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from torchthaw.console.library_messages import said_once
from torchthaw.console.reporter import Reporter
from torchthaw.console.run_bar import RunBar
from torchthaw.console.text import as_time, in_lines, printable, shortened


def reporter_of(width, *, encoding="utf-8", terminal=True):
    reporter = Reporter()
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True)
    reporter.console = Console(
        file=file, width=width, force_terminal=terminal, color_system=None, highlight=False, emoji=False,
        legacy_windows=False,
    )  # fmt: skip

    def lines():
        return file.buffer.getvalue().decode(encoding).splitlines()

    return reporter, lines


HOSTILE = "[red]b\x1b[31m:bug:\x07\u202e"
ROWS = [(HOSTILE, "everything", "11,200,000", "0.9612 -> 0.9800"), ("a" * 90, "head", "1,026", "0.0980 -> 0.9612")]


@pytest.mark.parametrize("width", [40, 60, 80, 120, 200])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_table_fits_and_no_number_is_cut(width, encoding):
    reporter, lines = reporter_of(width, encoding=encoding)
    reporter.table("plan of жук", ("stage", "trains", "parameters", "metric before -> after"), ROWS, words=("trains",))
    shown = lines()
    assert max(map(cell_len, shown)) <= width
    text = "\n".join(shown)
    assert "\x1b" not in text
    assert "\x07" not in text
    for row in ROWS:
        assert row[2] in text
        assert row[3] in text
    joined = "".join(text.split())
    assert printable(HOSTILE) in joined
    assert text.count("a" * 15) >= 90 // width or width >= 80


def test_columns_without_room_are_left_out_before_the_table_becomes_a_list():
    for width, count in ((80, 4), (52, 3), (36, 2)):
        reporter, lines = reporter_of(width)
        reporter.table("t", ("stage", "first number", "second number", "third number"),
                       [("a", "1" * 14, "2" * 14, "3" * 14)], optional=("second number", "third number"))  # fmt: skip
        text = "\n".join(lines())
        assert ["1" * 14 in text, "2" * 14 in text, "3" * 14 in text] == [True, count > 2, count > 3]


def test_lines_are_broken_between_words_and_go_on_below_their_beginning():
    reporter, lines = reporter_of(30)
    reporter.say("    several words that take more than one line [b]:bug:\x1b[2J")
    assert all(line.startswith("    ") and len(line) <= 30 for line in lines())
    assert " ".join(" ".join(lines()).split()) == r"several words that take more than one line [b]:bug:\x1b[2J"


def test_a_line_to_copy_is_never_broken():
    reporter, lines = reporter_of(30)
    reporter.paste("torchthaw predict " + "a" * 40)
    assert lines() == ["torchthaw predict " + "a" * 40]


def test_off_a_terminal_a_message_is_one_line():
    reporter, lines = reporter_of(200, terminal=False)
    reporter.say("word " * 100)
    assert len(lines()) == 1


@pytest.mark.parametrize("width", [30, 60, 80, 120])
@pytest.mark.parametrize(
    "name", ["head", "a name that is longer than some terminals are wide, and on" * 2, "层" * 60], ids=len
)
def test_the_bar_fits_with_any_name(width, name):
    reporter, lines = reporter_of(width)
    bar = RunBar("fold 2/5", lambda: (None, 75.0), stage=name, epoch=10, epochs=12, step=100, steps=300, rate=1e-3,
                 loss=0.5, metric=("balanced accuracy", 0.75), waiting=0.125)  # fmt: skip
    reporter.console.print(bar)
    shown = lines()
    assert max(map(cell_len, shown)) <= width - 1
    assert shown[0].startswith("fold 2/5  ")
    if width > 30:
        assert "epoch 10/12" in shown[0]
        assert shown[0].endswith(" 33 %")
    text = "\n".join(shown)
    for figure in ("1:15 left (stage)", "lr 1.0e-03", "loss 0.5000", "data wait 12%"):
        assert figure in text


def test_the_time_left_is_the_runs_as_soon_as_it_is_known():
    known = [(None, None), (None, 75.0), (3725.0, 75.0)]
    shown = [RunBar("", lambda times=times: times).left() for times in known]
    assert shown == ["- left (stage)", "1:15 left (stage)", "1:02:05 left"]


def test_texts():
    assert as_time(59.6) == "1:00"
    assert as_time(3725) == "1:02:05"
    assert shortened("层层层层", 7) == "层层..."
    assert in_lines(["aa", "bb", "cc"], 6) == ["aa  bb", "cc"]


def test_what_libraries_say_is_said_once_and_handlers_come_back(capsys):
    library = logging.getLogger("some_library")
    own = logging.StreamHandler()
    library.addHandler(own)
    library.propagate = False
    show = warnings.showwarning
    with said_once(Reporter()), warnings.catch_warnings():
        warnings.simplefilter("always")
        for _ in range(3):
            library.warning("weights of %s are old", "[red]x\x1b[31m")
            warnings.warn("this way is going away", FutureWarning, stacklevel=1)
            logging.getLogger("torchthaw.data").warning("not cached")
    err = capsys.readouterr().err
    assert err.count(r"weights of [red]x\x1b[31m are old") == 1
    assert err.count("this way is going away") == 1
    assert err.count("not cached") == 1
    assert library.handlers == [own]
    assert warnings.showwarning is show
    with said_once(Reporter(quiet=True)):
        library.warning("a warning")
        library.error("an error")
    err = capsys.readouterr().err
    assert "a warning" not in err
    assert "an error" in err


def test_text_cells_keep_their_lines():
    reporter, lines = reporter_of(80)
    reporter.table("t", ("a", "b"), [("x", Text("1 -> 2\n+1 to +2"))])
    assert any("1 -> 2" in line for line in lines())
    assert any("+1 to +2" in line for line in lines())
