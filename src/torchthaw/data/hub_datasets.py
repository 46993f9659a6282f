"""Data sets on the Hub: loaded whole or as streams, at a commit that is known, or refused with a reason."""

import logging
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import load_dataset
from datasets.exceptions import DatasetNotFoundError, DatasetsError
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from torchthaw.errors import DataError

logger = logging.getLogger(__name__)

# Of httpx, which huggingface_hub imports by one name or another: what all failed requests raise.
_HTTPError: type[Exception] = next(base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError")
# Seconds before the second try to load, the third one, and so on.
_WAITS = (1.0, 2.0, 4.0)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_PART_OF_COMMIT = re.compile(r"[0-9a-f]{7,40}")


def load_hub_dataset(source: str, name: str | None, revision: str | None, *, streaming: bool = False) -> Any:
    """Loads a data set of the Hub, or takes it from the cache if the Hub cannot be reached.

    Args:
        source: Its name, `user/name`.
        name: Its configuration.
        revision: Branch, tag or commit.
        streaming: Whether to return streams.

    Returns:
        A `DatasetDict` or `IterableDatasetDict`.

    Raises:
        DataError: it does not exist, may not be read or cannot be reached, or only another revision is in the cache.
    """
    if streaming:
        # Without the Hub, `datasets` would stream the last revision that is in the cache, whichever it is.
        revision = resolve_revision(source, revision)
        if revision is None:
            raise DataError(
                f"Cannot reach the data set {source!r} on the Hub, from which it is to be streamed. Check the network "
                "(HF_HUB_OFFLINE must be unset), or leave streaming out to take it from the cache."
            )
    try:
        found = _load(source, name, revision=revision, streaming=streaming)
    except (DatasetsError, _HTTPError, OSError, ValueError, RuntimeError) as error:
        raise DataError(_why_not(error, source, revision)) from error
    if not streaming:
        _check_revision(source, revision, loaded_revision(found))
    return found


def _load(*args: Any, **options: Any) -> Any:
    """Loads; starts again where a file broke off, which `huggingface_hub` does not do after every kind of loss."""
    for wait in _WAITS:
        try:
            return load_dataset(*args, **options)
        except (DatasetsError, _HTTPError, OSError) as error:
            kinds = {type(part).__name__ for part in _chain(error)}
            if not kinds & {"ReadError", "RemoteProtocolError"}:
                raise
            logger.warning("The connection to the Hub was lost; trying again in %g s.", wait)
            time.sleep(wait)
    return load_dataset(*args, **options)


def loaded_revision(splits: Mapping[Any, Any]) -> str | None:
    """Returns the commit of the Hub data set that splits were loaded from; None if they come from elsewhere.

    It is part of the place in the cache, so it is known offline too.

    Args:
        splits: What `load_image_dataset` returned; not streams.
    """
    for split in splits.values():
        for file in getattr(split, "cache_files", []):
            folder = Path(file["filename"]).parent.name
            if _COMMIT.fullmatch(folder):
                return folder
    return None


def resolve_revision(name: str, revision: str | None = None) -> str | None:
    """Asks the Hub which commit a revision of a data set is now.

    Args:
        name: Name of the data set, `user/name`.
        revision: Branch, tag or commit; None is `main`.

    Returns:
        The commit; None if the Hub cannot be reached.

    Raises:
        DataError: there is no such data set or revision, or it may not be read.
    """
    try:
        return HfApi(library_name="torchthaw").dataset_info(name, revision=revision).sha
    except HfHubHTTPError as error:
        if error.response.status_code >= 500 or error.response.status_code == 429:
            return None
        raise DataError(f"{_refusal(error, name, revision)}.") from None
    except (_HTTPError, OfflineModeIsEnabled, OSError):
        return None


def _check_revision(source: str, revision: str | None, loaded: str | None) -> None:
    """Refuses another revision than was asked for: without the Hub, `datasets` takes the last one it has."""
    if revision is None or loaded is None:
        return
    wanted: str | None = revision
    if not _PART_OF_COMMIT.fullmatch(revision):
        # What it was when the Hub was last asked for it.
        folder = f"datasets--{source.replace('/', '--')}"
        reference = Path(constants.HF_HUB_CACHE) / folder / "refs" / revision
        wanted = reference.read_text(encoding="utf-8").strip() if reference.is_file() else None
        if wanted is None and not constants.HF_HUB_OFFLINE:
            return
    if wanted is None or not loaded.startswith(wanted):
        raise DataError(
            f"The cache has the data set {source!r} at the commit {loaded}, not at revision {revision!r}, and the Hub "
            f"cannot be asked. Connect to it once (HF_HUB_OFFLINE must be unset), or write revision {loaded!r}."
        )


def _why_not(error: Exception, source: str, revision: str | None) -> str:
    """Says why a data set could not be loaded; the Hub is asked again if the error does not say it."""
    here = "and there is no such folder here"
    if constants.HF_HUB_OFFLINE:
        return (
            f"Cannot reach the data set {source!r} on the Hub, {here}: HF_HUB_OFFLINE is set, and the cache does not "
            f"have it ({_short(error)}). Unset HF_HUB_OFFLINE, or pass a folder."
        )
    chain = _chain(error)
    refused = next((part for part in chain if isinstance(part, HfHubHTTPError)), None)
    if refused is None and isinstance(error, DatasetNotFoundError):
        refused = _ask(source, revision)
    status = None if refused is None else refused.response.status_code
    if refused is not None and status is not None and status < 500 and status != 429:
        return f"{_refusal(refused, source, revision)}, {here}."
    lost = any(isinstance(part, _HTTPError | ConnectionError | LocalEntryNotFoundError) for part in chain)
    # What huggingface_hub 1.5 says where it tries again after a refused connection.
    lost = lost or "client has been closed" in str(error)
    if lost or status is not None:
        reason = f"the Hub is out of order ({status})" if status else _short(error)
        return (
            f"Cannot reach the data set {source!r} on the Hub, {here}: {reason}. Check the network, and try again; or "
            "pass a folder."
        )
    return (
        f"Cannot load the data set {source!r} from the Hub, {here}: {_short(chain[-1])} For a data set with several "
        "configurations, pass name."
    )


def _refusal(error: HfHubHTTPError, source: str, revision: str | None) -> str:
    status = error.response.status_code
    if isinstance(error, RevisionNotFoundError):
        return f"The data set {source!r} on the Hub has no revision {revision!r}; write a branch, a tag or a commit"
    if isinstance(error, GatedRepoError):
        return (
            f"The data set {source!r} on the Hub is gated ({status}); ask for access on its page, {constants.ENDPOINT}"
            f"/datasets/{source}, and log in with `hf auth login`, or set HF_TOKEN"
        )
    if status == 401 and not isinstance(error, RepositoryNotFoundError):
        return (
            f"The Hub does not know the token with which the data set {source!r} was asked for, or it has expired "
            "(401); log in anew with `hf auth login`, or set HF_TOKEN"
        )
    if status in (401, 403, 404):
        return (
            f"There is no data set {source!r} on the Hub, or it is private and not yours ({status}); check the name, "
            "and for a private one log in with `hf auth login`, or set HF_TOKEN"
        )
    return (
        f"The Hub refuses the data set {source!r} ({status}: {getattr(error, 'server_message', None) or 'no reason'})"
    )


def _ask(source: str, revision: str | None) -> HfHubHTTPError | None:
    try:
        HfApi(library_name="torchthaw").dataset_info(source, revision=revision)
    except HfHubHTTPError as error:
        return error
    except (_HTTPError, OSError):
        pass
    return None


def _chain(error: BaseException) -> list[BaseException]:
    """Returns an error and what it came from; `datasets` wraps what is wrong in general ones."""
    found = [error]
    while (cause := found[-1].__cause__ or found[-1].__context__) is not None and cause not in found:
        found.append(cause)
    return found


def _short(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
