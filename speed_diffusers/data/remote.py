"""Data sets on the Hugging Face Hub, and what goes wrong on the way there, each in one line."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import datasets
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError, DatasetsError
from huggingface_hub import HfFileSystem
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
)

from ..errors import InputError, unknown_name
from .shards import ParquetShards

ALIASES = {"imagenet-1k": "ILSVRC/imagenet-1k"}
"""Short ids that the Hub redirects; the page with the terms exists under the full id."""

CONVERTED = "refs/convert/parquet"
"""The branch to which the Hub converts sets of other formats."""

FILE_FORMATS = ("arrow", "csv", "imagefolder", "json", "parquet", "webdataset")
"""Names that `load_dataset` takes for a format instead of an id."""


def load_remote(
    name: str, config_name: str | None, *, split: str, cache_dir: str | None, revision: str | None
) -> datasets.Dataset:
    """Loads one split of a data set on the Hub; from the local cache where it has been loaded before.

    Args:
        name: Its id, "owner/name".
        config_name: Its configuration, needed where it has several.
        split: Name of the split.
        cache_dir: Where `datasets` keeps its files; None for its default.
        revision: Branch, tag or commit; None for the newest.

    Raises:
        InputError: If the id is malformed or unknown, the data set gated, the Hub unreachable, or the configuration,
            revision or split does not exist.
    """
    _check_name(name)
    with _explaining(name):
        return datasets.load_dataset(name, config_name, split=split, cache_dir=cache_dir, revision=revision)


def remote_shards(
    name: str, config_name: str | None, *, split: str, cache_dir: str | None, revision: str | None
) -> ParquetShards:
    """Opens the parquet files of a split of a data set on the Hub, of which nothing but the footers is read.

    Args:
        name: Its id, "owner/name".
        config_name: Its configuration, needed where it has several.
        split: Name of the split.
        cache_dir: Where `datasets` keeps what it knows of a data set; None for its default.
        revision: Branch, tag or commit; None for the newest. Branches are followed up to their commit of now.

    Raises:
        InputError: As `load_remote`, or the data set has no parquet files.
    """
    _check_name(name)
    with _explaining(name):
        builder = datasets.load_dataset_builder(name, config_name, cache_dir=cache_dir, revision=revision)
        files = _files_of(builder, split)
        if files is None:
            raise unknown_name("split", split, map(str, builder.config.data_files or ()))
        if other := next((file for file in files if not file.endswith(".parquet")), None):
            raise InputError(
                f"'{name}' cannot be streamed: it is no set of parquet files ({other.rpartition('/')[2]}). The Hub "
                f"converts many sets: try dataset_revision={CONVERTED}."
            )
        return ParquetShards(files, builder.info.features, HfFileSystem())


def unprepared_shards(
    name: str, config_name: str | None, *, split: str, cache_dir: str | None, revision: str | None
) -> ParquetShards | None:
    """As `remote_shards`; None where `load_remote` is asked for less, or has more to say of what is wrong.

    That is where the set has been loaded before, is no set of parquet files, or has no such split.
    """
    _check_name(name)
    with _explaining(name):
        builder = datasets.load_dataset_builder(name, config_name, cache_dir=cache_dir, revision=revision)
        files = _files_of(builder, split)
        if os.path.isdir(builder.cache_dir) or not files or not all(file.endswith(".parquet") for file in files):
            return None
        return ParquetShards(files, builder.info.features, HfFileSystem())


def _files_of(builder: datasets.DatasetBuilder, split: str) -> list[str] | None:
    """Addresses of the files of a split; None where there is no such split."""
    by_split = builder.config.data_files or {}
    return [str(file) for file in by_split[split]] if split in by_split else None


def _check_name(name: str) -> None:
    if os.path.exists(name):
        raise InputError(f"'{name}' is on this machine, not on the Hub: give it as train_data_dir={name}.")
    if name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise InputError(f"No such folder: '{name}'. (A data set on the Hub has an id like 'owner/name'.)")
    if name in FILE_FORMATS:
        raise InputError(f"'{name}' is a file format, not a data set: give the files as train_data_dir=FOLDER.")


@contextmanager
def _explaining(name: str) -> Iterator[None]:
    """Turns what goes wrong with a data set on the Hub into an `InputError`, where a user can mend it."""
    try:
        yield
    except InputError:
        raise
    # Which exception comes out depends on where in three libraries it happened; the unexplained ones pass unchanged.
    except Exception as error:
        explanation = _explain(error, name)
        if explanation is None:
            raise
        raise InputError(explanation) from error


def _explain(error: Exception, name: str) -> str | None:
    """One line for a failed `load_dataset`, None if it is nothing a user can mend."""
    chain = list(_chain(error))
    message = " ".join(str(error).split())
    # `datasets` cuts the chain of causes when it reports a gated set, so its wording has to do.
    if any(isinstance(link, GatedRepoError) for link in chain) or "is a gated dataset" in message:
        page = f"https://huggingface.co/datasets/{ALIASES.get(name, name)}"
        return f"{name} is gated: accept its terms at {page} and log in with `hf auth login`."
    if isinstance(error, DatasetNotFoundError) and "Revision" in message:
        return message
    if any(isinstance(link, (RepositoryNotFoundError, DatasetNotFoundError, HFValidationError)) for link in chain):
        return (
            f"There is no data set '{name}' on the Hub, or it is private and you are not logged in "
            "(`hf auth login`). For files on this machine give train_data_dir=."
        )
    if isinstance(error, ValueError | DatasetsError):
        # Unknown split or configuration, no data files, unreadable data: the messages of `datasets` say what there is.
        cause = error.__cause__ if isinstance(error, DatasetGenerationError) else None
        return f"Cannot load '{name}' from the Hub: {' '.join(str(cause or error).split())}"
    answered = next((link for link in chain if isinstance(link, HfHubHTTPError) and _status(link)), None)
    if answered is not None:
        return f"Cannot load '{name}': the Hub answered with status {_status(answered)}. Try again later."
    if any(isinstance(link, ConnectionError | TimeoutError) or _is_transport_error(link) for link in chain):
        return (
            f"Cannot reach the Hub for '{name}', and it is not in the cache. Check the network (and HF_HUB_OFFLINE), "
            "or train offline with dataset_name=embedded or train_data_dir=FOLDER."
        )
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """`error` and what led to it, newest first."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or link.__context__


def _status(error: HfHubHTTPError) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _is_transport_error(error: BaseException) -> bool:
    # By name: which HTTP client huggingface_hub uses (requests, httpx, httpx2) differs between its versions.
    return any(base.__name__ == "TransportError" for base in type(error).__mro__)
