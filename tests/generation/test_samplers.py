"""Samplers by name: the right scheduler for the schedule, and images that follow the data it was trained for."""

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
)

from pipeline_parts import MEAN, SCHEDULE, STD, GaussianDiT, generators, noise_of, pipeline_of, transformer
from speed_diffusers import InputError, SpeeDDDIMScheduler
from speed_diffusers.generation.generate import speed_pipeline
from speed_diffusers.generation.samplers import SAMPLERS, make_sampler

# diffusers takes arrays of tensors in a way that numpy will change.
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")

STOCHASTIC = {"ddpm", "euler_ancestral"}
# Largest error after 50 steps, on any of the schedules below, of values up to 4 deviations of 0.5 away. Another
# schedule's betas err by 0.3 at least; how exact each solver is on one schedule is in test_pipeline_solvers.py.
TOLERANCES = {"ddim": 0.15, "euler": 0.15, "dpmsolver++": 0.08, "unipc": 0.08, "deis": 0.04, "heun": 0.2}


def gaussian_pipeline(**schedule: Any) -> Any:
    """A pipeline with DDIM whose transformer is the best one for its schedule."""
    scheduler = DDIMScheduler(**(SCHEDULE | schedule), clip_sample=False)
    model = transformer(GaussianDiT, prediction_type=schedule.get("prediction_type", "epsilon"))
    model.alphas_cumprod = scheduler.alphas_cumprod.double().numpy()
    return pipeline_of(model, scheduler)


def check_images(name: str, pipeline: Any) -> None:
    """The images of a sampler are Gaussian like the data, and for deterministic ones each is the one of its noise."""
    sampling = speed_pipeline(pipeline, name)
    noise = noise_of(generators(64))
    num_steps = 200 if name in STOCHASTIC else 50
    images = sampling(None, 1.0, generators(64), num_steps, "latent", latents=noise).images
    if name in STOCHASTIC:
        # 4,096 values: standard errors of mean and deviation are 0.008 and 0.006; the rest is the steps' own error.
        assert abs(float(images.mean()) - MEAN) < 0.04 and abs(float(images.std()) - STD) < 0.03
        return
    alpha = float(pipeline.transformer.alphas_cumprod[int(sampling.scheduler.timesteps[0])])
    expected = MEAN + STD / np.sqrt(alpha * STD**2 + 1 - alpha) * (noise - np.sqrt(alpha) * MEAN)
    assert float((images - expected).abs().max()) < TOLERANCES[name]


def test_all_are_described_and_fit_the_pipeline() -> None:
    assert {*TOLERANCES, *STOCHASTIC} == set(SAMPLERS)
    for entry in SAMPLERS.values():
        assert entry.summary.endswith(".") and "arXiv" in entry.reference


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize(
    "schedule",
    [
        {},
        {"prediction_type": "v_prediction", "beta_schedule": "squaredcos_cap_v2"},
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
        {"trained_betas": np.linspace(0.001, 0.05, 400).tolist(), "num_train_timesteps": 400},
    ],
    ids=["linear", "cosine v", "scaled linear", "trained"],
)
def test_every_sampler_follows_the_schedule_of_the_model(name: str, schedule: dict[str, Any]) -> None:
    check_images(name, gaussian_pipeline(**schedule))


@pytest.mark.parametrize("name", SAMPLERS)
def test_schedules_that_few_solvers_know_are_handed_over_as_betas(name: str) -> None:
    pipeline = gaussian_pipeline()
    pipeline.scheduler = DDPMScheduler(**(SCHEDULE | {"beta_schedule": "sigmoid"}), clip_sample=False)
    pipeline.transformer.alphas_cumprod = pipeline.scheduler.alphas_cumprod.double().numpy()
    check_images(name, pipeline)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_schedule_without_signal_at_its_end_is_sampled_from_there(name: str) -> None:
    pipeline = gaussian_pipeline(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    if name in ("heun", "deis"):
        with pytest.raises(InputError, match=f"sampler={name}: .*ends without signal"):
            make_sampler(name, pipeline)
        return
    scheduler = make_sampler(name, pipeline)
    scheduler.set_timesteps(50)
    assert int(scheduler.timesteps[0]) == 999
    check_images(name, pipeline)


def test_ddpm_takes_the_variance_that_the_model_predicts() -> None:
    plain, learned = (pipeline_of(transformer(out_channels=channels)) for channels in (4, 8))
    assert make_sampler("ddpm", plain).config.variance_type == "fixed_small"
    scheduler = make_sampler("ddpm", learned)
    assert scheduler.config.variance_type == "learned_range" and scheduler.config.clip_sample is False
    scheduler.set_timesteps(250)
    # The original's respacing into 250: evenly, first and last timestep included.
    assert scheduler.timesteps.tolist() == [round(index * 999 / 249) for index in reversed(range(250))]


@pytest.mark.parametrize("name", SAMPLERS)
def test_flow_matching_has_solvers_of_its_own(name: str) -> None:
    flow = pipeline_of(transformer(GaussianDiT, flow=True), FlowMatchEulerDiscreteScheduler(shift=1.0))
    if name not in ("euler", "heun"):
        with pytest.raises(InputError, match=f"sampler={name.replace('+', '.')}: .*flow matching; use euler or heun"):
            make_sampler(name, flow)
        return
    scheduler = make_sampler(name, flow)
    assert type(scheduler) is {"euler": FlowMatchEulerDiscreteScheduler, "heun": FlowMatchHeunDiscreteScheduler}[name]
    noise = noise_of(generators(64))
    images = speed_pipeline(flow, name)(None, 1.0, None, 50, "latent", latents=noise).images
    assert float((images - (MEAN + STD * noise)).abs().max()) < {"euler": 0.08, "heun": 1e-3}[name]


def test_the_pipeline_keeps_its_scheduler_and_speeds_settings_stay_out() -> None:
    pipeline = pipeline_of(transformer(), SpeeDDDIMScheduler(clip_sample=False, timestep_spacing="trailing"))
    before = dict(pipeline.scheduler.config)
    for name in SAMPLERS:
        scheduler: Any = make_sampler(name, pipeline)
        assert scheduler is not pipeline.scheduler
        assert [key for key in scheduler.config if key.startswith("speed_")] == []
    assert dict(pipeline.scheduler.config) == before
    assert torch.equal(make_sampler("ddim", pipeline).alphas_cumprod, pipeline.scheduler.alphas_cumprod)


def test_unknown_sampler_names_the_nearest() -> None:
    with pytest.raises(
        InputError, match=r"Unknown sampler 'dpmsolver'. Did you mean 'dpmsolver\+\+'\? Allowed: ddim, "
    ):
        make_sampler("dpmsolver", gaussian_pipeline())


def test_ancestral_euler_says_what_it_lacks() -> None:
    with pytest.raises(InputError, match="euler_ancestral: .*predict the sample; use ddpm"):
        make_sampler("euler_ancestral", gaussian_pipeline(prediction_type="sample"))


def test_a_scheduler_without_the_training_noise_is_named() -> None:
    pipeline = gaussian_pipeline()
    pipeline.scheduler = EDMEulerScheduler()
    with pytest.raises(InputError, match="sampler=ddim: the pipeline's scheduler has no beta_start"):
        make_sampler("ddim", pipeline)


def respaced_by_dits_code(steps: int, num_timesteps: int = 1000) -> list[int]:
    """Timesteps as the respacing of DiT's code accumulates them, from an equal stride."""
    stride, position, found = (num_timesteps - 1) / (steps - 1), 0.0, []
    for _ in range(steps):
        found.append(round(position))
        position += stride
    return found


def test_respaced_steps_are_dits_up_to_the_rounding_of_halves() -> None:
    scheduler = DDPMScheduler(timestep_spacing="linspace")

    def differences(steps: int) -> list[int]:
        scheduler.set_timesteps(steps)
        ours = scheduler.timesteps.flip(0).tolist()
        pairs = zip(ours, respaced_by_dits_code(steps), strict=True)
        return [one - other for one, other in pairs if one != other]

    assert not any(differences(steps) for steps in (10, 25, 50, 100, 250, 500, 1000))
    assert len(differences(501)) == len(differences(999)) == 1
    assert all(abs(each) == 1 for steps in range(2, 1001) for each in differences(steps))
