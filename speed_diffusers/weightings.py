"""w(t): how much the error at each timestep counts in the loss.

To add a weighting write one function here that maps a process and the settings to T numbers and register it; its name
is then a value of `speed_weighting` everywhere.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .errors import InputError
from .process import ForwardProcess, SpeeDSettings
from .registry import Registry

Weighting = Callable[[ForwardProcess, SpeeDSettings], Tensor]
"""Process and settings to loss weights, shape (T,), float64, none negative."""

WEIGHTINGS: Registry[Weighting] = Registry("loss weighting (speed_weighting)")


@WEIGHTINGS.register(
    "change_aware",
    summary="SpeeD: the faster the noise level changes, the heavier the step; from 1 - lambda to lambda.",
    reference="SpeeD, arXiv 2405.17403: derivative of the increment's variance, rescaled to [1 - lambda, lambda]",
)
def change_aware(process: ForwardProcess, settings: SpeeDSettings) -> Tensor:
    """SpeeD's change-aware weighting over all timesteps, without a cut at tau.

    Raises:
        InputError: The noise level changes at one constant rate, so there is nothing to rescale.
    """
    change = process.change
    span = change.max() - change.min()
    if span <= 1e-12:
        raise InputError(
            "speed_weighting='change_aware': the noise level of this schedule changes at a constant rate, "
            "so the weights are undefined; use speed_weighting='none'."
        )
    lowest = 1.0 - settings.lambda_
    return lowest + (settings.lambda_ - lowest) * (change - change.min()) / span


@WEIGHTINGS.register(
    "none", summary="Every step counts 1; the exact baseline.", reference="DDPM, arXiv 2006.11239, equation 14"
)
def none(process: ForwardProcess, settings: SpeeDSettings) -> Tensor:
    """All timesteps alike."""
    return torch.ones(process.num_train_timesteps, dtype=torch.float64)


def timestep_weights(name: str, process: ForwardProcess, settings: SpeeDSettings) -> Tensor:
    """The weights of the weighting `name`, shape (T,), float64.

    Raises:
        InputError: No weighting of this name, or it is undefined for this process.
    """
    return WEIGHTINGS[name].function(process, settings)
