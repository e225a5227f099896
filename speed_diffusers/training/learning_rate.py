"""The learning rate as a function of the optimizer step: diffusers' schedules, and a constant rate with a cooldown."""

import math
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from torch.optim.lr_scheduler import LambdaLR

from .config import COOLDOWN, TrainConfig


def make_lr_scheduler(config: TrainConfig, optimizer: torch.optim.Optimizer) -> Any:
    """The schedule of a run, a LambdaLR, at its first step.

    Args:
        config: Options of the run.
        optimizer: The optimizer itself, not accelerate's wrapper.
    """
    if config.lr_scheduler != COOLDOWN:
        return get_scheduler(
            config.lr_scheduler,
            optimizer=optimizer,
            num_warmup_steps=config.lr_warmup_steps,
            num_training_steps=config.max_train_steps,
        )
    return LambdaLR(optimizer, lambda step: cooldown_rate(config, step))


def cooldown_rate(config: TrainConfig, step: int) -> float:
    """The rate as a share of its largest, in [0, 1]: it grows from 0, stays, and falls by 1 - sqrt at the end.

    Cooldown as in arXiv 2405.18392: with it a constant rate is worth a cosine schedule of the same length, and runs of
    several lengths share all but their last steps.

    Args:
        config: Options of the run.
        step: Optimizer steps done.
    """
    if step < config.lr_warmup_steps:
        return step / config.lr_warmup_steps
    done = step - (config.max_train_steps - config.lr_decay_steps)
    return 1.0 - math.sqrt(min(max(done, 0) / config.lr_decay_steps, 1.0))
