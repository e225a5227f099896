"""Loss-aware weightings: they are learned while a model trains."""

import math

import torch
from torch import Tensor

from ..process import ForwardProcess
from ..registry import Parameter
from ..settings import SpeeDSettings
from .loss_aware_state import LossAwareWeighting
from .weighting import WEIGHTINGS

SMALLEST_ERROR = 1e-12
"""A network that errs less would have weights without limit."""


@WEIGHTINGS.register(
    "uncertainty",
    summary="EDM2's learned uncertainty: 1 / E[error | log SNR], so that every noise level counts alike.",
    reference="EDM2, [arXiv 2312.02696](https://arxiv.org/abs/2312.02696), equations 14 to 16 and 21: the minimum "
    "over u of loss / exp(u) + u, which a network finds there and running means do here",
    parameters=(
        Parameter("bins", 64, "[1, 1000]", "equal ranges of log SNR whose errors are averaged", True),
        Parameter("samples", 30000, "[100, 1e12]", "how many of the latest count: each by exp(-age / samples)"),
    ),
    learns=True,
)
class Uncertainty(LossAwareWeighting):
    """The reciprocal of the error that is to be expected at a timestep's noise.

    EDM2 multiplies the loss of its network, which already carries a fixed weight w(sigma), by exp(-u(sigma)) and adds
    u(sigma); u is a small network of log sigma that is trained along. At each sigma that sum has one minimum over u,
    u = log(w E[error]), where its derivative 1 - w E[error] exp(-u) is 0. So the error is weighted by
    w exp(-u) = 1 / E[error], whatever w is, whatever the network predicts, and whatever density the noise is drawn
    from; u is a running estimate of E[error | log SNR] and nothing else.

    Here the minimum is taken where it is known instead of descended to: over the samples seen, each weighted by
    exp(-age / samples), the best u of each range of log SNR is the logarithm of its mean error. That needs no
    optimizer or learning rate, is two sums a range as state, and does not depend on how samples are split over updates
    and processes beyond rounding. Between the middles of ranges u is interpolated over log SNR. A range of which less
    than one sample counts, as at the ends of a narrow density, takes the nearest one's.

    State: `errors` and `counts` (ranges that hold a timestep,), float64, the weighted sums.
    """

    WARM_UP = 10
    """Samples a range, on average, that must count; until then all weights are 1."""

    def __init__(self, process: ForwardProcess, settings: SpeeDSettings, *, bins: float, samples: float) -> None:
        super().__init__(process)
        self.samples = samples
        log_snr = process.finite_log_snr
        span = (log_snr.max() - log_snr.min()).clamp_min(1e-9)
        ranges = ((log_snr - log_snr.min()) / span * bins).long().clamp_max(int(bins) - 1)
        found, self.bin_of_step = ranges.unique(return_inverse=True)
        zeros = torch.zeros(len(found), dtype=torch.float64)
        # In rising order, as the ranges are.
        self.middles = zeros.index_add(0, self.bin_of_step, log_snr) / self.bin_of_step.bincount()
        self.enough = min(self.WARM_UP * len(found), samples / 2)
        self.state = {"errors": zeros.clone(), "counts": zeros.clone()}

    def _learn(self, sums: Tensor, counts: Tensor, weights: Tensor) -> None:
        kept = math.exp(-float(counts.sum()) / self.samples)
        for name, values in (("errors", sums), ("counts", counts)):
            self.state[name].mul_(kept).index_add_(0, self.bin_of_step, values)

    def weights(self) -> Tensor:
        """All 1 until `WARM_UP` samples a range count, or half of those that can."""
        errors, counts = self.state["errors"], self.state["counts"]
        seen = (counts >= 1.0).nonzero().flatten()
        if not len(seen) or float(counts.sum()) < self.enough:
            return torch.ones(self.process.num_train_timesteps, dtype=torch.float64)
        middles = self.middles[seen]
        u = (errors[seen] / counts[seen]).clamp_min(SMALLEST_ERROR).log()
        log_snr = self.process.finite_log_snr
        above = torch.searchsorted(middles, log_snr).clamp_max(len(seen) - 1)
        below = (above - 1).clamp_min(0)
        gap = (middles[above] - middles[below]).clamp_min(1e-300)
        share = ((log_snr - middles[below]) / gap).clamp(0.0, 1.0)
        return torch.exp(-torch.lerp(u[below], u[above], share))
