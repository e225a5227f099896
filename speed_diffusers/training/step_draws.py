"""All random draws of one optimizer step, made for the global batch from (seed, purpose, step)."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..randomness import keyed_generator


class TimestepSampler(Protocol):
    """The part of a SpeeD scheduler that draws timesteps."""

    def sample_timesteps(
        self,
        batch_size: int,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        progress: float | None = None,
    ) -> Tensor: ...


@dataclass(frozen=True)
class StepDraws:
    """The draws of one optimizer step; the first axis is the position in the global batch.

    Every process draws the whole and takes its part, so the same step sees the same numbers on one process or many.
    Scalars are drawn on the CPU, which makes them the same on every kind of device, normal noise on the device.

    Attributes:
        timesteps: (G,), int64; float32 of a flow.
        dropped: bool (G,), samples trained without their label.
        flipped: bool (G,), samples flipped left to right.
        noise: float32 (G, C, H, W), what is added to the latents.
        encoder_noise: float32 (G, C, H, W), what samples the VAE's posterior.
    """

    timesteps: Tensor
    dropped: Tensor
    flipped: Tensor
    noise: Tensor
    encoder_noise: Tensor

    @classmethod
    def at_step(
        cls,
        scheduler: TimestepSampler,
        *,
        seed: int,
        step: int,
        latent_shape: tuple[int, int, int, int],
        class_dropout_prob: float,
        random_flip: bool,
        device: torch.device,
        progress: float | None = None,
    ) -> "StepDraws":
        """Draws for optimizer step `step`, counted from 0.

        Args:
            scheduler: Draws the timesteps.
            seed: Of the run.
            step: Optimizer step, from 0.
            latent_shape: (global batch, C, H, W).
            class_dropout_prob: Share of samples without their label.
            random_flip: Whether half of the samples are flipped.
            device: Where the results live.
            progress: Share of the training that is done, for densities that change in its course.
        """
        size = latent_shape[0]

        def uniform(purpose: str) -> Tensor:
            return torch.rand(size, generator=keyed_generator(seed, purpose, step), dtype=torch.float32)

        def normal(purpose: str) -> Tensor:
            generator = keyed_generator(seed, purpose, step, device)
            return torch.randn(latent_shape, generator=generator, device=device, dtype=torch.float32)

        generator = keyed_generator(seed, "timesteps", step)
        timesteps = scheduler.sample_timesteps(size, generator=generator, progress=progress)
        flip_prob = 0.5 if random_flip else 0.0
        return cls(
            timesteps=timesteps.to(device, non_blocking=True),
            dropped=(uniform("label drop") < class_dropout_prob).to(device, non_blocking=True),
            flipped=(uniform("flip") < flip_prob).to(device, non_blocking=True),
            noise=normal("noise"),
            encoder_noise=normal("encoder noise"),
        )

    def part(self, span: slice) -> "StepDraws":
        """The draws of some positions of the global batch."""
        return StepDraws(
            self.timesteps[span], self.dropped[span], self.flipped[span], self.noise[span], self.encoder_noise[span]
        )
