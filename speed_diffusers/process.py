"""The forward process as SpeeD sees it: noise level, its change, the three areas and tau.

Everything here is a float64 table over the T training timesteps, made on the CPU from the schedule alone. Index 0 is
the timestep with the least noise. Every process, variance-preserving or rectified flow, is described by its
signal-to-noise ratio, so that equal noise gets equal treatment on any schedule.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .errors import InputError

GRADIENT_THRESHOLD = 1e-4
"""Rate of the noise's standard deviation, per step, below which the authors' code calls steps meaningless."""

MAX_TIMESTEPS = 10**6
"""More are no process that anybody trains, and tables over them fill the memory."""


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
    """A noising process, described by the noise level of the variance-preserving process with the same SNR.

    That is x_t = sqrt(1 - n_t) x_0 + sqrt(n_t) eps. A rectified flow (1 - s) x_0 + s eps has the SNR ((1 - s) / s)^2
    and so n = s^2 / ((1 - s)^2 + s^2): scaling x_t, which a network can undo, is all that tells the two apart.

    Attributes:
        noise_level: Shape (T,), float64, in [0, 1]: n_t = 1 - alphas_cumprod_t = 1 / (1 + SNR_t).
        exact_log_snr: Shape (T,), float64, where it is known better than the noise level tells: with little signal
            left, 1 - n_t has lost its digits. None: taken from the noise level.
        flow_shift: None for a variance-preserving process. For a rectified flow the shift of its times towards noise
            for the resolution (SD3, arXiv 2403.03206, section 5.3.2); 1 where they are not shifted.
    """

    noise_level: Tensor
    exact_log_snr: Tensor | None = None
    flow_shift: float | None = None

    @classmethod
    def from_scheduler(cls, scheduler: Any) -> "ForwardProcess":
        """Reads the schedule of a diffusers scheduler.

        Of a variance-preserving scheduler the product of the alphas is taken again in float64: its own
        `alphas_cumprod` is a float32 running product, whose rounding shows in the differences between neighbouring
        steps. Where that table is another one altogether (CogVideoX shifts it), it is read as it stands, for
        `add_noise` uses it. Of a flow-matching scheduler `num_train_timesteps` and `shift` are read from the config;
        its sigmas belong to inference and change with `set_timesteps`. With `use_dynamic_shifting` training has no
        shift, as in diffusers' own scripts.

        Raises:
            InputError: The scheduler has neither betas nor a flow's shift, or no betas at all.
        """
        betas = getattr(scheduler, "betas", None)
        if isinstance(betas, Tensor):
            _check_size(betas.numel())
            betas = betas.detach().to("cpu", torch.float64)
            noise_level = 1.0 - torch.cumprod(1.0 - betas, dim=0)
            own = getattr(scheduler, "alphas_cumprod", None)
            if (
                isinstance(own, Tensor)
                and float((1.0 - own.to("cpu", torch.float64) - noise_level).abs().max()) > 1e-3
            ):
                return cls.from_alphas_cumprod(own)
            log_signal = torch.log1p(-betas).cumsum(0)
            return cls(noise_level, log_signal - torch.log(-torch.expm1(log_signal)))
        if is_rectified_flow(scheduler):
            config = scheduler.config
            shift = 1.0 if config.get("use_dynamic_shifting", False) else float(config["shift"])
            return cls.rectified_flow(config["num_train_timesteps"], shift=shift)
        raise InputError(
            f"{type(scheduler).__name__} has neither 'betas' nor the sigmas of a rectified flow, so SpeeD cannot read "
            "its noise schedule."
        )

    @classmethod
    def from_alphas_cumprod(cls, alphas_cumprod: Tensor) -> "ForwardProcess":
        """The variance-preserving process with these shares of signal.

        Args:
            alphas_cumprod: Shape (T,), in [0, 1], nowhere growing: index 0 has the least noise.

        Raises:
            InputError: Another shape, no values, values outside [0, 1], or growing ones.
        """
        signal = _checked(alphas_cumprod, "alphas_cumprod", rising=False)
        return cls(1.0 - signal, torch.log(signal) - torch.log1p(-signal))

    @classmethod
    def from_sigmas(cls, sigmas: Tensor) -> "ForwardProcess":
        """The rectified flow x = (1 - sigma) x_0 + sigma eps.

        Args:
            sigmas: Shape (T,), in [0, 1], nowhere falling: index 0 has the least noise.

        Raises:
            InputError: Another shape, no values, values outside [0, 1], or falling ones.
        """
        sigmas = _checked(sigmas, "sigmas", rising=True)
        log_snr = 2.0 * (torch.log1p(-sigmas) - torch.log(sigmas))
        return cls(torch.sigmoid(-log_snr), log_snr, 1.0)

    @classmethod
    def rectified_flow(cls, num_train_timesteps: int, *, shift: float = 1.0) -> "ForwardProcess":
        """The rectified flow at times u = 1/T, 2/T, ..., 1, with sigma = shift u / (1 + (shift - 1) u).

        Raises:
            InputError: No timesteps, or a shift that is not above 0.
        """
        _check_size(num_train_timesteps)
        if not (math.isfinite(shift) and shift > 0):
            raise InputError(f"shift={shift}: must be a finite number above 0.")
        time = torch.arange(1, num_train_timesteps + 1, dtype=torch.float64) / num_train_timesteps
        logit = torch.log(time) - torch.log1p(-time) + math.log(shift)
        return cls(torch.sigmoid(2.0 * logit), -2.0 * logit, shift)

    @property
    def num_train_timesteps(self) -> int:
        """T, the number of training timesteps."""
        return self.noise_level.numel()

    @cached_property
    def log_snr(self) -> Tensor:
        """Logarithm of the SNR, shape (T,), float64; -inf where no signal is left (zero terminal SNR, sigma = 1)."""
        if self.exact_log_snr is not None:
            return self.exact_log_snr
        return torch.log1p(-self.noise_level) - torch.log(self.noise_level)

    @property
    def snr(self) -> Tensor:
        """Signal-to-noise ratio, shape (T,), float64; 0 at the last step of a zero-terminal-SNR schedule."""
        return self.log_snr.exp()

    @cached_property
    def finite_log_snr(self) -> Tensor:
        """`log_snr` with infinite ends continued at the spacing of their neighbours, shape (T,), float64.

        Densities over log SNR take this one: the last step of a zero-terminal-SNR schedule then counts like one more
        step of the kind before it, and keeps a chance to be drawn.
        """
        log_snr = self.log_snr.clone()
        known = torch.isfinite(log_snr).nonzero().flatten()
        if not len(known):
            raise InputError("Every timestep of the noise schedule is pure noise or pure signal.")
        first, last = int(known[0]), int(known[-1])
        before, after = (min(first + 1, last), max(last - 1, first))
        slopes = [float(log_snr[a] - log_snr[b]) if a != b else 1.0 for a, b in ((first, before), (after, last))]
        steps = torch.arange(len(log_snr), dtype=torch.float64)
        log_snr[:first] = log_snr[first] + slopes[0] * (first - steps[:first])
        log_snr[last + 1 :] = log_snr[last] - slopes[1] * (steps[last + 1 :] - last)
        return log_snr

    @cached_property
    def log_snr_speed(self) -> Tensor:
        """|d log SNR / dt|, shape (T,), float64: what turns a density over log SNR into one over timesteps."""
        return derivative(self.finite_log_snr).abs()

    @property
    def flow_logit(self) -> Tensor:
        """logit(u) of the rectified-flow time u of each timestep before any shift, shape (T,), float64, finite.

        A variance-preserving process gets the time at which the flow has its SNR: u = 1 / (1 + sqrt(SNR)). Published
        densities over a flow's time (SD3, arXiv 2403.03206) so keep to the noise that they were made for.
        """
        return -0.5 * self.finite_log_snr - math.log(self.flow_shift or 1.0)

    @property
    def flow_time(self) -> Tensor:
        """The time u whose logit is `flow_logit`, shape (T,), float64, in [0, 1]; 1 where no signal is left."""
        return torch.sigmoid(-0.5 * self.log_snr - math.log(self.flow_shift or 1.0))

    @property
    def sigma(self) -> Tensor:
        """sigma of the rectified flow with the same SNR, shift included: 1 / (1 + sqrt(SNR)), shape (T,), float64."""
        return torch.sigmoid(-0.5 * self.log_snr)

    @cached_property
    def change(self) -> Tensor:
        """Derivative of the noise level over t, shape (T,), float64: central differences, one-sided at the ends."""
        return derivative(self.noise_level)

    @property
    def fastest_step(self) -> int:
        """t_{a-d}: the timestep at which the noise level grows fastest; acceleration ends here.

        Of several that differ by rounding only (symmetric schedules have pairs) it is the first.
        """
        change = self.change
        return int(torch.nonzero(change >= change.max() * (1.0 - 1e-9))[0])

    @property
    def noise_growth(self) -> Tensor:
        """Derivative over t of the noise's standard deviation as it is scheduled, shape (T,), float64.

        That is sqrt(n) on a variance-preserving process and sigma on a rectified flow.
        """
        deviation = self.noise_level.sqrt() if self.flow_shift is None else self.sigma
        return derivative(deviation)

    @property
    def dual_pivot(self) -> int:
        """The pivot m of the authors' code: one past the first step at which the noise grows by less than 1e-4.

        What grows is the noise's standard deviation.

        Their threshold is absolute, so m belongs to schedules like theirs of about 1,000 steps; 642 on DiT's.

        Raises:
            InputError: No step is that slow, or only the last, as on a rectified flow or with few timesteps.
        """
        # Within rounding of the threshold is not below it: a flow of 10,000 steps grows by 1e-4 everywhere.
        slow = torch.nonzero(self.noise_growth < GRADIENT_THRESHOLD * (1.0 - 1e-9))
        pivot = int(slow[0]) + 1 if len(slow) else self.num_train_timesteps
        if pivot >= self.num_train_timesteps:
            raise InputError(
                f"The noise's standard deviation grows by {GRADIENT_THRESHOLD:g} or more at every step of this noise "
                "schedule, so the pivot of the authors' code does not exist; use speed_draw='independent' or "
                "'stratified', and speed_sampling='asymmetric'."
            )
        return pivot

    def first_settled_step(self, r: float) -> int:
        """tau(r): the first timestep with 1 - noise level <= 1/r, or T if there is none.

        On DiT's linear schedule r = 145 gives 700, the value that the authors' code fixes for every schedule.

        Args:
            r: Magnitude by which the signal's variance must have shrunk, above 1.
        """
        # A step at 1/r but for the rounding of a float32 schedule is settled, on every machine.
        settled = torch.nonzero(1.0 - self.noise_level <= (1.0 + 1e-6) / r)
        return int(settled[0]) if len(settled) else self.num_train_timesteps

    def areas(self, tau: int) -> Areas:
        """Acceleration, deceleration and convergence for a given tau in [1, T]."""
        pivot = min(self.fastest_step, tau)
        return Areas(range(pivot), range(pivot, tau), range(tau, self.num_train_timesteps))


def is_rectified_flow(scheduler: Any) -> bool:
    """Whether a scheduler noises by (1 - sigma) x_0 + sigma eps with sigmas from its config, as FlowMatchEuler."""
    config = getattr(scheduler, "config", {})
    return (
        not isinstance(getattr(scheduler, "betas", None), Tensor)
        and hasattr(scheduler, "scale_noise")
        and {"num_train_timesteps", "shift"} <= set(config)
    )


def derivative(values: Tensor) -> Tensor:
    """Derivative over t, (T,): central differences, one-sided at the ends.

    Raises:
        InputError: There is one timestep only.
    """
    if len(values) < 2:
        raise InputError(
            "num_train_timesteps=1: nothing changes over one timestep; SpeeD needs at least 2, and one is for "
            "speed_sampling='uniform' with speed_weighting='none' alone."
        )
    return torch.gradient(values)[0]


def _check_size(num_train_timesteps: int) -> None:
    if num_train_timesteps < 1:
        raise InputError(f"num_train_timesteps={num_train_timesteps}: must be at least 1.")
    if num_train_timesteps > MAX_TIMESTEPS:
        raise InputError(f"num_train_timesteps={num_train_timesteps}: must be at most {MAX_TIMESTEPS}.")


def _checked(values: Tensor, name: str, *, rising: bool) -> Tensor:
    values = torch.as_tensor(values).detach().to("cpu", torch.float64)
    if values.dim() != 1:
        raise InputError(f"{name}: must have one axis, the timesteps, but its shape is {tuple(values.shape)}.")
    _check_size(values.numel())
    if not bool(((values >= 0) & (values <= 1)).all()):
        raise InputError(f"{name}: must lie in [0, 1], but runs from {float(values.min())} to {float(values.max())}.")
    steps = values.diff() if rising else -values.diff()
    if bool((steps < 0).any()):
        at = int((steps < 0).nonzero()[0])
        order = "fall" if rising else "grow"
        raise InputError(f"{name}: must not {order} (index 0 has the least noise), but does from {at} to {at + 1}.")
    return values
