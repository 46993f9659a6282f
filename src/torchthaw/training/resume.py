"""Going on with an interrupted run: which checkpoint, and whether it belongs to this run."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers.trainer import OPTIMIZER_NAME

from torchthaw.errors import PlanError
from torchthaw.evaluation.files import replacing
from torchthaw.training import processes
from torchthaw.training.checkpoints import checkpoints_in, last_complete, run_of, why_incomplete
from torchthaw.training.progress import STATE_FILE, read_state

JOURNAL_FILE = "journal.json"
_SHOWN_DIFFERENCES = 10


def find_checkpoint(wanted: str | bool, output_dir: Path) -> Path:
    """Returns the checkpoint to go on from.

    Args:
        wanted: A checkpoint's folder, or True for the last whole one of the run in `output_dir`.
        output_dir: Folder of the run.

    Raises:
        PlanError: there is no whole checkpoint; the message says why each one was passed over.
    """
    if wanted is not True:
        folder = Path(str(wanted))
        problem = why_incomplete(folder) if folder.is_dir() else "there is no such folder"
        problem = problem or _what_lacks(folder)
        if problem is not None:
            raise PlanError(
                f"cannot resume from {folder}: {problem}; pass True to take the last whole checkpoint of {output_dir}"
            )
        return folder
    found, passed_over = last_complete(output_dir, run_id=_run_in(output_dir))
    if found is None:
        reasons = "; ".join(f"{folder.name}: {problem}" for folder, problem in passed_over)
        raise PlanError(
            f"there is no whole checkpoint in {output_dir} to resume from{f' ({reasons})' if reasons else ''}; "
            "leave resume_from_checkpoint out to start anew"
        )
    problem = _what_lacks(found)
    if problem is not None:
        raise PlanError(f"cannot resume from {found}: {problem}; leave resume_from_checkpoint out to start anew")
    return found


def has_checkpoint(output_dir: Path) -> bool:
    """Whether an interrupted run in this folder can be gone on with."""
    return last_complete(output_dir, run_id=_run_in(output_dir))[0] is not None


def check_same_run(identity: Mapping[str, Any], checkpoint: Path) -> None:
    """Compares what this run is of with what the checkpoint's was.

    Raises:
        PlanError: they differ; the differences are in the message.
    """
    # As JSON has it, so that tuples and lists are alike.
    here = json.loads(json.dumps(identity))
    different = list(differences(read_state(checkpoint)["identity"], here))
    if different:
        raise PlanError(
            f"{checkpoint} belongs to another run:\n{_listed(different)}\n"
            "Resume with what that run had, or start anew in another folder."
        )


def check_same_everywhere(identity: Mapping[str, Any]) -> None:
    """Compares what the processes of a distributed run are about to do.

    Raises:
        PlanError: some were started with other settings or data than the first one; raised in every process.
    """
    first, *others = processes.gather(dict(identity))
    for rank, other in enumerate(others, start=1):
        different = list(differences(first, other))
        if different:
            raise PlanError(
                f"process {rank} was given another run than process 0 (what it was there, and is here):\n"
                f"{_listed(different)}\nGive all processes the same arguments and the same data, in the same order."
            )


def differences(was: Any, now: Any, key: str = "") -> Iterator[str]:
    """Yields one line for each value that differs between two pieces of plain data."""
    if isinstance(was, dict) and isinstance(now, dict):
        for name in [*was, *(name for name in now if name not in was)]:
            yield from differences(was.get(name), now.get(name), f"{key}.{name}" if key else str(name))
    elif isinstance(was, list) and isinstance(now, list) and len(was) == len(now):
        for number, (old, new) in enumerate(zip(was, now, strict=True)):
            yield from differences(old, new, f"{key}[{number}]")
    elif was != now:
        yield f"{key} was {_short(was)} and is {_short(now)}"


def write_journal(
    output_dir: Path, *, run_id: str, identity: Mapping[str, Any], stages: Sequence[Mapping[str, Any]], finished: bool
) -> None:
    """Writes, whole or not at all, what the run is of and what was decided after each stage so far."""
    journal = {"run_id": run_id, "finished": finished, "stages": list(stages), "identity": dict(identity)}
    with replacing(output_dir / JOURNAL_FILE) as temporary:
        temporary.write_text(json.dumps(journal, indent=2), encoding="utf-8")


def read_journal(output_dir: Path) -> dict[str, Any] | None:
    """Returns the journal of the run in a folder; None if there is none that can be read."""
    try:
        journal = json.loads((output_dir / JOURNAL_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return journal if isinstance(journal, dict) and isinstance(journal.get("run_id"), str) else None


def this_runs_checkpoints(output_dir: Path, run_id: str) -> list[Path]:
    """Returns the finished checkpoints of a run, oldest first."""
    return [folder for folder in checkpoints_in(output_dir) if run_of(folder) == run_id]


def new_run_id() -> str:
    """Returns a name for a run; it takes nothing from the seeded generators."""
    return os.urandom(8).hex()


def _run_in(output_dir: Path) -> str | None:
    """Returns the run that is in a folder; None, which is any, if a power cut took the journal."""
    journal = read_journal(output_dir)
    return None if journal is None else str(journal["run_id"])


def _listed(lines: Sequence[str]) -> str:
    shown = "\n".join(f"  - {line}" for line in lines[:_SHOWN_DIFFERENCES])
    return shown + (f"\n  and {len(lines) - _SHOWN_DIFFERENCES} more" if len(lines) > _SHOWN_DIFFERENCES else "")


def _what_lacks(checkpoint: Path) -> str | None:
    """Says what a whole checkpoint has not got of what a run is gone on with."""
    if not (checkpoint / STATE_FILE).is_file():
        return f"it has no {STATE_FILE}, so it is not of a staged run"
    if not (checkpoint / OPTIMIZER_NAME).is_file():
        return "it holds weights alone (save_only_model), without the state of the optimizer"
    return None


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
