"""Runs of the trainer on latents of 4x32x32, made from what the package ships: no download, no data of a user.

The autoencoder has one level, so it makes latents of 4x32x32 from images of 32x32 within seconds; the trainer sees
what it sees on ImageNet at 256x256: cached moments, 1,000 classes, and the recipe of DiT.
"""

import gc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from diffusers import AutoencoderKL

from speed_diffusers.models import build_dit, dit_config
from speed_diffusers.randomness import keyed_generator
from speed_diffusers.training.blocks import prepare_blocks
from speed_diffusers.training.config import TrainConfig
from speed_diffusers.training.run import Inputs

SIDE, CHANNELS, CLASSES = 32, 4, 1000
"""Of the latents of images of 256x256 under Stable Diffusion's autoencoder, and of ImageNet."""


def save_autoencoder(folder: Path) -> Path:
    """Saves an AutoencoderKL of fixed weights: latents of 4x32x32 from images of 32x32; returns its folder."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        autoencoder = AutoencoderKL(
            block_out_channels=(8,),
            down_block_types=("DownEncoderBlock2D",),
            up_block_types=("UpDecoderBlock2D",),
            norm_num_groups=4,
            layers_per_block=1,
            latent_channels=CHANNELS,
            sample_size=SIDE,
            mid_block_add_attention=False,
        )
    autoencoder.save_pretrained(folder)
    return folder


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
