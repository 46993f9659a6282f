"""One virtual environment for each tool, on top of the running one: all tools use the same torch."""

import hashlib
import importlib.metadata
import os
import site
import subprocess
import sys
import venv
from pathlib import Path

# What the tools ask for and the runs do not use, or what must stay as it is.
_LEFT_OUT = ("torch", "torchvision", "spacy")


class CannotInstallError(Exception):
    """A tool cannot be had; the message says why."""


def environment(package: str, folder: Path) -> Path:
    """Returns the Python of an environment with a package, made in a folder unless it is there already.

    Raises:
        CannotInstallError: it cannot be installed, or cannot be imported with this torch.
    """
    # Another running environment needs others above it.
    place = folder / f"{package}-{_digest(sys.prefix)}"
    python = place / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not _imports(python, package):
        venv.create(place, with_pip=True, clear=True, symlinks=os.name != "nt")
        purelib = _output([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"])
        # `system_site_packages` would take those of the installed Python, not of a running virtual environment.
        Path(purelib, "running_environment.pth").write_text("\n".join(site.getsitepackages()), encoding="utf-8")
        _install(python, package, place)
    if not _imports(python, package):
        raise CannotInstallError(f"{package} does not import: {_error([python, '-c', f'import {package}'])}")
    return python


def _install(python: Path, package: str, place: Path) -> None:
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    fixed = [f"{name}=={importlib.metadata.version(name).partition('+')[0]}" for name in ("torch", "torchvision")]
    constraints = place / "constraints.txt"
    constraints.write_text("\n".join(fixed), encoding="utf-8")
    asked = (
        "import importlib.metadata as m; from packaging.requirements import Requirement as R\n"
        f"for r in map(R, m.requires({package!r}) or []):\n"
        f"    if r.name not in {_LEFT_OUT!r} and (r.marker is None or r.marker.evaluate({{'extra': ''}})): print(r)"
    )
    for step in ("the package", "what it needs"):
        wanted = ["--no-deps", package]
        if step != "the package":
            wanted = ["--constraint", constraints, *_output([python, "-c", asked]).splitlines()]
        if len(wanted) > 2 or step == "the package":
            failure = _error([*pip, *wanted])
            if failure is not None:
                raise CannotInstallError(f"pip cannot install {step}: {failure}")


def _imports(python: Path, package: str) -> bool:
    return python.exists() and _error([python, "-c", f"import {package}"]) is None


def _output(command: list[object]) -> str:
    return subprocess.run([str(part) for part in command], check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def _error(command: list[object]) -> str | None:
    """Runs a command; returns None, or the last line that it complained with."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
    return None if done.returncode == 0 else lines[-1]


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=4).hexdigest()
