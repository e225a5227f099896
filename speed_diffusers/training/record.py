"""How a run went, besides its options: what the file beside its pipeline tells whoever releases it."""

import os
import platform
from pathlib import Path
from typing import Any

import torch

from ..assets import EMBEDDED
from ..config.load import config_dict
from ..config.published import published
from ..data.listing import describe_images
from ..generation.export import TrainingRecord
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


def describe_hardware(device: torch.device, num_processes: int) -> str:
    """What a run was computed on, such as "8 x NVIDIA H200" or "2 processes of 1 thread on AMD EPYC 7B13 (4 cores)".

    Args:
        device: Of this process.
        num_processes: Of the run.
    """
    if device.type == "cuda":
        return f"{num_processes} x {torch.cuda.get_device_name(device)}"
    if device.type != "cpu":
        return f"{num_processes} x {device.type}"
    threads = torch.get_num_threads()
    processes = f"{num_processes} process{'es' * (num_processes > 1)} of {threads} thread{'s' * (threads > 1)}"
    return f"{processes} on {_processor()} ({os.cpu_count()} cores)"


def _processor() -> str:
    """Kind of the processor."""
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name" and value.strip():
                return value.strip()
    return platform.processor() or platform.machine()
