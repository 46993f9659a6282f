"""Checkpoints that are whole or passed over.

A checkpoint is sealed by a manifest of all its files, written last. What has no manifest, or does not agree with it,
was cut off while it was written or removed, or was damaged since.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from torchthaw.errors import PlanError, TrainingError
from torchthaw.evaluation.files import replacing

MANIFEST = "complete.json"

_NAME = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(0|[1-9][0-9]*)")
_CHUNK = 1 << 22


def seal(folder: Path, *, run_id: str) -> None:
    """Writes the manifest: from here on the checkpoint counts as whole.

    All bytes are on the disk before the manifest is, so that it vouches for nothing that a power cut can take.

    Args:
        folder: The checkpoint, with all its files.
        run_id: Name of the run that it belongs to.

    Raises:
        TrainingError: there are no files to vouch for.
    """
    entries = {name: _entry(file, flush=True) for name, file in _files(folder).items()}
    if not entries:
        raise TrainingError(
            f"{folder} has no files, so it is no checkpoint to seal; save the model and its state first"
        )
    for parent, _, _ in os.walk(folder, topdown=False):
        _flush_folder(Path(parent))
    _flush_folder(folder.parent)
    with replacing(folder / MANIFEST) as temporary, temporary.open("w", encoding="utf-8") as stream:
        json.dump({"run_id": run_id, "files": entries}, stream, indent=2)
        stream.flush()
        os.fsync(stream.fileno())
    _flush_folder(folder)


def why_incomplete(folder: Path, *, run_id: str | None = None) -> str | None:
    """Says in one phrase what is wrong with a checkpoint, or returns None if it is whole.

    Files that the manifest does not list do not matter.

    Args:
        folder: The checkpoint.
        run_id: The run that it must belong to; None if any will do.
    """
    try:
        if not (folder / MANIFEST).is_file():
            return f"it has no {MANIFEST}, so it was not written to its end"
        manifest = _read_manifest(folder)
        if manifest is None:
            return f"its {MANIFEST} cannot be read"
        if run_id is not None and manifest["run_id"] != run_id:
            return "it belongs to another run"
        files = _files(folder)
        # What is cheap to see comes first.
        for name, entry in manifest["files"].items():
            if name not in files:
                return f"{name} is missing"
            size = files[name].stat().st_size
            if size != entry["size"]:
                return f"{name} has {size} bytes instead of {entry['size']}"
        for name, entry in manifest["files"].items():
            if _entry(files[name]) != entry:
                return f"{name} has other bytes than were written"
    except OSError as error:
        return f"it cannot be read ({error})"
    return None


def run_of(folder: Path) -> str | None:
    """Returns the run that a checkpoint belongs to by its manifest, unread otherwise; None without a manifest."""
    manifest = _read_manifest(folder)
    return None if manifest is None else str(manifest["run_id"])


def step_of(folder: Path) -> int:
    """Returns the optimizer step that a checkpoint is named after.

    Raises:
        PlanError: the folder has another name.
    """
    match = _NAME.fullmatch(folder.name)
    if match is None:
        raise PlanError(
            f"{folder} is not named as a checkpoint is; pass a folder of the name {PREFIX_CHECKPOINT_DIR}-N, with N "
            f"the number of steps, such as {PREFIX_CHECKPOINT_DIR}-500"
        )
    return int(match.group(1))


def checkpoints_in(output_dir: Path) -> list[Path]:
    """Returns the folders named `checkpoint-N`, whole or not, by step; links to folders elsewhere are left out."""
    if not output_dir.is_dir():
        return []
    found = [path for path in output_dir.iterdir() if _NAME.fullmatch(path.name)]
    return sorted((path for path in found if path.is_dir() and not path.is_symlink()), key=step_of)


def last_complete(output_dir: Path, *, run_id: str | None = None) -> tuple[Path | None, list[tuple[Path, str]]]:
    """Looks for the whole checkpoint with the highest step.

    Args:
        output_dir: Folder of the run.
        run_id: The run that it must belong to; None if any will do.

    Returns:
        The checkpoint, or None if there is none; and those of higher steps, highest first, with what is wrong with
        each.
    """
    passed_over: list[tuple[Path, str]] = []
    for folder in reversed(checkpoints_in(output_dir)):
        problem = why_incomplete(folder, run_id=run_id)
        if problem is None:
            return folder, passed_over
        passed_over.append((folder, problem))
    return None, passed_over


def remove_incomplete(output_dir: Path, *, run_id: str) -> list[Path]:
    """Removes checkpoints that were not written, or not removed, to the end: those without a manifest.

    Damaged ones stay, as do those of other runs. If all checkpoints with a manifest are of other runs, nothing is
    removed: one of these runs may be writing.

    Args:
        output_dir: Folder of the run.
        run_id: The run that goes on in this folder.

    Returns:
        The folders that were removed.
    """
    folders = checkpoints_in(output_dir)
    manifests = [_read_manifest(folder) for folder in folders]
    runs = {manifest["run_id"] for manifest in manifests if manifest is not None}
    if runs and run_id not in runs:
        return []
    incomplete = [folder for folder in folders if not (folder / MANIFEST).exists()]
    for folder in incomplete:
        _remove(folder)
    return incomplete


def prune(checkpoints: Path | Sequence[Path], *, limit: int | None, keep: Collection[Path]) -> list[Path]:
    """Removes the oldest checkpoints until as many are left as wanted.

    A checkpoint loses its manifest before anything else, so that one that is half removed never counts as whole.

    Args:
        checkpoints: The folder of the run, or those of its checkpoints that count.
        limit: How many may stay; None, 0 and less remove nothing, as in `TrainingArguments.save_total_limit`.
        keep: Checkpoints that stay whatever their age; so does the newest, and, of a run's folder, the newest whole
            one. If these are more than `limit`, more stay.

    Returns:
        The folders that were removed, oldest first.
    """
    if isinstance(checkpoints, Path):
        folders = checkpoints_in(checkpoints)
    else:
        folders = sorted((folder for folder in checkpoints if not folder.is_symlink()), key=step_of)
    if limit is None or limit < 1 or len(folders) <= limit:
        return []
    kept = {folder.resolve() for folder in [*keep, folders[-1]]}
    if isinstance(checkpoints, Path):
        whole, _ = last_complete(checkpoints)
        kept |= {whole.resolve()} if whole is not None else set()
    removed = [folder for folder in folders if folder.resolve() not in kept][: len(folders) - limit]
    for folder in removed:
        _remove(folder)
    return removed


def _remove(folder: Path) -> None:
    (folder / MANIFEST).unlink(missing_ok=True)
    _flush_folder(folder)
    shutil.rmtree(folder)


def _files(folder: Path) -> dict[str, Path]:
    """Returns the files below a folder by relative path, in any linked folders not included.

    Neither the manifest is, nor what is left of one that was being written when its process was killed.
    """
    files = sorted(Path(parent, name) for parent, _, names in os.walk(folder) for name in names)
    found = {file.relative_to(folder).as_posix(): file for file in files if file.is_file()}
    return {name: file for name, file in found.items() if name != MANIFEST and not name.startswith(f".{MANIFEST}.")}


def _entry(file: Path, *, flush: bool = False) -> dict[str, Any]:
    """Returns size and digest of a file's bytes, after they are on the disk if `flush` is set."""
    digest, size = hashlib.blake2b(digest_size=32), 0
    # Windows flushes only what is open for writing.
    with file.open("r+b" if flush and os.name == "nt" else "rb") as stream:
        if flush:
            os.fsync(stream.fileno())
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return {"size": size, "blake2b": digest.hexdigest()}


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    """Returns the manifest; None if there is none or it cannot be read."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        entries = manifest["files"]
        well_formed = isinstance(manifest["run_id"], str) and all(
            isinstance(entry["size"], int) and isinstance(entry["blake2b"], str) for entry in entries.values()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return manifest if well_formed else None


def _flush_folder(folder: Path) -> None:
    """Has the names in a folder written to the disk; Windows does this by itself."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
