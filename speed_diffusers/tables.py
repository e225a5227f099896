"""Probabilities and weights of one process as plain tables, and drawing from them: tables in, indices and weights out.

Here timesteps are indices in [0, T), 0 being the one with the least noise.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .process import ForwardProcess
from .settings import SpeeDSettings
from .timesteps import DRAWS, INDEPENDENT, drawn_pmf


@dataclass(frozen=True)
class SpeeDTables:
    """What SpeeD derives from a schedule: float64 on the CPU, never part of a saved config.

    Attributes:
        process: The forward process.
        settings: Resolved k, tau and lambda, at the progress that the tables are for.
        pmf: The density: probability of each timestep, shape (T,), summing to 1.
        weights: Loss weight of each timestep, shape (T,), as `loss_weights` gives it, importance included.
        importance: What undoes the density in the loss, shape (T,), if it is undone; None: it is not.
        draw: Name of how a batch is drawn from the density.
        pivot: Timestep at which paired draws are mirrored; None for other draws.
        randint: Draws are `torch.randint`'s, the exact baseline.
    """

    process: ForwardProcess
    settings: SpeeDSettings
    pmf: Tensor
    weights: Tensor
    importance: Tensor | None = None
    draw: str = INDEPENDENT
    pivot: int | None = None
    randint: bool = False
    # Working copies in float32, one per device, so that a training step copies no table.
    _copies: dict[tuple[str, torch.device], Tensor] = field(default_factory=dict, repr=False, compare=False)

    @property
    def drawn_pmf(self) -> Tensor:
        """Distribution of a draw taken at random from a large batch, (T,): the density, unless draws are paired."""
        return drawn_pmf(self.pmf, self.draw, self.pivot)

    def on_device(self, name: str, device: torch.device) -> Tensor:
        """A float32 copy of "weights", "importance" or the "cumulative" probabilities, made on first use."""
        key = (name, device)
        if key not in self._copies:
            if name == "weights":
                table = self.weights.float()
            elif name == "importance":
                table = (torch.ones_like(self.weights) if self.importance is None else self.importance).float()
            else:
                table = self.pmf.cumsum(0).float()
                # Rounding must not leave a gap below 1 that a draw could fall through.
                table[-1] = 1.0
            self._copies[key] = table.to(device, non_blocking=True)
        return self._copies[key]


def draw(
    tables: SpeeDTables,
    batch_size: int,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Draws timesteps, without host synchronisation.

    Args:
        tables: What to draw from.
        batch_size: Number of draws, at least 1. Stratified draws spread over all of them, so draw the global batch
            at once and slice it.
        generator: Source of randomness; the draw happens on its device. None takes torch's global one.
        device: Where the result lives; None: the generator's device, or the CPU.

    Returns:
        int64 (batch_size,) in [0, T).
    """
    source, target = draw_devices(generator, device)
    if tables.randint:
        steps = tables.process.num_train_timesteps
        # The very call of diffusers' training scripts.
        uniform = torch.randint(0, steps, (batch_size,), generator=generator, device=source)
        return uniform.to(target, non_blocking=may_be_late(target))
    cumulative = tables.on_device("cumulative", source)
    function = DRAWS[tables.draw].function
    return function(cumulative, batch_size, generator, tables.pivot).to(target, non_blocking=may_be_late(target))


def draw_devices(
    generator: torch.Generator | None, device: torch.device | str | None
) -> tuple[torch.device, torch.device]:
    """Where a draw happens and where its result goes."""
    target = torch.device(device) if device is not None else generator.device if generator else torch.device("cpu")
    return (generator.device if generator is not None else target), target


def may_be_late(target: torch.device) -> bool:
    """Whether a copy may end after its call returns: what reads it on a GPU waits for it, on the CPU nothing does."""
    return target.type != "cpu"


def weights(tables: SpeeDTables, timesteps: Tensor) -> Tensor:
    """The loss weight of each timestep of a batch, without host synchronisation.

    Args:
        tables: What to look up in.
        timesteps: int64, any shape, in [0, T).

    Returns:
        float32 of the same shape, on the same device.
    """
    return tables.on_device("weights", timesteps.device)[timesteps]


def importance(tables: SpeeDTables, timesteps: Tensor) -> Tensor:
    """What undoes the density in the loss of each timestep of a batch; 1 where it is not undone.

    Args:
        tables: What to look up in.
        timesteps: int64, any shape, in [0, T).

    Returns:
        float32 of the same shape, on the same device.
    """
    return tables.on_device("importance", timesteps.device)[timesteps]
