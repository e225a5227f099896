r"""Trains a small AutoencoderKL whose latents a DiT of the embedded default is trained on.

    python train_scripts/assets/train_vae.py train_data_dir=fashion_mnist_train.parquet \
        validation_data_dir=fashion_mnist_test.parquet output_dir=vae

Writes the VAE (half precision, as `AutoencoderKL.from_pretrained` reads it) and quality.json to output_dir. About a
quarter of an hour on one CPU core for Fashion-MNIST (make_embedded_dataset.py beside this file writes the two parquet
files). Without data settings it trains on the 9,000 images in the package. A quick try: max_train_steps=20.
"""

import json
import math
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from tqdm import tqdm

from speed_diffusers.config.command_line import run_script
from speed_diffusers.config.load import load_config
from speed_diffusers.config.published import published_command
from speed_diffusers.config.schema import option
from speed_diffusers.data import ImageSource
from speed_diffusers.data.batches import (
    ImageSettings,
    all_batches,
    batch_reader,
    open_training_images,
    open_validation_images,
)
from speed_diffusers.errors import InputError
from speed_diffusers.files import check_writable
from speed_diffusers.generation import load_vae

LATENT_CHANNELS = 4
WARMUP_STEPS = 100


@dataclass
class VAESettings(ImageSettings):
    """All settings of this script."""

    output_dir: str = option("vae", "Folder for the VAE; replaces one there.", path=True)
    max_train_steps: int = option(3600, "Optimizer steps.", interval="[1, inf)")
    train_batch_size: int = option(64, "Images per step.", interval="[1, inf)")
    learning_rate: float = option(2e-3, "Peak of the cosine schedule.", interval="(0, inf)")
    kl_weight: float = option(5e-4, "Weight of the KL term, per latent value in nats.", interval="[0, inf)")
    block_out_channels: list[int] = option([16, 32, 48], "Channels of each level; each halves the size.")
    mixed_precision: str = option("no", "Arithmetic; bf16 is slow on most CPUs.", choices=("no", "bf16"))
    device: str = option("cpu", "Torch device.")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_writable("output_dir", Path(self.output_dir))
        factor = 2 ** (len(self.block_out_channels) - 1)
        if self.resolution % factor:
            raise InputError(f"resolution={self.resolution} is not divisible by the VAE's factor {factor}.")
        if any(channels % 8 for channels in self.block_out_channels):
            raise InputError(f"block_out_channels={self.block_out_channels}, but each must be divisible by 8.")


def make_vae(settings: VAESettings) -> AutoencoderKL:
    """An untrained VAE, without attention: at 8x8 the convolutions already see the whole image."""
    levels = len(settings.block_out_channels)
    vae: AutoencoderKL = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=tuple(settings.block_out_channels),
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=LATENT_CHANNELS,
        sample_size=settings.resolution,
        force_upcast=False,
        mid_block_add_attention=False,
    )
    return vae


def shuffled_images(source: ImageSource, settings: VAESettings, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Endless batches (B, 3, R, R) in [0, 1], each epoch in an order made at its start and without a rest."""
    batch_size = min(settings.train_batch_size, len(source))
    read = batch_reader(source, settings, images_to_read=settings.max_train_steps * batch_size)
    while True:
        order = torch.randperm(len(source), generator=generator).split(batch_size)
        for images, _ in read([rows.tolist() for rows in order if len(rows) == batch_size]):
            yield images


def train(vae: AutoencoderKL, source: ImageSource, settings: VAESettings) -> None:
    """Squared error plus a small KL term: the evidence bound of a Gaussian decoder, up to a factor.

    One generator draws the order of the images and the latent noise, as they are needed. The embedded VAE follows from
    the order of these draws and of the operations in `losses`: whoever changes either makes another VAE.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    optimizer = torch.optim.AdamW(
        vae.parameters(), lr=settings.learning_rate, betas=(0.9, 0.99), weight_decay=0.0, fused=True
    )
    steps = settings.max_train_steps
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / WARMUP_STEPS) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
    )
    batches = islice(shuffled_images(source, settings, generator), steps)
    progress = tqdm(batches, total=steps, desc="train", unit="step", mininterval=1.0)
    for step, images in enumerate(progress):
        target = images.to(settings.device) * 2 - 1
        error, kl = losses(vae, target, generator, autocast=settings.mixed_precision == "bf16")
        optimizer.zero_grad()
        (error + settings.kl_weight * kl).backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            progress.set_postfix(mse=f"{error.item() / 4:.5f}", kl=f"{kl.item():.2f}")


def losses(
    vae: AutoencoderKL, target: torch.Tensor, generator: torch.Generator, *, autocast: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean squared error of target (B, 3, R, R) in [-1, 1], and KL to N(0, 1) per latent value in nats."""
    with torch.autocast(target.device.type, torch.bfloat16, enabled=autocast):
        posterior = vae.encode(target).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator, dtype=torch.float32).to(target.device)
        decoded = vae.decode(posterior.mean.float() + posterior.std.float() * noise).sample
    error = (decoded.float() - target).square().mean()
    kl = DiagonalGaussianDistribution(posterior.parameters.float()).kl().mean() / posterior.mean[0].numel()
    return error, kl


def latent_means(vae: AutoencoderKL, source: ImageSource, settings: VAESettings, name: str) -> Iterator[torch.Tensor]:
    """Posterior means (B, 4, R/f, R/f) in float64 of every image, batch by batch."""
    for images, _ in all_batches(source, settings, description=name):
        with torch.no_grad():
            yield vae.encode(images.to(settings.device) * 2 - 1).latent_dist.mean.double()


def latent_moments(latents: Iterator[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation (4,) of each latent channel over images and places, float64."""
    count, total, squares = 0, torch.zeros(LATENT_CHANNELS), torch.zeros(LATENT_CHANNELS)
    for batch in latents:
        count += batch[:, 0].numel()
        total = total.to(batch) + batch.sum(dim=(0, 2, 3))
        squares = squares.to(batch) + batch.square().sum(dim=(0, 2, 3))
    mean = total / count
    return mean, (squares / count - mean.square()).clamp(min=0).sqrt()


@torch.no_grad()
def fold_latent_mean(vae: Any, mean: torch.Tensor) -> None:
    """Moves each channel's latent mean (4,) into the quant convolutions: DiTPipeline knows a scale but no shift.

    Encoding gives z' = z - mean by the bias of quant_conv; post_quant_conv(z') = W (z' + mean) + b = W z + b by its
    bias, so that decoding is unchanged. The log variances (channels 4 to 7 of quant_conv) stay.
    """
    mean = mean.to(vae.quant_conv.bias)
    vae.quant_conv.bias[:LATENT_CHANNELS] -= mean
    vae.post_quant_conv.bias += vae.post_quant_conv.weight[:, :, 0, 0] @ mean


def centre_and_scale(vae: AutoencoderKL, source: ImageSource, settings: VAESettings) -> None:
    """Makes the latents of the training images, times scaling_factor, have mean 0 and standard deviation 1."""
    mean, std = latent_moments(latent_means(vae, source, settings, "latent mean"))
    fold_latent_mean(vae, mean)
    vae.register_to_config(scaling_factor=1 / float(std.square().mean().sqrt()))


@torch.no_grad()
def reconstruction_error(vae: AutoencoderKL, source: ImageSource, settings: VAESettings) -> float:
    """Mean squared error of the decoded posterior means, images in [0, 1]."""
    total = 0.0
    for images, _ in all_batches(source, settings, description="reconstruct"):
        images = images.to(settings.device)
        decoded = vae.decode(vae.encode(images * 2 - 1).latent_dist.mode()).sample
        total += float(((decoded / 2 + 0.5).clamp(0, 1) - images).square().mean(dim=(1, 2, 3)).double().sum())
    return total / len(source)


def save(vae: AutoencoderKL, output: Path) -> None:
    """Writes the VAE in half precision to a temporary folder, then moves its files into `output`."""
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output, prefix=".partial-") as partial:
        cast(Any, vae).to(torch.float16).save_pretrained(partial)
        for file in Path(partial).iterdir():
            file.replace(output / file.name)


def quality(source: ImageSource, settings: VAESettings) -> dict[str, object]:
    """What the stored VAE, read back in float32, does to images: the held-out ones where there are any."""
    vae = load_vae(settings.output_dir).eval()
    cast(Any, vae).to(settings.device)
    error = reconstruction_error(vae, source, settings)
    mean, std = latent_moments(latent_means(vae, source, settings, "latent moments"))
    scale = vae.config["scaling_factor"]
    return {
        "images": len(source),
        "mse": error,
        "psnr": -10 * math.log10(error),
        "scaled_latent_mean": [round(value, 4) for value in (mean * scale).tolist()],
        "scaled_latent_std": [round(value, 4) for value in (std * scale).tolist()],
        "parameters": sum(parameter.numel() for parameter in vae.parameters()),
    }


def main(argv: list[str]) -> None:
    """Trains, centres, writes, reads back and measures."""
    settings = load_config(VAESettings, argv, Path(__file__).parent)
    source = open_training_images(settings)
    validation = open_validation_images(settings, source)
    torch.manual_seed(settings.seed)
    vae = make_vae(settings)
    cast(Any, vae).to(settings.device)
    started = time.perf_counter()
    train(vae.train(), source, settings)
    seconds = time.perf_counter() - started
    centre_and_scale(vae.eval(), source, settings)
    output = Path(settings.output_dir)
    save(vae, output)
    report = {
        "command": published_command("train_scripts/assets/train_vae.py", argv),
        "held_out": validation is not None,
        **quality(validation or source, settings),
        "train_images": len(source),
        "seconds": math.ceil(seconds),
        "threads": torch.get_num_threads(),
    }
    (output / "quality.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    run_script(main, __doc__, VAESettings)
