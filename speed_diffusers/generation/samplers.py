"""Samplers by name: each makes a diffusers scheduler from the schedule that a model was trained with."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DiTPipeline,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)

from ..errors import InputError
from ..process import is_rectified_flow
from ..registry import Registry


@dataclass(frozen=True)
class Trained:
    """What a sampler must know of how a model was trained.

    Attributes:
        config: Config of the pipeline's scheduler: the schedule, and what the model predicts.
        is_flow: Whether it was trained for flow matching, which has no betas.
        predicts_variance: Whether the model predicts a variance beside the mean.
    """

    config: Mapping[str, Any]
    is_flow: bool
    predicts_variance: bool


Sampler = Callable[[Trained], SchedulerMixin]
"""How a model was trained, to a scheduler that samples from it."""

SAMPLERS: Registry[Sampler] = Registry("sampler")

SCHEDULE = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type")

# What all of diffusers' solvers know; DDPM's and DDIM's know some more.
COMMON_BETAS = ("linear", "scaled_linear", "squaredcos_cap_v2")


def make_sampler(name: str, pipeline: DiTPipeline) -> SchedulerMixin:
    """A scheduler for a pipeline by the name of its sampler; the pipeline keeps its own.

    Latents are never clipped, whatever the pipeline's scheduler says.

    Args:
        name: One of `SAMPLERS`.
        pipeline: Any DiT pipeline. Its scheduler's config tells the schedule and what the model predicts.

    Raises:
        InputError: Unknown name, or a sampler that cannot follow this schedule.
    """
    shape = pipeline.transformer.config
    predicts_variance = shape.out_channels == 2 * shape.in_channels
    return SAMPLERS[name].function(
        Trained(pipeline.scheduler.config, is_rectified_flow(pipeline.scheduler), predicts_variance)
    )


def _schedule(trained: Trained, sampler: str, spacing: str, *, zero_snr_known: bool = True) -> dict[str, Any]:
    """Keywords of the training's schedule, with the spacing of the sampler's steps.

    All are given, because in converting one scheduler into another diffusers leaves out values that are the first
    one's defaults, and the defaults differ.

    Raises:
        InputError: Flow matching, or a schedule that ends without signal where the sampler divides by the signal.
    """
    config = trained.config
    if trained.is_flow:
        raise InputError(f"sampler={sampler}: the model was trained for flow matching; use euler or heun.")
    if missing := [key for key in SCHEDULE if key not in config]:
        raise InputError(
            f"sampler={sampler}: the pipeline's scheduler has no {missing[0]}, so the noise of the model's training "
            "is not known; give the pipeline the scheduler of that first."
        )
    kept = {**{key: config[key] for key in SCHEDULE}, "timestep_spacing": spacing}
    if kept["trained_betas"] is None and kept["beta_schedule"] not in COMMON_BETAS:
        betas = {key: value for key, value in kept.items() if key.startswith(("beta", "num"))}
        kept |= {"trained_betas": DDPMScheduler(**betas).betas.tolist(), "beta_schedule": "linear"}
    if not config.get("rescale_betas_zero_snr"):
        return kept
    if not zero_snr_known:
        raise InputError(f"sampler={sampler}: the model's schedule ends without signal, where this solver fails.")
    # Such a schedule must be sampled from its very end (Lin et al., arXiv 2305.08891, section 3.3).
    ends = "trailing" if spacing == "leading" else spacing
    return {**kept, "timestep_spacing": ends, "rescale_betas_zero_snr": True}


@SAMPLERS.register("ddim", summary="Deterministic, first order.", reference="Song et al., arXiv 2010.02502, eq. 12")
def ddim(trained: Trained) -> SchedulerMixin:
    """DDIM with eta 0."""
    return DDIMScheduler(**_schedule(trained, "ddim", "leading"), clip_sample=False)


@SAMPLERS.register(
    "ddpm",
    summary="Ancestral sampling over evenly respaced steps, with the model's variance where it predicts one.",
    reference="Nichol and Dhariwal, arXiv 2102.09672, eq. 15 and section 4; else Ho et al., arXiv 2006.11239, eq. 7",
)
def ddpm(trained: Trained) -> SchedulerMixin:
    """IDDPM's respaced sampler; DiT's scores are those of its 250 steps.

    The steps are (T - 1) i / (n - 1), rounded; of 1,000 timesteps those of DiT's code with 10, 25, 50, 100, 250, 500
    and 1,000 steps. With an odd number of steps its accumulated stride may miss a half by rounding, and a timestep
    differs by 1: one of 501, and one of 999.
    """
    variance_type = "learned_range" if trained.predicts_variance else "fixed_small"
    return DDPMScheduler(**_schedule(trained, "ddpm", "linspace"), clip_sample=False, variance_type=variance_type)


@SAMPLERS.register(
    "dpmsolver++", summary="Deterministic, second order, multistep.", reference="Lu et al., arXiv 2211.01095, alg. 2"
)
def dpmsolver(trained: Trained) -> SchedulerMixin:
    """DPM-Solver++(2M)."""
    return DPMSolverMultistepScheduler(**_schedule(trained, "dpmsolver++", "linspace"))


@SAMPLERS.register(
    "unipc", summary="Deterministic predictor-corrector, second order.", reference="Zhao et al., arXiv 2302.04867"
)
def unipc(trained: Trained) -> SchedulerMixin:
    """UniPC of order 2 (bh2)."""
    return UniPCMultistepScheduler(**_schedule(trained, "unipc", "linspace"))


@SAMPLERS.register(
    "deis", summary="Deterministic exponential integrator, multistep.", reference="Zhang and Chen, arXiv 2204.13902"
)
def deis(trained: Trained) -> SchedulerMixin:
    """DEIS of order 2 in log-rho."""
    return DEISMultistepScheduler(**_schedule(trained, "deis", "linspace", zero_snr_known=False))


@SAMPLERS.register(
    "euler",
    summary="Deterministic, first order in sigma; also for flow matching.",
    reference="Karras et al., arXiv 2206.00364, alg. 1 without its correction",
)
def euler(trained: Trained) -> SchedulerMixin:
    """Euler's method on the probability flow, or on the learned velocity."""
    if trained.is_flow:
        return FlowMatchEulerDiscreteScheduler.from_config(trained.config)
    return EulerDiscreteScheduler(**_schedule(trained, "euler", "linspace"))


@SAMPLERS.register(
    "euler_ancestral",
    summary="Stochastic, first order in sigma.",
    reference="ancestral step of Ho et al., arXiv 2006.11239, in the sigmas of Karras et al., arXiv 2206.00364",
)
def euler_ancestral(trained: Trained) -> SchedulerMixin:
    """Euler's method with fresh noise in each step."""
    if trained.config.get("prediction_type") == "sample":
        raise InputError("sampler=euler_ancestral: diffusers has none for models that predict the sample; use ddpm.")
    return EulerAncestralDiscreteScheduler(**_schedule(trained, "euler_ancestral", "linspace"))


@SAMPLERS.register(
    "heun",
    summary="Deterministic, second order, two evaluations per step; also for flow matching.",
    reference="Karras et al., arXiv 2206.00364, alg. 1",
)
def heun(trained: Trained) -> SchedulerMixin:
    """Heun's method on the probability flow, or on the learned velocity."""
    if trained.is_flow:
        kept = {key: trained.config[key] for key in ("num_train_timesteps", "shift")}
        return FlowMatchHeunDiscreteScheduler(**kept)
    return HeunDiscreteScheduler(**_schedule(trained, "heun", "linspace", zero_snr_known=False))
