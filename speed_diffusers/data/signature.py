"""What tells one set of training images from another, wherever and whenever its files were written."""

import hashlib
import os
from pathlib import Path

import datasets
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

RULE = "2:"
"""Begins a signature; those of version 0.1 have nothing before their digits."""

WHOLE_IMAGES = 1024
"""Images, evenly spread over the set, whose every byte counts."""

WHOLE_IMAGES_BEFORE = 32
"""The same in version 0.1, which looked at nothing else of the images."""


def data_signature(
    dataset: datasets.Dataset,
    image_column: str,
    labels: npt.NDArray[np.int64],
    label_names: list[str] | None,
    *,
    earlier: str | None = None,
) -> str:
    """Hash of every row's label and number of bytes, of the classes' names, and of all bytes of 1,024 images.

    A set of more images is not told from one in which an image outside those 1,024 has others in its place of exactly
    as many bytes. Whether the images lie in files or in a column, and under which names, makes no difference.

    Args:
        dataset: With its image column undecoded ({"bytes", "path"}).
        image_column: That column.
        labels: int64 (N,).
        label_names: Name of each class id.
        earlier: A signature to compare with; its rule is taken, be it that of version 0.1.
    """
    digest = hashlib.sha256(f"{len(labels)} {label_names}".encode())
    digest.update(labels.tobytes())
    if earlier is not None and not earlier.startswith(RULE):
        _add_images(digest, dataset, image_column, WHOLE_IMAGES_BEFORE)
        return digest.hexdigest()
    digest.update(_num_bytes(dataset, image_column).tobytes())
    _add_images(digest, dataset, image_column, WHOLE_IMAGES)
    return RULE + digest.hexdigest()


def _add_images(digest: "hashlib._Hash", dataset: datasets.Dataset, image_column: str, count: int) -> None:
    rows = np.linspace(0, len(dataset) - 1, min(count, len(dataset)), dtype=int)
    images = dataset.select_columns([image_column])
    for row in rows.tolist():
        image = images[row][image_column] or {"bytes": b"", "path": None}
        digest.update(image["bytes"] if image["bytes"] is not None else _content(image["path"]))


def _content(path: str | None) -> bytes:
    try:
        return Path(path or "").read_bytes()
    except OSError:
        return b""  # cannot be read, of which the training tells


def _num_bytes(dataset: datasets.Dataset, image_column: str) -> npt.NDArray[np.int64]:
    """Size of each row's image, (N,) int64, read without the images; -1 where there is none."""
    column = dataset.data.column(image_column)
    sizes = pc.cast(pc.binary_length(pc.struct_field(column, "bytes")), pa.int64())
    paths = pc.struct_field(column, "path")
    if dataset._indices is not None:
        rows = dataset._indices.column(0)
        sizes, paths = sizes.take(rows), paths.take(rows)
    known = np.asarray(sizes.is_valid())
    values: npt.NDArray[np.int64] = sizes.fill_null(-1).to_numpy().copy()
    if not known.all():
        values[~known] = [_file_size(path) for path in paths.filter(pa.array(~known)).to_pylist()]
    return values


def _file_size(path: str | None) -> int:
    try:
        return os.stat(path or "").st_size
    except OSError:
        return -1
