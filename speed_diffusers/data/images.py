"""Training images from the embedded set, the Hugging Face Hub, an image folder or parquet files, as one `ImageSource`.

Everything a user can have got wrong is checked here, before the first training step and without decoding an image.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import datasets
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tqdm import tqdm

from ..assets import EMBEDDED, EMBEDDED_IMAGES
from ..errors import InputError, unknown_name
from ..randomness import keyed_seed
from .bad_images import BadImage, BadImages
from .decode import UnreadableImage, load_image
from .few_rows import are_few, read_column, read_rows
from .labels import check_label_column, read_labels
from .local import load_local, parquet_shards
from .remote import load_remote, unprepared_shards
from .shards import ParquetShards
from .signature import data_signature

BAD_ROWS = "bad_rows"

CHECKED_AT_ONCE = 1024

FIRST_IMAGES = 8
"""If none of the first so many rows can be read, the column is taken to hold no images."""


class ImageRows(ABC):
    """Rows with an image and a class each, wherever they lie and in whatever order they are read."""

    image_column: str
    label_names: list[str] | None
    """Name of each class id ("0", "1", ... where the data has integers only); None without classes."""
    ignored: tuple[str, ...]
    """What lies beside the images and is not read: a line for each reason, with how much it is."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def image(self, row: int) -> dict[str, object] | None:
        """The undecoded image of a row, {"bytes", "path"}."""

    @abstractmethod
    def labels_of(self, rows: Sequence[int]) -> npt.NDArray[np.int64]:
        """Class ids of rows, (len(rows),); all zero without classes."""

    @abstractmethod
    def spread(self, count: int) -> list[int]:
        """At most so many rows, ascending, spread over all."""

    @abstractmethod
    def signature(self, earlier: str | None = None) -> str:
        """What a resumed run holds against its checkpoint; the same for the same data on another disk.

        Args:
            earlier: The checkpoint's signature, whose rule is taken where there are several.
        """

    @property
    def description(self) -> str:
        """Where the images come from, if that is more than a folder; for the plan of a run."""
        return ""

    @property
    def num_classes(self) -> int:
        """Number of classes in the whole data, 0 without classes."""
        return len(self.label_names or ())

    def load(self, row: int, resolution: int, center_crop: bool = True) -> npt.NDArray[np.uint8]:
        """Decodes row `row` to uint8 (resolution, resolution, 3); see `load_image`.

        Raises:
            UnreadableImage: If the image is missing or damaged; the message gives the row.
        """
        return self.decode(self.image(row), row, resolution, center_crop)

    def load_or_next(
        self, row: int, resolution: int, center_crop: bool = True
    ) -> tuple[npt.NDArray[np.uint8], int, list[BadImage]]:
        """Decodes row `row`, or the next that can be read; behind the last comes the first.

        Returns:
            The image as from `load`, its row, whose label goes with it, and the bad images before it.

        Raises:
            InputError: None can be read.
        """
        bad: list[BadImage] = []
        for used in (*range(row, len(self)), *range(row)):
            try:
                return self.load(used, resolution, center_crop), used, bad
            except UnreadableImage as error:
                bad.append(BadImage(used, error.path, error.reason))
        raise InputError(f"None of the {len(self)} images can be read: {bad[0]}")

    def fault(self, row: int) -> BadImage:
        """What is wrong with an image that could not be read."""
        try:
            self.load(row, resolution=1)
        except UnreadableImage as error:
            return BadImage(row, error.path, error.reason)
        return BadImage(row, None, "it could be read at the second try.")

    def decode(
        self, image: dict[str, object] | None, row: int, resolution: int, center_crop: bool
    ) -> npt.NDArray[np.uint8]:
        """As `load`, for an image column's value that has been read already."""
        return load_image(image or {}, resolution, center_crop, name=f"the image of row {row}")


@dataclass(frozen=True, eq=False)
class ImageSource(ImageRows):
    """A set of images with class ids, checked."""

    dataset: datasets.Dataset
    """One row per image; the image column is undecoded ({"bytes", "path"}), for `load_image`."""
    image_column: str
    label_column: str | None
    """None: the set is used without classes."""
    labels: npt.NDArray[np.int64]
    """(N,): class id of each row, in 0..num_classes-1; all zero without classes."""
    label_names: list[str] | None
    fingerprint: str
    """Changes whenever the images, their order or their labels change (for files on disk: path, size or time)."""
    ignored: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, row: int) -> dict[str, object] | None:
        """The undecoded image of a row, {"bytes", "path"}."""
        return cast(dict[str, object] | None, self.dataset[row][self.image_column])

    def labels_of(self, rows: Sequence[int]) -> npt.NDArray[np.int64]:
        """Class ids of rows, (len(rows),); all zero without classes."""
        return self.labels[list(rows)]

    def spread(self, count: int) -> list[int]:
        """At most so many rows, evenly spaced."""
        rows: list[int] = np.linspace(0, len(self) - 1, min(count, len(self)), dtype=int).tolist()
        return rows

    def signature(self, earlier: str | None = None) -> str:
        """What a resumed run holds against its checkpoint; see `data_signature`.

        `fingerprint` changes when a set is copied to another disk, and this does not.

        Args:
            earlier: The checkpoint's signature, whose rule is taken.
        """
        return data_signature(self.dataset, self.image_column, self.labels, self.label_names, earlier=earlier)


def open_images(
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
    first_rows: bool = False,
) -> ImageSource:
    """Opens a set of training images; give exactly one of `dataset_name` and `train_data_dir`.

    Args:
        dataset_name: "embedded" for the set in this package, else a data set's id on the Hub.
        dataset_config_name: Configuration of the Hub data set, where it has several.
        train_data_dir: A folder with one sub-folder of images per class, a folder of parquet files, one parquet file,
            or a folder written by `Dataset.save_to_disk`.
        split: Which split, also a slice or a sum as in `datasets` ("train[:10%]"). On this machine the names of files
            and folders say the splits (see `splits`), and None, for images to measure on, takes what they call
            validation, else test, else all.
        image_column: Column with the images.
        label_column: Column with the class (names or integers from 0); None trains without classes.
        cache_dir: Where `datasets` keeps its copies; None for its own default.
        revision: Branch, tag or commit of the Hub data set.
        max_train_samples: Use so many rows only: a random share, the same in every run, in the order of the data.
        first_rows: Take the first ones instead, as version 0.1 did.

    Raises:
        InputError: For every mistake a user can mend, in one line: unknown or gated data set, unreachable Hub,
            missing or empty folder, unknown column or split, missing or negative labels.
    """
    if (dataset_name is None) == (train_data_dir is None):
        given = "neither" if dataset_name is None else f"both (dataset_name=None takes {dataset_name} out)"
        raise InputError(f"Give exactly one of dataset_name and train_data_dir; got {given}.")
    columns = (image_column, label_column)
    limit: dict[str, Any] = {"max_train_samples": max_train_samples, "first_rows": first_rows}
    if dataset_name == EMBEDDED:
        embedded = load_local(EMBEDDED_IMAGES.parent, split=split, label_column=label_column, cache_dir=cache_dir)
        return from_dataset(embedded.dataset, *columns, **limit)
    if train_data_dir is not None:
        return _open_local(Path(train_data_dir).expanduser(), *columns, split=split, cache_dir=cache_dir, **limit)
    assert dataset_name is not None
    if split is None:
        raise InputError(f"'{dataset_name}' is on the Hub: say which split.")
    where: dict[str, Any] = {"split": split, "cache_dir": cache_dir, "revision": revision}
    if max_train_samples is not None:
        shards = unprepared_shards(dataset_name, dataset_config_name, **where)
        if shards is not None and are_few(max_train_samples, shards.num_rows):
            return _from_shards(shards, *columns, **limit)
    return from_dataset(load_remote(dataset_name, dataset_config_name, **where), *columns, **limit)


def _open_local(
    path: Path,
    image_column: str,
    label_column: str | None,
    *,
    split: str | None,
    cache_dir: str | None,
    max_train_samples: int | None,
    first_rows: bool,
) -> ImageSource:
    """Images on this machine; where they are few out of many, the others cost no more than their names."""
    limit: dict[str, Any] = {"max_train_samples": max_train_samples, "first_rows": first_rows}
    shards, ignored = (None, ()) if max_train_samples is None else parquet_shards(path, split)
    if shards is not None and are_few(max_train_samples, shards.num_rows):
        return replace(_from_shards(shards, image_column, label_column, **limit), ignored=ignored)
    few = partial(_few_rows, **limit)
    local = load_local(path, split=split, label_column=label_column, cache_dir=cache_dir, few=few)
    if local.all_labels is None:
        source = from_dataset(local.dataset, image_column, label_column, **limit)
    else:
        labels, names = _labels_of(local.all_labels, label_column)
        rows = _share(len(labels), max_train_samples, first_rows)
        dataset = _undecoded(local.dataset, image_column)
        source = _checked(dataset, image_column, label_column, labels, names, rows, local.dataset._fingerprint)
    return replace(source, ignored=local.ignored)


def from_dataset(
    dataset: datasets.Dataset,
    image_column: str = "image",
    label_column: str | None = "label",
    *,
    max_train_samples: int | None = None,
    first_rows: bool = False,
) -> ImageSource:
    """Checks a `datasets.Dataset` of one's own and makes an `ImageSource` of it. See `open_images`."""
    if max_train_samples is not None and max_train_samples < 1:
        raise InputError(f"max_train_samples must be at least 1 (or None for all), got {max_train_samples}.")
    if len(dataset) == 0:
        raise InputError("The data set has no rows.")
    dataset = dataset.with_format(None)
    rows = _share(len(dataset), max_train_samples, first_rows)
    # The whole column, not those rows only: the number of classes must not depend on max_train_samples.
    labels, names = _labels_of(dataset, label_column)
    undecoded = _undecoded(dataset, image_column).select(rows)
    return _checked(undecoded, image_column, label_column, labels, names, rows, dataset._fingerprint)


def _from_shards(
    shards: ParquetShards,
    image_column: str,
    label_column: str | None,
    *,
    max_train_samples: int | None,
    first_rows: bool,
) -> ImageSource:
    """A few rows of parquet files: those that `from_dataset` takes, without a look at the others."""
    rows = _share(shards.num_rows, max_train_samples, first_rows)
    check_image_column(shards.features, image_column)
    labels, names = np.zeros(shards.num_rows, dtype=np.int64), None
    if label_column is not None:
        check_label_column(shards.features, label_column)
        labels, names = _labels_of(read_column(shards, label_column), label_column)
    dataset = _undecoded(read_rows(shards, rows, [image_column]), image_column)
    return _checked(dataset, image_column, label_column, labels, names, rows, shards.key())


def _checked(
    dataset: datasets.Dataset,
    image_column: str,
    label_column: str | None,
    labels: npt.NDArray[np.int64],
    names: list[str] | None,
    rows: npt.NDArray[np.int64] | range,
    fingerprint: str,
) -> ImageSource:
    """The source of some rows of a set, `labels` being those of all, once its first images have been looked at."""
    key = hashlib.sha256(f"{fingerprint} {image_column} {len(rows)} {names}".encode())
    key.update(labels[rows].tobytes())
    if len(rows) < len(labels):
        key.update(np.asarray(rows).tobytes())
    source = ImageSource(
        dataset=dataset,
        image_column=image_column,
        label_column=label_column,
        labels=labels[rows],
        label_names=names,
        fingerprint=key.hexdigest()[:32],
    )
    check_first(source)
    return source


def _labels_of(dataset: datasets.Dataset, column: str | None) -> tuple[npt.NDArray[np.int64], list[str] | None]:
    """Class ids of all rows, zeros without classes, and the classes' names."""
    return (np.zeros(len(dataset), dtype=np.int64), None) if column is None else read_labels(dataset, column)


def _few_rows(num_rows: int, *, max_train_samples: int | None, first_rows: bool) -> npt.NDArray[np.int64] | None:
    """The rows of `_share` if they are so few that the others should cost nothing."""
    if not are_few(max_train_samples, num_rows):
        return None
    return np.asarray(_share(num_rows, max_train_samples, first_rows), dtype=np.int64)


def _share(num_rows: int, limit: int | None, first: bool) -> npt.NDArray[np.int64] | range:
    """Ascending row numbers: all, or `limit` at random. The first ones of sorted data would be of one class."""
    if limit is None or limit >= num_rows:
        return range(num_rows)
    if first:
        return range(limit)
    shuffled = np.random.default_rng(keyed_seed(0, "max_train_samples", 0)).permutation(num_rows)
    return np.sort(shuffled[:limit])


def check_first(source: ImageRows) -> None:
    """Text or bytes that are no images show now instead of at the first step; one bad image among others may pass."""
    errors = []
    for row in range(min(FIRST_IMAGES, len(source))):
        try:
            source.load(row, resolution=1)
            return
        except UnreadableImage as error:
            errors.append(error)
    raise errors[0]


def _undecoded(dataset: datasets.Dataset, image_column: str) -> datasets.Dataset:
    """The image column alone, as {"bytes", "path"}, so that `load_image` can say which image is damaged.

    Other columns would be read with every row, and decoded: masks, depths or sounds.
    """
    check_image_column(dataset.features, image_column)
    return dataset.select_columns([image_column]).cast_column(image_column, datasets.Image(decode=False))


def check_image_column(features: datasets.Features, image_column: str) -> None:
    """Checks that a column may hold images.

    Raises:
        InputError: It is missing or holds something else.
    """
    if image_column not in features:
        raise unknown_name("image column", image_column, features)
    feature = features[image_column]
    kinds = ("binary", "large_binary", "string", "large_string")
    encoded = isinstance(feature, datasets.Value) and feature.dtype in kinds
    parts = isinstance(feature, dict) and set(feature) <= {"bytes", "path"}
    if not (isinstance(feature, datasets.Image) or encoded or parts):
        columns = ", ".join(f"{name} ({_kind(each)})" for name, each in features.items())
        raise InputError(f"The image column '{image_column}' holds {_kind(feature)}, not images. Columns: {columns}.")


def _kind(feature: object) -> str:
    return str(getattr(feature, "dtype", type(feature).__name__))


class ImageDataset(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Decoded images a whole batch at a time, for training without the latent cache.

    Use it with a `batch_sampler` and `collate_fn=collate`. Images are not flipped: that is for the caller.
    """

    def __init__(self, source: ImageSource, *, resolution: int, center_crop: bool = True) -> None:
        self.source = source
        self.resolution = resolution
        self.center_crop = center_crop

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        """One image and its label, without a batch axis."""
        return {name: value[0] for name, value in self.__getitems__([row]).items() if name != BAD_ROWS}

    def __getitems__(self, rows: list[int]) -> dict[str, Tensor]:
        """A batch, in which the next good image and its label stand for one that cannot be read.

        Returns:
            "pixel_values": uint8 (B, 3, resolution, resolution), 0..255; "labels": int64 (B,); "bad_rows": int64 (M,),
            the rows that could not be read, M = 0 as a rule.

        Raises:
            InputError: No image at all can be read.
        """
        images, used, bad = zip(
            *(self.source.load_or_next(row, self.resolution, self.center_crop) for row in rows), strict=True
        )
        return as_batch(images, self.source.labels_of(used), [image.row for found in bad for image in found])


def as_batch(
    images: Sequence[npt.NDArray[np.uint8]], labels: npt.NDArray[np.int64], bad_rows: list[int]
) -> dict[str, Tensor]:
    """Decoded images and their class ids as `ImageDataset` gives them, with the rows that could not be read."""
    return {
        "pixel_values": torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(),
        "labels": torch.from_numpy(labels),
        BAD_ROWS: torch.tensor(bad_rows, dtype=torch.int64),
    }


def note_bad_rows(batch: dict[str, Tensor], source: ImageRows, bad_images: BadImages) -> None:
    """Takes "bad_rows" out of a batch of `ImageDataset` and adds their images; other batches have none.

    Raises:
        InputError: They are too many.
    """
    rows = batch.pop(BAD_ROWS, torch.empty(0)).tolist()
    # Batches hold tensors only: what is wrong is seen by reading once more.
    bad_images.add(source.fault(row) for row in rows if row not in bad_images)


def find_bad_images(source: ImageRows, num_threads: int = 8) -> Iterator[BadImage]:
    """Decodes every image, with a progress bar, and gives those that cannot be read."""

    def is_good(row: int) -> bool:
        try:
            source.load(row, resolution=1)
        except UnreadableImage:
            return False
        return True

    with (
        ThreadPoolExecutor(num_threads) as threads,
        tqdm(total=len(source), desc="Checking images", unit="image", leave=False) as progress,
    ):
        for begin in range(0, len(source), CHECKED_AT_ONCE):
            rows = range(begin, min(begin + CHECKED_AT_ONCE, len(source)))
            good = threads.map(is_good, rows)
            yield from (source.fault(row) for row, fine in zip(rows, good, strict=True) if not fine)
            progress.update(len(rows))


def collate(batch: Any) -> dict[str, Tensor]:
    """The identity, as `collate_fn`: `__getitems__` has already put the batch together, a dict of tensors."""
    return cast(dict[str, Tensor], batch)
