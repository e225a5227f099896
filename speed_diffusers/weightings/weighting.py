"""What a weighting is, and from its name to weights."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import InputError
from ..process import ForwardProcess
from ..registry import Choice, Registry
from ..settings import SpeeDSettings
from .loss_aware_state import LossAwareWeighting

Weighting = Callable[..., Tensor | LossAwareWeighting]
"""Process and settings (and parameters, by keyword) to loss weights, shape (T,), float64, none negative.

Or to an object that learns them from the errors of the training.
"""

WEIGHTINGS: Registry[Weighting] = Registry("loss weighting (speed_weighting)")


def timestep_weights(
    choice: str | Weighting | Choice[Weighting], process: ForwardProcess, settings: SpeeDSettings
) -> Tensor:
    """The weights that a weighting gives to the timesteps of a process, shape (T,), float64, finite.

    Of a loss-aware weighting those that it begins with.

    Args:
        choice: Name of a weighting, with parameters or without, such as "min_snr:gamma=3"; or a function.
        process: The forward process.
        settings: SpeeD's numbers; the prediction type says whose error is weighted.

    Raises:
        InputError: No such weighting or parameter, a parameter outside its range, or it is undefined for the process.
    """
    weighting = WEIGHTINGS.parse(choice)
    made = weighting(process, settings)
    return checked_weights(weighting, made.weights() if isinstance(made, LossAwareWeighting) else made)


def checked_weights(choice: Choice[Weighting], weights: Tensor) -> Tensor:
    """The weights themselves, which train something in float32, the arithmetic of a loss.

    Raises:
        InputError: One is negative or not finite there, or all are 0: parameters may do together what none does alone.
    """
    used = weights.float()
    if not bool(torch.isfinite(used).all() & (used >= 0).all() & (used > 0).any()):
        raise InputError(
            f"speed_weighting='{choice}': the weights run from {float(weights.min()):g} to {float(weights.max()):g}; "
            "in float32 they must be finite, none negative and not all 0."
        )
    return weights
