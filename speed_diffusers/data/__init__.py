"""Training data: images from anywhere, and the cache of their latents (needs the `train` extra)."""

from .decode import load_image
from .images import ImageDataset, ImageSource, collate, from_dataset, open_images
from .latents import LatentDataset, cache_latents, check_resolution, sample_latents, vae_fingerprint

__all__ = [
    "ImageDataset",
    "ImageSource",
    "LatentDataset",
    "cache_latents",
    "check_resolution",
    "collate",
    "from_dataset",
    "load_image",
    "open_images",
    "sample_latents",
    "vae_fingerprint",
]
