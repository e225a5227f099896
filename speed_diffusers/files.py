"""Files: written whole or not at all, hashed, and checked before work begins."""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from .errors import InputError


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A temporary place for a file or folder that appears under its own name only when it is complete.

    Args:
        path: The file or folder to write or replace, in an existing folder.

    Yields:
        The path to write to. It is renamed to `path` at the end, or removed if anything was raised.
    """
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    try:
        yield temporary
        if path.is_symlink():
            path.unlink()
        elif path.is_dir() and temporary.is_dir():
            # A folder cannot be renamed over a full one. A file is not renamed over a folder, which is no older self.
            shutil.rmtree(path)
        temporary.replace(path)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


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
    """Checks that a folder can be written to, or made.

    Args:
        name: The option that names it, for the message.
        folder: The folder; it need not exist yet, and is not made.

    Raises:
        InputError: It, or what it would be made in, is a file or cannot be written.
    """
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not existing.is_dir():
        raise InputError(f"{name}={folder}: {existing} is a file.")
    try:
        # Asked by doing: permission bits do not tell what root, a read-only mount or a full quota allow.
        with tempfile.TemporaryDirectory(prefix=".tmp-writable-", dir=existing):
            pass
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
