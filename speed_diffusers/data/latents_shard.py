"""Format of the latent cache: a header, and shards of consecutive rows as safetensors, each with its checksums.

safetensors rather than Arrow: a row's place in its file follows from the file's short header, so opening a cache of a
million rows reads no more than a few hundred headers, and the files can be read by whoever has no `datasets`. Rows are
read with positioned reads rather than through a memory map: what was read does not stay in a process's memory, and a
file that is cut short, or a share that is gone, is an error to catch and not the end of the process (SIGBUS).

A checksum covers a shard's header, labels, bad images and the checksums of its rows, and is verified when the shard is
first used; a row's checksum covers its moments and is verified each time the row is read. One checksum over a whole
shard would make the first steps of a training, whose rows come from all shards, read the whole cache in each process:
5 s for 4.1 GB that lie in memory (benchmarks/latent_cache), and 21 GB of ImageNet from a disk. Of a row that is read
anyway it costs 5 microseconds for 16 KB.
"""

import json
import os
import secrets
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save

from ..files import naming_disk_errors, sync
from .bad_images import BadImage

FORMAT_VERSION = 2
"""Of header and shards."""

HEADER_FILE = "header.json"
SHARDS = "shard-*.safetensors"
METADATA = "speed_diffusers"
"""The one entry of a shard's metadata: several would be written in any order."""

MAX_SHARDS = 512
"""As many as a process can hold open at a time; more only where they would be larger than `MAX_SHARD_BYTES`."""
MIN_SHARD_ROWS = 256
MAX_SHARD_BYTES = 2**28
"""A shard is put together in memory."""

ROWS_AT_ONCE = 256
"""Rows that are read together where all are."""

HAS_PREADV = hasattr(os, "preadv")
"""Not on Windows."""


class DamagedShard(OSError):
    """A shard of the latent cache is missing, damaged or of another cache; one line names it and says why."""


@dataclass(frozen=True)
class CacheHeader:
    """What a latent cache is of, and how it is divided. `header.json` holds it and every shard repeats it.

    Attributes:
        images: `ImageSource.fingerprint`: of images, their order and their labels.
        vae: `vae_fingerprint` of the autoencoder.
        resolution: Side of the images in pixels.
        center_crop: Whether their centre square was cropped.
        random_flip: Whether the moments of the flipped images are there too.
        num_rows: Number of images.
        shape: (2C, h, w) of the moments of one.
        rows_per_shard: Of all shards but the last.
        format_version: `FORMAT_VERSION` of who wrote it.
    """

    images: str
    vae: str
    resolution: int
    center_crop: bool
    random_flip: bool
    num_rows: int
    shape: tuple[int, int, int]
    rows_per_shard: int
    format_version: int = FORMAT_VERSION

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the moments that each row has."""
        return ("moments", "moments_flipped") if self.random_flip else ("moments",)

    @property
    def column_bytes(self) -> int:
        """Size of a row in one of `columns`."""
        return int(2 * np.prod(self.shape))

    @property
    def num_shards(self) -> int:
        """How many shards there are when all are there."""
        return -(-self.num_rows // self.rows_per_shard)

    def rows_of(self, index: int) -> range:
        """Rows of the shard of this number."""
        return range(index * self.rows_per_shard, min((index + 1) * self.rows_per_shard, self.num_rows))

    def bytes_of(self, index: int) -> int:
        """Size of that shard's tensors."""
        return len(self.rows_of(index)) * (len(self.columns) * self.column_bytes + 16)

    def differences(self, other: "CacheHeader") -> dict[str, str]:
        """What makes another header one of other latents: names of fields to "this value, not that"."""
        return {
            field.name: f"{getattr(other, field.name)}, not {getattr(self, field.name)}"
            for field in fields(self)
            if getattr(self, field.name) != getattr(other, field.name)
        }

    @classmethod
    def from_json(cls, text: str) -> "CacheHeader":
        """Reads what `to_json` wrote.

        Raises:
            ValueError, TypeError, KeyError: It is something else.
        """
        return cls.from_dict(json.loads(text))

    @classmethod
    def from_dict(cls, values: Any) -> "CacheHeader":
        """Reads what `dataclasses.asdict` and JSON have made of a header.

        Raises:
            ValueError, TypeError, KeyError: It is something else.
        """
        return cls(**{**values, "shape": tuple(values["shape"])})

    def to_json(self) -> str:
        """For `header.json`."""
        return json.dumps(asdict(self), indent=2) + "\n"


def rows_per_shard(num_rows: int, row_bytes: int) -> int:
    """A power of two, so that shards end where batches of the usual sizes do, whatever the number of processes.

    Args:
        num_rows: Of the whole cache.
        row_bytes: Size of a row's moments.
    """
    rows = MIN_SHARD_ROWS
    while rows * MAX_SHARDS < num_rows:
        rows *= 2
    while rows > 1 and rows * row_bytes > MAX_SHARD_BYTES:
        rows //= 2
    return rows


def shard_name(index: int) -> str:
    """File name of a shard."""
    return f"shard-{index:05d}.safetensors"


def write_shard(
    folder: Path,
    header: CacheHeader,
    index: int,
    columns: dict[str, npt.NDArray[np.float16]],
    labels: npt.NDArray[np.int64],
    bad_images: Sequence[BadImage],
) -> None:
    """Writes a shard with its checksums, whole or not at all.

    Args:
        folder: Of the cache.
        header: Of the cache.
        index: Which shard.
        columns: float16 (N, 2C, h, w) for each of `header.columns`.
        labels: int64 (N,).
        bad_images: Those that could not be read on the way.

    Raises:
        OSError: It cannot be written; with the bytes needed and free where the disk is full.
    """
    checksums = np.zeros(len(labels), dtype=np.int64)
    for name in header.columns:
        checksums = _row_checksums(columns[name], checksums)
    about: dict[str, Any] = {"cache": asdict(header), "index": index, "bad_images": [*map(asdict, bad_images)]}
    metadata = json.dumps(about | {"crc32": _shard_checksum(about, labels, checksums)})
    tensors = {name: torch.from_numpy(columns[name]) for name in header.columns}
    tensors |= {"labels": torch.from_numpy(labels), "row_crc32": torch.from_numpy(checksums)}
    # Not by safetensors' save_file, which would leave a file of its own naming behind where it is killed.
    write_file(folder / shard_name(index), save(tensors, {METADATA: metadata}), header.bytes_of(index))


def write_file(path: Path, content: bytes, num_bytes: int | None = None) -> None:
    """Writes a file of the cache, whole or not at all, though processes of other machines may write the same one.

    Args:
        path: The file to write or replace, in an existing folder.
        content: What is in it.
        num_bytes: What it needs, for the message where the disk is full.

    Raises:
        OSError: It cannot be written.
    """
    # No process's number: those of two containers are often the same.
    temporary = path.with_name(f".tmp-{path.name}-{secrets.randbelow(10**12)}")
    try:
        with naming_disk_errors(path, num_bytes):
            temporary.write_bytes(content)
            sync(temporary)
            temporary.replace(path)
            sync(path.parent)
    finally:
        with suppress(OSError):
            temporary.unlink()


def _row_checksums(
    rows: npt.NDArray[np.float16] | npt.NDArray[np.uint8], before: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """CRC-32 of each row, going on from those of the row's columns before."""
    content = np.ascontiguousarray(rows).reshape(len(rows), -1).view(np.uint8)
    found = (zlib.crc32(row, start) for row, start in zip(content, before.tolist(), strict=True))  # type: ignore[arg-type]
    return np.fromiter(found, np.int64, len(rows))


def _shard_checksum(about: dict[str, Any], labels: npt.NDArray[np.int64], checksums: npt.NDArray[np.int64]) -> int:
    text = json.dumps(about, sort_keys=True).encode()
    return zlib.crc32(checksums.tobytes(), zlib.crc32(labels.tobytes(), zlib.crc32(text)))


def read_at(file: int, buffer: npt.NDArray[np.uint8], position: int) -> int:
    """Reads into a buffer, as much as comes, and returns how much that was."""
    if HAS_PREADV:
        # At a position: forked workers of a DataLoader share the descriptor, and with it its current position.
        return os.preadv(file, [buffer.data], position)
    os.lseek(file, position, os.SEEK_SET)
    content = os.read(file, buffer.nbytes)
    buffer[: len(content)] = np.frombuffer(content, np.uint8)
    return len(content)


class Shard:
    """A shard to read from; all but its moments has been verified, and each row is when it is read.

    Attributes:
        path: Its file.
        rows: Its rows.
        begins: Where in the file the moments begin, for each of the header's columns.
        labels: int64 (N,).
        checksums: int64 (N,), CRC-32 of each row's moments.
        bad_images: Those that could not be read when it was made.
    """

    def __init__(self, folder: Path, header: CacheHeader, index: int) -> None:
        """Opens the shard and verifies all but its moments.

        Args:
            folder: Of the cache.
            header: Of the cache.
            index: Which shard.

        Raises:
            DamagedShard: It is missing, damaged or of another cache.
        """
        self.path = folder / shard_name(index)
        self.rows = header.rows_of(index)
        self._header = header
        self._file: int | None = None
        self.open()
        try:
            self._read_beginning(header, index)
        except BaseException:
            self.close()
            raise

    def open(self) -> int:
        """The open file's descriptor.

        Raises:
            DamagedShard: It is missing.
        """
        if self._file is None:
            try:
                self._file = os.open(self.path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
            except FileNotFoundError as error:
                raise self.damaged("it is missing") from error
        return self._file

    def close(self) -> None:
        """Gives the descriptor back; the next read opens the file again."""
        file, self._file = self._file, None
        if file is not None:
            os.close(file)

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        # Python may have taken its modules down.
        if self._file is not None:
            close(self._file)

    def is_file_of(self, path: Path) -> bool:
        """Whether the file that is open still stands at a path."""
        try:
            return self._file is not None and os.path.samestat(os.fstat(self._file), path.stat())
        except FileNotFoundError:
            return False

    def damaged(self, reason: str) -> DamagedShard:
        """The error for this shard."""
        return DamagedShard(
            f"'{self.path}' of the latent cache (rows {self.rows[0]:,} to {self.rows[-1]:,}): {reason}."
        )

    def read_row(self, row: int, into: npt.NDArray[np.uint8]) -> None:
        """Reads and verifies the moments of a row.

        Args:
            row: Row of the cache.
            into: uint8 (columns, `column_bytes`) to fill.

        Raises:
            DamagedShard: The row does not match its checksum.
            OSError: The disk failed.
        """
        position, crc32 = row - self.rows.start, 0
        for begin, buffer in zip(self.begins, into, strict=True):
            self._fill(buffer, begin + position * buffer.nbytes)
            crc32 = zlib.crc32(buffer, crc32)
        if crc32 != self.checksums[position]:
            raise self.damaged(f"row {row} does not match its checksum")

    def verify(self) -> None:
        """Reads and verifies all rows.

        Raises:
            DamagedShard: One does not match its checksum.
        """
        width = self._header.column_bytes
        for first in range(0, len(self.rows), ROWS_AT_ONCE):
            count = min(ROWS_AT_ONCE, len(self.rows) - first)
            found = np.zeros(count, dtype=np.int64)
            for begin in self.begins:
                buffer = np.empty(count * width, dtype=np.uint8)
                self._fill(buffer, begin + first * width)
                found = _row_checksums(buffer.reshape(count, width), found)
            if len(wrong := np.flatnonzero(found != self.checksums[first : first + count])):
                raise self.damaged(f"row {self.rows[first + int(wrong[0])]} does not match its checksum")

    def _fill(self, buffer: npt.NDArray[np.uint8], position: int) -> None:
        file, done = self.open(), 0
        while done < buffer.nbytes:
            try:
                count = read_at(file, buffer[done:] if done else buffer, position + done)
            except OSError as error:
                # The disk or the share failed, which says nothing of the shard.
                raise OSError(error.errno, error.strerror, str(self.path)) from error
            if not count:
                raise self.damaged("the file ends too early")
            done += count

    def _array(self, position: int, count: int) -> npt.NDArray[np.int64]:
        values = np.empty(count, dtype=np.int64)
        self._fill(values.view(np.uint8), position)
        return values

    def _read_beginning(self, header: CacheHeader, index: int) -> None:
        """Where everything stands, by the file's own header, which must be as this cache's shards have it."""
        size = os.fstat(self.open()).st_size
        length = int(self._array(0, 1)[0])
        if not 0 < length <= size - 8:
            raise self.damaged("it is not a safetensors file")
        text = np.empty(length, dtype=np.uint8)
        self._fill(text, 8)
        try:
            tensors = json.loads(text.tobytes())
            about = json.loads(tensors.pop("__metadata__")[METADATA])
            crc32, cache = about.pop("crc32"), CacheHeader.from_dict(about["cache"])
            self.bad_images = [BadImage(**image) for image in about["bad_images"]]
            found = {name: (each["dtype"], each["shape"], each["data_offsets"]) for name, each in tensors.items()}
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise self.damaged("its header is damaged") from error
        if differences := header.differences(cache):
            told = "; ".join(f"{name} is {values}" for name, values in differences.items())
            raise self.damaged(f"it is of another cache ({told})")
        count = len(self.rows)
        shapes: dict[str, tuple[str, list[int]]] = dict.fromkeys(header.columns, ("F16", [count, *header.shape]))
        shapes |= {"labels": ("I64", [count]), "row_crc32": ("I64", [count])}
        end, begins = 0, {}
        for name, (dtype, shape, (begin, stop)) in sorted(found.items(), key=lambda item: item[1][2]):
            wanted = int(np.prod(shape)) * (2 if dtype == "F16" else 8)
            if shapes.get(name) != (dtype, shape) or (begin, stop) != (end, end + wanted):
                raise self.damaged("its header is damaged")
            begins[name], end = 8 + length + begin, stop
        if begins.keys() != shapes.keys() or about["index"] != index:
            raise self.damaged("its header is damaged")
        if 8 + length + end != size:
            raise self.damaged(f"it has {size:,} bytes and should have {8 + length + end:,}")
        self.begins = [begins[name] for name in header.columns]
        self.labels = self._array(begins["labels"], count)
        self.checksums = self._array(begins["row_crc32"], count)
        if crc32 != _shard_checksum(about, self.labels, self.checksums):
            raise self.damaged("its header does not match its checksum")
