"""The forward process as SpeeD sees it: noise level, its change, the three areas and tau.

Everything here is a float64 table over the T training timesteps, made on the CPU from the schedule alone.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .errors import InputError


class VariancePreservingSchedule(Protocol):
    """What SpeeD asks of a scheduler: the noise schedule of a variance-preserving process."""

    betas: Tensor


@dataclass(frozen=True)
class Areas:
    """The three areas of the process as half-open ranges of timesteps (SpeeD, arXiv 2405.17403, section 2).

    Attributes:
        acceleration: From 0 to where the noise level grows fastest.
        deceleration: From there to tau.
        convergence: From tau to T: the process has settled and its steps teach little.
    """

    acceleration: range
    deceleration: range
    convergence: range


@dataclass(frozen=True)
class ForwardProcess:
    """A noising process x_t = sqrt(1 - n_t) x_0 + sqrt(n_t) eps, described by its noise level.

    Attributes:
        noise_level: Shape (T,), float64, in [0, 1]: n_t = 1 - alphas_cumprod_t = 1 / (1 + SNR_t).
    """

    noise_level: Tensor

    @classmethod
    def from_scheduler(cls, scheduler: VariancePreservingSchedule) -> "ForwardProcess":
        """Reads the schedule of a diffusers scheduler.

        The product of the alphas is taken again in float64: the scheduler's own `alphas_cumprod` is a float32 running
        product, whose rounding shows in the differences between neighbouring steps.

        Raises:
            InputError: The scheduler has no `betas`, or fewer than two training timesteps.
        """
        betas = getattr(scheduler, "betas", None)
        if not isinstance(betas, Tensor):
            raise InputError(f"{type(scheduler).__name__} has no 'betas', so SpeeD cannot read its noise schedule.")
        if betas.numel() < 2:
            raise InputError(f"num_train_timesteps={betas.numel()}: SpeeD needs at least 2 training timesteps.")
        return cls(1.0 - torch.cumprod(1.0 - betas.detach().to("cpu", torch.float64), dim=0))

    @property
    def num_train_timesteps(self) -> int:
        """T, the number of training timesteps."""
        return self.noise_level.numel()

    @property
    def snr(self) -> Tensor:
        """Signal-to-noise ratio, shape (T,), float64; 0 at the last step of a zero-terminal-SNR schedule."""
        return (1.0 - self.noise_level) / self.noise_level

    @property
    def change(self) -> Tensor:
        """Derivative of the noise level over t, shape (T,), float64: central differences, one-sided at the ends."""
        return torch.gradient(self.noise_level)[0]

    @property
    def fastest_step(self) -> int:
        """t_{a-d}: the timestep at which the noise level grows fastest; acceleration ends here."""
        return int(self.change.argmax())

    def first_settled_step(self, r: float) -> int:
        """tau(r): the first timestep with 1 - noise level <= 1/r, or T if there is none.

        On DiT's linear schedule r = 145 gives 700, the value that the authors' code fixes for every schedule.

        Args:
            r: Magnitude by which the signal's variance must have shrunk, above 1.
        """
        settled = torch.nonzero(1.0 - self.noise_level <= 1.0 / r)
        return int(settled[0]) if len(settled) else self.num_train_timesteps

    def areas(self, tau: int) -> Areas:
        """Acceleration, deceleration and convergence for a given tau in [1, T]."""
        pivot = min(self.fastest_step, tau)
        return Areas(range(pivot), range(pivot, tau), range(tau, self.num_train_timesteps))


@dataclass(frozen=True)
class SpeeDSettings:
    """SpeeD's numbers, checked and resolved for one process.

    Attributes:
        k: How many times more often a step before tau is drawn than one from tau on; at least 1.
        tau: First timestep of the convergence area, in [1, T].
        lambda_: Upper end of the change-aware weights, in [0.5, 1]; the lower end is 1 - lambda_.
        tau_found: False if tau was to come from r but the process never settles that far (tau is T then).
    """

    k: float
    tau: int
    lambda_: float
    tau_found: bool = True

    @classmethod
    def resolve(
        cls, process: ForwardProcess, *, k: float, tau: int | None, r: float, lambda_: float
    ) -> "SpeeDSettings":
        """Checks the numbers against their ranges and finds tau from `r` where it is not given.

        Raises:
            InputError: k below 1, tau outside [1, T], r not above 1, lambda_ outside [0.5, 1], or not finite.
        """
        for name, value in (("speed_k", k), ("speed_tau", tau or 1), ("speed_r", r), ("speed_lambda", lambda_)):
            if not isinstance(value, int | float):
                raise InputError(f"{name}={value!r}: must be a number.")
        num_timesteps = process.num_train_timesteps
        if not (math.isfinite(k) and k >= 1):
            raise InputError(f"speed_k={k}: must be a finite number of at least 1 (1 draws all timesteps alike).")
        if not 0.5 <= lambda_ <= 1:
            raise InputError(
                f"speed_lambda={lambda_}: must lie in [0.5, 1]; the weights run from 1 - lambda to lambda, "
                "so above 1 some would be negative."
            )
        if tau is not None:
            if not math.isfinite(tau) or tau != int(tau) or not 1 <= tau <= num_timesteps:
                raise InputError(f"speed_tau={tau}: must be a whole number in [1, {num_timesteps}], or None (from r).")
            return cls(k, int(tau), lambda_)
        if not (math.isfinite(r) and r > 1):
            raise InputError(f"speed_r={r}: must be a finite number above 1.")
        found = process.first_settled_step(r)
        # A process whose very first step has settled would leave nothing to prefer; tau stays inside [1, T].
        return cls(k, max(found, 1), lambda_, tau_found=found < num_timesteps)
