"""Training images that are read from their shards as the training goes: no copy on the disk, no pass before it."""

import hashlib
import threading
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from ..assets import EMBEDDED, EMBEDDED_IMAGES
from ..errors import InputError
from ..randomness import keyed_seed
from .images import ImageRows, check_first, check_image_column
from .labels import MAX_CLASSES, WITHOUT_CLASSES, check_label_column
from .local import open_shards
from .remote import remote_shards
from .shards import WHOLE_BYTES, Shards, Stretch, first_rows
from .splits import is_whole

SPREAD_OVER = 64
"""Few images out of many are taken from about so many stretches, each of which has to be read."""

RECENT = 4
"""Stretches that are kept when rows are asked for one by one."""

FIRST_READ = 64
"""Rows of a stretch that are read then, twice as many when a later one is asked for."""

RULE = "stream 1:"
"""Begins the signature of a stream."""


class EncodedImage(NamedTuple):
    """A row as it was read."""

    row: int
    image: dict[str, object] | None
    """{"bytes", "path"}, for `load_image`."""
    label: int


class StreamSource(ImageRows):
    """Images in shards, with classes; opened without reading more than the numbers of rows."""

    def __init__(
        self,
        shards: Shards,
        image_column: str,
        label_column: str | None,
        *,
        max_train_samples: int | None = None,
        is_remote: bool = False,
        ignored: Sequence[str] = (),
    ) -> None:
        """Checks the columns.

        Args:
            shards: The rows.
            image_column: Column with the images.
            label_column: Column with the class; None: without classes.
            max_train_samples: Use so many rows only, see `open_stream`.
            is_remote: Whether a read that fails may succeed at the next try.
            ignored: What lies beside the shards and is not read.

        Raises:
            InputError: A column is missing or holds something else, or there are no rows.
        """
        if max_train_samples is not None and max_train_samples < 1:
            raise InputError(f"max_train_samples must be at least 1 (or None for all), got {max_train_samples}.")
        if not shards.stretches:
            raise InputError("The data set has no rows.")
        check_image_column(shards.features, image_column)
        self.shards = shards
        self.image_column = image_column
        self.label_column = label_column
        self.is_remote = is_remote
        self.ignored = tuple(ignored)
        self.stretches = _some(shards.stretches, max_train_samples)
        self.starts = first_rows(self.stretches)
        self.label_names: list[str] | None = None
        self._ids: dict[str, int] | None = None
        """Of a column of texts the classes' ids."""
        if label_column is not None:
            self.label_names, self._ids = _classes(shards, label_column)
        self._recent: dict[int, list[EncodedImage]] = {}
        self._lock = threading.Lock()
        check_first(self)

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__ | {"_recent": {}}
        del state["_lock"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ = state | {"_lock": threading.Lock()}

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def description(self) -> str:
        """Where the images come from."""
        return f"streamed from {self.shards.description}"

    def read(self, stretch: Stretch, begin: int, first: int) -> Iterator[list[EncodedImage]]:
        """Reads a stretch, some images at a time.

        Args:
            stretch: Which.
            begin: Number of its first row.
            first: Number of the row to begin at.

        Raises:
            InputError: A row has no class, or one that is out of range.
        """
        columns = [self.image_column, *([self.label_column] if self.label_column else [])]
        row = first
        for table in self.shards.read(stretch, columns, first - begin):
            images = datasets.Image(decode=False).cast_storage(table[self.image_column].combine_chunks()).to_pylist()
            labels = self._labels(table, row)
            yield [EncodedImage(*one) for one in zip(range(row, row + len(images)), images, labels, strict=True)]
            row += len(images)

    def _labels(self, table: pa.Table, row: int) -> list[int]:
        if self.label_column is None:
            return [0] * table.num_rows
        values = table[self.label_column].combine_chunks()
        if self._ids is not None:
            values = pa.array([self._ids.get(name) for name in values.cast(pa.string()).to_pylist()], pa.int64())
        labels = np.asarray(values.cast(pa.int64()).fill_null(-1))
        wrong = np.flatnonzero((labels < 0) | (labels >= self.num_classes))
        if len(wrong):
            found = table[self.label_column][int(wrong[0])].as_py()
            raise InputError(
                f"Row {row + int(wrong[0])} has the label {found} in column '{self.label_column}', which has the "
                f"classes 0 to {self.num_classes - 1}. {WITHOUT_CLASSES}."
            )
        ids: list[int] = labels.tolist()
        return ids

    def unreadable(self, stretch: Stretch, error: Exception) -> InputError:
        """The error for a stretch that cannot be read, in one line."""
        place = self.shards.place(stretch)
        return InputError(f"Cannot read '{place}': {' '.join(str(error).split()) or type(error).__name__}.")

    def _encoded(self, row: int) -> EncodedImage:
        """One row by its number; its stretch is read up to it and somewhat further, and then kept if it is small."""
        if not 0 <= row < len(self):
            raise IndexError(row)
        number = int(np.searchsorted(self.starts, row, side="right")) - 1
        begin, stretch = int(self.starts[number]), self.stretches[number]
        with self._lock:
            if stretch.num_bytes > WHOLE_BYTES:
                return next(self.read(stretch, begin, row))[0]
            held = self._recent.get(number, [])
            if row - begin >= len(held):
                count = min(stretch.rows, max(FIRST_READ, 2 * len(held), row - begin + 1))
                held = [image for some in self.read(stretch._replace(rows=count), begin, begin) for image in some]
                others = {index: images for index, images in self._recent.items() if index != number}
                self._recent = dict([*others.items()][1 - RECENT :]) | {number: held}
            return held[row - begin]

    def image(self, row: int) -> dict[str, object] | None:
        """The undecoded image of a row, {"bytes", "path"}."""
        return self._encoded(row).image

    def labels_of(self, rows: Sequence[int]) -> npt.NDArray[np.int64]:
        """Class ids of rows, (len(rows),); all zero without classes."""
        return np.array([self._encoded(row).label for row in rows], dtype=np.int64)

    def spread(self, count: int) -> list[int]:
        """At most so many rows, from stretches that are spread over all, as many as `SPREAD_OVER` if need be more."""
        count = min(count, len(self))
        chosen = np.unique(
            np.linspace(0, len(self.stretches) - 1, min(SPREAD_OVER, count)).round().astype(int)
        ).tolist()
        sizes = [self.stretches[index].rows for index in chosen]
        if sum(sizes) < count:
            rows: list[int] = np.linspace(0, len(self) - 1, count, dtype=int).tolist()
            return rows
        # The first ones of each, so that no more than their row groups are read.
        kept = _capped(np.array(sizes), count)
        return [
            int(self.starts[index]) + row
            for index, rows in zip(chosen, kept.tolist(), strict=True)
            for row in range(rows)
        ]

    @cached_property
    def _key(self) -> str:
        return self.shards.key()

    def signature(self, earlier: str | None = None) -> str:
        """What a resumed run holds against its checkpoint.

        Of a data set on the Hub it covers every byte; on this machine sizes and statistics of all parts of the files,
        and 16 MB of their bytes, spread evenly; of a saved set what `datasets` calls its fingerprint.

        Args:
            earlier: The checkpoint's signature; there is one rule only.
        """
        parts = [self._key, self.image_column, self.label_column, self.label_names, self.stretches]
        return RULE + hashlib.sha256(repr(parts).encode()).hexdigest()


def open_stream(
    *,
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    train_data_dir: str | None = None,
    split: str | None = "train",
    image_column: str = "image",
    label_column: str | None = "label",
    cache_dir: str | None = None,
    revision: str | None = None,
    max_train_samples: int | None = None,
) -> StreamSource:
    """Opens images to be streamed, see `open_images`; give exactly one of `dataset_name` and `train_data_dir`.

    What can be streamed are parquet files, of a data set on the Hub or on this machine, and what `datasets` saved
    with `save_to_disk`. Their footers are read, and of the label column what they do not say of it.

    Args:
        dataset_name: "embedded" for the set in this package, else a data set's id on the Hub.
        dataset_config_name: Configuration of the Hub data set, where it has several.
        train_data_dir: A folder of parquet files, one parquet file, or a folder written by `Dataset.save_to_disk`.
        split: Which split, whole.
        image_column: Column with the images.
        label_column: Column with the class (names or integers from 0); None trains without classes.
        cache_dir: Where `datasets` keeps what it knows of a data set.
        revision: Branch, tag or commit of the Hub data set.
        max_train_samples: Use so many rows only, the first of some 64 stretches chosen at random, or of more if need
            be; the same in every run.

    Raises:
        InputError: As for `open_images`, and for data that cannot be streamed, or a part of a split.
    """
    if (dataset_name is None) == (train_data_dir is None):
        given = "neither" if dataset_name is None else f"both (dataset_name=None takes {dataset_name} out)"
        raise InputError(f"Give exactly one of dataset_name and train_data_dir; got {given}.")
    if not is_whole(split):
        raise InputError(f"split={split}: a stream reads one split, whole; max_train_samples takes a part of it.")
    if train_data_dir is not None or dataset_name == EMBEDDED:
        path = EMBEDDED_IMAGES.parent if train_data_dir is None else Path(train_data_dir).expanduser()
        shards: Shards
        shards, ignored = open_shards(path, split)
        is_remote = False
        if train_data_dir is None:
            ignored = ()
    else:
        assert dataset_name is not None
        if split is None:
            raise InputError(f"'{dataset_name}' is on the Hub: say which split.")
        ignored = ()
        shards = remote_shards(dataset_name, dataset_config_name, split=split, cache_dir=cache_dir, revision=revision)
        is_remote = True
    return StreamSource(
        shards,
        image_column,
        label_column,
        max_train_samples=max_train_samples,
        is_remote=is_remote,
        ignored=ignored,
    )


def _some(stretches: list[Stretch], limit: int | None) -> list[Stretch]:
    """So many rows: the first ones of stretches chosen at random, as few of each as will do."""
    if limit is None or limit >= sum(stretch.rows for stretch in stretches):
        return stretches
    shuffled = np.random.default_rng(keyed_seed(0, "max_train_samples", 0)).permutation(len(stretches))
    rows = np.array([stretch.rows for stretch in stretches])[shuffled]
    enough = int(np.searchsorted(np.cumsum(rows), limit)) + 1
    rows = rows[: min(max(enough, SPREAD_OVER), limit)]
    rows = _capped(rows, limit)
    kept = sorted(zip(shuffled.tolist(), rows.tolist(), strict=False))
    return [stretches[index]._replace(rows=count) for index, count in kept if count]


def _capped(rows: npt.NDArray[np.int64], count: int) -> npt.NDArray[np.int64]:
    """As many of each as there are, but up to a cap, so that they are `count` in all."""
    # The least cap that leaves enough; the last ones give back what is too much.
    low, high = 1, int(rows.max())
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if np.minimum(rows, middle).sum() >= count else (middle + 1, high)
    rows = np.minimum(rows, low)
    capped = np.flatnonzero(rows == low)
    rows[capped[len(capped) - (int(rows.sum()) - count) :]] -= 1
    return rows


def _classes(shards: Shards, column: str) -> tuple[list[str], dict[str, int] | None]:
    """Names of the classes; and of a column of texts the ids of all of them, of one with ids None."""
    check_label_column(shards.features, column)
    feature = shards.features[column]
    dtype = str(getattr(feature, "dtype", type(feature).__name__))
    if dtype in ("string", "large_string", "bool"):
        values = pc.unique(shards.column(column)).cast(pa.string()).to_pylist()
        if None in values:
            raise InputError(f"Some rows have no label in column '{column}'. {WITHOUT_CLASSES}.")
        return sorted(values), {name: label for label, name in enumerate(sorted(values))}
    if not isinstance(feature, datasets.ClassLabel) and not dtype.startswith(("int", "uint")):
        raise InputError(
            f"The label column '{column}' holds {dtype}; class labels are integers or strings. "
            f"Columns: {', '.join(shards.features)}. {WITHOUT_CLASSES}."
        )
    smallest, largest, missing = shards.label_range(column)
    if missing:
        raise InputError(f"{missing} rows have no label in column '{column}'. Choose another; {WITHOUT_CLASSES}.")
    if smallest < 0:
        # -1 is how data sets on the Hub mark a split whose labels are kept secret.
        raise InputError(
            f"Labels in column '{column}' go down to {smallest}. Choose another split or column; {WITHOUT_CLASSES}."
        )
    if isinstance(feature, datasets.ClassLabel):
        if largest >= len(feature.names):
            raise InputError(
                f"The label column '{column}' goes up to {largest}, but names only {len(feature.names)} classes."
            )
        return list(feature.names), None
    if largest >= MAX_CLASSES:
        raise InputError(
            f"The label column '{column}' goes up to {largest}; class ids are integers from 0 to the number of "
            f"classes - 1. {WITHOUT_CLASSES}."
        )
    return [str(label) for label in range(largest + 1)], None
