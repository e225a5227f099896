"""One optimizer step after the other: draw, noise, forward, backward, update."""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace

from torch import Tensor

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
        InputError: An image is damaged; the message names it.
    """
    config, accelerator, layout = run.config, run.accelerator, run.layout
    max_norm = config.max_grad_norm if config.max_grad_norm is not None else float("inf")
    batches = run.batches()
    for step in range(run.first_step, config.max_train_steps):
        draws = run.draws(step)
        micro_steps = []
        for index in range(layout.accumulation):
            with labelled("data"):
                batch = next(batches)
            # Gradients travel between processes once per optimizer step.
            with nullcontext() if index == layout.accumulation - 1 else accelerator.no_sync(run.model):
                micro_steps.append(_learn(run, step, batch, draws.part(layout.span(index))))
        with labelled("gradient norm"):
            grad_norm = accelerator.clip_grad_norm_(run.model.parameters(), max_norm)
            run.guard.observe(grad_norm, step + 1)
        with labelled("optimizer"):
            run.optimizer.step()
            run.optimizer.zero_grad()
        with labelled("learning rate"):
            run.lr_scheduler.step()
        with labelled("ema"):
            run.ema.update()
        if run.feedback is not None:
            run.feedback.advance(step + 1, run.summed)
        yield TrainedStep(step + 1, step + 1 == config.max_train_steps, micro_steps, grad_norm)


def _learn(run: TrainingRun, step: int, batch: dict[str, Tensor], draws: StepDraws) -> MicroStep:
    """Adds the gradients of one batch; `draws` are those of its images."""
    clean = run.latents(batch, draws)
    class_rows = drop_labels(run.labels(batch), draws.dropped)
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
