"""Images of noise and small sets of them, for the tests of data."""

import io

import datasets
import numpy as np
from PIL import Image


def noise_image(width: int, height: int, seed: int = 0) -> Image.Image:
    """An RGB image of independent random values."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def encoded(image: Image.Image, fmt: str = "PNG", **options: object) -> bytes:
    """The bytes of the image's file."""
    file = io.BytesIO()
    image.save(file, fmt, **options)
    return file.getvalue()


def image_rows(count: int, size: int = 8) -> list[dict[str, object]]:
    """Undecoded images, each of its own noise."""
    return [{"bytes": encoded(noise_image(size, size, seed)), "path": None} for seed in range(count)]


def image_dataset(labels: list[object] | None, feature: object = None, count: int = 6) -> datasets.Dataset:
    """A set in memory with an "image" and, if given, a "label" column."""
    columns: dict[str, list[object]] = {"image": list(image_rows(count))}
    features = {"image": datasets.Image()}
    if labels is not None:
        columns["label"], features["label"] = labels, feature or datasets.Value("int64")
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))
