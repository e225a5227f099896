"""What the Hub's client raises, put into one line that says what to do about it.

The client has been on requests, httpx and httpx2; its own error class tells which of them it is on now.
"""

import logging
from http import HTTPStatus
from typing import NamedTuple

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from ..errors import InputError, unknown_name

logger = logging.getLogger(__name__)

TRANSIENT_STATUS = {408, 429, 500, 502, 503, 504}
"""Answers of a server that may be another one in a while."""

NO_TOKEN = "set HF_TOKEN, or log in with `hf auth login`"

LONGEST = 300
"""Letters of a foreign message that are told."""

# The mother of all errors of the client's HTTP library: the last class between its own error and Python's.
_HTTP_ERROR = [kind for kind in HfHubHTTPError.__mro__ if kind.__module__ != "builtins"][-1]
_NETWORK = (ConnectionError, TimeoutError, _HTTP_ERROR)


def hub_error(error: BaseException) -> BaseException:
    """The error of the Hub's client that is behind another one; the error itself where there is none."""
    behind: BaseException | None = error
    while behind is not None:
        if isinstance(behind, _NETWORK):
            return behind
        behind = behind.__cause__ or behind.__context__
    return error


def status_of(error: BaseException) -> int | None:
    """The status of the answer that an error tells of; None where there was no answer."""
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    return status if isinstance(status, int) else None


def is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed in a while: a server's trouble, or the network's."""
    found = hub_error(error)
    if isinstance(found, OfflineModeIsEnabled):
        return False
    status = status_of(found)
    return isinstance(found, _NETWORK) if status is None else status in TRANSIENT_STATUS


def seconds_to_wait(error: BaseException) -> float:
    """What a server asks to wait before the next request; 0 where it does not say."""
    headers = getattr(getattr(hub_error(error), "response", None), "headers", None) or {}
    asked = str(headers.get("Retry-After", ""))
    return float(asked) if asked.isdecimal() else 0.0


def hub_line(error: BaseException, repo_id: str, *, revision: str | None = None) -> str:
    """What an error of the Hub's client means, as the end of a line: "there is no model ... on the Hub".

    Args:
        error: What the client raised, or what somebody raised from it.
        repo_id: The model.
        revision: Branch, tag or commit that was asked for.
    """
    found = hub_error(error)
    status = status_of(found)
    if isinstance(found, OfflineModeIsEnabled):
        return "the Hub must not be asked (HF_HUB_OFFLINE is set)"
    if isinstance(found, HFValidationError):
        return f"'{repo_id}' is no name of the Hub, which are OWNER/NAME of letters, digits, '-', '_' and '.'"
    if isinstance(found, GatedRepoError):
        log_in = "" if get_token() else f", and {NO_TOKEN}"
        return f"{repo_id} is gated: accept its terms at {constants.ENDPOINT}/{repo_id}{log_in}"
    if isinstance(found, RevisionNotFoundError):
        return f"{repo_id} has no branch, tag or commit '{revision}'"
    if status == 401 and not isinstance(found, RepositoryNotFoundError):
        return f"{'the Hub does not know the token' if get_token() else 'there is no token'}: {NO_TOKEN}"
    if isinstance(found, RepositoryNotFoundError):
        why = "the token's user may not read it" if get_token() else f"there is no token ({NO_TOKEN})"
        return f"the Hub has no model {repo_id}, or it is private and {why}"
    if status == 403:
        return f"the token may not do this to {repo_id}{_server_words(found)}"
    if status is not None:
        try:
            name = f"{status} {HTTPStatus(status).phrase}"
        except ValueError:
            name = str(status)
        words = _server_words(found)
        if not words and isinstance(error, ValueError):  # older clients put a card's faults into an error of their own
            words = f" ({_first_line(error)})"
        return f"the Hub answers {name}{words}"
    if isinstance(found, _NETWORK):
        return f"the Hub cannot be reached at {constants.ENDPOINT} ({_first_line(found)})"
    return _first_line(found)


class Problem(NamedTuple):
    """What keeps a model on the Hub from being read.

    Attributes:
        line: In words, as the end of a line.
        is_final: Whether the Hub has said so; else it could not be asked, and a copy in the cache is as good.
    """

    line: str
    is_final: bool


def find_problem(repo_id: str, *, revision: str | None = None) -> Problem | None:
    """Asks the Hub whether a model can be read, once and at once: the client itself asks for half a minute per file.

    Args:
        repo_id: "owner/name".
        revision: Branch, tag or commit.

    Returns:
        What is wrong; None if nothing is, or nothing that this question could find.
    """
    api = HfApi()
    try:
        validate_repo_id(repo_id)
        api.auth_check(repo_id)
        if revision is not None:
            api.model_info(repo_id, revision=revision)
    except RevisionNotFoundError as error:
        return Problem(_with_nearest_revision(error, repo_id, revision), is_final=True)
    except (HFValidationError, RepositoryNotFoundError) as error:  # a gated one counts as not found to the client
        return Problem(hub_line(error, repo_id), is_final=True)
    except Exception as error:
        if status_of(hub_error(error)) == 401:
            return Problem(hub_line(error, repo_id), is_final=True)
        if is_transient(error) or isinstance(hub_error(error), OfflineModeIsEnabled):
            return Problem(hub_line(error, repo_id), is_final=False)
        logger.debug("%s: %s", repo_id, error)  # mirrors of the Hub do not know every question
    return None


def _with_nearest_revision(error: RevisionNotFoundError, repo_id: str, revision: str | None) -> str:
    try:
        refs = HfApi().list_repo_refs(repo_id)
    except Exception:
        return hub_line(error, repo_id, revision=revision)
    names = [ref.name for ref in (*refs.branches, *refs.tags)]
    return str(unknown_name(f"revision of {repo_id}", revision, names)).rstrip(".")


def in_one_line(error: Exception, what: str, repo_id: str, revision: str | None = None) -> Exception:
    """An error of the Hub's client as one of ours: what the user can mend, or trouble of network or server.

    Any other error, which is a mistake in a program, is returned as it is.

    Args:
        error: What the client raised.
        what: The beginning of the line: the option that named the model, "hub_model_id=owner/name".
        repo_id: The model.
        revision: Branch that was asked for.
    """
    if not isinstance(hub_error(error), _NETWORK):
        return error
    line = f"{what}: {hub_line(error, repo_id, revision=revision)}."
    return ConnectionError(line) if is_transient(error) else InputError(line)


def _server_words(error: BaseException) -> str:
    """The server's own words, in brackets."""
    words = getattr(error, "server_message", None)
    return f" ({_short(words)})" if words else ""


def _first_line(error: BaseException) -> str:
    """What an error says first; its heading alone ("Invalid metadata in README.md.") would say nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return _short(" ".join(lines[:2]))


def _short(text: str) -> str:
    """Foreign text in one line, not too long and without the token, which malformed headers are quoted with."""
    token, text = get_token(), " ".join(text.split()).rstrip(".")
    if token:
        text = text.replace(token, "<token>")
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."
