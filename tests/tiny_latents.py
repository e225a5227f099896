"""A cache of the latents of 40 images, made in a fraction of a second by a real autoencoder with few channels."""

from pathlib import Path

import datasets
import numpy as np
import torch
from diffusers import AutoencoderKL

from speed_diffusers.data.images import ImageSource
from speed_diffusers.data.latents import LatentDataset, cache_latents, vae_fingerprint

SIZE = 16
COUNT = 40


def tiny_vae(seed: int = 0) -> AutoencoderKL:
    """An untrained autoencoder, 16 x 16 pixels to 4 x 4 latents of 4 channels."""
    torch.manual_seed(seed)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8),
        norm_num_groups=4,
        layers_per_block=1,
    )
    return vae.eval().requires_grad_(False)


def tiny_dataset(count: int = COUNT) -> datasets.Dataset:
    """Noise images in memory with labels 0, 1, 2, 0, ..."""
    values = np.random.default_rng(0).integers(0, 256, (count, SIZE, SIZE, 3), dtype=np.uint8)
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["bag", "coat", "shoe"]))
    columns = {"image": list(values), "label": [row % 3 for row in range(count)]}
    return datasets.Dataset.from_dict(columns, features=features)


def cache(source: ImageSource, vae: AutoencoderKL, cache_dir: Path, **changes: object) -> LatentDataset:
    """`cache_latents` with the settings of most tests."""
    settings: dict[str, object] = {
        "vae_fingerprint": vae_fingerprint(vae),
        "resolution": SIZE,
        "center_crop": True,
        "random_flip": True,
        "batch_size": 16,
        "device": torch.device("cpu"),
        "cache_dir": str(cache_dir),
    }
    return cache_latents(source, vae, **(settings | changes))


def count_encodings(vae: AutoencoderKL) -> list[int]:
    """A list that grows by the batch size at every call of the encoder."""
    calls: list[int] = []
    vae.encoder.register_forward_hook(lambda module, inputs, output: calls.append(len(output)))
    return calls


def shards_in(cache_dir: Path) -> list[str]:
    """Names of the files under the cache's folder, without headers and the lock of these."""
    beside = ("header.json", "header.lock")
    return sorted(file.name for file in cache_dir.rglob("*") if file.is_file() and file.name not in beside)
