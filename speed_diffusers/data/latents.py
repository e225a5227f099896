"""A VAE's view of the training images, computed once: mean and log-variance of every latent, and of its mirror image.

What is stored are the moments, not samples, so that every epoch draws new latents; and both mirror images, because a
VAE does not commute with mirroring. The file is an Arrow file made by `datasets`, memory-mapped when it is read.
"""

import hashlib
import json
import logging
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import datasets
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from filelock import FileLock
from torch import Tensor

from ..errors import InputError
from .images import ImageSource

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
"""Part of the cache's key; raise it when what is stored for the same images and VAE changes."""

CACHE_FOLDER = "speed_diffusers_latents"
LOG_VARIANCE_RANGE = (-30.0, 20.0)
"""diffusers' DiagonalGaussianDistribution clamps to it; clamped before storing, no value overflows float16."""


def vae_factor(vae: AutoencoderKL) -> int:
    """How many pixels along a side one latent stands for."""
    return int(2 ** (len(vae.config["block_out_channels"]) - 1))


def check_resolution(resolution: int, vae: AutoencoderKL) -> int:
    """Check that the VAE can encode colour images of this size.

    Args:
        resolution: Side of the training images in pixels.
        vae: The autoencoder.

    Returns:
        The side of the latents, resolution / vae_factor(vae).

    Raises:
        InputError: If the size is not a multiple of the VAE's factor (with the nearest sizes), or the VAE does not
            take 3 channels.
    """
    if vae.config["in_channels"] != 3:
        raise InputError(f"The VAE takes {vae.config['in_channels']} channels; training images have 3 (RGB).")
    factor = vae_factor(vae)
    below, rest = divmod(resolution, factor)
    if rest or resolution < 1:
        nearest = [str(size * factor) for size in (below, below + 1) if size > 0]
        raise InputError(
            f"Image size {resolution} is not a multiple of the VAE's factor {factor} "
            f"({resolution} = {below} x {factor} + {rest}). Nearest: {' or '.join(nearest)}."
        )
    return below


def vae_fingerprint(vae: AutoencoderKL) -> str:
    """SHA-256 (hex) over the VAE's configuration and the names, types, shapes and bytes of its weights."""
    # Private keys say where it was loaded from and by which version, not what it computes.
    config = {name: value for name, value in vae.config.items() if not name.startswith("_")}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, weight in sorted(vae.state_dict().items()):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        # Through bytes, because numpy has no bfloat16.
        digest.update(weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def sample_latents(moments: Tensor, noise: Tensor, scaling_factor: float) -> Tensor:
    """Draw latents as the diffusion model sees them: (mean + std * noise) * scaling_factor.

    Args:
        moments: (B, 2C, h, w), any float type: C channels of means, then C of log-variances.
        noise: (B, C, h, w), standard normal; zeros give the mean.
        scaling_factor: `vae.config.scaling_factor`.

    Returns:
        float32 (B, C, h, w).
    """
    mean, log_variance = moments.float().chunk(2, dim=1)
    std = torch.exp(0.5 * log_variance.clamp(*LOG_VARIANCE_RANGE))
    return (mean + std * noise.float()) * scaling_factor


class LatentDataset(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Cached moments and labels, read a whole batch at a time from a memory-mapped file.

    Use it with a `batch_sampler` and `collate_fn=collate`; it travels to DataLoader workers as a path.
    """

    def __init__(self, dataset: datasets.Dataset, shape: tuple[int, int, int]) -> None:
        """Wrap what `cache_latents` wrote.

        Args:
            dataset: Columns "moments" and, if mirror images were stored, "moments_flipped" (flat float16), "label".
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
            "moments": float16 (B, 2C, h, w); "moments_flipped": the same of the mirror images, if stored; "labels":
            int64 (B,).
        """
        table = self.dataset[rows]
        batch = {"labels": torch.from_numpy(table["label"].to_numpy().copy())}
        for name in table.column_names:
            if name != "label":
                # Flat lists of fixed length: one copy a batch, 30 times faster than datasets' Array3D.
                values = table[name].combine_chunks().flatten().to_numpy()
                batch[name] = torch.from_numpy(values.reshape(-1, *self.shape).copy())
        return batch


def cache_latents(
    source: ImageSource,
    vae: AutoencoderKL,
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
    """Encode all images, or find them encoded by an earlier run.

    The file lies in `cache_dir` under a key of images, labels, VAE, resolution, crop and mirroring. It appears there
    only when it is complete, and a lock makes a second process wait for the first instead of doing the work twice.

    Args:
        source: The images.
        vae: The autoencoder; moved to `device` if there is something to encode. Its dtype is used.
        vae_fingerprint: `vae_fingerprint(vae)`.
        resolution: Side of the images in pixels, a multiple of the VAE's factor.
        center_crop: See `load_image`.
        random_flip: Store the moments of the mirror images too.
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
    num_values = shape[0] * side * side
    columns = ["moments", "moments_flipped"] if random_flip else ["moments"]
    key = _key(FORMAT_VERSION, source.fingerprint, vae_fingerprint, resolution, center_crop, random_flip)
    folder = Path(cache_dir or datasets.config.HF_DATASETS_CACHE) / CACHE_FOLDER / key
    file = folder / "latents.arrow"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / "lock"):
            cached = _read(file, len(source))
            if cached is None:
                _make_room(folder, len(source) * (len(columns) * 2 * num_values + 8))
                cast(Any, vae).to(device)
                cached = _write(
                    source,
                    vae,
                    file,
                    columns=columns,
                    resolution=resolution,
                    center_crop=center_crop,
                    batch_size=batch_size,
                    num_threads=num_threads,
                    num_values=num_values,
                )
    except OSError as error:
        raise InputError(f"Cannot keep latents in '{folder}' (cache_dir, or HF_DATASETS_CACHE): {error}.") from error
    return LatentDataset(cached, shape)


def _key(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


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
    """Remove what a killed run left and check that the file fits. Only under the lock: nobody else is writing."""
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
    vae: AutoencoderKL,
    file: Path,
    *,
    columns: list[str],
    resolution: int,
    center_crop: bool,
    batch_size: int,
    num_threads: int,
    num_values: int,
) -> datasets.Dataset:
    moments = datasets.Sequence(datasets.Value("float16"), length=num_values)
    features = datasets.Features({**dict.fromkeys(columns, moments), "label": datasets.Value("int64")})

    def to_table(images: list[dict[str, object] | None], rows: list[int]) -> pa.Table:
        def load(image: dict[str, object] | None, row: int) -> npt.NDArray[np.uint8]:
            return source.decode(image, row, resolution, center_crop)

        pixels = np.stack(list(threads.map(load, images, rows)))  # (B, R, R, 3)
        encoded = _encode(pixels, vae, mirrored="moments_flipped" in columns)
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


@torch.inference_mode()
def _encode(pixels: npt.NDArray[np.uint8], vae: AutoencoderKL, *, mirrored: bool) -> list[npt.NDArray[np.float16]]:
    """Moments, float16 (B, 2C, h, w), of images, uint8 (B, R, R, 3), and if wanted of their mirror images."""
    images = torch.from_numpy(pixels).to(vae.device).permute(0, 3, 1, 2).to(vae.dtype) / 127.5 - 1
    encoded = []
    for batch in (images, images.flip(-1)) if mirrored else (images,):
        mean, log_variance = vae.encode(batch).latent_dist.parameters.float().chunk(2, dim=1)
        moments = torch.cat((mean, log_variance.clamp(*LOG_VARIANCE_RANGE)), dim=1)
        encoded.append(moments.half().cpu().numpy())
    return encoded
