"""Which recipe a run is of: its digest, and the commit of the git repository that it came from."""

import hashlib
import os
import subprocess
from pathlib import Path
from typing import Any

_SECONDS = 10


def describe_recipe(folder: Path) -> dict[str, Any]:
    """Returns `sha256` of the resolved recipe in the folder of a run; nothing if it has none."""
    file = folder / "recipe.yaml"
    return {"sha256": hashlib.sha256(file.read_bytes()).hexdigest()} if file.is_file() else {}


def git_state(file: Path) -> dict[str, Any]:
    """Returns the commit of the git repository that a file is in.

    Args:
        file: A recipe.

    Returns:
        `commit`, and whether it is `dirty`: a tracked file is changed, or this one is not in the commit. Nothing if it
        is in no repository, there is no commit, or no git, or git takes longer than ten seconds.
    """
    commit = _git(file, "rev-parse", "--verify", "HEAD")
    if not commit:
        return {}
    changed = _git(file, "status", "--porcelain", "--untracked-files=no")
    own = _git(file, "status", "--porcelain", "--untracked-files=all", "--ignored", "--", file.name)
    return {} if changed is None or own is None else {"commit": commit, "dirty": bool(changed or own)}


def _git(file: Path, *arguments: str) -> str | None:
    # Nothing that the repository's configuration names is started, and nothing is written.
    command = ["git", "-c", "core.fsmonitor=false", "-C", str(file.resolve().parent), *arguments]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_SECONDS,
            check=False,
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
