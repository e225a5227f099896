"""Runs of the trainer on latents of 4x32x32, made here or from what the package ships: no download, no data of a user.

The trainer sees what it sees on ImageNet at 256x256: 1,000 classes and the recipe of DiT. Of cached moments the
autoencoder has one level and makes them from images of 32x32 within seconds. In the loop it has four, of the widths
that are asked for, and encodes JPEG files of about ImageNet's size in every step.
"""

import gc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from diffusers import AutoencoderKL
from PIL import Image

from speed_diffusers.models import build_dit, dit_config
from speed_diffusers.randomness import keyed_generator
from speed_diffusers.training.blocks import prepare_blocks
from speed_diffusers.training.config import TrainConfig
from speed_diffusers.training.run import Inputs

SIDE, CHANNELS, CLASSES = 32, 4, 1000
"""Of the latents of images of 256x256 under Stable Diffusion's autoencoder, and of ImageNet."""


def save_autoencoder(folder: Path, widths: tuple[int, ...] = (8,)) -> Path:
    """Saves an AutoencoderKL of fixed weights; returns its folder.

    Args:
        folder: For `AutoencoderKL.from_pretrained`.
        widths: Of its levels, each of which after the first halves the image. 128, 256, 512 and 512 are those of
            Stable Diffusion, whose depth, attention and cost the autoencoder then has.
    """
    like_stable_diffusion = widths == (128, 256, 512, 512)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        autoencoder = AutoencoderKL(
            block_out_channels=widths,
            down_block_types=("DownEncoderBlock2D",) * len(widths),
            up_block_types=("UpDecoderBlock2D",) * len(widths),
            norm_num_groups=32 if like_stable_diffusion else 4,
            layers_per_block=2 if like_stable_diffusion else 1,
            latent_channels=CHANNELS,
            sample_size=SIDE * 2 ** (len(widths) - 1),
            mid_block_add_attention=like_stable_diffusion,
        )
    autoencoder.save_pretrained(folder)
    return folder


def save_images(folder: Path, num_images: int, *, size: tuple[int, int] = (500, 375)) -> Path:
    """Saves JPEG files in the folders of ten classes; returns the folder.

    Args:
        folder: Of the data; left as it is if it is there.
        num_images: How many, a smooth picture with grain each.
        size: Width and height. Those of ImageNet are 500 x 375 most often.
    """
    if folder.is_dir():
        return folder
    rng = np.random.default_rng(0)
    for number in range(num_images):
        place = folder / f"class {number % 10}"
        place.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize(
            size, Image.Resampling.BICUBIC
        )
        grain = rng.integers(-12, 13, (size[1], size[0], 1), dtype=np.int16)
        pixels = (np.asarray(coarse).astype(np.int16) + grain).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(place / f"{number}.jpg", quality=90)
    return folder


def image_run_options(work_dir: Path, *, widths: tuple[int, ...], num_images: int) -> dict[str, Any]:
    """Options for `latent_run_config` with which every step encodes its images, of which it takes the centre.

    Args:
        work_dir: For autoencoder and images; what is there is used again.
        widths: Four levels of the autoencoder; see `save_autoencoder`.
        num_images: How many JPEG files.
    """
    autoencoder = work_dir / f"autoencoder {'-'.join(map(str, widths))}"
    if not (autoencoder / "config.json").is_file():
        save_autoencoder(autoencoder, widths)
    return {
        "dataset_name": None,
        "train_data_dir": str(save_images(work_dir / f"images {num_images}", num_images)),
        "pretrained_vae_model_name_or_path": str(autoencoder),
        "resolution": SIDE * 2 ** (len(widths) - 1),
        "cache_latents": False,
        "random_flip": True,
    }


def latent_run_config(work_dir: Path, **options: Any) -> TrainConfig:
    """Options of a run with DiT's recipe (arXiv 2212.09748, section 4) on such latents.

    Args:
        work_dir: For the autoencoder, the cached latents and the run; what is there is used again.
        options: Of the trainer, in place of these.
    """
    autoencoder = work_dir / "autoencoder"
    if not (autoencoder / "config.json").is_file():
        save_autoencoder(autoencoder)
    given: dict[str, Any] = {
        "dataset_name": "embedded",
        "pretrained_vae_model_name_or_path": str(autoencoder),
        "cache_dir": str(work_dir / "cache"),
        "output_dir": str(work_dir / "run"),
        "resolution": SIDE,
        "num_classes": CLASSES,
        "vae_batch_size": 512,
        "model": "DiT-tiny/2",
        "variance_type": "learned_range",
        "prediction_type": "epsilon",
        "lr_scheduler": "constant",
        "max_grad_norm": None,
        "ema_decay": 0.9999,
        "report_to": ["none"],
        "checkpointing_steps": None,
        "logging_steps": 10**6,
    }
    return TrainConfig(**given | options)


def with_model(name: str) -> Callable[[Inputs], Inputs]:
    """Replaces the network of a run by a size of DiT that is made and initialised on the device.

    On a CPU the weights of DiT-XL/2 take longer to draw than its steps take on a GPU.

    Args:
        name: Such as "DiT-XL/2".
    """

    def change(inputs: Inputs) -> Inputs:
        device, config = inputs.accelerator.device, inputs.config
        architecture = dit_config(
            name, sample_size=SIDE, in_channels=CHANNELS, out_channels=2 * CHANNELS, num_classes=CLASSES
        )
        with torch.device(device):
            core = build_dit(architecture, keyed_generator(config.seed, "weights", 0, device))
        prepare_blocks(core, config)
        return replace(inputs, core=core.train())

    return change


def forget_the_last_run() -> None:
    """Lets a process begin another run: accelerate's state, compiled code, and what the device still holds."""
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()
    GradientState._reset_state()
    torch.compiler.reset()
    torch.use_deterministic_algorithms(False)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
