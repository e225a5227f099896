"""Loss weights: the paper's numbers, numpy's gradient, and their range on any schedule."""

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

from speed_diffusers import SpeeDDDIMScheduler, SpeeDDDPMScheduler
from speed_diffusers.errors import InputError
from speed_diffusers.process import ForwardProcess, SpeeDSettings
from speed_diffusers.weightings import timestep_weights


def weights_of(name: str, *, lambda_: float = 0.6, tau: int | None = None, **config: object) -> torch.Tensor:
    process = ForwardProcess.from_scheduler(DDPMScheduler(**config))
    return timestep_weights(name, process, SpeeDSettings.resolve(process, k=5.0, tau=tau, r=145.0, lambda_=lambda_))


def reference_weights(lambda_: float) -> np.ndarray:
    """Change-aware weights of DiT's schedule from their definition, in float64."""
    noise_level = 1.0 - np.cumprod(1.0 - np.linspace(1e-4, 0.02, 1000, dtype=np.float64))
    gradient = np.gradient(noise_level)
    rescaled = (gradient - gradient.min()) / (gradient.max() - gradient.min())
    return (1 - lambda_) + (2 * lambda_ - 1) * rescaled


@pytest.mark.parametrize(
    ("timestep", "weight"), [(0, 0.409), (100, 0.539), (219, 0.600), (300, 0.577), (500, 0.458), (699, 0.407)]
)
def test_weights_of_the_paper(timestep: int, weight: float) -> None:
    assert float(weights_of("change_aware")[timestep]) == pytest.approx(weight, abs=5.1e-4)


@pytest.mark.parametrize("lambda_", [0.5, 0.6, 0.8, 1.0])
def test_weights_are_the_rescaled_gradient(lambda_: float) -> None:
    ours = weights_of("change_aware", lambda_=lambda_)
    assert ours.dtype == torch.float64
    # The schedule itself is given in float32.
    np.testing.assert_allclose(ours.numpy(), reference_weights(lambda_), atol=1e-4)


@pytest.mark.parametrize("lambda_", [0.6, 0.8, 1.0])
@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"])
def test_weights_span_exactly_their_range(lambda_: float, schedule: str) -> None:
    weights = weights_of("change_aware", lambda_=lambda_, beta_schedule=schedule)
    assert float(weights.min()) == pytest.approx(1 - lambda_, abs=1e-12)
    assert float(weights.max()) == pytest.approx(lambda_, abs=1e-12)
    assert float(weights.min()) >= 0


def test_heaviest_step_is_where_the_noise_level_grows_fastest() -> None:
    assert int(weights_of("change_aware").argmax()) == 219


def test_lambda_of_a_half_is_constant() -> None:
    assert torch.equal(weights_of("change_aware", lambda_=0.5), torch.full((1000,), 0.5, dtype=torch.float64))


def test_tau_does_not_cut_the_weights() -> None:
    weights = weights_of("change_aware", tau=300)
    assert torch.equal(weights, weights_of("change_aware", tau=900))
    assert float(weights.diff().abs().max()) < 0.01


@pytest.mark.parametrize("num_timesteps", [3, 10, 10000])
def test_any_number_of_timesteps(num_timesteps: int) -> None:
    weights = weights_of("change_aware", num_train_timesteps=num_timesteps)
    assert float(weights.min()) == pytest.approx(0.4) and float(weights.max()) == pytest.approx(0.6)


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_zero_terminal_snr_is_finite(schedule: str) -> None:
    weights = weights_of("change_aware", beta_schedule=schedule, rescale_betas_zero_snr=True)
    assert bool(torch.isfinite(weights).all())
    assert float(weights.min()) >= 0.4 - 1e-12 and float(weights.max()) <= 0.6 + 1e-12


def test_none_is_exactly_one() -> None:
    assert torch.equal(weights_of("none"), torch.ones(1000, dtype=torch.float64))


def test_constant_rate_of_change_is_refused_in_one_line() -> None:
    with pytest.raises(InputError, match="speed_weighting='change_aware': .*constant rate.*'none'") as error:
        weights_of("change_aware", num_train_timesteps=2)
    assert "\n" not in str(error.value)
    assert torch.equal(weights_of("none", num_train_timesteps=2), torch.ones(2, dtype=torch.float64))


def test_unknown_weighting_names_the_nearest() -> None:
    with pytest.raises(InputError, match=r"Unknown loss weighting \(speed_weighting\) 'change-aware'.*'change_aware'"):
        weights_of("change-aware")


@pytest.mark.parametrize("host", [SpeeDDDPMScheduler, SpeeDDDIMScheduler])
@pytest.mark.parametrize("shape", [(), (5,), (2, 3)])
def test_scheduler_gives_float32_of_the_same_shape(host: type, shape: tuple[int, ...]) -> None:
    timesteps = torch.randint(0, 1000, shape, generator=torch.Generator().manual_seed(0))
    weights = host().loss_weights(timesteps)
    assert weights.dtype == torch.float32 and weights.shape == shape and weights.device == timesteps.device
    np.testing.assert_allclose(weights.numpy(), reference_weights(0.6)[timesteps.numpy()], atol=1e-4)


def test_baseline_weights_are_exactly_one() -> None:
    scheduler = SpeeDDDPMScheduler(speed_sampling="uniform", speed_weighting="none")
    assert torch.equal(scheduler.loss_weights(torch.arange(1000)), torch.ones(1000))


def test_changing_a_result_does_not_change_the_table() -> None:
    scheduler = SpeeDDDPMScheduler()
    timesteps = torch.arange(4)
    before = scheduler.loss_weights(timesteps)
    scheduler.loss_weights(timesteps).zero_()
    assert torch.equal(scheduler.loss_weights(timesteps), before)
