"""p(t): how often each timestep is trained on, and how a batch is drawn from that.

To add a density write one function here that maps a process and the settings to T non-negative numbers and register
it; its name is then a value of `speed_sampling` everywhere.
"""

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from .process import ForwardProcess, SpeeDSettings
from .registry import Registry

logger = logging.getLogger(__name__)

Density = Callable[[ForwardProcess, SpeeDSettings], Tensor]
"""Process and settings to unnormalised probabilities, shape (T,), float64, none negative."""

DENSITIES: Registry[Density] = Registry("timestep density (speed_sampling)")

UNIFORM = "uniform"


@DENSITIES.register(
    "asymmetric",
    summary="SpeeD: steps before tau k times as often as those from tau on.",
    reference="SpeeD, arXiv 2405.17403: P(t) = k / (T + tau (k-1)) for t < tau, else 1 / (T + tau (k-1))",
)
def asymmetric(process: ForwardProcess, settings: SpeeDSettings) -> Tensor:
    """SpeeD's asymmetric sampling."""
    if not settings.tau_found:
        logger.warning(
            "The noise schedule never settles to 1/speed_r of its signal, so tau = T = %d and sampling is uniform. "
            "Set speed_tau or a smaller speed_r.",
            settings.tau,
        )
    density = torch.ones(process.num_train_timesteps, dtype=torch.float64)
    density[: settings.tau] = settings.k
    return density


@DENSITIES.register(
    UNIFORM,
    summary="Every timestep alike; the exact baseline, drawn by torch.randint as plain diffusers loops do.",
    reference="DDPM, arXiv 2006.11239, algorithm 1",
)
def uniform(process: ForwardProcess, settings: SpeeDSettings) -> Tensor:
    """All timesteps alike."""
    return torch.ones(process.num_train_timesteps, dtype=torch.float64)


def timestep_pmf(name: str, process: ForwardProcess, settings: SpeeDSettings) -> Tensor:
    """The probabilities of the density `name`, shape (T,), float64, summing to 1.

    Raises:
        InputError: No density of this name.
    """
    density = DENSITIES[name].function(process, settings)
    return density / density.sum()


def draw_uniform(
    num_train_timesteps: int, batch_size: int, *, generator: torch.Generator | None, device: torch.device
) -> Tensor:
    """Uniform timesteps, int64 (batch_size,), by the very call that diffusers' training scripts make."""
    return torch.randint(0, num_train_timesteps, (batch_size,), generator=generator, device=device)


def draw_independent(cumulative: Tensor, batch_size: int, *, generator: torch.Generator | None) -> Tensor:
    """Independent draws by inversion of the cumulative distribution, without host synchronisation.

    Args:
        cumulative: Cumulative probabilities, float32 (T,), on the device of the generator; the last is 1.
        batch_size: Number of draws.
        generator: Source of randomness on the same device; None takes torch's global one.

    Returns:
        int64 (batch_size,) in [0, T).
    """
    uniform = torch.rand(batch_size, generator=generator, device=cumulative.device)
    return torch.searchsorted(cumulative, uniform, right=True)
