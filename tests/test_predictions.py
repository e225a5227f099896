"""Errors of what a network predicts against errors of the noise, measured on the processes themselves."""

import pytest
import torch
from diffusers import DDPMScheduler

from noise_schedules import process_named
from speed_diffusers.errors import InputError
from speed_diffusers.predictions import EPSILON_ERROR_RATIOS, SNR_BOUNDS, epsilon_error_ratio, weights_by_snr
from speed_diffusers.process import ForwardProcess

TIMESTEPS = torch.tensor([0, 10, 219, 500, 700, 900])


def noised() -> tuple[torch.Tensor, ...]:
    """x_0, eps, an error to make, and a and s of x_t = a x_0 + s eps, all float64, of DiT's schedule."""
    generator = torch.Generator().manual_seed(0)
    clean, noise, wrong = (torch.randn(len(TIMESTEPS), 64, generator=generator).double() for _ in range(3))
    level = process_named("linear").noise_level[TIMESTEPS, None]
    return clean, noise, wrong, (1 - level).sqrt(), level.sqrt()


def squared(values: torch.Tensor) -> torch.Tensor:
    return values.square().mean(1)


def test_ratio_of_x0_and_v_is_what_a_wrong_prediction_does_to_epsilon() -> None:
    clean, noise, wrong, a, s = noised()
    noisy = a * clean + s * noise
    from_x0 = (noisy - a * (clean + wrong)) / s
    process = process_named("linear")
    ratio = epsilon_error_ratio(process, "sample")[TIMESTEPS]
    torch.testing.assert_close(squared(from_x0 - noise), ratio * squared(wrong), rtol=1e-9, atol=0)
    velocity = DDPMScheduler().get_velocity(clean, noise, TIMESTEPS)
    from_v = s * noisy + a * (velocity + wrong)
    ratio = epsilon_error_ratio(process, "v_prediction")[TIMESTEPS]
    # get_velocity has the schedule in float32.
    torch.testing.assert_close(squared(from_v - noise), ratio * squared(wrong), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["flow", "flow, shift 3"])
def test_ratio_of_the_velocity_on_a_flow(name: str) -> None:
    clean, noise, wrong, _, _ = noised()
    process = process_named(name)
    sigma = process.sigma[TIMESTEPS, None]
    noisy = (1 - sigma) * clean + sigma * noise
    implied = noisy + (1 - sigma) * (noise - clean + wrong)
    ratio = epsilon_error_ratio(process, "flow_prediction")[TIMESTEPS]
    torch.testing.assert_close(squared(implied - noise), ratio * squared(wrong), rtol=1e-9, atol=0)


def test_ratios_in_closed_form() -> None:
    process = process_named("linear")
    snr, level = process.snr, process.noise_level
    torch.testing.assert_close(epsilon_error_ratio(process, "epsilon"), torch.ones(1000).double())
    torch.testing.assert_close(epsilon_error_ratio(process, "sample"), snr, rtol=1e-12, atol=0)
    torch.testing.assert_close(epsilon_error_ratio(process, "v_prediction"), 1 - level, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction", "flow_prediction"])
def test_without_signal_an_error_of_the_prediction_is_none_of_epsilon(prediction_type: str) -> None:
    for name in ("linear, zero terminal SNR", "flow"):
        assert float(epsilon_error_ratio(process_named(name), prediction_type)[-1]) < 1e-30


@pytest.mark.parametrize("prediction_type", EPSILON_ERROR_RATIOS)
def test_a_weight_without_limit_stays_at_its_bound(prediction_type: str) -> None:
    log_snr = torch.tensor([float("inf"), 40.0, 27.0, 0.0, -13.0, -30.0, -float("inf")], dtype=torch.float64)
    process = ForwardProcess(torch.sigmoid(-log_snr), log_snr)
    for power in (-1.0, -0.5, 0.0, 0.5):
        weights = weights_by_snr(lambda snr, power=power: snr**power, process, prediction_type)
        bounds = torch.tensor(SNR_BOUNDS, dtype=torch.float64)
        at_bounds = weights_by_snr(
            lambda snr, power=power: snr**power,
            ForwardProcess(1 / (1 + bounds), bounds.log()),
            prediction_type,
        )
        assert bool(torch.isfinite(weights).all())
        assert float(weights[0]) <= float(at_bounds[1]) * (1 + 1e-9)
        assert float(weights[-1]) <= float(at_bounds[0]) * (1 + 1e-9)
        # Within the bounds nothing is touched: SNR 1 has weight 1 times the ratio there.
        assert float(weights[3]) == float(EPSILON_ERROR_RATIOS[prediction_type](torch.ones(1)))


def test_unknown_prediction_type_names_the_nearest() -> None:
    for function in (
        lambda: epsilon_error_ratio(process_named("flow"), "v-prediction"),
        lambda: weights_by_snr(torch.ones_like, process_named("flow"), "v-prediction"),
    ):
        with pytest.raises(InputError, match="^Unknown prediction_type 'v-prediction'. Did you mean 'v_prediction'"):
            function()
