"""Where caches are, unless the user says otherwise."""

import os
import sys
from pathlib import Path


def default_cache_folder() -> Path:
    """Returns the environment's `TORCHTHAW_CACHE`, or else `torchthaw` in the platform's folder for caches.

    That is `XDG_CACHE_HOME` or `~/.cache` on Linux, `~/Library/Caches` on macOS, `LOCALAPPDATA` on Windows.
    """
    if chosen := os.environ.get("TORCHTHAW_CACHE"):
        return Path(chosen).expanduser()
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or "~/AppData/Local"
    elif sys.platform == "darwin":
        base = "~/Library/Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "torchthaw"
