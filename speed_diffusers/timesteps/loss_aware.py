"""Loss-aware densities: they are learned while a model trains."""

import torch
from torch import Tensor

from ..predictions import epsilon_error_ratio
from ..process import ForwardProcess
from ..registry import Parameter
from ..settings import SpeeDSettings
from .density import DENSITIES
from .loss_aware_state import LossAwareDensity

UNIFORM_SHARE = "share of draws that stay uniform"


def _with_uniform(density: Tensor, share: float) -> Tensor:
    """Probabilities of a density with a share of uniform draws; uniform if the density is 0 everywhere."""
    total = density.sum()
    uniform = torch.full_like(density, 1.0 / len(density))
    return torch.where(total > 0, (1.0 - share) * density / total + share * uniform, uniform)


@DENSITIES.register(
    "loss_second_moment",
    summary="IDDPM's resampling: by the root mean square of each step's latest losses, undone in the loss.",
    reference="Improved DDPM, [arXiv 2102.09672](https://arxiv.org/abs/2102.09672), section 3.3: p_t ~ "
    "sqrt(E[L_t^2]), loss / (T p_t)",
    parameters=(
        Parameter("history", 10, "[1, 1000]", "latest losses kept of each step; uniform until all have so many", True),
        Parameter("uniform", 0.001, "[1e-6, 1]", UNIFORM_SHARE),
    ),
    learns=True,
)
class LossSecondMoment(LossAwareDensity):
    """Importance sampling of timesteps by their losses; the objective stays that of uniform draws.

    L_t is the error times the loss weight, so that the gradient of the weighted objective is what gets less noisy. One
    call of `update` adds one loss per step: the mean of the samples that it was told of.

    State: `squares` (T, history), float64, the latest squared losses; `seen` (T,), int64, how many there were.
    """

    def __init__(self, process: ForwardProcess, settings: SpeeDSettings, *, history: float, uniform: float) -> None:
        super().__init__(process)
        self.uniform = uniform
        num_timesteps = process.num_train_timesteps
        self.state = {
            "squares": torch.zeros(num_timesteps, int(history), dtype=torch.float64),
            "seen": torch.zeros(num_timesteps, dtype=torch.int64),
        }

    def _learn(self, sums: Tensor, counts: Tensor, weights: Tensor) -> None:
        squares, seen = self.state["squares"], self.state["seen"]
        steps = counts.nonzero().flatten()
        losses = sums[steps] / counts[steps] * weights[steps]
        squares[steps, seen[steps] % squares.shape[1]] = losses.square()
        seen[steps] += 1

    def pmf(self) -> Tensor:
        """Uniform until every step has its whole history."""
        squares, seen = self.state["squares"], self.state["seen"]
        warm = bool((seen >= squares.shape[1]).all())
        return _with_uniform(
            squares.mean(1).sqrt() if warm else torch.zeros_like(seen, dtype=torch.float64), self.uniform
        )

    def importance_weights(self) -> Tensor:
        """1 / (T p_t), which makes the mean loss that of uniform draws."""
        pmf = self.pmf()
        return 1.0 / (len(pmf) * pmf)


@DENSITIES.register(
    "information_rate",
    summary="By the information that a step's noise destroys: running epsilon error times |d log SNR / dt|.",
    reference="in no paper; by I-MMSE ([arXiv cs/0412108](https://arxiv.org/abs/cs/0412108)): d I / d log SNR is half "
    "the error of epsilon",
    parameters=(
        Parameter("bins", 100, "[2, 10000]", "ranges of timesteps whose errors are averaged; T at most", True),
        Parameter("decay", 0.99, "[0, 1)", "of the running mean of each range's errors, an update"),
        Parameter("uniform", 0.01, "[0, 1]", UNIFORM_SHARE),
    ),
    learns=True,
)
class InformationRate(LossAwareDensity):
    """Timesteps in proportion to the entropy rate that the network's own errors show.

    The draws are not undone in the loss: the distribution of the noise changes.

    State: `mean` (bins,), float64, the running mean of epsilon's squared error; `seen` (bins,), int64, updates.
    """

    WARM_UP = 10
    """Updates that every range must have seen; until then draws are uniform."""

    def __init__(
        self, process: ForwardProcess, settings: SpeeDSettings, *, bins: float, decay: float, uniform: float
    ) -> None:
        super().__init__(process)
        self.decay, self.uniform = decay, uniform
        num_timesteps = process.num_train_timesteps
        num_bins = min(int(bins), num_timesteps)
        self.bin_of_step = torch.arange(num_timesteps) * num_bins // num_timesteps
        self.to_epsilon = epsilon_error_ratio(process, settings.prediction_type)
        self.speed = process.log_snr_speed
        self.state = {
            "mean": torch.zeros(num_bins, dtype=torch.float64),
            "seen": torch.zeros(num_bins, dtype=torch.int64),
        }

    def _learn(self, sums: Tensor, counts: Tensor, weights: Tensor) -> None:
        mean, seen = self.state["mean"], self.state["seen"]
        total = torch.zeros_like(mean).index_add_(0, self.bin_of_step, sums * self.to_epsilon)
        number = torch.zeros_like(mean).index_add_(0, self.bin_of_step, counts)
        bins = number.nonzero().flatten()
        # The plain mean at first, then a running one, so that the first error does not linger.
        step = (1.0 / (seen[bins] + 1).double()).clamp_min(1.0 - self.decay)
        mean[bins] += step * (total[bins] / number[bins] - mean[bins])
        seen[bins] += 1

    def pmf(self) -> Tensor:
        """Uniform until every range has seen `WARM_UP` updates."""
        warm = bool((self.state["seen"] >= self.WARM_UP).all())
        errors = self.state["mean"][self.bin_of_step]
        return _with_uniform(errors * self.speed if warm else torch.zeros_like(errors), self.uniform)


@DENSITIES.register(
    "infonoise",
    summary="InfoNoise, for velocity and flows: by the information per log sigma in the errors, over the loss weight.",
    reference="InfoNoise, [arXiv 2602.18647](https://arxiv.org/abs/2602.18647), as public ports of it read: error "
    "of x_0 / sigma^2, gated by sigma^3 / (sigma^3 + c^3), divided by the weight on the error of x_0, "
    "search=0.002 being its rule for c; not checked against the paper",
    parameters=(
        Parameter("gate", 0.3, "[0, 10]", "c, the sigma = SNR^-1/2 below which draws fall off; 0: no gate"),
        Parameter(
            "search",
            0.0,
            "[0, 1)",
            "c is instead the largest sigma at which the error of x_0 / sigma^3 is this share of its peak; 0: gate is",
        ),
        Parameter("bins", 100, "[2, 10000]", "ranges of timesteps whose errors are averaged; T at most", True),
        Parameter("decay", 0.99, "[0, 1)", "of the running mean of each range's errors, an update"),
        Parameter("uniform", 0.01, "[0, 1]", UNIFORM_SHARE),
    ),
    learns=True,
)
class InfoNoise(InformationRate):
    """The gated entropy rate divided by the loss weight, so that density times weight follows the rate.

    Where the weight is 0 nothing is learned and nothing but the uniform share is drawn. Epsilon's loss weighs the
    error of x_0 by SNR, and where that is low a network that predicts epsilon errs by more than x_0 itself: divided by
    the weight, nine of ten draws are mostly noise, and little is learned.

    State: as `InformationRate`, and `weights` (T,), float64, the loss weights of the last update.
    """

    def __init__(
        self,
        process: ForwardProcess,
        settings: SpeeDSettings,
        *,
        gate: float,
        search: float,
        bins: float,
        decay: float,
        uniform: float,
    ) -> None:
        super().__init__(process, settings, bins=bins, decay=decay, uniform=uniform)
        self.fixed_gate, self.search = gate, search
        self.sigma = torch.exp(-0.5 * process.finite_log_snr)
        # Squared error of epsilon is that of x_0 / sigma^2, so a weight w_p on the prediction's error is
        # w_p / (sigma^2 to_epsilon) on that of x_0.
        self.factor = self.sigma.square() * self.to_epsilon
        self.state["weights"] = torch.ones(process.num_train_timesteps, dtype=torch.float64)

    def _learn(self, sums: Tensor, counts: Tensor, weights: Tensor) -> None:
        super()._learn(sums, counts, weights)
        self.state["weights"].copy_(weights)

    @property
    def gate(self) -> float:
        """c: as given, or from the errors seen so far.

        The rule scans from the largest sigma, where the error of x_0 has stopped growing and error / sigma^3 is small,
        to the first one at which that ratio is no longer small beside its peak.
        """
        # Error of x_0 / sigma^3 is that of epsilon / sigma.
        onset = self.state["mean"][self.bin_of_step] / self.sigma
        if not self.search or not bool((onset > 0).any()):
            return self.fixed_gate
        return float(self.sigma[onset >= self.search * onset.max()].max())

    def pmf(self) -> Tensor:
        """Uniform until every range has seen `WARM_UP` updates."""
        warm = bool((self.state["seen"] >= self.WARM_UP).all())
        errors, weights = self.state["mean"][self.bin_of_step], self.state["weights"]
        gated = errors * self.factor * self.sigma.pow(3) / (self.sigma.pow(3) + self.gate**3)
        rate = torch.where(weights > 0, gated / weights.clamp_min(1e-300), 0.0) * self.speed
        return _with_uniform(rate if warm else torch.zeros_like(errors), self.uniform)
