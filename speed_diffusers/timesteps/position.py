"""Densities over the position of a timestep in the process, t / T, whatever the noise there."""

import math

import torch
from torch import Tensor

from ..errors import InputError
from ..process import ForwardProcess
from ..registry import Parameter
from ..settings import SpeeDSettings
from .density import DENSITIES


@DENSITIES.register(
    "beta",
    summary="B-TTDM: t / T follows Beta(alpha, 1), early steps more often.",
    reference="Beta-Tuned Timestep Diffusion Model, ECCV 2024; alpha as OneTrainer gives the paper's advice, not "
    "checked there",
    parameters=(Parameter("alpha", 0.8, "(0, 10]", "below 1 favours little noise, 1 is uniform"),),
)
def beta(process: ForwardProcess, settings: SpeeDSettings, *, alpha: float) -> Tensor:
    """Each step's exact share of Beta(alpha, 1), whose distribution function is u^alpha."""
    edges = torch.arange(process.num_train_timesteps + 1, dtype=torch.float64) / process.num_train_timesteps
    return edges.pow(alpha).diff()


@DENSITIES.register(
    "clts",
    summary="CLTS: from uniform to a Gaussian over t over the training.",
    reference="[arXiv 2404.07946](https://arxiv.org/abs/2404.07946); formula and numbers after SpeeD's code with its "
    "slips mended, not checked against the paper",
    parameters=(
        Parameter("mean", 0.3, "[0, 1]", "of the Gaussian, as a share of T; higher favours much noise"),
        Parameter("std", 1.0, "[1e-6, 100]", "of the Gaussian, as a share of T"),
        Parameter("horizon", 1.0, "(0, 1]", "share of the training after which the Gaussian is reached"),
    ),
    needs_progress=True,
)
def clts(process: ForwardProcess, settings: SpeeDSettings, *, mean: float, std: float, horizon: float) -> Tensor:
    """l N(t) + (1 - l) / T with l growing from 0 to 1 at the horizon, where it stays.

    The authors of SpeeD wrote the exponent as -(t - mu)^2 / 2 * T^2, which is a spike, and let l grow beyond 1, which
    makes probabilities negative; here it is -(t - mu)^2 / (2 std^2) with std = T, and l stops at 1.
    """
    position = torch.arange(process.num_train_timesteps, dtype=torch.float64) / process.num_train_timesteps
    exponent = -0.5 * ((position - mean) / std).square()
    bell = torch.exp(exponent - exponent.max())
    share = min(1.0, settings.progress / horizon)
    return share * bell / bell.sum() + (1.0 - share) / process.num_train_timesteps


@DENSITIES.register(
    "range_bias",
    summary="SDXL's timestep bias: the steps of one range several times as often as the others.",
    reference="diffusers, `train_text_to_image_sdxl.py`, `--timestep_bias_strategy`: earlier is begin=0, later is "
    "end=1",
    parameters=(
        Parameter("begin", 0.0, "[0, 1]", "start of the range, as a share of T"),
        Parameter("end", 0.25, "[0, 1]", "end of the range, as a share of T"),
        Parameter("multiplier", 2.0, "(0, 1e6]", "how many times as often"),
    ),
)
def range_bias(
    process: ForwardProcess, settings: SpeeDSettings, *, begin: float, end: float, multiplier: float
) -> Tensor:
    """All timesteps alike but those of a range.

    Raises:
        InputError: The range holds no timestep.
    """
    num_timesteps = process.num_train_timesteps
    first, last = math.floor(begin * num_timesteps + 1e-9), math.floor(end * num_timesteps + 1e-9)
    if first >= last:
        raise InputError(
            f"speed_sampling='range_bias': no timestep of {num_timesteps} from begin={begin} to end={end}."
        )
    density = torch.ones(num_timesteps, dtype=torch.float64)
    density[first:last] = multiplier
    return density
