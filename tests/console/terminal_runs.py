"""Runs torchthaw several times in one process, which takes the imports once; see test_terminal.py.

The argument is JSON: a list of runs, each with `arguments`, `columns` if the terminal is to be so wide, and
`environment`.
"""

import fcntl
import json
import os
import struct
import sys
import termios

from torchthaw import cli

MARK = "=== run over, exit code"


def main() -> None:
    for run in json.loads(sys.argv[1]):
        if "columns" in run:
            fcntl.ioctl(2, termios.TIOCSWINSZ, struct.pack("HHHH", 50, run["columns"], 0, 0))
        os.environ.update(run.get("environment", {}))
        sys.argv = ["torchthaw", *run["arguments"]]
        code = 0
        try:
            cli.main()
        except SystemExit as exit_:
            code = exit_.code or 0
        # A terminal shows both streams: there the mark would be read as the end of two runs.
        for stream in [sys.stdout] if sys.stdout.isatty() else [sys.stderr, sys.stdout]:
            print(f"\n{MARK} {code}", file=stream, flush=True)
        sys.stdin.readline()  # the reader has seen it


if __name__ == "__main__":
    main()
