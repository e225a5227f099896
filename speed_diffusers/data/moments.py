"""What a VAE makes of images: mean and log-variance of their latents, and the latents sampled from these."""

import json
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..errors import InputError
from ..files import tensors_sha256

if TYPE_CHECKING:
    # Importing it costs seconds, which opening images need not pay.
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

LOG_VARIANCE_RANGE = (-30.0, 20.0)
"""diffusers' DiagonalGaussianDistribution clamps to it; clamped before storing, no value overflows float16."""


def vae_factor(vae: "AutoencoderKL") -> int:
    """How many pixels along a side one latent stands for."""
    return int(2 ** (len(vae.config["block_out_channels"]) - 1))


def check_resolution(resolution: int, vae: "AutoencoderKL") -> int:
    """Checks that the VAE can encode colour images of this size.

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


def vae_fingerprint(vae: "AutoencoderKL") -> str:
    """SHA-256 (hex) over the VAE's configuration and the names, types, shapes and bytes of its weights."""
    # Private keys say where it was loaded from and by which version, not what it computes.
    config = {name: value for name, value in vae.config.items() if not name.startswith("_")}
    return tensors_sha256(vae.state_dict(), json.dumps(config, sort_keys=True, default=str).encode())


def sample_latents(moments: Tensor, noise: Tensor, scaling_factor: float) -> Tensor:
    """Samples latents as the diffusion model sees them: (mean + std * noise) * scaling_factor.

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


@torch.inference_mode()
def encode_moments(
    pixels: npt.NDArray[np.uint8], vae: "AutoencoderKL", *, flipped: bool
) -> list[npt.NDArray[np.float16]]:
    """Mean and log-variance of the latents of images.

    Args:
        pixels: uint8 (B, R, R, 3).
        vae: Encodes on its own device in its own dtype.
        flipped: Also encode the flipped images.

    Returns:
        One array, or two if flipped, float16 (B, 2C, h, w): C channels of means, then C of clamped log-variances.
    """
    images = (torch.from_numpy(pixels).to(vae.device).permute(0, 3, 1, 2) / 127.5 - 1).to(vae.dtype)
    encoded = []
    for batch in (images, images.flip(-1)) if flipped else (images,):
        mean, log_variance = vae.encode(batch).latent_dist.parameters.float().chunk(2, dim=1)
        moments = torch.cat((mean, log_variance.clamp(*LOG_VARIANCE_RANGE)), dim=1)
        encoded.append(moments.half().cpu().numpy())
    return encoded
