"""What a density is, and from its name to probabilities."""

from collections.abc import Callable

from torch import Tensor

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
    density = DENSITIES.parse(choice)(process, settings)
    return density.pmf() if isinstance(density, LossAwareDensity) else normalised(density)


def normalised(density: Tensor) -> Tensor:
    """The density divided by its sum."""
    return density / density.sum()
