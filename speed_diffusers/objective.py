"""The denoising objective: label drop, noising, target, error and weight."""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from .errors import unknown_name
from .models import NULL_CLASS, label_to_embedding_row

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


class TrainingScheduler(Protocol):
    """What the objective asks of a scheduler: any class with `SpeeDSchedulerMixin` over DDPM or DDIM."""

    @property
    def config(self) -> Any: ...

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Any) -> Tensor: ...

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Any) -> Tensor: ...

    def loss_weights(self, timesteps: Tensor) -> Tensor: ...


class Denoiser(Protocol):
    """A network from noisy latents, timesteps and label rows to the prediction."""

    def __call__(self, sample: Tensor, timestep: Tensor, class_rows: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class DenoisingLoss:
    """The loss of a batch and what it is made of.

    Attributes:
        loss: Scalar, float32: mean over the batch of weight times squared error.
        squared_error: (B,), float32, detached: each sample's mean squared error without its weight, comparable
            between runs whose weights differ.
    """

    loss: Tensor
    squared_error: Tensor


def drop_labels(labels: Tensor, dropped: Tensor) -> Tensor:
    """Rows of the label table, with the null row for samples whose label is dropped.

    The label is dropped once a sample, before the network, so that every block sees the same condition
    (Ho and Salimans, arXiv 2207.12598, algorithm 1).

    Args:
        labels: int64 (B,), class ids from 0, or negative for "no class".
        dropped: bool (B,).
    """
    return torch.where(dropped | (labels < 0), NULL_CLASS, label_to_embedding_row(labels))


def prediction_target(scheduler: TrainingScheduler, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """What the network shall predict under the scheduler's `prediction_type`; shape and dtype of `clean`.

    Raises:
        InputError: A prediction type other than epsilon, v_prediction or sample.
    """
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        return noise
    if kind == "v_prediction":
        return scheduler.get_velocity(clean, noise, timesteps)
    if kind == "sample":
        return clean
    raise unknown_name("prediction_type", kind, PREDICTION_TYPES)


def denoising_loss(
    model: Denoiser,
    scheduler: TrainingScheduler,
    clean: Tensor,
    class_rows: Tensor,
    timesteps: Tensor,
    noise: Tensor,
) -> DenoisingLoss:
    """Weighted denoising loss of one batch (DDPM, arXiv 2006.11239, equation 14, with a weight a timestep).

    Args:
        model: The network.
        scheduler: Gives the noise schedule, the prediction type and the loss weights.
        clean: Latents (B, C, H, W), float32: the schedule would be rounded in a lower precision.
        class_rows: int64 (B,), from `drop_labels`.
        timesteps: int64 (B,), from `sample_timesteps`.
        noise: Standard normal, like `clean`.
    """
    noisy = scheduler.add_noise(clean, noise, timesteps)
    target = prediction_target(scheduler, clean, noise, timesteps)
    prediction = model(noisy, timesteps, class_rows)
    squared_error = (prediction.float() - target.float()).square().flatten(1).mean(1)
    loss = (scheduler.loss_weights(timesteps) * squared_error).mean()
    return DenoisingLoss(loss, squared_error.detach())
