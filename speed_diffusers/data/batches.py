"""The images that the scripts for the VAE, the classifier and the reference statistics read, and batches of them."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from ..config.schema import Options, option
from ..errors import InputError
from . import ImageDataset, ImageSource, collate, open_images
from .bad_images import MAX_BAD_IMAGES, BadImages
from .batch_sampler import BatchLayout, BatchOrder
from .images import note_bad_rows
from .workers import end_with_parent

logger = logging.getLogger(__name__)

PRELOAD_BYTES = 2**29
"""Sets of at most this size, decoded, are trained on from memory."""

BatchReader = Callable[[BatchOrder | list[list[int]]], Iterator[tuple[torch.Tensor, torch.Tensor]]]


@dataclass
class ImageSettings(Options):
    """Which images; the scripts' own settings inherit these."""

    dataset_name: str | None = option(
        None, "Hub id, or embedded for the images in the package (default without other data)."
    )
    dataset_config_name: str | None = option(None, "Configuration of the Hub data set.")
    split: str = option("train", "Split to train on, train[:10%] too; locally as names say it.")
    validation_split: str | None = option(None, "Split to measure on, likewise.")
    train_data_dir: str | None = option(None, "Image folder, parquet folder or file.", path=True)
    validation_data_dir: str | None = option(None, "Held-out images, like train_data_dir.", path=True)
    image_column: str = option("image", "Column with the images.")
    label_column: str | None = option("label", "Column with the class, or None.")
    cache_dir: str | None = option(None, "Where datasets keeps its copies.", path=True)
    resolution: int = option(32, "Side of the images in pixels.", interval="[8, 2^14]")
    max_bad_images: float = option(
        MAX_BAD_IMAGES, "Share of images that may be unreadable; the next good one replaces each.", interval="[0, 1]"
    )
    num_workers: int = option(0, "Processes that decode images.", interval="[0, 256]")
    seed: int = option(0, "Initialisation, order and everything random.", interval="[0, 2^63)")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dataset_name is not None and self.train_data_dir is not None:
            raise InputError("Give dataset_name or train_data_dir, not both.")
        if self.dataset_name is None and self.train_data_dir is None:
            self.dataset_name = "embedded"


def open_training_images(settings: ImageSettings, *, max_train_samples: int | None = None) -> ImageSource:
    """The images to train on, all or so many of them."""
    return _open(settings, settings.train_data_dir, settings.split, max_train_samples)


def open_validation_images(settings: ImageSettings, training: ImageSource) -> ImageSource | None:
    """The held-out images; None where the settings name none, or, with a warning, the training images again.

    Of `validation_data_dir` without a split, what names in it call validation, else test, else all of it.

    Args:
        settings: They name both.
        training: From `open_training_images`, all of them.
    """
    if settings.validation_data_dir is None and settings.validation_split is None:
        return None
    data_dir = settings.validation_data_dir or settings.train_data_dir
    held_out = _open(settings, data_dir, settings.validation_split)
    if held_out.signature() == training.signature():
        logger.warning("Nothing is held out: the validation images are the training images again.")
        return None
    return held_out


def _open(
    settings: ImageSettings, data_dir: str | None, split: str | None, max_train_samples: int | None = None
) -> ImageSource:
    source = open_images(
        dataset_name=settings.dataset_name if data_dir is None else None,
        dataset_config_name=settings.dataset_config_name,
        train_data_dir=data_dir,
        split=split,
        image_column=settings.image_column,
        label_column=settings.label_column,
        cache_dir=settings.cache_dir,
        max_train_samples=max_train_samples,
    )
    if source.ignored:
        logger.warning("Not read in '%s': %s.", data_dir, "; ".join(source.ignored))
    return source


def training_batches(
    source: ImageSource, settings: ImageSettings, *, batch_size: int, steps: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """`steps` shuffled batches: images (B, 3, R, R) float32 in [0, 1], labels (B,) int64."""
    order = BatchOrder(len(source), BatchLayout(batch_size), seed=settings.seed, first_step=0, max_steps=steps)
    yield from batch_reader(source, settings, images_to_read=steps * batch_size)(order)


def batch_reader(source: ImageSource, settings: ImageSettings, *, images_to_read: int) -> BatchReader:
    """What turns lists of rows into batches as `training_batches` gives them, again and again.

    Decoding a small PNG costs as much as training on it: a set that fits in memory is decoded once, unless fewer
    images than it holds are to be read.
    """
    size = len(source) * 3 * settings.resolution**2
    if size > PRELOAD_BYTES or images_to_read < len(source):
        return lambda order: _load(source, settings, order)
    decoded = [
        ((batch * 255).round().to(torch.uint8), labels)
        for batch, labels in all_batches(source, settings, description="decode")
    ]
    images, labels = (torch.cat(parts) for parts in zip(*decoded, strict=True))
    return lambda order: ((images[rows].float() / 255, labels[rows]) for rows in order)


def all_batches(
    source: ImageSource, settings: ImageSettings, *, description: str, batch_size: int = 250
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Every image once, in order, with a progress bar; batches as `training_batches` gives them."""
    rows = range(len(source))
    order = [list(rows[begin : begin + batch_size]) for begin in range(0, len(source), batch_size)]
    yield from tqdm(_load(source, settings, order), desc=description, total=len(order), unit="batch", leave=False)


@cache
def _bad_images_of(source: ImageSource, max_share: float) -> BadImages:
    """Of all passes over the images together, so that each bad one is told once."""
    return BadImages(len(source), max_share)


def _load(
    source: ImageSource, settings: ImageSettings, order: BatchOrder | list[list[int]]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    bad_images = _bad_images_of(source, settings.max_bad_images)
    dataset = ImageDataset(source, resolution=settings.resolution)
    loader = DataLoader(
        dataset,
        batch_sampler=order,
        collate_fn=collate,
        num_workers=settings.num_workers,
        worker_init_fn=end_with_parent,
    )
    for batch in loader:
        note_bad_rows(batch, source, bad_images)
        yield batch["pixel_values"].float() / 255, batch["labels"]
