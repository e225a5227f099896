"""Weightings that follow from the noise schedule alone.

Published weights are defined here once, on the squared error of epsilon, and turned into weights on the error of
whatever the network predicts (`predictions.py`). SpeeD's own weights multiply the error as it is predicted, whatever
that is, as in the authors' code.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import InputError
from ..predictions import weights_by_snr
from ..process import ForwardProcess
from ..registry import Parameter
from ..settings import SpeeDSettings
from .weighting import WEIGHTINGS

MIN_SNR = "Min-SNR, [arXiv 2303.09556](https://arxiv.org/abs/2303.09556), section 3.4"
SD3 = "SD3, [arXiv 2403.03206](https://arxiv.org/abs/2403.03206), section 3.1"
AUTHORS = "NUS-HPC-AI-Lab/SpeeD on GitHub"


def _rescaled_change(process: ForwardProcess, name: str, highest: float) -> Tensor:
    """The derivative of the noise level, rescaled to [1 - highest, highest] over all timesteps."""
    change = process.change
    span = change.max() - change.min()
    if span <= 1e-12:
        raise InputError(
            f"speed_weighting='{name}': the noise level of this schedule changes at a constant rate, "
            "so the weights are undefined; use speed_weighting='none'."
        )
    lowest = 1.0 - highest
    return lowest + (highest - lowest) * (change - change.min()) / span


@WEIGHTINGS.register(
    "change_aware",
    summary="SpeeD: the faster the noise level changes, the heavier the step; from 1 - lambda to lambda.",
    reference="SpeeD, [arXiv 2405.17403](https://arxiv.org/abs/2405.17403): derivative of the increment's variance, "
    "rescaled to [1 - lambda, lambda]",
)
def change_aware(process: ForwardProcess, settings: SpeeDSettings) -> Tensor:
    """SpeeD's change-aware weighting over all timesteps, without a cut at tau.

    Raises:
        InputError: The noise level changes at one constant rate, so there is nothing to rescale.
    """
    return _rescaled_change(process, "change_aware", settings.lambda_)


@WEIGHTINGS.register(
    "none",
    summary="Every step counts 1; the exact baseline.",
    reference="DDPM, [arXiv 2006.11239](https://arxiv.org/abs/2006.11239), equation 14",
)
def none(process: ForwardProcess, settings: SpeeDSettings) -> Tensor:
    """All timesteps alike."""
    return torch.ones(process.num_train_timesteps, dtype=torch.float64)


@WEIGHTINGS.register(
    "official",
    summary="SpeeD's code: change-aware before tau, 1 from tau on.",
    reference=f"{AUTHORS}, weighting 'ours'; the jump at tau is not in the paper",
)
def official(process: ForwardProcess, settings: SpeeDSettings) -> Tensor:
    """The weights of the authors' code: smallest and largest change are taken over all timesteps, then cut at tau.

    Raises:
        InputError: The noise level changes at one constant rate.
    """
    weights = _rescaled_change(process, "official", settings.lambda_)
    weights[settings.tau :] = 1.0
    return weights


@WEIGHTINGS.register(
    "theory",
    summary="Change-aware weights from 0.2 to 0.8, whatever lambda is.",
    reference=f"{AUTHORS}, weighting 'theory'",
)
def theory(process: ForwardProcess, settings: SpeeDSettings) -> Tensor:
    """The authors' variant with fixed ends.

    Raises:
        InputError: The noise level changes at one constant rate.
    """
    return _rescaled_change(process, "theory", 0.8)


@WEIGHTINGS.register(
    "p2",
    summary="P2: (k + SNR)^-gamma on epsilon; with k = gamma = 1 it is the noise level, SpeeD's first weight.",
    reference="P2, [arXiv 2204.00227](https://arxiv.org/abs/2204.00227): lambda_t / (k + SNR)^gamma",
    parameters=(
        Parameter("k", 1.0, "(0, 1e12]", "limits the weight of steps with much noise"),
        Parameter("gamma", 1.0, "[0, 10]", "how strongly steps with little noise are held down; 0: not at all"),
    ),
)
def p2(process: ForwardProcess, settings: SpeeDSettings, *, k: float, gamma: float) -> Tensor:
    """Perception-prioritised weights."""
    return weights_by_snr(lambda snr: (k + snr).pow(-gamma), process, settings.prediction_type)


@WEIGHTINGS.register(
    "min_snr",
    summary="Min-SNR: min(SNR, gamma) on x_0, so min(SNR, gamma) / SNR on epsilon and / (SNR + 1) on v.",
    reference=MIN_SNR,
    parameters=(Parameter("gamma", 5.0, "[1e-12, inf)", "largest SNR that counts"),),
)
def min_snr(process: ForwardProcess, settings: SpeeDSettings, *, gamma: float) -> Tensor:
    """Min-SNR-gamma weights."""
    return weights_by_snr(lambda snr: (gamma / snr).clamp_max(1.0), process, settings.prediction_type)


@WEIGHTINGS.register(
    "soft_min_snr",
    summary="Min-SNR with a smooth knee: gamma / (gamma + SNR) on epsilon.",
    reference="HDiT, [arXiv 2401.11605](https://arxiv.org/abs/2401.11605); gamma=4 is 1 / sigma_data^2 of "
    "k-diffusion, not checked against the paper",
    parameters=(Parameter("gamma", 4.0, "[1e-12, inf)", "SNR of the knee"),),
)
def soft_min_snr(process: ForwardProcess, settings: SpeeDSettings, *, gamma: float) -> Tensor:
    """Soft-min-SNR weights: the harmonic sum of SNR and gamma on x_0."""
    return weights_by_snr(lambda snr: gamma / (gamma + snr), process, settings.prediction_type)


@WEIGHTINGS.register(
    "debiased",
    summary="Debiased: SNR^-1/2 on epsilon.",
    reference="[arXiv 2310.08442](https://arxiv.org/abs/2310.08442) and its authors' code, which has no limit; "
    "OneTrainer and kohya's scripts take max_snr=1000",
    parameters=(
        Parameter(
            "max_snr", math.inf, "[1e-12, inf]", "the SNR is clipped here, so no weight is smaller than its -1/2 power"
        ),
    ),
)
def debiased(process: ForwardProcess, settings: SpeeDSettings, *, max_snr: float) -> Tensor:
    """Debiased estimation."""
    return weights_by_snr(lambda snr: snr.clamp_max(max_snr).rsqrt(), process, settings.prediction_type)


@WEIGHTINGS.register(
    "max_snr",
    summary="Truncated SNR, also called max-SNR: max(SNR, gamma) on x_0.",
    reference="Progressive distillation, [arXiv 2202.00512](https://arxiv.org/abs/2202.00512), not checked there; "
    "named max-SNR in Min-SNR's code",
    parameters=(Parameter("gamma", 1.0, "(0, 1e12]", "smallest SNR that counts"),),
)
def max_snr(process: ForwardProcess, settings: SpeeDSettings, *, gamma: float) -> Tensor:
    """Truncated-SNR weights."""
    return weights_by_snr(lambda snr: (gamma / snr).clamp_min(1.0), process, settings.prediction_type)


@WEIGHTINGS.register(
    "edm",
    summary="EDM: (sigma^2 + sigma_data^2) / (sigma sigma_data)^2 on x_0, with sigma = SNR^-1/2.",
    reference="EDM, [arXiv 2206.00364](https://arxiv.org/abs/2206.00364), table 1",
    parameters=(Parameter("sigma_data", 0.5, "[1e-6, 100]", "standard deviation of the data"),),
)
def edm(process: ForwardProcess, settings: SpeeDSettings, *, sigma_data: float) -> Tensor:
    """EDM's weights, SNR + 1 / sigma_data^2 on x_0."""
    return weights_by_snr(lambda snr: 1.0 + 1.0 / (sigma_data**2 * snr), process, settings.prediction_type)


@WEIGHTINGS.register(
    "sigma_sqrt",
    summary="SD3's script: sigma^-2 on the flow's velocity.",
    reference="diffusers, `compute_loss_weighting_for_sd3`",
)
def sigma_sqrt(process: ForwardProcess, settings: SpeeDSettings) -> Tensor:
    """The weight of this name in diffusers' SD3 and Flux scripts, which put it on the velocity's error."""
    return _by_sigma(lambda sigma: sigma.pow(-2.0), process, settings)


@WEIGHTINGS.register(
    "cosmap",
    summary="SD3's CosMap as a weight: 2 / (pi (1 - 2 sigma + 2 sigma^2)) on the flow's velocity.",
    reference=f"{SD3}; diffusers, `compute_loss_weighting_for_sd3`",
)
def cosmap(process: ForwardProcess, settings: SpeeDSettings) -> Tensor:
    """SD3's CosMap density, used as diffusers' scripts do, as a weight on the velocity's error."""
    return _by_sigma(lambda sigma: 2.0 / (math.pi * (1.0 - 2.0 * sigma + 2.0 * sigma.square())), process, settings)


def _by_sigma(velocity_weight: Callable[[Tensor], Tensor], process: ForwardProcess, settings: SpeeDSettings) -> Tensor:
    """Weights that count the error of the flow's velocity by a function of sigma = 1 / (1 + sqrt(SNR))."""

    def epsilon_weight(snr: Tensor) -> Tensor:
        root = snr.sqrt()
        return velocity_weight(1.0 / (1.0 + root)) * ((1.0 + root) / root).square()

    return weights_by_snr(epsilon_weight, process, settings.prediction_type)
