"""Every solver of the pipeline against closed forms, and the learned variance against float64 arithmetic."""

import copy
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch import Tensor

from pipeline_parts import (
    ALPHAS_CUMPROD,
    MEAN,
    SCHEDULE,
    STD,
    GaussianDiT,
    generators,
    noise_of,
    pipeline_of,
    transformer,
)

# diffusers takes arrays of tensors in a way that numpy will change.
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")

LABELS = [3, 10, 0, 7, 7]
LEARNED = {**SCHEDULE, "variance_type": "learned_range", "timestep_spacing": "linspace", "clip_sample": False}


def learned_model() -> Any:
    """Mean and variance depend on timestep, class and sample; the guided mean stays near the data."""
    return transformer(GaussianDiT, out_channels=8, ripple=0.3)


def respaced_sampling(
    model: Any,
    num_steps: int,
    guide: tuple[float, int] = (1.0, 4),
    *,
    spacing: str = "iddpm",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """IDDPM's ancestral sampling (Nichol and Dhariwal, arXiv 2102.09672, eq. 9 to 15, section 4).

    In float64; the noise is drawn as `dtype`, because it is not the same in another one.
    """
    labels = LABELS
    model, sources = copy.deepcopy(model).double(), generators(len(labels))
    stride = (1000 - 1) / (num_steps - 1)
    kept = [round(index * stride) for index in range(num_steps)]
    if spacing == "trailing":
        kept = [1000 * (index + 1) // num_steps - 1 for index in range(num_steps)]
    kept_alphas = ALPHAS_CUMPROD[kept]
    before = np.append(1.0, kept_alphas[:-1])
    betas = 1 - kept_alphas / before
    posterior = betas * (1 - before) / (1 - kept_alphas)
    sample = noise_of(sources, dtype).double()
    scale, guided = guide
    for index in reversed(range(num_steps)):
        timesteps = torch.full((len(labels),), kept[index])
        with torch.no_grad():
            output = model(sample, timesteps, torch.tensor(labels))[0]
            free = model(sample, timesteps, torch.full((len(labels),), 10))[0]
        epsilon, fraction = output[:, :4].clone(), (output[:, 4:] + 1) / 2
        epsilon[:, :guided] = free[:, :guided] + scale * (output[:, :guided] - free[:, :guided])
        clean = sample / np.sqrt(kept_alphas[index]) - np.sqrt(1 / kept_alphas[index] - 1) * epsilon
        mean = np.sqrt(before[index]) * betas[index] / (1 - kept_alphas[index]) * clean
        mean = mean + np.sqrt(1 - betas[index]) * (1 - before[index]) / (1 - kept_alphas[index]) * sample
        sample = mean
        if index > 0:
            log_variance = fraction * np.log(betas[index]) + (1 - fraction) * np.log(posterior[index])
            sample = mean + torch.exp(0.5 * log_variance) * noise_of(sources, dtype).double()
    return sample


@pytest.mark.parametrize(("num_steps", "guide"), [(50, (1.0, 4)), (50, (4.0, 3)), (250, (1.0, 4)), (250, (2.0, 4))])
def test_learned_variance_is_iddpms_respaced_sampling(num_steps: int, guide: tuple[float, int]) -> None:
    model = learned_model()
    expected = respaced_sampling(model, num_steps, guide)
    options = {"guidance_scale": guide[0], "guidance_channels": guide[1], "num_inference_steps": num_steps}
    draw = pipeline_of(model, DDPMScheduler(**LEARNED))
    images = draw(LABELS, generator=generators(5), output_type="latent", **options).images
    assert images.dtype == torch.float32
    assert float((images - expected).abs().max()) < 1e-4
    assert 0.3 < float(expected.std()) < 2, "of the size of the data, so that the tolerance means something"


def test_learned_variance_is_exact_in_float64() -> None:
    model = learned_model().double()
    scheduler = DDPMScheduler(**LEARNED)
    scheduler.alphas_cumprod, scheduler.one = torch.from_numpy(ALPHAS_CUMPROD), torch.ones((), dtype=torch.float64)
    images = pipeline_of(model, scheduler)(LABELS, 1.0, generators(5), 50, "latent").images
    assert images.dtype == torch.float64
    expected = respaced_sampling(model, 50, dtype=torch.float64)
    assert float((images - expected).abs().max()) < 1e-9


def test_nothing_is_noisy_after_the_last_step_of_a_spacing_that_stops_early() -> None:
    model = learned_model()
    scheduler = DDPMScheduler(**{**LEARNED, "timestep_spacing": "trailing"})
    images = pipeline_of(model, scheduler)(LABELS, 1.0, generators(5), 10, "latent").images
    assert scheduler.timesteps[-1] == 99
    expected = respaced_sampling(model, 10, spacing="trailing")
    assert float((images - expected).abs().max()) < 1e-4


def exact_end(scheduler: Any, noise: Tensor) -> Tensor:
    """Where the probability flow (Song et al., arXiv 2011.13456, eq. 13) takes noise if the data are Gaussian."""
    if not hasattr(scheduler, "init_noise_sigma"):
        return MEAN + STD * noise
    alpha = np.interp(float(scheduler.timesteps[0]), np.arange(1000), ALPHAS_CUMPROD)
    start = noise
    if float(scheduler.init_noise_sigma) != 1 and scheduler.config.timestep_spacing != "leading":
        start = noise * np.sqrt(1 - alpha)  # pure noise of the schedule's own size
    return MEAN + STD / np.sqrt(alpha * STD**2 + 1 - alpha) * (start - np.sqrt(alpha) * MEAN)


# Largest error of any element after 50 steps; first-order solvers err by a tenth of the data's deviations of 0.5 x 4.
TOLERANCES = {
    "DDIMScheduler": 0.13,
    "PNDMScheduler": 1e-3,
    "DPMSolverMultistepScheduler": 0.02,
    "DPMSolverSinglestepScheduler": 0.08,
    "UniPCMultistepScheduler": 0.02,
    "DEISMultistepScheduler": 0.04,
    "LMSDiscreteScheduler": 1e-3,
    "EulerDiscreteScheduler": 0.13,
    "HeunDiscreteScheduler": 0.01,
    "KDPM2DiscreteScheduler": 0.03,
    "FlowMatchEulerDiscreteScheduler": 0.08,
    "FlowMatchHeunDiscreteScheduler": 1e-3,
}
STOCHASTIC = ("DDPMScheduler", "EulerAncestralDiscreteScheduler", "KDPM2AncestralDiscreteScheduler")


def scheduler_of(name: str, **options: Any) -> Any:
    kind = getattr(diffusers, name)
    if name.startswith("FlowMatch"):
        return kind()
    # These two clip by default, and latents are not bounded by 1.
    clip = {"clip_sample": False} if name in ("DDIMScheduler", "DDPMScheduler") else {}
    return kind(**SCHEDULE, **clip, **options)


def gaussian_images(scheduler: Any, num_steps: int, noise: Tensor | None, count: int = 64) -> Tensor:
    model = transformer(GaussianDiT, flow=not hasattr(scheduler, "scale_model_input"))
    model.prediction_type = scheduler.config.get("prediction_type", "epsilon")
    options = {"num_inference_steps": num_steps, "output_type": "latent", "latents": noise}
    return pipeline_of(model, scheduler)(num_images=count, generator=generators(count), **options).images


FLOW = [name for name in TOLERANCES if name.startswith("FlowMatch")]
DIFFUSION = [name for name in TOLERANCES if name not in FLOW]
PREDICTIONS = [(name, kind) for name in DIFFUSION for kind in ("epsilon", "v_prediction")]


@pytest.mark.parametrize(("name", "prediction_type"), [*PREDICTIONS, *((name, None) for name in FLOW)])
def test_deterministic_solvers_follow_the_probability_flow(name: str, prediction_type: str | None) -> None:
    scheduler = scheduler_of(name, **({"prediction_type": prediction_type} if prediction_type else {}))
    noise = noise_of(generators(64))
    errors = []
    for num_steps in (25, 50):
        images = gaussian_images(scheduler, num_steps, noise)
        errors.append(float((images - exact_end(scheduler, noise)).abs().max()))
    # diffusers' PNDM mixes the answers of several timesteps before it makes them noise, which is first order for v.
    first_order = (name, prediction_type) == ("PNDMScheduler", "v_prediction")
    assert errors[1] < (0.1 if first_order else TOLERANCES[name])
    assert errors[1] < 0.6 * errors[0], "more steps, less error"


@pytest.mark.parametrize("name", STOCHASTIC)
def test_stochastic_solvers_end_in_the_distribution_of_the_data(name: str) -> None:
    images = gaussian_images(scheduler_of(name, timestep_spacing="linspace"), 200, None, count=128)
    # 8,192 values: standard errors of mean and deviation are 0.006 and 0.004; the rest is the steps' own error.
    assert abs(float(images.mean()) - MEAN) < 0.03
    assert abs(float(images.std()) - STD) < 0.03


def test_ddim_with_eta_draws_from_the_generators() -> None:
    scheduler = scheduler_of("DDIMScheduler")
    model = transformer(GaussianDiT)
    draw = pipeline_of(model, scheduler)
    options: dict[str, Any] = {"num_images": 64, "num_inference_steps": 100, "output_type": "latent", "eta": 1.0}
    first = draw(generator=generators(64), **options).images
    assert torch.equal(draw(generator=generators(64), **options).images, first)
    assert not torch.equal(draw(generator=generators(64), **(options | {"eta": 0.0})).images, first)
    assert abs(float(first.mean()) - MEAN) < 0.05 and abs(float(first.std()) - STD) < 0.06


@pytest.mark.parametrize(
    ("name", "how"),
    [
        *((name, "inherited") for name in DIFFUSION),
        ("DPMSolverMultistepScheduler", "given"),
        ("DPMSolverSinglestepScheduler", "given"),
    ],
)
def test_a_learned_variance_left_in_a_solvers_config_does_no_harm(name: str, how: str) -> None:
    kind = getattr(diffusers, name)
    if how == "given":
        scheduler, plain = kind(**SCHEDULE, variance_type="learned_range"), kind(**SCHEDULE)
    else:
        # As loaded from a file, where every value is given; values that are another class's default get lost.
        scheduler = kind.from_config({**dict(DDPMScheduler(**LEARNED).config), "_use_default_values": []})
        plain = kind.from_config({**dict(scheduler.config), "variance_type": None, "_use_default_values": []})
    assert scheduler.config["variance_type"] == "learned_range"
    model = learned_model()
    options = {"guidance_scale": 2.0, "num_inference_steps": 6, "output_type": "latent"}
    images = [pipeline_of(model, one)(LABELS, generator=generators(5), **options).images for one in (scheduler, plain)]
    assert images[0].shape == (5, 4, 4, 4) and torch.isfinite(images[0]).all()
    assert torch.equal(images[0], images[1])
    assert scheduler.config["variance_type"] == "learned_range", "the scheduler itself is left alone"


def test_the_mean_of_a_model_with_a_variance_serves_every_solver() -> None:
    with_variance = learned_model()
    images = []
    for scheduler in (DDIMScheduler(**SCHEDULE, clip_sample=False), DDPMScheduler(**SCHEDULE, clip_sample=False)):
        draw = pipeline_of(with_variance, scheduler)
        images.append(draw(LABELS, 2.0, generators(5), 20, "latent").images)
    assert all(one.shape == (5, 4, 4, 4) and torch.isfinite(one).all() for one in images)
