"""Uploads to the Hub in one commit: checked before, resumed after a bad moment, with nothing but what is allowed."""

import logging
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TypeVar

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
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from ..errors import InputError
from .failures import NO_TOKEN, hub_line, in_one_line, is_transient, seconds_to_wait

T = TypeVar("T")

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_TRIES = (1.0, 2.0, 4.0, 8.0, 16.0)
"""Waits after a server's or the network's trouble, on top of those that the client itself makes for single files."""

LONGEST_WAIT = 300.0
"""Seconds that a server may ask to wait."""

CARD_FILE = "README.md"

ALLOWED_FILES = (
    CARD_FILE,
    "model_index.json",
    "speed_training.json",
    "samples.png",
    "training_curve.png",
    "error_by_timestep.png",
    "scheduler/scheduler_config.json",
    *(
        f"{part}/{name}"
        for part in ("transformer", "vae")
        for name in (
            "config.json",
            "diffusion_pytorch_model*.safetensors",
            "diffusion_pytorch_model*.safetensors.index*.json",
        )
    ),
)
"""What a release may consist of, as patterns of paths; nothing else is ever uploaded or deleted."""

_QUERY = re.compile(r"\?[^\s'\"]+")


@dataclass(frozen=True)
class Destination:
    """Where a release goes.

    Attributes:
        repo_id: "owner/name", or a name alone for one's own.
        private: Whether a new repository is private; None: as the owner's default is. One that is there stays as it
            is.
        revision: Branch, which is made if it is not there.
    """

    repo_id: str
    private: bool | None = None
    revision: str = "main"

    @property
    def in_words(self) -> str:
        """The beginning of every message about it."""
        return f"hub_model_id={self.repo_id}"


def is_allowed(path: str) -> bool:
    """Whether a file, by its path in a release, may be uploaded."""
    return any(fnmatchcase(path, pattern) and path.count("/") == pattern.count("/") for pattern in ALLOWED_FILES)


def check_destination(destination: Destination) -> Destination:
    """Checks all that can be known before there is anything to upload: name, token, and whether it may write.

    Returns:
        The same with its owner, who is the token's where a name stands alone.

    Raises:
        InputError: The name is none, there is no token, it is unknown to the Hub or read-only, or the Hub must not be
            asked.
        ConnectionError: The Hub cannot be reached, or is in trouble.
    """
    _check_here(destination)
    owner, name = _owner(destination), destination.repo_id
    return destination if "/" in name else replace(destination, repo_id=f"{owner}/{name}")


def check_name(destination: Destination) -> None:
    """Checks that the Hub could have a model of this name; asks nobody.

    Raises:
        InputError: It could not.
    """
    try:
        validate_repo_id(destination.repo_id)
    except HFValidationError as error:
        raise InputError(f"{destination.in_words}: {hub_line(error, destination.repo_id)}.") from error


def _check_here(destination: Destination) -> None:
    """The part of the check that asks nobody."""
    check_name(destination)
    if constants.HF_HUB_OFFLINE:
        raise InputError(f"{destination.in_words}: HF_HUB_OFFLINE is set, so nothing can be uploaded.")
    if get_token() is None:
        raise InputError(f"{destination.in_words}: there is no token: {NO_TOKEN}.")


def _owner(destination: Destination) -> str:
    """Whose the token is, which must not be read-only."""
    user = patiently(HfApi().whoami, destination)
    token = (user.get("auth") or {}).get("accessToken") or {}
    if token.get("role") == "read":
        raise InputError(
            f"{destination.in_words}: the token of {user.get('name')} is read-only: make one that may write at "
            f"{constants.ENDPOINT}/settings/tokens."
        )
    return str(user["name"])


def upload(folder: Path, destination: Destination, *, message: str) -> str:
    """Makes the files of a folder, as far as they are allowed, the content of a model on the Hub, in one commit.

    What the Hub holds of the allowed files and the folder does not, shards of larger weights perhaps, is deleted;
    others stay. After a server's or the network's trouble the same is asked again: large files that have arrived are
    not sent twice, neither then nor by a later call.

    Args:
        folder: The release.
        destination: Where it goes; made if it is not there.
        message: Of the commit.

    Returns:
        Address of the commit.

    Raises:
        InputError: The Hub refuses it: name, token, rights or card.
        ConnectionError: Server or network are in trouble for longer than it is worth to wait.
    """
    _check_here(destination)
    api, private, revision = HfApi(), destination.private, destination.revision
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    allowed = {name: path for name, path in files.items() if is_allowed(name)}

    def commit() -> CommitInfo:
        # Asked and made anew for each try: the last one may have been done and only its answer lost.
        gone = [
            name
            for name in api.list_repo_files(repo_id, revision=revision)
            if is_allowed(name) and name not in allowed
        ]
        operations = [CommitOperationAdd(name, path) for name, path in allowed.items()]
        return api.create_commit(
            repo_id,
            [*operations, *map(CommitOperationDelete, gone)],
            commit_message=message,
            revision=revision,
        )

    with _queries_hidden():
        if CARD_FILE in allowed:
            # Before there is an empty repository to be seen.
            patiently(ModelCard.load(allowed[CARD_FILE]).validate, destination)
        repo = patiently(lambda: api.create_repo(destination.repo_id, private=private, exist_ok=True), destination)
        repo_id = repo.repo_id
        if revision != constants.DEFAULT_REVISION:
            patiently(lambda: api.create_branch(repo_id, branch=revision, exist_ok=True), destination)
        return str(patiently(commit, destination).commit_url)


def patiently(call: Callable[[], T], destination: Destination) -> T:
    """Calls the Hub's client, again after trouble that may pass.

    Args:
        call: What may be done twice.
        destination: For the messages.

    Raises:
        InputError: The Hub refuses.
        ConnectionError: The trouble does not pass.
    """
    for seconds in (*SECONDS_BETWEEN_TRIES, None):
        try:
            return call()
        except Exception as error:
            found = in_one_line(error, destination.in_words, destination.repo_id, destination.revision)
            if seconds is None or not is_transient(error):
                raise found from (None if found is error else error)
            wait = max(seconds, min(seconds_to_wait(error), LONGEST_WAIT))
            logger.warning("%s Trying again in %g s.", found, wait)
            time.sleep(wait)
    raise AssertionError("the last try returns or raises")


class _WithoutQueries(logging.Filter):
    """Takes from messages what follows addresses behind a question mark: storage is opened by signatures there."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = _QUERY.sub("", record.getMessage()), ()
        return True


@contextmanager
def _queries_hidden() -> Iterator[None]:
    """Lets the client's warnings, which name the addresses that failed, keep the signatures in them to themselves."""
    client, hidden = logging.getLogger("huggingface_hub.utils._http"), _WithoutQueries()
    client.addFilter(hidden)
    try:
        yield
    finally:
        client.removeFilter(hidden)
