"""What a density is, and from its name to probabilities."""

from collections.abc import Callable

from torch import Tensor

from ..process import ForwardProcess
from ..registry import Registry
from ..settings import SpeeDSettings
from .adaptive import AdaptiveDensity

Density = Callable[..., Tensor | AdaptiveDensity]
"""Process and settings (and parameters, by keyword) to unnormalised probabilities, shape (T,), float64, none negative.

Or to an object that learns them from the errors of the training.
"""

DENSITIES: Registry[Density] = Registry("timestep density (speed_sampling)")


def timestep_density(choice: str, process: ForwardProcess, settings: SpeeDSettings) -> Tensor | AdaptiveDensity:
    """What the density `choice` makes of a process: unnormalised probabilities, or an object that learns them.

    Args:
        choice: Name of a density, with parameters or without, such as "logit_normal:mean=-0.5".
        process: The forward process.
        settings: SpeeD's numbers.

    Raises:
        InputError: No such density or parameter, a parameter outside its range, or a process it does not fit.
    """
    chosen = DENSITIES.parse(choice)
    return chosen.entry.function(process, settings, **chosen.arguments)


def timestep_pmf(choice: str, process: ForwardProcess, settings: SpeeDSettings) -> Tensor:
    """The probabilities of the density `choice`, shape (T,), float64, summing to 1.

    Raises:
        InputError: As for `timestep_density`.
    """
    density = timestep_density(choice, process, settings)
    return density.pmf() if isinstance(density, AdaptiveDensity) else normalised(density)


def normalised(density: Tensor) -> Tensor:
    """The density divided by its sum."""
    return density / density.sum()
