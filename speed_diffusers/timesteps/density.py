"""What a density is, and from its name to probabilities."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import InputError
from ..process import ForwardProcess
from ..registry import Choice, Registry
from ..settings import SpeeDSettings
from .loss_aware_state import LossAwareDensity

Density = Callable[..., Tensor | LossAwareDensity]
"""Process and settings (and parameters, by keyword) to unnormalised probabilities, shape (T,), float64, none negative.

Or to an object that learns them from the errors of the training.
"""

DENSITIES: Registry[Density] = Registry("timestep density (speed_sampling)")


def timestep_pmf(choice: str | Density | Choice[Density], process: ForwardProcess, settings: SpeeDSettings) -> Tensor:
    """The probabilities that a density gives to the timesteps of a process.

    Args:
        choice: Name of a density, with parameters or without, such as "logit_normal:mean=-0.5"; or a function.
        process: The forward process.
        settings: SpeeD's numbers.

    Returns:
        Shape (T,), float64, summing to 1; of a loss-aware density those that it begins with.

    Raises:
        InputError: No such density or parameter, a parameter outside its range, or a process it does not fit.
    """
    chosen = DENSITIES.parse(choice)
    density = chosen(process, settings)
    return checked_pmf(chosen, density.pmf() if isinstance(density, LossAwareDensity) else normalised(density))


def normalised(density: Tensor) -> Tensor:
    """The density divided by its sum."""
    return density / density.sum()


def checked_pmf(choice: Choice[Density], pmf: Tensor) -> Tensor:
    """The probabilities themselves, which are some.

    Raises:
        InputError: One is negative or not finite, or all are 0, as where a density overflows or vanishes.
    """
    if not bool(torch.isfinite(pmf).all() & (pmf >= 0).all() & (pmf > 0).any()):
        raise InputError(
            f"speed_sampling='{choice}': the probabilities run from {float(pmf.min()):g} to {float(pmf.max()):g}; "
            "they must be finite, none negative and not all 0."
        )
    return pmf
