"""What went wrong on the Hub, in words, and whether it is worth another try."""

import inspect
import re
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from huggingface_hub.errors import BadRequestError, HfHubHTTPError, OfflineModeIsEnabled, RevisionNotFoundError
from huggingface_hub.utils import http_backoff  # type: ignore[attr-defined]  # documented, but not in an __all__

from torchthaw.errors import HubError, SharingError, ThawError

T = TypeVar("T")

# Of httpx, which huggingface_hub imports by one name or another: what all failed requests raise.
HTTPError: type[Exception] = next(base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError")

# Seconds before the second try, the third one, and so on.
WAITS = (1.0, 2.0, 4.0)
LONGEST_WAIT = 60.0
TOKENS_PAGE = "https://huggingface.co/settings/tokens"
_PASSING = {408, 429, 500, 502, 503, 504}
# Another commit came in between; the next try begins with what the branch has then.
_OVERTAKEN = {409, 412}
_QUOTA = re.compile(r"quota|storage|\blimit\b|exceed|upgrade your plan|no space|too large", flags=re.IGNORECASE)
_LONGEST_MESSAGE = 400


@dataclass(frozen=True)
class Upload:
    """What was being uploaded, for messages.

    Attributes:
        repo_id: The repository.
        revision: Its branch.
        token: What must not be shown.
        afterwards: What the state of the local files is, and how to push again.
    """

    repo_id: str
    revision: str
    token: str
    afterwards: str


@contextmanager
def explained(upload: Upload, doing: str) -> Iterator[None]:
    """Turns what `huggingface_hub` raises into a `HubError` that says what happened and what to do.

    Args:
        upload: What is being uploaded.
        doing: What is being done, such as "uploading the files".

    Raises:
        HubError: the Hub could not be reached, or refused.
    """
    try:
        yield
    except ThawError:
        raise
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        # Without its cause, whose requests have the token in their headers.
        raise HubError(clean(f"{_explain(error, upload, doing)}. {upload.afterwards}", upload.token)) from None


def retried(action: Callable[[], T], say: Callable[[str], None]) -> T:
    """Does something up to four times, as long as the failure is one that passes: no connection, 429, 5xx, a race.

    What `huggingface_hub` has tried again by itself already is not tried once more.
    """
    for wait in WAITS:
        try:
            return action()
        except (HTTPError, OSError, RuntimeError) as error:
            root = _root(error)
            if not _may_pass(root) or _was_retried(root):
                raise
            pause = min(_wanted_wait(root) or wait, LONGEST_WAIT)
            say(f"{_short(root)}; trying again in {pause:g} s")
            time.sleep(pause)
    return action()


def clean(text: str, token: str | None = None) -> str:
    """Returns a text on one line, printable, and without tokens."""
    if token:
        text = text.replace(token, "***")
    text = re.sub(r"(?i)\b(bearer|basic) +[^\s'\"]+", r"\1 ***", re.sub(r"\bhf_\w{6,}", "hf_***", text))
    text = " ".join(text.split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _root(error: BaseException) -> BaseException:
    """Returns the failed request's error, which uploads by threads wrap in another one."""
    found = error
    while not isinstance(found, HTTPError) and found.__cause__ is not None:
        found = found.__cause__
    return found if isinstance(found, HTTPError) or _is_connection(found) else error


def _status(error: BaseException) -> int | None:
    return error.response.status_code if isinstance(error, HfHubHTTPError) else None


def _is_connection(error: BaseException) -> bool:
    # huggingface_hub 1.5 says that its client is closed where it tries again after a refused connection.
    closed = isinstance(error, RuntimeError) and "client has been closed" in str(error)
    return closed or (isinstance(error, HTTPError) and not isinstance(error, HfHubHTTPError))


def _may_pass(error: BaseException) -> bool:
    if _is_connection(error):
        # Such as a token that no header can have.
        return type(error).__name__ not in ("LocalProtocolError", "UnsupportedProtocol", "TooManyRedirects")
    status = _status(error)
    return status in _PASSING or (status in _OVERTAKEN and not _looks_full(error))


def _was_retried(error: BaseException) -> bool:
    """Whether `huggingface_hub` made several requests before it gave up: its `http_backoff` is where it comes from."""
    if not any(frame.name == http_backoff.__name__ for frame in traceback.extract_tb(error.__traceback__)):
        return False
    defaults = {name: item.default for name, item in inspect.signature(http_backoff).parameters.items()}
    status = _status(error)
    return isinstance(error, defaults["retry_on_exceptions"]) or status in defaults["retry_on_status_codes"]


def _wanted_wait(error: BaseException) -> float | None:
    """Returns the seconds that the Hub asks to wait."""
    headers = error.response.headers if isinstance(error, HfHubHTTPError) else {}
    after = headers.get("retry-after", "")
    window = re.search(r";\s*r\s*=\s*0\s*;\s*t\s*=\s*(\d+)", headers.get("ratelimit", ""))
    return float(after) if after.isdigit() else float(window[1]) + 1 if window else None


def _server_message(error: BaseException) -> str:
    """Returns what the Hub said, in brackets; nothing if it said nothing."""
    message = (getattr(error, "server_message", None) or "").strip()
    message = message if len(message) <= _LONGEST_MESSAGE else f"{message[:_LONGEST_MESSAGE]} ..."
    return f' ("{message}")' if message else ""


def _looks_full(error: BaseException) -> bool:
    said = getattr(error, "server_message", None) or ""
    return _status(error) in (402, 413, 507) or bool(_QUOTA.search(said))


def _short(error: BaseException) -> str:
    status = _status(error)
    if status is None:
        return f"no connection to the Hub ({type(error).__name__})"
    if status in _OVERTAKEN:
        return f"another commit came in between ({status})"
    return f"too many requests for the Hub ({status})" if status == 429 else f"the Hub is out of order ({status})"


def _explain(error: BaseException, upload: Upload, doing: str) -> str:
    root = _root(error)
    if isinstance(root, OfflineModeIsEnabled):
        return f"{doing} needs the Hub, but HF_HUB_OFFLINE is set; unset it"
    if isinstance(root, HfHubHTTPError):
        return f"{doing} failed: {_explain_status(root, upload)}"
    if _is_connection(root):
        return (
            f"{doing} failed: the connection to the Hub was lost or could not be made ({type(root).__name__}: {root}); "
            "check the network, and HF_ENDPOINT if it is set"
        )
    text = str(root)
    if "LFS batch API" in text and _QUOTA.search(text):
        return f"{doing} failed: the Hub has no room for it ({text}); {_make_room(upload)}"
    return f"{doing} failed ({type(root).__name__}: {text})"


def _explain_status(error: HfHubHTTPError, upload: Upload) -> str:
    status, said, owner = _status(error), _server_message(error), upload.repo_id.split("/")[0]
    if _looks_full(error):
        return f"the Hub has no room for it, or the files are too large ({status}){said}; {_make_room(upload)}"
    if status == 401:
        return (
            f"the Hub does not know the token, or it has expired (401){said}; make one that may write at {TOKENS_PAGE} "
            "and log in with `hf auth login`, or set HF_TOKEN"
        )
    if status == 403:
        return (
            f"the token may not write to {upload.repo_id} (403){said}; make one with write access to {owner!r} at "
            f"{TOKENS_PAGE} and log in with `hf auth login`, or push to a repository of your own"
        )
    if isinstance(error, RevisionNotFoundError):
        return f"{upload.repo_id} has no branch {upload.revision!r} (404)"
    if status == 404:
        return f"there is no repository {upload.repo_id}, or the token may not see it (404){said}; check its name"
    if status in _OVERTAKEN:
        return f"others change {upload.repo_id} at the same time ({status}){said}"
    if status == 429:
        wait = _wanted_wait(error)
        return f"too many requests (429){said}; wait " + (f"{wait:g} seconds" if wait else "a few minutes")
    if isinstance(error, BadRequestError):
        return f"the Hub refuses it as it is (400){said}"
    return f"the Hub is out of order ({status}){said}; wait a few minutes"


def _make_room(upload: Upload) -> str:
    owner = upload.repo_id.split("/")[0]
    return f"remove repositories of {owner!r} that are not needed, or make its storage larger"


def check_card_answer(response: Any, where: str) -> None:
    """Raises what the Hub has against a card's metadata.

    Args:
        response: Its answer to `/api/validate-yaml`.
        where: The card's file.

    Raises:
        SharingError: there are errors.
    """
    if response.status_code == 400:
        errors = "; ".join(str(error.get("message")) for error in response.json().get("errors", []))
        raise SharingError(clean(f"the Hub does not accept the metadata of {where}: {errors}; mend it and push again"))
