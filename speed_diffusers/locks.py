"""Locks by which processes of one or many machines keep out of one another's files; the system frees a dead one's."""

import errno
import logging
from pathlib import Path

from filelock import FileLock, Timeout

from .errors import InputError

logger = logging.getLogger(__name__)

LOCK_FILE = ".lock"
"""In a folder that one launch at a time may write to."""

_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL}
"""What a file system answers that grants no locks: NFS without its daemon, some FUSE and SMB."""


def take_lock(file: Path, *, wait: bool = False) -> FileLock | None:
    """Takes a lock.

    Args:
        file: The lock, in a folder that exists.
        wait: Until another process lets it go.

    Returns:
        The lock, for its holder to release; None where the file system grants none.

    Raises:
        Timeout: Another process holds it.
        OSError: The file cannot be written.
    """
    lock = FileLock(file)
    try:
        lock.acquire(timeout=-1 if wait else 0)
    except NotImplementedError:
        return None
    except OSError as error:
        if isinstance(error, Timeout) or error.errno not in _NO_LOCKS:
            raise
        return None
    return lock


def lock_output_dir(folder: Path) -> FileLock | None:
    """Makes a folder and keeps other launches from writing to it.

    Args:
        folder: The value of `output_dir`.

    Returns:
        The lock, for its holder to release; None, with a warning, where the file system grants none.

    Raises:
        InputError: Another process writes to the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock = take_lock(folder / LOCK_FILE)
    except Timeout as error:
        raise InputError(f"output_dir={folder} is being written by another process.") from error
    if lock is None:
        logger.warning("output_dir=%s: no locks there; see to it that nothing else writes to it.", folder)
    return lock
