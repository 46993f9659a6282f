"""Saved models on the Hub: a push is one commit, of the files that belong there, and changes nothing locally."""

import logging
import re
import shlex
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import yaml
from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    constants,
    get_token,
)
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import (  # type: ignore[attr-defined]  # documented, but not in an __all__
    build_hf_headers,
    get_session,
    hf_raise_for_status,
    validate_repo_id,
)

from torchthaw._version import __version__
from torchthaw.errors import HubError, SharingError
from torchthaw.sharing.hub_errors import TOKENS_PAGE, Upload, check_card_answer, clean, explained, retried
from torchthaw.sharing.pushed_files import CARD_FILE, REPORTS, saved_files

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PushResult:
    """What a push did.

    Attributes:
        url: Page of the model.
        repo_id: The repository.
        revision: The branch.
        commit: Name of the commit: what `revision=` takes to get exactly this state.
        files: What the folder gave, by path in the repository; files that were there already are among them.
        removed: What was removed from the repository: reports of other weights.
        info: What `huggingface_hub` says of the commit.
    """

    url: str
    repo_id: str
    revision: str
    commit: str
    files: tuple[str, ...]
    removed: tuple[str, ...]
    info: CommitInfo


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    commit_message: str | None = None,
    include_predictions: bool = False,
    say: Callable[[str], None] | None = None,
) -> PushResult:
    """Pushes a saved model to the Hub, in one commit; the folder stays as it is.

    What is pushed is what `saved_files` returns. Reports of earlier weights that the repository has and the folder
    lacks are removed from it (plots, results, predictions). Weights that were uploaded by a push that was interrupted
    are not uploaded again.

    Args:
        folder: The saved model.
        repo_id: The repository, `user/name`; it is made if there is none.
        private: Whether a repository that is made is private; None takes the account's default. With True, an existing
            one that is public is refused.
        revision: Branch; it is made if there is none. None is `main`.
        token: Token that may write. None takes `HF_TOKEN`, or what `hf auth login` stored.
        commit_message: Title of the commit.
        include_predictions: Whether `predictions/`, `report.html` and plots of images are pushed too: they show images
            of the data set and the names of their files.
        say: Gets a line about each step.

    Raises:
        SharingError: the folder is no whole saved model, or the name or the card's metadata are not valid.
        HubError: the Hub could not be reached, or refused. The folder is whole; the message says how to push again.
    """
    root = Path(folder)
    check_repo_id(repo_id)
    files = saved_files(root, include_predictions=include_predictions)
    options = [f"--revision {shlex.quote(revision)}"] if revision else []
    options += ["--private"] * bool(private) + ["--predictions"] * include_predictions
    command = " ".join(["torchthaw push", shlex.quote(str(root)), shlex.quote(repo_id), *options])
    return push_files(
        files,
        repo_id,
        private=private,
        revision=revision,
        token=token,
        commit_message=commit_message or f"Model, card and results (torchthaw {__version__})",
        owned=REPORTS,
        afterwards=f"{root} is whole; push it again with `{command}`",
        say=say,
    )


def push_files(
    files: Mapping[str, Path],
    repo_id: str,
    *,
    commit_message: str,
    afterwards: str = "",
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    owned: Collection[str] = (),
    say: Callable[[str], None] | None = None,
) -> PushResult:
    """Pushes files to a model repository in one commit; see `push_folder`.

    Args:
        files: Files by their path in the repository.
        repo_id: The repository.
        commit_message: Title of the commit.
        afterwards: What a message of failure says about the local files and how to push again.
        private: As in `push_folder`.
        revision: As in `push_folder`.
        token: As in `push_folder`.
        owned: Patterns of paths in the repository that are removed if `files` lacks them.
        say: Gets a line about each step.

    Raises:
        SharingError: the name or the card's metadata are not valid.
        HubError: the Hub could not be reached, or refused.
    """
    say = say or logger.info
    check_repo_id(repo_id)
    branch = check_branch(revision)
    token = find_token(token, afterwards)
    upload = Upload(repo_id, branch, token, afterwards)
    api = HfApi(token=token, library_name="torchthaw", library_version=__version__)
    if CARD_FILE in files:
        _check_card(files[CARD_FILE], api, upload, say)
    else:
        say(f"there is no model card ({CARD_FILE}) to push; `torchthaw card` writes one")
    make_repository(api, upload, private, say)
    size = sum(file.stat().st_size for file in files.values())
    say(f"uploading {len(files)} files ({size / 1e6:.1f} MB) to {repo_id}")
    with explained(upload, f"uploading to {repo_id}"):
        info, removed = retried(lambda: _commit(api, upload, files, owned, commit_message), say)
    page = f"{api.endpoint}/{repo_id}" + ("" if branch == constants.DEFAULT_REVISION else f"/tree/{branch}")
    return PushResult(page, repo_id, branch, info.oid, tuple(sorted(files)), removed, info)


def check_repo_id(repo_id: str) -> None:
    """Checks the name of a repository.

    Raises:
        SharingError: it is not of the form `user/name`, or has characters that the Hub does not allow.
    """
    name = str(repo_id)
    if name.startswith(("http://", "https://")) or name.count("/") != 1 or not all(name.split("/")):
        last = re.sub(r"[^\w.-]+", "-", name.rstrip("/").rsplit("/", 1)[-1], flags=re.ASCII).strip("-.") or "my-model"
        raise SharingError(f"{name!r} does not name a repository on the Hub; write user/name, such as maker/{last}")
    try:
        validate_repo_id(name)
    except HFValidationError:
        raise SharingError(
            f"{name!r} does not name a repository on the Hub: user and name have letters, digits, '-', '_' and '.' "
            "only, no '--' or '..', no '-' or '.' at an end, and 96 characters at most; write user/name, such as "
            "maker/ants-and-bees"
        ) from None


def check_branch(revision: str | None) -> str:
    """Returns the name of a branch that can be pushed to, `main` for None.

    Raises:
        SharingError: it is a commit, or no name for a branch.
    """
    branch = constants.DEFAULT_REVISION if revision is None else revision
    if re.fullmatch(r"[0-9a-f]{7,40}", branch):
        raise SharingError(f"revision is {branch!r}, which is a commit; write a branch to push to, such as 'main'")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)*", branch, flags=re.ASCII) or ".." in branch:
        raise SharingError(
            f"revision is {branch!r}, which no branch can be called; write letters, digits, '-', '_', '.' and '/'"
        )
    return branch


def find_token(token: str | None, afterwards: str) -> str:
    """Returns the token that was passed, or else that of the environment or the stored login.

    Raises:
        HubError: there is none.
    """
    found = (token or "").strip() or get_token()
    if found and not re.fullmatch(r"[!-~]+", found):
        raise HubError(f"the token has characters that no token has, such as blanks; copy it anew. {afterwards}")
    if not found:
        raise HubError(
            f"there is no token for the Hub; make one that may write at {TOKENS_PAGE} and log in with `hf auth login`, "
            f"or set HF_TOKEN. {afterwards}"
        )
    return found


def make_repository(api: HfApi, upload: Upload, private: bool | None, say: Callable[[str], None]) -> None:
    """Makes the repository and the branch, as far as they are missing.

    Raises:
        SharingError: the repository is to be private and is public.
        HubError: the Hub could not be reached, or refused.
    """
    with explained(upload, f"making the repository {upload.repo_id}"):
        retried(lambda: api.create_repo(upload.repo_id, private=private, exist_ok=True), say)
    if private:
        with explained(upload, f"looking at the repository {upload.repo_id}"):
            is_private = retried(lambda: api.model_info(upload.repo_id), say).private
        if not is_private:
            raise SharingError(
                f"{upload.repo_id} is to be private, but it exists and everybody can read it; make it private in its "
                "settings, push to another repository, or leave private out. Nothing was uploaded."
            )
    if upload.revision != constants.DEFAULT_REVISION and not upload.revision.startswith("refs/"):
        with explained(upload, f"making the branch {upload.revision!r} of {upload.repo_id}"):
            retried(lambda: api.create_branch(upload.repo_id, branch=upload.revision, exist_ok=True), say)


def _check_card(file: Path, api: HfApi, upload: Upload, say: Callable[[str], None]) -> None:
    """Has `huggingface_hub` and the Hub read the card's metadata before anything is made there."""
    try:
        text = file.read_text(encoding="utf-8")
        ModelCard(text)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError) as error:
        raise SharingError(
            clean(f"the metadata of {file} is not valid: {error}; mend it, or write the card again (`torchthaw card`)")
        ) from error

    def ask() -> None:
        response = get_session().post(
            f"{api.endpoint}/api/validate-yaml",
            json={"content": text, "repoType": "model"},
            headers=build_hf_headers(token=upload.token, library_name="torchthaw", library_version=__version__),
        )
        check_card_answer(response, str(file))
        hf_raise_for_status(response)

    with explained(upload, "having the card checked"):
        retried(ask, say)


def _commit(
    api: HfApi, upload: Upload, files: Mapping[str, Path], owned: Collection[str], message: str
) -> tuple[CommitInfo, tuple[str, ...]]:
    """Makes the commit that takes the branch from what it has to what it is to have; doing so twice does no harm."""
    there = api.model_info(upload.repo_id, revision=upload.revision).siblings or []
    surplus = [
        item.rfilename
        for item in there
        if item.rfilename not in files and any(fnmatch(item.rfilename, pattern) for pattern in owned)
    ]
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        *(CommitOperationAdd(name, str(file)) for name, file in sorted(files.items())),
        *(CommitOperationDelete(name) for name in surplus),
    ]
    info = api.create_commit(upload.repo_id, [*operations], commit_message=message, revision=upload.revision)
    return info, tuple(surplus)
