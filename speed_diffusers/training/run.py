"""A run: what it is made from, and everything that its steps work with."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from filelock import FileLock
from torch import Tensor
from torch.utils.data import DataLoader

from ..data.bad_images import BadImages
from ..data.batch_sampler import BatchLayout
from ..data.images import ImageRows
from ..files import naming_disk_errors
from ..models import TrainableDiT
from ..schedulers import SpeeDDDPMScheduler, SpeeDFlowMatchEulerDiscreteScheduler
from ..variance import LearnedVariance
from .config import TrainConfig
from .ema import ExponentialMovingAverage
from .ema_tracks import EmaTracks
from .feedback import ErrorFeedback
from .guard import NonFiniteGuard
from .ranks import Ranks
from .run_folder import LOGGING_FOLDER
from .trackers import Trackers
from .validation import ValidationSet

TrainingScheduler = SpeeDDDPMScheduler | SpeeDFlowMatchEulerDiscreteScheduler
"""What a run is trained with."""


@dataclass(frozen=True)
class Inputs:
    """What a run is made from, every bit of it checked, before anything is written."""

    config: TrainConfig
    accelerator: Accelerator
    scheduler: TrainingScheduler
    source: ImageRows
    held_out: ImageRows | None
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
    ranks: Ranks
    trackers: Trackers
    scheduler: TrainingScheduler
    learned_variance: LearnedVariance | None
    feedback: ErrorFeedback | None
    """For a loss-aware density or weighting; None where neither is."""
    source: ImageRows
    bad_images: BadImages
    """Those that this process has met; at logging steps, those of all processes."""
    vae: AutoencoderKL
    core: TrainableDiT
    model: torch.nn.Module
    optimizer: Any
    lr_scheduler: Any
    ema: ExponentialMovingAverage
    ema_tracks: EmaTracks | None
    """Averages from which any length is made afterwards, if the options ask for some."""
    guard: NonFiniteGuard
    layout: BatchLayout
    loader: DataLoader[dict[str, Tensor]]
    first_step: int
    seconds: float
    """Spent in training steps so far, over all starts of the run."""
    log: Mapping[str, Any] | None
    """What `StepLog` had not reported yet when the run was saved; None for a new run, and one of version 0.1."""
    identity: dict[str, str]
    """What a checkpoint must find unchanged besides the options, and is saved with."""
    validation: ValidationSet | None
    """Held-out images, on the main process where the options name some."""
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

    def close(self) -> None:
        """Ends the trackers and lets go of the run's folder."""
        self.ranks.close()
        try:
            with naming_disk_errors(self.output_dir / LOGGING_FOLDER):
                self.accelerator.end_training()
        finally:
            if self.lock is not None:
                self.lock.release()
