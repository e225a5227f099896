"""Samplers by name: each makes a diffusers scheduler from the schedule that a model was trained with."""

from collections.abc import Callable, Mapping
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

from .errors import InputError
from .registry import Registry

Sampler = Callable[[Mapping[str, Any], bool], SchedulerMixin]
"""Config of a pipeline's scheduler, and whether the model predicts a variance, to a scheduler of its own."""

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
    return SAMPLERS[name].function(pipeline.scheduler.config, shape.out_channels == 2 * shape.in_channels)


def is_flow(config: Mapping[str, Any]) -> bool:
    """Whether a scheduler's config is that of flow matching, which has no betas."""
    return "beta_schedule" not in config and "shift" in config


def _schedule(config: Mapping[str, Any], sampler: str, spacing: str, *, zero_snr_known: bool = True) -> dict[str, Any]:
    """Keywords of the training's schedule, with the spacing of the sampler's steps.

    All are given, because in converting one scheduler into another diffusers leaves out values that are the first
    one's defaults, and the defaults differ.

    Raises:
        InputError: Flow matching, or a schedule that ends without signal where the sampler divides by the signal.
    """
    if is_flow(config):
        raise InputError(f"sampler={sampler}: the model was trained for flow matching; use euler or heun.")
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
def ddim(config: Mapping[str, Any], predicts_variance: bool) -> SchedulerMixin:
    """DDIM with eta 0."""
    return DDIMScheduler(**_schedule(config, "ddim", "leading"), clip_sample=False)


@SAMPLERS.register(
    "ddpm",
    summary="Ancestral sampling over evenly respaced steps, with the model's variance where it predicts one.",
    reference="Nichol and Dhariwal, arXiv 2102.09672, eq. 15 and section 4; else Ho et al., arXiv 2006.11239, eq. 7",
)
def ddpm(config: Mapping[str, Any], predicts_variance: bool) -> SchedulerMixin:
    """IDDPM's respaced sampler; DiT's scores are those of its 250 steps."""
    variance_type = "learned_range" if predicts_variance else "fixed_small"
    return DDPMScheduler(**_schedule(config, "ddpm", "linspace"), clip_sample=False, variance_type=variance_type)


@SAMPLERS.register(
    "dpmsolver++", summary="Deterministic, second order, multistep.", reference="Lu et al., arXiv 2211.01095, alg. 2"
)
def dpmsolver(config: Mapping[str, Any], predicts_variance: bool) -> SchedulerMixin:
    """DPM-Solver++(2M)."""
    return DPMSolverMultistepScheduler(**_schedule(config, "dpmsolver++", "linspace"))


@SAMPLERS.register(
    "unipc", summary="Deterministic predictor-corrector, second order.", reference="Zhao et al., arXiv 2302.04867"
)
def unipc(config: Mapping[str, Any], predicts_variance: bool) -> SchedulerMixin:
    """UniPC of order 2 (bh2)."""
    return UniPCMultistepScheduler(**_schedule(config, "unipc", "linspace"))


@SAMPLERS.register(
    "deis", summary="Deterministic exponential integrator, multistep.", reference="Zhang and Chen, arXiv 2204.13902"
)
def deis(config: Mapping[str, Any], predicts_variance: bool) -> SchedulerMixin:
    """DEIS of order 2 in log-rho."""
    return DEISMultistepScheduler(**_schedule(config, "deis", "linspace", zero_snr_known=False))


@SAMPLERS.register(
    "euler",
    summary="Deterministic, first order in sigma; also for flow matching.",
    reference="Karras et al., arXiv 2206.00364, alg. 1 without its correction",
)
def euler(config: Mapping[str, Any], predicts_variance: bool) -> SchedulerMixin:
    """Euler's method on the probability flow, or on the learned velocity."""
    if is_flow(config):
        return FlowMatchEulerDiscreteScheduler.from_config(config)
    return EulerDiscreteScheduler(**_schedule(config, "euler", "linspace"))


@SAMPLERS.register(
    "euler_ancestral",
    summary="Stochastic, first order in sigma.",
    reference="ancestral step of Ho et al., arXiv 2006.11239, in the sigmas of Karras et al., arXiv 2206.00364",
)
def euler_ancestral(config: Mapping[str, Any], predicts_variance: bool) -> SchedulerMixin:
    """Euler's method with fresh noise in each step."""
    if config.get("prediction_type") == "sample":
        raise InputError("sampler=euler_ancestral: diffusers has none for models that predict the sample; use ddpm.")
    return EulerAncestralDiscreteScheduler(**_schedule(config, "euler_ancestral", "linspace"))


@SAMPLERS.register(
    "heun",
    summary="Deterministic, second order, two evaluations a step; also for flow matching.",
    reference="Karras et al., arXiv 2206.00364, alg. 1",
)
def heun(config: Mapping[str, Any], predicts_variance: bool) -> SchedulerMixin:
    """Heun's method on the probability flow, or on the learned velocity."""
    if is_flow(config):
        kept = {key: config[key] for key in ("num_train_timesteps", "shift")}
        return FlowMatchHeunDiscreteScheduler(**kept)
    return HeunDiscreteScheduler(**_schedule(config, "heun", "linspace", zero_snr_known=False))
