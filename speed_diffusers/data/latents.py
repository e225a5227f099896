"""A VAE's view of the training images, computed once: mean and log-variance of every latent, and of its flipped image.

What is stored are the moments, not samples, so that every epoch samples new latents; and those of the flipped images
too, because a VAE does not commute with flipping. The file is an Arrow file made by `datasets`, memory-mapped when it
is read.
"""

import hashlib
import json
import logging
import math
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import datasets
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from filelock import FileLock, Timeout
from torch import Tensor

from ..errors import InputError
from .images import ImageSource
from .moments import check_resolution, encode_moments, sample_latents, vae_factor, vae_fingerprint

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

__all__ = [
    "LatentDataset",
    "cache_latents",
    "check_resolution",
    "sample_latents",
    "vae_factor",
    "vae_fingerprint",
]

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
"""Part of the cache's key; raise it when what is stored for the same images and VAE changes."""

CACHE_FOLDER = "speed_diffusers_latents"


class LatentDataset(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Cached moments and labels, read a whole batch at a time from a memory-mapped file.

    Use it with a `batch_sampler` and `collate_fn=collate`; it travels to DataLoader workers as a path.
    """

    def __init__(self, dataset: datasets.Dataset, shape: tuple[int, int, int]) -> None:
        """Wraps what `cache_latents` wrote.

        Args:
            dataset: Columns "moments" and, if flipped images were stored, "moments_flipped" (flat float16), "label".
            shape: (2C, h, w) of the moments.
        """
        self.dataset = dataset.with_format("arrow")
        self.shape = shape

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        """One image's moments and label, without a batch axis."""
        return {name: value[0] for name, value in self.__getitems__([row]).items()}

    def __getitems__(self, rows: list[int]) -> dict[str, Tensor]:
        """A batch.

        Returns:
            "moments": float16 (B, 2C, h, w); "moments_flipped": the same of the flipped images, if stored; "labels":
            int64 (B,).
        """
        table = self.dataset[rows]
        batch = {"labels": torch.from_numpy(table["label"].to_numpy().copy())}
        for name in table.column_names:
            if name != "label":
                # Flat lists of fixed length: one copy per batch, 30 times faster than datasets' Array3D.
                values = table[name].combine_chunks().flatten().to_numpy()
                batch[name] = torch.from_numpy(values.reshape(-1, *self.shape).copy())
        return batch


def cache_latents(
    source: ImageSource,
    vae: "AutoencoderKL",
    *,
    vae_fingerprint: str,
    resolution: int,
    center_crop: bool,
    random_flip: bool,
    batch_size: int,
    device: torch.device,
    cache_dir: str | None = None,
    num_threads: int = 8,
) -> LatentDataset:
    """Encodes all images, or finds them encoded by an earlier run.

    The file lies in `cache_dir` under a key of images, labels, VAE, resolution, crop and flipping. It appears there
    only when it is complete, and a lock makes a second process wait for the first instead of doing the work twice.

    Args:
        source: The images.
        vae: The autoencoder; moved to `device` if there is something to encode. Its dtype is used.
        vae_fingerprint: `vae_fingerprint(vae)`.
        resolution: Side of the images in pixels, a multiple of the VAE's factor.
        center_crop: See `load_image`.
        random_flip: Store the moments of the flipped images too.
        batch_size: Images encoded at a time; it does not change the key.
        device: Where to encode.
        cache_dir: Folder of the caches; None for that of `datasets` (HF_DATASETS_CACHE).
        num_threads: Threads that decode images.

    Raises:
        InputError: If an image is damaged, the resolution does not fit, the VAE yields NaN, or the cache's folder
            cannot be written or has too little space.
    """
    side = check_resolution(resolution, vae)
    shape = (2 * int(vae.config["latent_channels"]), side, side)
    columns = ["moments", "moments_flipped"] if random_flip else ["moments"]
    key = _key(FORMAT_VERSION, source.fingerprint, vae_fingerprint, resolution, center_crop, random_flip)
    folder = Path(cache_dir or datasets.config.HF_DATASETS_CACHE).expanduser() / CACHE_FOLDER / key
    file = folder / "latents.arrow"
    # Before the lock, so that a finished cache can lie on a read-only disk.
    if (cached := _read(file, len(source))) is not None:
        return LatentDataset(cached, shape)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _only_one(folder):
            cached = _read(file, len(source))
            if cached is None:
                _make_room(folder, len(source) * (len(columns) * 2 * math.prod(shape) + 8))
                cast(Any, vae).to(device)
                cached = _write(source, vae, file, columns, shape, resolution, center_crop, batch_size, num_threads)
    except OSError as error:
        raise InputError(f"Cannot keep latents in '{folder}' (cache_dir, or HF_DATASETS_CACHE): {error}.") from error
    return LatentDataset(cached, shape)


def _key(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


@contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """Holds the folder's lock; the system releases it when its holder dies."""
    lock = FileLock(folder / "lock")
    try:
        lock.acquire(timeout=1)
    except Timeout:
        logger.warning("Another process is making the latents in '%s'; waiting for it.", folder)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _read(file: Path, num_rows: int) -> datasets.Dataset | None:
    if not file.exists():
        return None
    try:
        dataset = datasets.Dataset.from_file(str(file))
    except (pa.ArrowInvalid, OSError) as error:
        logger.warning("The latent cache '%s' is damaged (%s); making it again.", file, error)
        return None
    if len(dataset) != num_rows:
        logger.warning("The latent cache '%s' has %d rows, not %d; making it again.", file, len(dataset), num_rows)
        return None
    return dataset


def _make_room(folder: Path, num_bytes: int) -> None:
    """Removes what a killed run left and checks that the file fits. Only under the lock: nobody else is writing."""
    for leftover in folder.glob("tmp*"):
        leftover.unlink()
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise InputError(
            f"The latents need {num_bytes / 1e9:.1f} GB in '{folder}', where {free / 1e9:.1f} GB are free. Give "
            "another cache_dir (or HF_DATASETS_CACHE), or train with cache_latents=false."
        )


def _write(
    source: ImageSource,
    vae: "AutoencoderKL",
    file: Path,
    columns: list[str],
    shape: tuple[int, int, int],
    resolution: int,
    center_crop: bool,
    batch_size: int,
    num_threads: int,
) -> datasets.Dataset:
    num_values = math.prod(shape)
    moments = datasets.Sequence(datasets.Value("float16"), length=num_values)
    features = datasets.Features({**dict.fromkeys(columns, moments), "label": datasets.Value("int64")})

    def to_table(images: list[dict[str, object] | None], rows: list[int]) -> pa.Table:
        def load(image: dict[str, object] | None, row: int) -> npt.NDArray[np.uint8]:
            return source.decode(image, row, resolution, center_crop)

        pixels = np.stack(list(threads.map(load, images, rows)))  # (B, R, R, 3)
        encoded = encode_moments(pixels, vae, flipped="moments_flipped" in columns)
        if not all(np.isfinite(values).all() for values in encoded):
            raise InputError(f"The VAE ({vae.dtype}) yields NaN or infinity on rows {rows[0]} to {rows[-1]}.")
        lists = [pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), num_values) for values in encoded]
        # A table instead of a dict of arrays: `map` writes it as it is, without a detour over Python lists.
        return pa.table([*lists, pa.array(source.labels[rows])], names=[*columns, "label"])

    with ThreadPoolExecutor(num_threads) as threads:
        # `map` writes to a temporary file beside `file` and renames it at the end.
        return source.dataset.map(
            to_table,
            with_indices=True,
            batched=True,
            batch_size=batch_size,
            input_columns=[source.image_column],
            remove_columns=source.dataset.column_names,
            features=features,
            cache_file_name=str(file),
            load_from_cache_file=False,
            new_fingerprint=file.parent.name,
            desc="Caching latents",
        )
