"""How a run went, besides its options: what the file beside its pipeline tells whoever releases it."""

from pathlib import Path
from typing import Any

import torch

from ..assets import EMBEDDED
from ..config.load import config_dict
from ..config.published import published
from ..data.listing import describe_images
from ..generation.export import TrainingRecord
from ..hardware import describe_hardware
from .config import TrainConfig
from .run import TrainingRun
from .run_folder import repeatable

PRIVATE_OPTIONS = ("train_data_dir", "validation_data_dir", "cache_dir", "output_dir")
"""Paths of the machine that trained, which have no business in a released pipeline."""


def record_of(run: TrainingRun) -> TrainingRecord:
    """The record of a run that has taken all its steps."""
    config = run.config
    return TrainingRecord(
        images=describe_images(run.source),
        num_images=len(run.source),
        global_batch=run.layout.global_batch,
        images_seen=config.max_train_steps * run.layout.global_batch,
        seconds=round(run.seconds, 1),
        hardware=describe_hardware(run.accelerator.device, run.layout.processes),
        mixed_precision=run.accelerator.mixed_precision,
        torch=torch.__version__,
        dataset=public_dataset(config),
        vae=public_name(config.pretrained_vae_model_name_or_path),
        base_model=public_name(config.pretrained_model_name_or_path),
    )


def public_dataset(config: TrainConfig) -> str | None:
    """Name of the dataset, as `public_name` has it; None for files of the machine."""
    return None if config.train_data_dir else public_name(config.dataset_name)


def published_config(config: TrainConfig, accumulation: int | None = None) -> dict[str, Any]:
    """The options of a run as others may see them.

    Args:
        config: The options.
        accumulation: Batches per optimizer step, if it has become another number than the options say.
    """
    same = repeatable(config, config.gradient_accumulation_steps if accumulation is None else accumulation)
    return {key: published(value) for key, value in config_dict(same).items() if key not in PRIVATE_OPTIONS}


def public_name(name: str | None) -> str | None:
    """A name that others can look up, on the Hub or in this package; None for paths of the machine, and for None."""
    if name is None or name == EMBEDDED:
        return name
    return None if Path(name).expanduser().exists() else name
