r"""Encodes the training images' latents before a training, on as many processes and machines as there are.

    python train_scripts/cache_latents.py config=imagenet_256/dit_xl2 dataset_name=None train_data_dir=imagenet/train

On the GPUs of a machine, and on several machines, each with the same command, where cache_dir is a folder of all:

    torchrun --nproc_per_node 8 train_scripts/cache_latents.py config=imagenet_256/dit_xl2 \
        dataset_name=None train_data_dir=/shared/imagenet/train cache_dir=/shared/cache

Takes every option of train_dit_speed.py, so that a training's own command finds what this has made; it reads those of
the data, of the autoencoder and of precision. The training encodes by itself what is missing. Every row that is there
already is verified (verify=true), and shards that are damaged or missing are encoded again. A run may be stopped at
any time, and resumed by the same command with any number of processes.
"""

import time
from dataclasses import dataclass
from pathlib import Path

from speed_diffusers.config.command_line import run_script
from speed_diffusers.config.load import load_config
from speed_diffusers.config.schema import option
from speed_diffusers.data import ImageSource, LatentDataset, vae_fingerprint
from speed_diffusers.data.bad_images import BadImages
from speed_diffusers.errors import InputError
from speed_diffusers.generation import load_vae
from speed_diffusers.training.config import DEFAULT_CONFIG, TrainConfig, trainer_options
from speed_diffusers.training.parts import make_accelerator, open_data
from speed_diffusers.training.setup import cached_latents

SCRIPT_DIR = Path(__file__).resolve().parent


@dataclass
class CacheConfig(TrainConfig):
    """Options of `cache_latents.py`: the trainer's, and this."""

    verify: bool = option(True, "Read and verify every row that is cached already; false: as a training does.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.cache_latents:
            raise InputError("cache_latents=false: then there is nothing to do here.")


def main(argv: list[str]) -> None:
    """Encodes what is missing and says where it lies.

    Raises:
        InputError: Wrong options or data, or no room for the latents.
    """
    config = load_config(CacheConfig, argv, SCRIPT_DIR, default=DEFAULT_CONFIG)
    options = trainer_options(config)
    accelerator = make_accelerator(options)
    source = open_data(options)
    assert isinstance(source, ImageSource), "a stream, which knows no cache, has been refused"
    vae = load_vae(options.pretrained_vae_model_name_or_path).eval().requires_grad_(False)
    began = time.monotonic()
    latents = cached_latents(
        options,
        accelerator,
        source,
        vae,
        vae_fingerprint=vae_fingerprint(vae),
        bad_images=BadImages(len(source), options.max_bad_images),
        verify=config.verify,
    )
    if accelerator.is_main_process:
        print(describe(latents, time.monotonic() - began))
    accelerator.end_training()


def describe(latents: LatentDataset, seconds: float) -> str:
    """What there is now, in a line."""
    header = latents.header
    size = sum(map(header.bytes_of, range(header.num_shards)))
    shards = f"{header.num_shards:,} shard{'s' * (header.num_shards > 1)}"
    return f"{len(latents):,} images in {shards}, {size:,} bytes, after {seconds:,.1f} s: {latents.folder}"


if __name__ == "__main__":
    run_script(main, __doc__, CacheConfig)
