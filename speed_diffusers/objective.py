"""The denoising objective: label dropout, noising, target, error, weight, and the term of a learned variance."""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from .errors import unknown_name
from .models import NULL_CLASS, label_to_embedding_row
from .predictions import FLOW_PREDICTION
from .process import is_rectified_flow
from .variance import LearnedVariance

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample", FLOW_PREDICTION)


class TrainingScheduler(Protocol):
    """What the objective asks of a scheduler: a SpeeD scheduler for DDPM, DDIM or a flow."""

    @property
    def config(self) -> Any: ...

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Any) -> Tensor: ...

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Any) -> Tensor: ...

    def loss_weights(self, timesteps: Tensor, progress: float | None = None) -> Tensor: ...

    def importance_weights(self, timesteps: Tensor, progress: float | None = None) -> Tensor: ...


class Denoiser(Protocol):
    """A network from noisy latents, timesteps and label rows to the prediction."""

    def __call__(self, sample: Tensor, timestep: Tensor, class_rows: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class DenoisingLoss:
    """The loss of a batch and what it is made of.

    Attributes:
        loss: Scalar, float32: mean over the batch of weight times squared error, plus that of the variance term.
        squared_error: (B,), float32, detached: each sample's unweighted mean squared error, comparable
            between runs whose weights differ.
        variance_bits: (B,), float32, detached: each sample's unweighted variance term, in bits per dimension; None
            where no variance is learned.
    """

    loss: Tensor
    squared_error: Tensor
    variance_bits: Tensor | None = None


def drop_labels(labels: Tensor, dropped: Tensor) -> Tensor:
    """Rows of the label table, with the null row for samples whose label is dropped.

    The label is dropped once per sample, before the network, so that every block sees the same condition
    (Ho and Salimans, arXiv 2207.12598, algorithm 1).

    Args:
        labels: int64 (B,), class ids from 0, or negative for "no class".
        dropped: bool (B,).
    """
    return torch.where(dropped | (labels < 0), NULL_CLASS, label_to_embedding_row(labels))


def prediction_target(scheduler: TrainingScheduler, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """What the network shall predict under the scheduler's `prediction_type`; shape and dtype of `clean`.

    Raises:
        InputError: A prediction type other than epsilon, v_prediction, sample, or a flow's.
    """
    # A flow knows one target, whatever the config that it was converted from had.
    kind = FLOW_PREDICTION if is_rectified_flow(scheduler) else scheduler.config.prediction_type
    if kind == "epsilon":
        return noise
    if kind in ("v_prediction", FLOW_PREDICTION):
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
    learned_variance: LearnedVariance | None = None,
    progress: float | None = None,
) -> DenoisingLoss:
    """Weighted denoising loss of one batch.

    DDPM, arXiv 2006.11239, equation 14, with a weight per timestep; with a learned variance the hybrid loss of arXiv
    2102.09672, equation 16: squared error plus T/1000 times the bound's term in bits per dimension, which is IDDPM's
    RESCALED_MSE. DiT's code has the coefficient 1 at every T; at T = 1000 the two are equal.

    Args:
        model: The network.
        scheduler: Gives the noise schedule, the prediction type and the loss weights.
        clean: Latents (B, C, H, W), float32: the schedule would be rounded in a lower precision.
        class_rows: int64 (B,), from `drop_labels`.
        timesteps: (B,), from `sample_timesteps`.
        noise: Standard normal, like `clean`.
        learned_variance: For a network with 2C output channels, the second half of which is the variance's; None for
            one with C. The weights hold for its term only if it is `weighted`.
        progress: Share of the training that is done, for weights that change in its course.
    """
    noisy = scheduler.add_noise(clean, noise, timesteps)
    target = prediction_target(scheduler, clean, noise, timesteps)
    prediction = model(noisy, timesteps, class_rows)
    if learned_variance is not None:
        prediction, variance_values = prediction.chunk(2, dim=1)
    error = prediction.float() - target.float()
    squared_error = error.square().flatten(1).mean(1)
    weights = scheduler.loss_weights(timesteps, progress)
    loss = (weights * squared_error).mean()
    if learned_variance is None:
        return DenoisingLoss(loss, squared_error.detach())
    bits = learned_variance.bits(variance_values, error, clean, timesteps)
    # What undoes the density holds for the whole loss, whether the loss weight does or not.
    counted = weights if learned_variance.weighted else scheduler.importance_weights(timesteps, progress)
    loss = loss + learned_variance.scale * (counted * bits).mean()
    return DenoisingLoss(loss, squared_error.detach(), bits.detach())
