"""The variance that a network learns beside its mean: the variational bound's term of each step, bits per dimension.

Nichol and Dhariwal, "Improved Denoising Diffusion Probabilistic Models", arXiv 2102.09672, equations 13 to 16; the
objective of DiT (Peebles and Xie, arXiv 2212.09748, section 3.1).
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .errors import InputError, unknown_name

LEARNED_RANGE = "learned_range"
VARIANCE_TYPES = ("fixed_small", LEARNED_RANGE)
"""What `DDPMScheduler`'s `variance_type` may be in training: no variance from the network, or one between bounds."""

BIN_HALF_WIDTH = 1 / 255
"""Half the distance of two of 256 values in [-1, 1]."""

LEAST_LOG_MASS = math.log(1e-12)
"""Log of the least mass that a bin counts with, as in DiT: at most 39.9 bits per dimension at t = 0. A network that
predicts x_0 would begin with thousands, since the posterior of the first step is narrow."""

EDGE = 0.999
"""Values beyond it belong to an outermost bin, which reaches to infinity."""


class VariancePreservingScheduler(Protocol):
    """What the tables are made from."""

    betas: Tensor


@dataclass(frozen=True)
class LearnedVariance:
    """Tables for the variance term of the loss.

    The network's extra output v interpolates the logarithm of the variance between that of the posterior
    q(x_{t-1} | x_t, x_0), at v = -1, and beta_t, at v = 1.

    Attributes:
        table: float32 (T, 4), for each timestep: the range of the log variance, log beta_t - log posterior variance;
            the squared distance of the means over the posterior variance, and x_0 minus predicted x_0, each for an
            error of 1 in the prediction; and the log of the posterior variance.
        scale: T / 1000, what the term counts in the loss, as IDDPM's RESCALED_MSE; 1 at T = 1000, as DiT has it.
        weighted: Whether the loss weight of a timestep multiplies this term too, not only the squared error.
    """

    table: Tensor
    scale: float
    weighted: bool = False

    @classmethod
    def from_scheduler(
        cls,
        scheduler: VariancePreservingScheduler,
        *,
        prediction_type: str,
        weighted: bool = False,
        device: torch.device | str = "cpu",
    ) -> "LearnedVariance":
        """Makes the tables in float64 from a scheduler's `betas`.

        Args:
            scheduler: A diffusers scheduler of a variance-preserving process with at least 2 timesteps.
            prediction_type: What the network's mean half predicts: epsilon, v_prediction or sample.
            weighted: As the attribute.
            device: Where the tables live: that of the training.

        Raises:
            InputError: Unknown prediction type, or epsilon on a schedule that ends without signal, whose last mean is
                no function of epsilon.
        """
        betas = scheduler.betas.detach().to("cpu", torch.float64)
        kept = torch.cumprod(1.0 - betas, dim=0)  # alphas_cumprod
        kept_before = torch.cat((kept.new_ones(1), kept[:-1]))
        posterior = betas * (1.0 - kept_before) / (1.0 - kept)
        # The first posterior has no variance at all; the second's is taken for it (as in arXiv 2102.09672).
        log_posterior = torch.cat((posterior[1:2], posterior[1:])).log()
        if prediction_type == "epsilon":
            if float(kept[-1]) == 0.0:
                raise InputError(
                    "variance_type=learned_range with prediction_type=epsilon needs a schedule that keeps some signal "
                    "to the end; with rescale_betas_zero_snr take prediction_type=v_prediction."
                )
            to_clean = ((1.0 - kept) / kept).sqrt()  # x_0 - predicted x_0 = to_clean (predicted - true epsilon)
        elif prediction_type == "v_prediction":
            to_clean = (1.0 - kept).sqrt()
        elif prediction_type == "sample":
            to_clean = -torch.ones_like(kept)
        else:
            raise unknown_name("prediction_type", prediction_type, ("epsilon", "v_prediction", "sample"))
        # The mean of the posterior moves with x_0 by this much (DDPM, arXiv 2006.11239, equation 7).
        mean_of_clean = betas * kept_before.sqrt() / (1.0 - kept)
        distance = (mean_of_clean * to_clean).square() / log_posterior.exp()
        columns = (betas.log() - log_posterior, distance, to_clean, log_posterior)
        table = torch.stack(columns, dim=1).to(device, torch.float32)
        return cls(table, len(betas) / 1000, weighted)

    def bits(self, values: Tensor, error: Tensor, clean: Tensor, timesteps: Tensor) -> Tensor:
        """The bound's term L_t of each sample, as a function of the variance alone.

        For t > 0 the Kullback-Leibler divergence between q(x_{t-1} | x_t, x_0) and the network's Gaussian, for t = 0
        the negative log likelihood of x_0 (DDPM, arXiv 2006.11239, equations 5, 7 and 13). With d the log of the
        network's variance over the posterior's and c the squared distance of the means over the posterior variance,
        the divergence is (d + expm1(-d) + c exp(-d)) / 2. Written with two means and two log variances, as usual, it
        would lose four digits in float32: near the end of the process both pairs are almost equal.

        Args:
            values: The network's extra output v, (B, C, H, W).
            error: Prediction minus target, (B, C, H, W); no gradient goes into it: this term teaches the variance and
                leaves the mean to the squared error.
            clean: x_0, (B, C, H, W).
            timesteps: int64 (B,).

        Returns:
            float32 (B,), bits per dimension.
        """
        error = error.detach().float()
        row = self.table[timesteps]
        span, distance, to_clean, log_posterior = (column[:, None, None, None] for column in row.unbind(1))
        log_ratio = (values.float() + 1.0) / 2.0 * span
        divergence = 0.5 * (log_ratio + torch.expm1(-log_ratio) + distance * error.square() * torch.exp(-log_ratio))
        is_first = (timesteps == 0)[:, None, None, None]
        # Zeros where the likelihood is not wanted: what is thrown away must not have a gradient that is not finite.
        residual = torch.where(is_first, to_clean * error, 0.0)
        likelihood = bin_log_likelihood(residual, 0.5 * (log_posterior + log_ratio), clean.float())
        return torch.where(is_first, -likelihood, divergence).flatten(1).mean(1) / math.log(2.0)


def bin_log_likelihood(residual: Tensor, log_std: Tensor, clean: Tensor) -> Tensor:
    """Log of a Gaussian's mass in the bin of each value (DDPM, arXiv 2006.11239, equation 13).

    Bins are those of 8-bit images in [-1, 1], the outermost reach to infinity; DiT takes them for latents as well, and
    so it is here: only the variance at t = 0 depends on it, with which no sampler ever adds noise. The mass is the
    exact one; the original code approximates the normal distribution's integral by a tanh (off by up to 2e-4).

    Args:
        residual: Value minus mean, any shape.
        log_std: Log of the standard deviation, same shape.
        clean: The values themselves, same shape, which decide whether a bin is an outermost one.

    Returns:
        Natural logarithms, same shape, at most 0 and at least `LEAST_LOG_MASS`, beyond which there is no gradient.
    """
    inverse_std = torch.exp(-log_std)
    upper = (residual + BIN_HALF_WIDTH) * inverse_std
    lower = (residual - BIN_HALF_WIDTH) * inverse_std
    # Mirrored so that both ends lie in the left tail, whose logarithms keep their digits.
    is_right = residual > 0
    high, low = torch.where(is_right, -lower, upper), torch.where(is_right, -upper, lower)
    log_high = torch.special.log_ndtr(high)
    inside = log_high + torch.log(-torch.expm1(torch.special.log_ndtr(low) - log_high))
    below, above = torch.special.log_ndtr(upper), torch.special.log_ndtr(-lower)
    return torch.where(clean < -EDGE, below, torch.where(clean > EDGE, above, inside)).clamp_min(LEAST_LOG_MASS)
