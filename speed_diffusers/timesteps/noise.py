"""Densities over the noise: over log SNR, over sigma, or over the time of a rectified flow.

A timestep's share is the density at its noise times how fast the noise changes there (|d log SNR / dt| or the like),
so that the same noise is trained equally often on any schedule.
"""

import math

import torch
from torch import Tensor

from ..process import ForwardProcess, derivative
from ..registry import Parameter
from ..settings import SpeeDSettings
from .density import DENSITIES

SD3 = "SD3, [arXiv 2403.03206](https://arxiv.org/abs/2403.03206), section 3.1"
BY_SD3_TIME = "over the flow's time before shift; on other processes over the time with the same SNR, which is ours"


def _bell(standard: Tensor) -> Tensor:
    """exp(-x^2 / 2), scaled so that the largest is 1: a narrow bell between two steps must not vanish altogether."""
    exponent = 0.5 * standard.square()
    return torch.exp(exponent.min() - exponent)


def _time_speed(process: ForwardProcess) -> Tensor:
    """du/dt of the flow's time u, shape (T,): 1/T everywhere on a flow."""
    return derivative(process.flow_time)


@DENSITIES.register(
    "logit_normal",
    summary="The logit of the flow's time is normal: the middle of the process most often.",
    reference=f"{SD3}; {BY_SD3_TIME}. The mean is minus the `--logit_mean` of diffusers' scripts, whose table begins "
    "with the most noise",
    parameters=(
        Parameter("mean", 0.0, "[-10, 10]", "of the logit; above 0 favours much noise: -2 mean is that of log SNR"),
        Parameter("std", 1.0, "[1e-6, 100]", "of the logit"),
    ),
)
def logit_normal(process: ForwardProcess, settings: SpeeDSettings, *, mean: float, std: float) -> Tensor:
    """Logit-normal over the flow's time u: logit(u), which is -log SNR / 2 and a constant, ~ N(mean, std^2)."""
    return _bell((process.flow_logit - mean) / std) * process.log_snr_speed


@DENSITIES.register(
    "mode",
    summary="SD3's mode density with heavy tails: the middle of the process more often, the ends never rare.",
    reference=f"{SD3}: u = 1 - v - s (cos^2(pi v / 2) - 1 + v) for uniform v; {BY_SD3_TIME}",
    parameters=(Parameter("scale", 1.29, "[-0.99, 1.75]", "s; above 0 favours the middle, below 0 the ends"),),
)
def mode(process: ForwardProcess, settings: SpeeDSettings, *, scale: float) -> Tensor:
    """The density of u = f(v) for uniform v, which is 1 / |f'(v)|; f falls from 1 to 0 for every allowed scale."""
    time = process.flow_time
    low, high = torch.zeros_like(time), torch.ones_like(time)
    for _ in range(60):  # bisection to the last bit
        v = 0.5 * (low + high)
        above = 1.0 - v - scale * (torch.cos(0.5 * math.pi * v).square() - 1.0 + v) > time
        low, high = torch.where(above, v, low), torch.where(above, high, v)
    slope = 1.0 + scale - 0.5 * math.pi * scale * torch.sin(math.pi * low)
    return _time_speed(process) / slope


@DENSITIES.register(
    "cosmap",
    summary="Flow times as often as the cosine schedule meets them.",
    reference=f"{SD3}: 2 / (pi - 2 pi u + 2 pi u^2); {BY_SD3_TIME}",
)
def cosmap(process: ForwardProcess, settings: SpeeDSettings) -> Tensor:
    """SD3's CosMap density over the flow's time u."""
    u = process.flow_time
    return _time_speed(process) * 2.0 / (math.pi * (1.0 - 2.0 * u + 2.0 * u.square()))


@DENSITIES.register(
    "edm",
    summary="EDM: the logarithm of sigma = SNR^-1/2 is normal.",
    reference="EDM, [arXiv 2206.00364](https://arxiv.org/abs/2206.00364), table 1. EDM2 takes mean=-0.4,std=1; "
    "both for data of standard deviation 0.5",
    parameters=(
        Parameter("mean", -1.2, "[-20, 20]", "of ln sigma; higher favours much noise: -2 mean is that of log SNR"),
        Parameter("std", 1.2, "[1e-6, 100]", "of ln sigma"),
    ),
)
def edm(process: ForwardProcess, settings: SpeeDSettings, *, mean: float, std: float) -> Tensor:
    """EDM's log-normal over sigma, the noise's standard deviation beside unscaled data."""
    log_sigma = -0.5 * process.finite_log_snr
    return _bell((log_sigma - mean) / std) * process.log_snr_speed


@DENSITIES.register(
    "gaussian",
    summary="Log SNR is normal.",
    reference="log SNR as the variable: VDM, [arXiv 2107.00630](https://arxiv.org/abs/2107.00630); "
    "mean and std are ours to choose",
    parameters=(
        Parameter("mean", 0.0, "[-20, 20]", "of log SNR; higher favours little noise"),
        Parameter("std", 2.0, "[1e-6, 100]", "of log SNR"),
    ),
    named={
        # Each paper's own mean and deviation, carried over to log SNR: -2 ln sigma for latents of variance 1 where
        # the paper's data has 0.5^2, and -2 logit(u) of a flow's time u.
        "edm": {"mean": 1.0, "std": 2.4},
        "edm2": {"mean": -0.6, "std": 2.0},
        "sd3": {"mean": 0.0, "std": 2.0},
        "jit": {"mean": -1.6, "std": 1.6},
        "rae": {"mean": -3.9, "std": 2.0},
    },
)
def gaussian(process: ForwardProcess, settings: SpeeDSettings, *, mean: float, std: float) -> Tensor:
    """A Gaussian over log SNR."""
    return _bell((process.finite_log_snr - mean) / std) * process.log_snr_speed


@DENSITIES.register(
    "laplace",
    summary="Log SNR follows a Laplace distribution: where signal and noise are equal most often.",
    reference="[arXiv 2407.03297](https://arxiv.org/abs/2407.03297); scale=0.5 is that of diffusers' schedule of this "
    "name, not checked against the paper's tables",
    parameters=(
        Parameter("mean", 0.0, "[-20, 20]", "of log SNR; higher favours little noise"),
        Parameter("scale", 0.5, "[1e-6, 100]", "b: mean distance of log SNR from its mean"),
        Parameter("uniform", 0.0, "[0, 1]", "share of draws that stay uniform over the timesteps"),
    ),
)
def laplace(process: ForwardProcess, settings: SpeeDSettings, *, mean: float, scale: float, uniform: float) -> Tensor:
    """Laplace's density over log SNR."""
    distance = (process.finite_log_snr - mean).abs()
    density = torch.exp(-(distance - distance.min()) / scale) * process.log_snr_speed
    return (1.0 - uniform) * density / density.sum() + uniform / len(density) if uniform else density


@DENSITIES.register(
    "cosine_scaled",
    summary="The cosine schedule's density with another width: sech(s log SNR / 2).",
    reference="[arXiv 2407.03297](https://arxiv.org/abs/2407.03297), which compares with it; s = 1 is the cosine "
    "schedule of Improved DDPM, [arXiv 2102.09672](https://arxiv.org/abs/2102.09672)",
    parameters=(Parameter("scale", 1.0, "(0, 20]", "s; higher favours the middle, where signal and noise are equal"),),
)
def cosine_scaled(process: ForwardProcess, settings: SpeeDSettings, *, scale: float) -> Tensor:
    """The hyperbolic secant over log SNR, taken in logarithms because cosh overflows."""
    distance = 0.5 * scale * process.finite_log_snr.abs()
    log_density = -distance - torch.log1p(torch.exp(-2.0 * distance))
    return torch.exp(log_density - log_density.max()) * process.log_snr_speed


@DENSITIES.register(
    "cauchy",
    summary="Log SNR follows a Cauchy distribution: the middle more often, the ends never rare.",
    reference="[arXiv 2407.03297](https://arxiv.org/abs/2407.03297) tries it; formula from memory of it",
    parameters=(
        Parameter("mean", 0.0, "[-20, 20]", "centre in log SNR; higher favours little noise"),
        Parameter("scale", 1.0, "[1e-6, 100]", "half width at half height, in log SNR"),
    ),
)
def cauchy(process: ForwardProcess, settings: SpeeDSettings, *, mean: float, scale: float) -> Tensor:
    """Cauchy's density over log SNR."""
    distance = ((process.finite_log_snr - mean) / scale).square()
    return (1.0 + distance.min()) / (1.0 + distance) * process.log_snr_speed


@DENSITIES.register(
    "lognorm",
    summary="The rival 'lognorm' of SpeeD's code: a logit-normal of the noise's standard deviation, tilted to noise.",
    reference="NUS-HPC-AI-Lab/SpeeD on GitHub: logit-normal(0, 1) of x = sqrt(1 - abar) times x / (1 - x), without a "
    "Jacobian; in no paper",
)
def lognorm(process: ForwardProcess, settings: SpeeDSettings) -> Tensor:
    """What the authors compare with as log-normal, as their code has it."""
    # With a = 1 - x: density x logit term = exp(-logit^2 / 2) / a^2, taken in logarithms because a goes to 0.
    log_snr = process.finite_log_snr
    deviation = torch.sigmoid(-log_snr).sqrt()
    rest = torch.sigmoid(log_snr) / (1.0 + deviation)
    log_density = -0.5 * (deviation / rest).log().square() - 2.0 * rest.log()
    return torch.exp(log_density - log_density.max())
