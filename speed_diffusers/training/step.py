"""One optimizer step after the other: draw, noise, forward, backward, update."""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..data.images import note_bad_rows
from ..data.latents import sample_latents
from ..errors import InputError
from ..objective import DenoisingLoss, denoising_loss, drop_labels
from .profiling import labelled
from .run import TrainingRun
from .step_draws import StepDraws


@dataclass(frozen=True)
class MicroStep:
    """A batch of this process that has been learned from.

    Attributes:
        result: Its losses, detached.
        timesteps: (B,), as the scheduler drew them.
    """

    result: DenoisingLoss
    timesteps: Tensor

    @property
    def losses(self) -> Tensor:
        """Float32 (B,), each image's, the variance term included."""
        error, bits = self.result.squared_error, self.result.variance_bits
        return error if bits is None else error + bits


@dataclass(frozen=True)
class TrainedStep:
    """An optimizer step that has been taken.

    Attributes:
        done: Optimizer steps done, this one included.
        is_last: Whether it is the last of the run.
        micro_steps: The batches whose gradients made it, on this process.
        grad_norm: Scalar, norm of the gradients before they were clipped.
    """

    done: int
    is_last: bool
    micro_steps: list[MicroStep]
    grad_norm: Tensor


def training_steps(run: TrainingRun) -> Iterator[TrainedStep]:
    """Takes the optimizer steps of a run, from its first to its last, one each time that the next is asked for.

    All that is computed happens here; the consumer logs, saves, validates and stops between two steps. Every process
    of a run must ask for the same steps.

    Args:
        run: From `start_run`; its parameters, EMA weights and optimizer are changed.

    Yields:
        Each step, once it is done.

    Raises:
        InputError: Too many images cannot be read; the message names some.
    """
    config, accelerator, layout = run.config, run.accelerator, run.layout
    batches = batches_of(run)
    for step in range(run.first_step, config.max_train_steps):
        draws = draws_of(run, step)
        micro_steps = []
        for index in range(layout.accumulation):
            run.ranks.at(step + 1, "data")
            with labelled("data"):
                batch = next(batches)
            run.ranks.at(step + 1, "forward and backward")
            # Gradients travel between processes once per optimizer step.
            with nullcontext() if index == layout.accumulation - 1 else accelerator.no_sync(run.model):
                micro_steps.append(_learn(run, step, batch, draws.part(layout.span(index))))
        run.ranks.at(step + 1, "update")
        with labelled("gradient norm"):
            if config.max_grad_norm is None:
                gradients = [each.grad for each in run.model.parameters() if each.grad is not None]
                grad_norm = torch.nn.utils.get_total_norm(gradients)
            else:
                grad_norm = accelerator.clip_grad_norm_(run.model.parameters(), config.max_grad_norm)
            if isinstance(grad_norm, DTensor):  # of a sharded model
                grad_norm = grad_norm.full_tensor()
            run.guard.observe(grad_norm, step + 1, [(each.timesteps, each.losses) for each in micro_steps])
        with labelled("optimizer"):
            run.optimizer.step()
            run.optimizer.zero_grad()
        with labelled("learning rate"):
            run.lr_scheduler.step()
        with labelled("ema"):
            run.ema.update()
            if run.ema_tracks is not None:
                run.ema_tracks.update(step + 1)
        if run.feedback is not None:
            run.feedback.advance(step + 1, run.summed)
        run.ranks.at(step + 1, "logging")
        yield TrainedStep(step + 1, step + 1 == config.max_train_steps, micro_steps, grad_norm)


def _learn(run: TrainingRun, step: int, batch: dict[str, Tensor], draws: StepDraws) -> MicroStep:
    """Adds the gradients of one batch; `draws` are those of its images."""
    clean = latents_of(run, batch, draws)
    labels = batch["labels"].to(run.accelerator.device, non_blocking=True)
    if not run.source.num_classes:
        labels = torch.full_like(labels, -1)
    class_rows = drop_labels(labels, draws.dropped)
    with labelled("forward and loss"):
        result = denoising_loss(
            run.model,
            run.scheduler,
            clean,
            class_rows,
            draws.timesteps,
            draws.noise,
            run.learned_variance,
            run.progress(step),
        )
    with labelled("backward"):
        run.accelerator.backward(result.loss / run.layout.accumulation)
    if run.feedback is not None:
        run.feedback.add(draws.timesteps, result.squared_error)
    return MicroStep(replace(result, loss=result.loss.detach()), draws.timesteps)


@labelled("draws")
def draws_of(run: TrainingRun, step: int) -> StepDraws:
    """Everything random of an optimizer step, for the global batch."""
    config, shape = run.config, cast(Any, run.core.transformer.config)
    return StepDraws.at_step(
        run.scheduler,
        seed=config.seed,
        step=step,
        latent_shape=(run.layout.global_batch, shape.in_channels, shape.sample_size, shape.sample_size),
        class_dropout_prob=config.class_dropout_prob,
        random_flip=config.random_flip,
        device=run.accelerator.device,
        progress=run.progress(step),
    )


def batches_of(run: TrainingRun) -> Iterator[dict[str, Tensor]]:
    """Batches of this process, micro-step by micro-step.

    Raises:
        InputError: Too many images cannot be read; the message names some.
    """
    try:
        for batch in run.loader:
            note_bad_rows(batch, run.source, run.bad_images)
            yield batch
    except InputError as error:
        # A loader's worker sends its whole traceback as the message; the line is its last.
        raise InputError(str(error).strip().splitlines()[-1].split("InputError: ")[-1]) from error


@labelled("latents")
@torch.no_grad()
def latents_of(run: TrainingRun, batch: dict[str, Tensor], draws: StepDraws) -> Tensor:
    """Latents of a batch, float32 (B, C, h, w), from cached moments or by encoding its images."""
    device = run.accelerator.device
    is_flipped = draws.flipped[:, None, None, None]
    if "moments" in batch:
        moments = batch["moments"].to(device, non_blocking=True)
        if "moments_flipped" in batch:
            flipped = batch["moments_flipped"].to(device, non_blocking=True)
            moments = torch.where(is_flipped, flipped, moments)
    else:
        pixels = batch["pixel_values"].to(device, non_blocking=True).float() / 127.5 - 1.0
        pixels = torch.where(is_flipped, pixels.flip(-1), pixels)
        parts = [run.vae.encode(part).latent_dist.parameters for part in pixels.split(run.config.vae_batch_size)]
        moments = torch.cat(parts)
    return sample_latents(moments, draws.encoder_noise, run.vae.config["scaling_factor"])
