"""A run: what it is made from, and everything that its steps work with."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from filelock import FileLock
from torch import Tensor
from torch.utils.data import DataLoader

from ..data.batch_sampler import BatchLayout
from ..data.images import ImageSource
from ..data.latents import sample_latents
from ..errors import InputError
from ..models import TrainableDiT
from ..schedulers import SpeeDDDPMScheduler, SpeeDFlowMatchEulerDiscreteScheduler
from ..variance import LearnedVariance
from .config import TrainConfig
from .ema import ExponentialMovingAverage
from .feedback import ErrorFeedback
from .guard import NonFiniteGuard
from .profiling import labelled
from .step_draws import StepDraws

TrainingScheduler = SpeeDDDPMScheduler | SpeeDFlowMatchEulerDiscreteScheduler
"""What a run is trained with."""


@dataclass(frozen=True)
class Inputs:
    """What a run is made from, every bit of it checked, before anything is written."""

    config: TrainConfig
    accelerator: Accelerator
    scheduler: TrainingScheduler
    source: ImageSource
    vae: AutoencoderKL
    core: TrainableDiT
    layout: BatchLayout
    checkpoint: Path | None
    identity: dict[str, str]


@dataclass
class TrainingRun:
    """Everything the loop works with; `model` is what accelerate prepared, `core` the module inside it."""

    config: TrainConfig
    accelerator: Accelerator
    scheduler: TrainingScheduler
    learned_variance: LearnedVariance | None
    feedback: ErrorFeedback | None
    """Of a loss-aware density from errors; None for all others."""
    source: ImageSource
    vae: AutoencoderKL
    core: TrainableDiT
    model: torch.nn.Module
    optimizer: Any
    lr_scheduler: Any
    ema: ExponentialMovingAverage
    guard: NonFiniteGuard
    layout: BatchLayout
    loader: DataLoader[dict[str, Tensor]]
    first_step: int
    seconds: float
    """Spent in training steps so far, over all starts of the run."""
    identity: dict[str, str]
    """What a checkpoint must find unchanged besides the options, and is saved with."""
    lock: FileLock | None
    """Held on the folder of the run; None where another process writes."""

    @property
    def output_dir(self) -> Path:
        """Folder of the run."""
        return Path(self.config.output_dir)

    def summed(self, tensor: Tensor) -> Tensor:
        """A tensor summed over all processes."""
        total: Tensor = self.accelerator.reduce(tensor, reduction="sum")
        return total

    def progress(self, step: int) -> float:
        """Share of the training that is done before an optimizer step, in [0, 1)."""
        return step / self.config.max_train_steps

    @labelled("draws")
    def draws(self, step: int) -> StepDraws:
        """All random draws of an optimizer step."""
        shape: Any = self.core.transformer.config
        return StepDraws.at_step(
            self.scheduler,
            seed=self.config.seed,
            step=step,
            latent_shape=(self.layout.global_batch, shape.in_channels, shape.sample_size, shape.sample_size),
            class_dropout_prob=self.config.class_dropout_prob,
            random_flip=self.config.random_flip,
            device=self.accelerator.device,
            progress=self.progress(step),
        )

    def batches(self) -> Iterator[dict[str, Tensor]]:
        """Batches of this process, micro-step by micro-step.

        Raises:
            InputError: An image is damaged; the message names it.
        """
        try:
            yield from self.loader
        except InputError as error:
            # A loader's worker sends its whole traceback as the message; the line is its last.
            raise InputError(str(error).strip().splitlines()[-1].split("InputError: ")[-1]) from error

    @labelled("latents")
    @torch.no_grad()
    def latents(self, batch: dict[str, Tensor], draws: StepDraws) -> Tensor:
        """Latents of a batch, float32 (B, C, h, w), from cached moments or by encoding its images."""
        device = self.accelerator.device
        is_flipped = draws.flipped[:, None, None, None]
        if "moments" in batch:
            moments = batch["moments"].to(device, non_blocking=True)
            if "moments_flipped" in batch:
                flipped = batch["moments_flipped"].to(device, non_blocking=True)
                moments = torch.where(is_flipped, flipped, moments)
        else:
            pixels = batch["pixel_values"].to(device, non_blocking=True).float() / 127.5 - 1.0
            pixels = torch.where(is_flipped, pixels.flip(-1), pixels)
            moments = self.vae.encode(pixels).latent_dist.parameters
        return sample_latents(moments, draws.encoder_noise, self.vae.config["scaling_factor"])

    def labels(self, batch: dict[str, Tensor]) -> Tensor:
        """Class ids of a batch, int64 (B,); -1 where the data has no classes."""
        labels = batch["labels"].to(self.accelerator.device, non_blocking=True)
        return labels if self.source.num_classes else torch.full_like(labels, -1)

    def close(self) -> None:
        """Ends the trackers and lets go of the run's folder."""
        self.accelerator.end_training()
        if self.lock is not None:
            self.lock.release()
