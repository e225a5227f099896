"""SpeeD without a diffusers scheduler: the same numbers, from tables alone."""

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

from speed_diffusers import InputError, SpeeDDDPMScheduler, SpeeDFlowMatchEulerDiscreteScheduler, functional


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sampling": "uniform", "weighting": "none"},
        {"sampling": "logit_normal:mean=-0.5", "weighting": "min_snr:gamma=3", "draw": "stratified"},
        {"weighting": "official", "tau": 700, "draw": "paired", "normalize_weights": True},
    ],
)
def test_tables_give_what_the_scheduler_gives(options: dict[str, object]) -> None:
    config = {f"speed_{key}": value for key, value in options.items()}
    scheduler = SpeeDDDPMScheduler(**config, prediction_type="v_prediction")
    alphas_cumprod = torch.cumprod(1.0 - scheduler.betas.double(), 0)
    tables = functional.speed_tables(alphas_cumprod=alphas_cumprod, prediction_type="v_prediction", **options)
    timesteps = functional.draw(tables, 256, seeded(1))
    assert torch.equal(timesteps, scheduler.sample_timesteps(256, generator=seeded(1)))
    torch.testing.assert_close(
        functional.weights(tables, timesteps), scheduler.loss_weights(timesteps), rtol=1e-5, atol=1e-7
    )


def test_a_flow_by_its_sigmas_or_by_its_number_of_timesteps() -> None:
    sigmas = FlowMatchEulerDiscreteScheduler(shift=3.0).sigmas.flip(0)
    scheduler = SpeeDFlowMatchEulerDiscreteScheduler(shift=3.0, speed_weighting="min_snr")
    tables = functional.speed_tables(sigmas=sigmas, weighting="min_snr")
    indices = functional.draw(tables, 512, seeded(0))
    assert torch.equal(scheduler.training_timesteps[indices], scheduler.sample_timesteps(512, generator=seeded(0)))
    expected = scheduler.loss_weights(scheduler.training_timesteps[indices])
    torch.testing.assert_close(functional.weights(tables, indices), expected, rtol=1e-3, atol=1e-6)
    plain = functional.speed_tables(num_train_timesteps=1000)
    assert plain.settings.tau == 923 and plain.settings.prediction_type == "flow_prediction"


def test_k_falls_with_the_progress_that_is_passed() -> None:
    early, late = (functional.speed_tables(num_train_timesteps=100, anneal_start=0.0, progress=p) for p in (0.0, 1.0))
    assert float(early.pmf[0] / early.pmf[-1]) == 5.0 and float(late.pmf.std()) < 1e-12


@pytest.mark.parametrize("shape", [(), (4,), (2, 3)])
def test_weights_keep_the_shape(shape: tuple[int, ...]) -> None:
    tables = functional.speed_tables(num_train_timesteps=10)
    weights = functional.weights(tables, torch.zeros(shape, dtype=torch.int64))
    assert weights.shape == shape and weights.dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "Give the noise schedule once: alphas_cumprod, sigmas or num_train_timesteps"),
        ({"sigmas": torch.tensor([0.1, 0.9]), "num_train_timesteps": 2}, "Give the noise schedule once"),
        ({"num_train_timesteps": 0}, "num_train_timesteps=0: must be at least 1"),
        ({"num_train_timesteps": 2**63}, "num_train_timesteps=9223372036854775808: must be at most 1000000"),
        ({"num_train_timesteps": 1}, "num_train_timesteps=1: .*SpeeD needs at least 2"),
        ({"num_train_timesteps": 10, "sampling": "assymetric"}, "Unknown timestep density .* 'asymmetric'"),
        ({"num_train_timesteps": 10, "prediction_type": "x0", "weighting": "p2"}, "Unknown prediction_type 'x0'"),
        ({"num_train_timesteps": 10, "anneal_start": 0.5}, "speed_sampling='asymmetric' with .*pass progress"),
        (
            {"num_train_timesteps": 10, "sampling": "information_rate"},
            "sampling='information_rate' learns from",
        ),
        ({"alphas_cumprod": DDPMScheduler().alphas_cumprod.flip(0)}, "alphas_cumprod: must not grow"),
    ],
)
def test_bad_input_is_one_line(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=f"^{message}") as error:
        functional.speed_tables(**options)  # type: ignore[arg-type]
    assert "\n" not in str(error.value)
