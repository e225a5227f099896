"""Training images from the embedded set, the Hugging Face Hub, an image folder or parquet files, as one `ImageSource`.

Everything a user can have got wrong is checked here, before the first training step and without decoding an image.
"""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import datasets
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..assets import EMBEDDED, EMBEDDED_IMAGES
from ..errors import InputError, unknown_name
from ..randomness import keyed_seed
from .decode import load_image
from .labels import read_labels
from .local import load_local
from .remote import load_remote


@dataclass(frozen=True, eq=False)
class ImageSource:
    """A set of images with class ids, checked."""

    dataset: datasets.Dataset
    """One row per image; the image column is undecoded ({"bytes", "path"}), for `load_image`."""
    image_column: str
    label_column: str | None
    """None: the set is used without classes."""
    labels: npt.NDArray[np.int64]
    """(N,): class id of each row, in 0..num_classes-1; all zero without classes."""
    label_names: list[str] | None
    """Name of each class id ("0", "1", ... where the data has integers only); None without classes."""
    fingerprint: str
    """Changes whenever the images, their order or their labels change (for files on disk: path, size or time)."""
    ignored: tuple[str, ...] = ()
    """What lies beside the images and is not read: a line for each reason, with how much it is."""

    @property
    def num_classes(self) -> int:
        """Number of classes in the whole data, 0 without classes."""
        return len(self.label_names or ())

    def __len__(self) -> int:
        return len(self.labels)

    def signature(self) -> str:
        """Hash of the labels, their names and the bytes of 32 images, wherever and whenever the files were written.

        What a resumed run holds against its checkpoint: `fingerprint` changes when a set is copied to another disk.
        """
        digest = hashlib.sha256(f"{len(self)} {self.label_names}".encode())
        digest.update(self.labels.tobytes())
        for row in np.linspace(0, len(self) - 1, min(32, len(self)), dtype=int).tolist():
            image = self.dataset[row][self.image_column] or {"bytes": b""}
            digest.update(image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes())
        return digest.hexdigest()

    def load(self, row: int, resolution: int, center_crop: bool = True) -> npt.NDArray[np.uint8]:
        """Decodes row `row` to uint8 (resolution, resolution, 3); see `load_image`.

        Raises:
            InputError: If the image is missing or damaged; the message gives the row.
        """
        return self.decode(self.dataset[row][self.image_column], row, resolution, center_crop)

    def decode(
        self, image: dict[str, object] | None, row: int, resolution: int, center_crop: bool
    ) -> npt.NDArray[np.uint8]:
        """As `load`, for an image column's value that has been read already."""
        return load_image(image or {}, resolution, center_crop, name=f"the image of row {row}")


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

    Raises:
        InputError: For every mistake a user can mend, in one line: unknown or gated data set, unreachable Hub,
            missing or empty folder, unknown column or split, missing or negative labels.
    """
    if (dataset_name is None) == (train_data_dir is None):
        given = "neither" if dataset_name is None else f"both (dataset_name=None takes {dataset_name} out)"
        raise InputError(f"Give exactly one of dataset_name and train_data_dir; got {given}.")
    if train_data_dir is not None or dataset_name == EMBEDDED:
        path = EMBEDDED_IMAGES.parent if train_data_dir is None else Path(train_data_dir).expanduser()
        local = load_local(path, split=split, label_column=label_column, cache_dir=cache_dir)
        source = from_dataset(local.dataset, image_column, label_column, max_train_samples=max_train_samples)
        return source if train_data_dir is None else replace(source, ignored=local.ignored)
    assert dataset_name is not None
    if split is None:
        raise InputError(f"'{dataset_name}' is on the Hub: say which split.")
    dataset = load_remote(dataset_name, dataset_config_name, split=split, cache_dir=cache_dir, revision=revision)
    return from_dataset(dataset, image_column, label_column, max_train_samples=max_train_samples)


def from_dataset(
    dataset: datasets.Dataset,
    image_column: str = "image",
    label_column: str | None = "label",
    *,
    max_train_samples: int | None = None,
) -> ImageSource:
    """Checks a `datasets.Dataset` of one's own and makes an `ImageSource` of it. See `open_images`."""
    if max_train_samples is not None and max_train_samples < 1:
        raise InputError(f"max_train_samples must be at least 1 (or None for all), got {max_train_samples}.")
    if len(dataset) == 0:
        raise InputError("The data set has no rows.")
    dataset = dataset.with_format(None)
    rows = _share(len(dataset), max_train_samples)
    if label_column is None:
        labels, names = np.zeros(len(dataset), dtype=np.int64), None
    else:
        # The whole column, not those rows only: the number of classes must not depend on max_train_samples.
        labels, names = read_labels(dataset, label_column)
    undecoded = _undecoded(dataset, image_column)
    key = hashlib.sha256(f"{dataset._fingerprint} {image_column} {len(rows)} {names}".encode())
    key.update(labels[rows].tobytes())
    if len(rows) < len(dataset):
        key.update(np.asarray(rows).tobytes())
    source = ImageSource(
        dataset=undecoded.select(rows),
        image_column=image_column,
        label_column=label_column,
        labels=labels[rows],
        label_names=names,
        fingerprint=key.hexdigest()[:32],
    )
    source.load(0, resolution=1)  # text or bytes that are no images show now instead of at the first step
    return source


def _share(num_rows: int, limit: int | None) -> npt.NDArray[np.int64] | range:
    """Ascending row numbers: all, or `limit` at random. The first ones of sorted data would be of one class."""
    if limit is None or limit >= num_rows:
        return range(num_rows)
    shuffled = np.random.default_rng(keyed_seed(0, "max_train_samples", 0)).permutation(num_rows)
    return np.sort(shuffled[:limit])


def _undecoded(dataset: datasets.Dataset, image_column: str) -> datasets.Dataset:
    """The data set with its image column as {"bytes", "path"}, so that `load_image` can say which image is damaged."""
    if image_column not in dataset.column_names:
        raise unknown_name("image column", image_column, dataset.column_names)
    feature = dataset.features[image_column]
    encoded = isinstance(feature, datasets.Value) and feature.dtype in ("binary", "large_binary", "string")
    parts = isinstance(feature, dict) and set(feature) <= {"bytes", "path"}
    if not (isinstance(feature, datasets.Image) or encoded or parts):
        raise InputError(
            f"The image column '{image_column}' holds {_kind(feature)}, not images. Columns: {_columns(dataset)}."
        )
    return dataset.cast_column(image_column, datasets.Image(decode=False))


def _kind(feature: object) -> str:
    return str(getattr(feature, "dtype", type(feature).__name__))


def _columns(dataset: datasets.Dataset) -> str:
    return ", ".join(f"{name} ({_kind(feature)})" for name, feature in dataset.features.items())


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
        return {name: value[0] for name, value in self.__getitems__([row]).items()}

    def __getitems__(self, rows: list[int]) -> dict[str, Tensor]:
        """A batch.

        Returns:
            "pixel_values": uint8 (B, 3, resolution, resolution), 0..255; "labels": int64 (B,).

        Raises:
            InputError: If an image is damaged; the message gives its row.
        """
        images = np.stack([self.source.load(row, self.resolution, self.center_crop) for row in rows])
        pixel_values = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
        return {"pixel_values": pixel_values, "labels": torch.from_numpy(self.source.labels[rows])}


def collate(batch: Any) -> dict[str, Tensor]:
    """The identity, as `collate_fn`: `__getitems__` has already put the batch together, a dict of tensors."""
    return cast(dict[str, Tensor], batch)
