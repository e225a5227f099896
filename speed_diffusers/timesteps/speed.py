"""The forms of SpeeD (arXiv 2405.17403), and the uniform baseline."""

import logging

import torch
from torch import Tensor

from ..process import GRADIENT_THRESHOLD, ForwardProcess
from ..registry import Parameter
from ..settings import SpeeDSettings
from .density import DENSITIES

logger = logging.getLogger(__name__)

UNIFORM = "uniform"


@DENSITIES.register(
    "asymmetric",
    summary="SpeeD: steps before tau k times as often as those from tau on.",
    reference="SpeeD, [arXiv 2405.17403](https://arxiv.org/abs/2405.17403): P(t) = k / (T + tau (k-1)) for t < tau, "
    "else 1 / (T + tau (k-1)); the smooth edge is ours",
    parameters=(
        Parameter("edge", 0.0, "[0, 20]", "width of a smooth edge at tau, in units of log SNR; 0: the paper's step"),
    ),
)
def asymmetric(process: ForwardProcess, settings: SpeeDSettings, *, edge: float) -> Tensor:
    """SpeeD's asymmetric sampling, with a step at tau or a sigmoid in its place.

    The width of the sigmoid is measured in log SNR, so that equal noise is drawn equally often on any schedule; a
    width in timesteps would reach over different noise on each.
    """
    if not settings.tau_found:
        logger.warning(
            "The noise schedule never settles to 1/speed_r of its signal, so tau = T = %d and sampling is uniform. "
            "Set speed_tau or a smaller speed_r.",
            settings.tau,
        )
    num_timesteps, tau = process.num_train_timesteps, settings.tau
    if edge > 0 and tau < num_timesteps:
        log_snr = process.finite_log_snr
        middle = 0.5 * (log_snr[tau - 1] + log_snr[tau])
        return 1.0 + (settings.k - 1.0) * torch.sigmoid((log_snr - middle) / edge)
    density = torch.ones(num_timesteps, dtype=torch.float64)
    density[:tau] = settings.k
    return density


@DENSITIES.register(
    UNIFORM,
    summary="Every timestep alike; the exact baseline, drawn by torch.randint as plain diffusers loops do.",
    reference="DDPM, [arXiv 2006.11239](https://arxiv.org/abs/2006.11239), algorithm 1",
)
def uniform(process: ForwardProcess, settings: SpeeDSettings) -> Tensor:
    """All timesteps alike."""
    return torch.ones(process.num_train_timesteps, dtype=torch.float64)


@DENSITIES.register(
    "t_sample",
    summary="SpeeD's first code: five times as often where the noise grows by more than 1e-4 a step.",
    reference="kaiwang960112/SpeeD on GitHub, `t_sample`: tanh(1e6 (d sqrt(1 - abar)/dt - 1e-4)) + 1.5; not in the "
    "paper",
)
def t_sample(process: ForwardProcess, settings: SpeeDSettings) -> Tensor:
    """The density of the authors' first code: 2.5 before the gradient's threshold, 0.5 after it.

    Raises:
        InputError: The noise never grows that slowly, so there is no threshold to tell steps apart by.
    """
    _ = process.dual_pivot
    return torch.tanh(1e6 * (process.noise_growth - GRADIENT_THRESHOLD)) + 1.5
