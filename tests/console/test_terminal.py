"""What a person sees: real processes on a terminal of several widths, through a pipe, interrupted."""

import json
import os
import re
import select
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pty = pytest.importorskip("pty", reason="only Unix has pseudo-terminals")
pyte = pytest.importorskip("pyte")

SCRIPT = Path(__file__).with_name("terminal_runs.py")
MARK = "=== run over, exit code"
STAGE = "[red]all\x1b[31m :bug: of the layers that there are"
SHOWN = r"[red]all\x1b[31m :bug: of the layers that there are"
STAGES = json.dumps(
    [{"name": "head", "unfreeze": "head", "epochs": 2}, {"name": STAGE, "unfreeze": "all", "epochs": 6}]
)
TINY = ["--backbone", "shufflenet_v2_x0_5", "--set", "weights=null", "--set", "image_size=32", "--set", "batch_size=4",
        "--set", "num_workers=0", "--set", "data.validation=0.5", "--set", "plan=null", "--set", "epochs=null",
        "--set", "audit=off"]  # fmt: skip
CLASSES = ("[red]ant", "b\x1b[31mee", "жук :bug:")
ENVIRONMENT = {key: value for key, value in os.environ.items() if key not in ("FORCE_COLOR", "COLUMNS", "NO_COLOR")}


def arguments(data, output, *more, stages=STAGES):
    return ["train", "staged", "--data", str(data), "--output", str(output), *TINY, "--set", f"stages={stages}", *more]


def on_terminal(runs):
    """Runs the command line on a terminal.

    Args:
        runs: See terminal_runs.py; `interrupt_at` is a pattern, and when it is drawn, Ctrl-C is pressed.

    Returns:
        For each run the screen at its end, its lines at many moments, all bytes as text, and the exit code.
    """
    child, terminal = pty.fork()
    if child == 0:
        # Whoever starts the tests in the background lets them ignore it.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.execve(sys.executable, [sys.executable, str(SCRIPT), json.dumps(runs)], {**ENVIRONMENT, "TERM": "xterm"})
    ended = []
    try:
        for run in runs:
            screen = pyte.Screen(run.get("columns", 80), 90)
            stream, seen, text = pyte.ByteStream(screen), [], b""
            interrupt_at = run.get("interrupt_at")
            while MARK.encode() not in text or not text.endswith(b"\n"):
                ready, _, _ = select.select([terminal], [], [], 240)
                assert ready, "\n".join(screen.display)
                got = os.read(terminal, 1000)
                text += got
                stream.feed(got)
                if b"epoch" in got:
                    seen.append([line.rstrip() for line in screen.display])
                if interrupt_at is not None and re.search(interrupt_at, text[-2000:].decode(errors="replace")):
                    os.write(terminal, b"\x03")
                    interrupt_at = None
            os.write(terminal, b"\n")
            code = int(re.search(rf"{MARK} (\d+)".encode(), text).group(1))
            ended.append((screen, seen, text.decode(), code))
    finally:
        os.close(terminal)
        os.waitpid(child, 0)
    return ended


def through_pipes(runs, **environment):
    """Returns stdout and stderr of each run, and its exit code."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT), json.dumps(runs)],
        input=b"\n" * len(runs), capture_output=True, env={**ENVIRONMENT, **environment}, timeout=400, check=True,
    )  # fmt: skip
    out, err = (re.split(rf"\n{MARK} (\d+)\n", stream.decode()) for stream in (done.stdout, done.stderr))
    return [(out[2 * n], err[2 * n], int(out[2 * n + 1])) for n in range(len(runs))]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Noise in three classes with names that a terminal must not obey."""
    root = tmp_path_factory.mktemp("photos")
    random = np.random.default_rng(0)
    for number, name in enumerate(CLASSES):
        (root / name).mkdir()
        for image in range(24):
            pixels = random.integers(0, 120, size=(32, 32, 3), dtype=np.uint8)
            pixels[..., number] += 100
            Image.fromarray(pixels).save(root / name / f"{image}.png")
    return root


WIDTHS = (60, 80, 120)


@pytest.fixture(scope="module")
def terminals(photos, tmp_path_factory):
    """The same small run on terminals of several widths, one that is interrupted, and one that can only print."""
    folder = tmp_path_factory.mktemp("runs")
    runs = {width: {"arguments": arguments(photos, folder / str(width)), "columns": width} for width in WIDTHS}
    endless = json.dumps([{"name": "all", "unfreeze": "all", "epochs": 500}])
    runs[120]["environment"] = {"NO_COLOR": "1"}
    runs["interrupted"] = {
        "arguments": arguments(photos, folder / "not whole", stages=endless),
        "interrupt_at": "epoch [2-9]/500",
        "columns": 80,
    }
    # Interrupted too, since a whole run takes longer.
    runs["dumb"] = {
        "arguments": arguments(photos, folder / "dumb", stages=endless),
        "interrupt_at": "validation loss",
        "environment": {"TERM": "dumb"},
    }
    return dict(zip(runs, on_terminal(list(runs.values())), strict=True)), folder


@pytest.mark.parametrize("width", WIDTHS)
def test_the_bar_is_whole_at_every_moment(terminals, width):
    seen = terminals[0][width][1]
    drawn = [[line for line in lines if re.search(r"epoch \d+/\d+  ", line)] for lines in seen]
    drawn = [lines for lines in drawn if lines]
    assert len(drawn) > 5
    assert all(len(lines) == 1 for lines in drawn), "one bar, redrawn in place"
    # Between two moments of a drawing, a line may be there in part; most moments are whole.
    whole = [line for (line,) in drawn if re.fullmatch(r"\S.*  epoch [1-8]/8  [━╸╺]* +\d+ %", line)]
    assert len(whole) > len(drawn) / 2
    assert max(map(len, whole)) == width - 1
    names = {re.match(r"(.*?)  epoch", line).group(1) for line in whole}
    assert "head" in names
    stage = next(name for name in names if name != "head")
    assert stage == SHOWN or (stage.endswith("...") and SHOWN.startswith(stage[:-3])), stage
    texts = ["\n".join(lines) for lines in seen]
    # After a stage's last step the rate is "0.0e+00", and on a fast machine no other may be drawn.
    figures = [r"\blr \d\.\de[-+]0\d", r"loss \d\.\d{4}", r"val accuracy \d\.\d{4}", r"data wait \d+%"]
    # Whether a moment is drawn at which no time is known yet is a matter of luck; see test_reporter.py.
    for figure in [*figures, r"\d:\d\d left$|\d:\d\d left "]:
        assert any(re.search(figure, text, re.MULTILINE) for text in texts), figure


@pytest.mark.parametrize("width", WIDTHS)
def test_the_screen_is_left_whole_with_a_closing_table(terminals, width):
    (screen, _, text, code), folder = terminals[0][width], terminals[1]
    assert code == 0, text
    lines = [line.rstrip() for line in screen.display]
    assert not any(re.search(r"epoch \d+/\d+  |[\d-] left\b|━", line) for line in lines), "no bar is left"
    assert not screen.cursor.hidden
    assert "\x1b[?1049" not in text
    results = json.loads((folder / str(width) / "results.json").read_text())
    start = next(number for number, line in enumerate(lines) if line.startswith("what each stage reached"))
    table = lines[start + 1 :]
    table = table[: next(n for n, line in enumerate(table) if line.startswith(("validation: ", "head: frozen")))]
    shown = "\n".join(table)
    for stage in results["stages"]:
        assert f"{stage['trainable_parameters']:,}" in shown, "no number is cut or broken"
        assert f"{stage['comparison']['before']:.4f} -> {stage['comparison']['after']:.4f}" in shown
        low, high = stage["comparison"]["interval"]
        assert f"{low:+.4f} to {high:+.4f}" in shown
        assert f"{stage['seconds']:.1f}" in shown
        assert ("kept" if stage["accepted"] else "rolled back") in shown
    # The whole name is there, in the lines that its column takes.
    letters = re.sub(r"\s", "", shown)
    assert all(word in letters for word in ("[red]all", r"\x1b[31m", ":bug:"))
    low, high = results["validation"]["accuracy_interval"]
    flowing = " ".join(" ".join(lines).split())
    assert f"accuracy {results['validation']['accuracy']:.4f} (95 % interval {low:.3f} to {high:.3f}, " in flowing


def test_without_colour_a_screen_has_none(terminals):
    colour = r"\x1b\[(\d;)*(3[0-7]|38;\d[;\d]*|9[0-7])m"
    assert re.search(colour, terminals[0][80][2])
    assert not re.search(colour, terminals[0][120][2])


def test_words_are_not_torn_apart(terminals):
    lines = [line.rstrip() for line in terminals[0][60][0].display]
    flowing = " ".join(" ".join(lines).split())
    assert (
        "Frozen groups run as in inference: BatchNorm statistics, dropout and stochastic depth. Gate: best." in flowing
    )


@pytest.fixture(scope="module")
def piped(photos, tmp_path_factory):
    """Runs through pipes, in an encoding that lacks most letters, with --json, and with --quiet."""
    folder = tmp_path_factory.mktemp("piped")
    one = json.dumps([{"name": "жук", "unfreeze": "head", "epochs": 40}])
    runs = [
        arguments(photos, folder / "json", "--json", stages=one),
        arguments(photos, folder / "quiet", "--quiet"),
        ["predict", str(folder / "quiet"), str(photos / CLASSES[2])],
        ["train", "staged", "--data", str(photos / "no\x1b[31msuch"), "--json"],
    ]
    return through_pipes([{"arguments": run} for run in runs], PYTHONIOENCODING="ascii", LANG="C")


def test_json_is_alone_on_stdout_and_lines_are_plain_and_few(piped):
    out, err, code = piped[0]
    assert code == 0, err
    assert json.loads(out)["stages"][0]["name"] == "жук"
    assert "\x1b" not in err
    assert "\r" not in err
    assert r"epoch 40 of 40 (\u0436\u0443\u043a): training loss" in err
    assert 15 <= err.count("training loss") <= 21, "not a line for each of 40 short epochs"
    assert "left (stage)" not in err
    assert "━" not in err


def test_quiet_says_nothing(piped):
    out, err, code = piped[1]
    assert (code, out, err) == (0, "", "")


def test_names_that_the_encoding_lacks_are_escaped(piped):
    out, err, code = piped[2]
    assert code == 0, err
    assert out.count("\n") == 24
    assert out.isascii()


def test_an_error_does_not_reach_the_terminal_as_a_command(piped):
    out, err, code = piped[3]
    assert (code, out) == (2, "")
    assert r"no\x1b[31msuch" in err
    assert "\x1b" not in err


def test_ctrl_c_leaves_the_terminal_whole_and_says_how_to_go_on(terminals):
    screen, _, _, code = terminals[0]["interrupted"]
    assert code == 130
    lines = [line.rstrip() for line in screen.display]
    flowing = " ".join(" ".join(lines).split())
    assert "stopped; to go on from the last checkpoint:" in flowing
    assert "not whole/recipe.yaml' --resume" in "".join(lines)
    assert not any("/500  " in line for line in lines), "the bar is gone"
    assert "Traceback" not in flowing
    assert not screen.cursor.hidden


def test_a_terminal_that_can_only_print_gets_no_control_codes(terminals):
    _, _, text, code = terminals[0]["dumb"]
    assert code == 130
    assert "\x1b" not in text
    assert re.search(r"epoch \d+ of 500 \(all\): training loss", text)
