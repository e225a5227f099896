"""Files: written whole or not at all, hashed, and checked before work begins."""

import errno
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from .errors import InputError

_DISK_ERRORS = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EIO,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
}
"""What a full, read-only or broken disk answers."""

_NOT_SUPPORTED = {errno.EINVAL, errno.ENOTSUP, errno.ENOSYS}
"""What a file system answers that knows no fsync, of a folder mostly: FUSE, SMB."""


@contextmanager
def naming_disk_errors(path: Path, num_bytes: int | None = None) -> Iterator[None]:
    """Lets an error of the disk say what could not be written; any other exception passes unchanged.

    Args:
        path: What is being written.
        num_bytes: What it needs, if that is known.

    Raises:
        OSError: The disk is full, read-only or broken; one line with the path and the bytes needed and free.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = _error_number(error)
        if number not in _DISK_ERRORS:
            raise
        needed = "" if num_bytes is None else f"{num_bytes:,} bytes needed, "
        folder = next(parent for parent in path.absolute().parents if parent.exists())
        text = f"Could not write {path}: {os.strerror(number)} ({needed}{shutil.disk_usage(folder).free:,} free)"
        raise OSError(number, text) from error


def _error_number(error: OSError | SafetensorError) -> int | None:
    if isinstance(error, OSError):
        return error.errno
    # safetensors passes the system's error on as text: "I/O error: No space left on device (os error 28)".
    found = re.search(r"os error (\d+)", str(error))
    return int(found[1]) if found else None


def remove(path: Path) -> None:
    """Deletes a file, a folder with all that is in it, or a link, never what a link points to; or nothing."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Waits until a file or the entries of a folder are on the disk, as far as the file system knows how to.

    Where it does not, a power cut may cost what was just written; a process that dies costs nothing.

    Raises:
        OSError: The disk failed.
    """
    is_folder = path.is_dir()
    if is_folder and os.name == "nt":
        return  # Windows opens no folder
    # Windows syncs only what is open for writing.
    descriptor = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NOT_SUPPORTED:
            raise
    finally:
        os.close(descriptor)


@contextmanager
def written_whole(path: Path, num_bytes: int | None = None) -> Iterator[Path]:
    """A temporary place for a file or folder that appears under its own name only when it is complete.

    Args:
        path: The file or folder to write or replace, in an existing folder.
        num_bytes: What it needs, if that is known.

    Yields:
        The path to write to. It is renamed to `path` at the end, or removed if anything was raised.

    Raises:
        OSError: The disk is full, read-only or broken; see `naming_disk_errors`.
    """
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    try:
        with naming_disk_errors(path, num_bytes):
            # A killed process can have had the same number: in a container every one has.
            remove(temporary)
            yield temporary
            if path.is_symlink() or (path.is_dir() and temporary.is_dir()):
                # A folder cannot be renamed over a full one. A file is not renamed over a folder: no older self of it.
                remove(path)
            temporary.replace(path)
    finally:
        with suppress(OSError):
            remove(temporary)


def unfinished(folder: Path, *names: str) -> list[Path]:
    """What killed processes, or ones still at work, have left of `written_whole`.

    Args:
        folder: Where they wrote; it need not exist.
        names: Names of their files and folders, or patterns such as "*.json".
    """
    found = []
    for each in list(folder.iterdir()) if folder.is_dir() else []:
        stem, _, process = each.name.rpartition("-")
        if process.isdigit() and any(fnmatchcase(stem, f".tmp-{name}") for name in names):
            found.append(each)
    return found


def remove_unfinished(folder: Path, *names: str) -> None:
    """Removes what `unfinished` finds; only for who alone writes to the folder.

    Args:
        folder: Where they wrote; it need not exist.
        names: Names of their files and folders, or patterns such as "*.json".
    """
    for leftover in unfinished(folder, *names):
        remove(leftover)


def write_text(path: Path, text: str) -> None:
    """Writes a text file in UTF-8, whole or not at all."""
    with written_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Writes tensors as safetensors, readable by whom other new files are readable by.

    Args:
        tensors: Names to tensors on any device.
        path: The file to write or replace.
        metadata: For the header.
    """
    path.touch()
    mode = path.stat().st_mode
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    # safetensors makes files that only their owner reads, whatever the umask says.
    path.chmod(mode)


def give_usual_mode(folder: Path) -> None:
    """Makes the safetensors files in a folder, at any depth, readable by whom its other new files are readable by."""
    with tempfile.TemporaryDirectory(dir=folder, prefix=".tmp-mode-") as place:
        (probe := Path(place) / "probe").touch()
        mode = probe.stat().st_mode
    for path in folder.rglob("*.safetensors"):
        path.chmod(mode)


def file_sha256(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tensors_sha256(tensors: Mapping[str, Tensor], header: bytes = b"") -> str:
    """Hexadecimal SHA-256 over the names, dtypes, shapes and bytes of tensors; their order does not matter.

    Args:
        tensors: Names to tensors on any device.
        header: Hashed before them.
    """
    digest = hashlib.sha256(header)
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        # Through bytes, because numpy has no bfloat16.
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_writable(name: str, folder: Path) -> None:
    """Checks that a folder can be written to, or made, by rehearsing all that a save does.

    Args:
        name: The option that names it, for the message.
        folder: The folder; it need not exist yet, and is not made.

    Raises:
        InputError: It, or what it would be made in, is a file, cannot be written, or refuses one of a save's steps.
    """
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not existing.is_dir():
        raise InputError(f"{name}={folder}: {existing} is a file.")
    try:
        # Asked by doing: permission bits do not tell what root, a read-only mount or a full quota allow.
        with tempfile.TemporaryDirectory(prefix=".tmp-writable-", dir=existing) as place:
            rehearsal = Path(place) / "folder"
            rehearsal.mkdir()
            for _ in range(2):  # a file is renamed over its older self, too
                (rehearsal / "new").write_bytes(b"saved")
                sync(rehearsal / "new")
                (rehearsal / "new").replace(rehearsal / "file")
            sync(rehearsal)
            rehearsal.rename(Path(place) / "renamed")
    except OSError as error:
        raise InputError(f"{name}={folder}: {existing} is not writable ({error.strerror}).") from error


def check_output_file(name: str, path: str | Path, *suffixes: str) -> Path:
    """Checks that an option names a file that can be written.

    Args:
        name: The option, for the message.
        path: Its value.
        suffixes: What the file's name may end in.

    Returns:
        The path.

    Raises:
        InputError: The file's name has another ending, it is a folder, or its folder cannot be written.
    """
    file = Path(path)
    if not file.name.endswith(suffixes) or file.is_dir():
        raise InputError(f"{name}={path}: must be a file that ends in {' or '.join(suffixes)}.")
    check_writable(name, file.parent)
    return file
