"""The validation loss: errors at fixed noise levels on held-out images, comparable whatever a network predicts.

A training loss is not: it follows from the density of timesteps, the weights and the prediction type.
"""

from dataclasses import dataclass

import numpy as np
import torch
from diffusers import AutoencoderKL, DiTPipeline
from torch import Tensor
from tqdm.auto import tqdm

from ..data.images import ImageRows
from ..data.moments import encode_moments, sample_latents
from ..objective import Denoiser, TrainingScheduler, drop_labels, prediction_target
from ..predictions import FLOW_PREDICTION, epsilon_error_ratio
from ..process import ForwardProcess, is_rectified_flow
from ..randomness import keyed_generator

LOG_SNR_LEVELS = (-7.0, -5.0, -3.0, -1.0, 1.0, 3.0, 5.0, 7.0)
"""Eight noise levels, as torchtitan's diffusion training has, here evenly spaced over log SNR, so that they are the
same noise on every schedule; each is taken at the nearest timestep."""


@dataclass(frozen=True)
class ValidationSet:
    """Held-out images, encoded.

    Attributes:
        latents: float32 (N, C, h, w), as the network sees clean images.
        labels: int64 (N,), class ids; -1 without classes.
    """

    latents: Tensor
    labels: Tensor

    @classmethod
    def encode(
        cls,
        source: ImageRows,
        vae: AutoencoderKL,
        *,
        resolution: int,
        center_crop: bool,
        num_images: int,
        batch_size: int = 32,
    ) -> "ValidationSet":
        """Encodes images of a source, spread over its rows; the next good one stands in for one that is bad.

        Args:
            source: The images.
            vae: The autoencoder, which encodes on its device.
            resolution: Side of the images in pixels.
            center_crop: See `load_image`.
            num_images: At most so many.
            batch_size: Images encoded at a time.
        """
        rows = source.spread(num_images)
        scaling = float(vae.config["scaling_factor"])
        latents, used = [], []
        for begin in range(0, len(rows), batch_size):
            loaded = [source.load_or_next(row, resolution, center_crop) for row in rows[begin : begin + batch_size]]
            used += [row for _, row, _ in loaded]
            (moments,) = encode_moments(np.stack([image for image, _, _ in loaded]), vae, flipped=False)
            mean = torch.from_numpy(moments)
            # The posterior's mean: its noise would be a floor under the errors at little noise.
            latents.append(sample_latents(mean, torch.zeros_like(mean.chunk(2, dim=1)[0]), scaling))
        labels = torch.from_numpy(source.labels_of(used))
        return cls(torch.cat(latents), labels if source.num_classes else torch.full_like(labels, -1))


@dataclass(frozen=True)
class ValidationLoss:
    """Errors by noise level.

    Attributes:
        by_log_snr: Level of log SNR to the mean squared error per value of the velocity that the prediction amounts
            to: v = a epsilon - s x_0 with a^2 + s^2 = 1 at the same SNR. Predicting zero has an error of about 1 at
            every level for data of variance 1.
    """

    by_log_snr: dict[float, float]

    @property
    def mean(self) -> float:
        """Geometric mean over the levels: errors of x_0 or epsilon would give the same up to one constant factor."""
        return float(np.exp(np.mean(np.log(list(self.by_log_snr.values())))))


@torch.no_grad()
def validation_loss(
    model: Denoiser,
    scheduler: TrainingScheduler,
    images: ValidationSet,
    *,
    device: torch.device,
    batch_size: int = 100,
) -> ValidationLoss:
    """The errors of a network on held-out images with the same noise each time, with a progress bar.

    Args:
        model: The network; its first C channels are the prediction.
        scheduler: That of its training.
        images: Held-out images.
        device: Where the network is.
        batch_size: Images at a time; it changes nothing but rounding.
    """
    process = ForwardProcess.from_scheduler(scheduler)
    kind = FLOW_PREDICTION if is_rectified_flow(scheduler) else str(scheduler.config.prediction_type)
    snr = process.finite_log_snr.exp()
    # Squared error of v over that of epsilon is 1 / a^2 = (1 + SNR) / SNR, whatever the schedule's own scale.
    to_velocity = epsilon_error_ratio(process, kind) * (1.0 + snr) / snr
    table = getattr(scheduler, "training_timesteps", torch.arange(process.num_train_timesteps))
    batches = [slice(begin, begin + batch_size) for begin in range(0, len(images.latents), batch_size)]
    errors = {}
    with tqdm(total=len(LOG_SNR_LEVELS) * len(batches), desc="Validation loss", unit="batch", leave=False) as progress:
        for level in LOG_SNR_LEVELS:
            index = int((process.finite_log_snr - level).abs().argmin())
            noise = torch.randn(images.latents.shape, generator=keyed_generator(0, f"validation {level:g}", 0))
            total = 0.0
            for part in batches:
                clean, eps = images.latents[part].to(device), noise[part].to(device)
                rows = drop_labels(images.labels[part], torch.zeros(len(clean), dtype=torch.bool)).to(device)
                timesteps = table[index].to(device).expand(len(clean))
                prediction = model(scheduler.add_noise(clean, eps, timesteps), timesteps, rows)[:, : clean.shape[1]]
                target = prediction_target(scheduler, clean, eps, timesteps)
                total += float((prediction.float() - target.float()).square().mean((1, 2, 3)).cpu().double().sum())
                progress.update()
            errors[level] = total / len(images.latents) * float(to_velocity[index])
    return ValidationLoss(errors)


def pipeline_validation_loss(
    pipeline: DiTPipeline, scheduler: TrainingScheduler, images: ValidationSet, *, batch_size: int = 100
) -> ValidationLoss:
    """`validation_loss` of a pipeline's network.

    Args:
        pipeline: Its transformer is measured on its own device.
        scheduler: That of the training.
        images: Held-out images.
        batch_size: Images at a time.
    """

    def network(sample: Tensor, timestep: Tensor, class_rows: Tensor) -> Tensor:
        output: Tensor = pipeline.transformer(sample, timestep=timestep, class_labels=class_rows, return_dict=False)[0]
        return output

    return validation_loss(network, scheduler, images, device=pipeline.transformer.device, batch_size=batch_size)
