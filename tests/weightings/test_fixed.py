"""Loss weights: the paper's numbers, numpy's gradient, and their range on any schedule."""

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_loss_weighting_for_sd3

from noise_schedules import SCHEDULES, process_named, settings_of
from speed_diffusers import SpeeDDDIMScheduler, SpeeDDDPMScheduler
from speed_diffusers.errors import InputError
from speed_diffusers.process import ForwardProcess
from speed_diffusers.settings import SpeeDOptions, SpeeDSettings
from speed_diffusers.weightings import WEIGHTINGS, timestep_weights


def weights_of(name: str, *, lambda_: float = 0.6, tau: int | None = None, **config: object) -> torch.Tensor:
    process = ForwardProcess.from_scheduler(DDPMScheduler(**config))
    return timestep_weights(name, process, SpeeDSettings.resolve(process, SpeeDOptions(tau=tau, lambda_=lambda_)))


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


# The rivals: right for whatever the network predicts.

PREDICTIONS = ("epsilon", "v_prediction", "sample", "flow_prediction")


def rival(choice: str, prediction_type: str, schedule: str) -> np.ndarray:
    process = process_named(schedule)
    return timestep_weights(choice, process, settings_of(process, prediction_type=prediction_type)).numpy()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", WEIGHTINGS)
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_weighting_for_any_prediction_on_any_schedule(name: str, prediction_type: str, schedule: str) -> None:
    process = process_named(schedule)
    weights = timestep_weights(name, process, settings_of(process, prediction_type=prediction_type))
    assert weights.shape == (process.num_train_timesteps,) and weights.dtype == torch.float64
    assert bool(torch.isfinite(weights.float()).all()) and bool((weights >= 0).all()) and float(weights.max()) > 0
    if name in ("change_aware", "none", "official", "theory"):
        assert float(weights.min()) >= 0.2 - 1e-12 and float(weights.max()) <= 1.0


def expected_rivals(snr: np.ndarray) -> dict[tuple[str, str], np.ndarray]:
    """Each published form, written down for the error that its paper or code weighs, and what follows for others."""
    sigma = 1 / (1 + np.sqrt(snr))
    low = np.minimum(snr, 5.0)
    return {
        ("p2", "epsilon"): 1 / (1 + snr),
        ("p2:k=2,gamma=0.5", "epsilon"): (2 + snr) ** -0.5,
        ("p2:k=2,gamma=0.5", "v_prediction"): (2 + snr) ** -0.5 * snr / (1 + snr),
        ("min_snr", "epsilon"): low / snr,
        ("min_snr", "v_prediction"): low / (snr + 1),
        ("min_snr", "sample"): low,
        ("min_snr", "flow_prediction"): low * sigma**2,
        ("min_snr:gamma=1", "v_prediction"): np.minimum(snr, 1.0) / (snr + 1),
        ("soft_min_snr", "sample"): 4 * snr / (4 + snr),
        ("soft_min_snr:gamma=1", "epsilon"): 1 / (1 + snr),
        ("debiased", "epsilon"): snr**-0.5,
        ("debiased", "v_prediction"): snr**0.5 / (1 + snr),
        ("debiased:max_snr=1000", "epsilon"): np.minimum(snr, 1000) ** -0.5,
        ("max_snr", "sample"): np.maximum(snr, 1.0),
        ("max_snr", "epsilon"): np.maximum(snr, 1.0) / snr,
        ("max_snr:gamma=0.1", "v_prediction"): np.maximum(snr, 0.1) / (snr + 1),
        ("edm", "sample"): (1 / snr + 0.25) / (0.25 / snr),
        ("edm", "epsilon"): (1 / snr + 0.25) / 0.25,
        ("edm:sigma_data=1", "v_prediction"): np.ones_like(snr),
        ("sigma_sqrt", "flow_prediction"): sigma**-2,
        ("sigma_sqrt", "sample"): sigma**-4,
        ("cosmap", "flow_prediction"): 2 / (np.pi * (1 - 2 * sigma + 2 * sigma**2)),
        ("cosmap", "epsilon"): 2 / (np.pi * (1 - 2 * sigma + 2 * sigma**2)) / (1 - sigma) ** 2,
    }


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "sigmoid"])
def test_rivals_in_closed_form(schedule: str) -> None:
    level = process_named(schedule).noise_level.numpy()
    for (choice, prediction_type), expected in expected_rivals((1 - level) / level).items():
        weights = rival(choice, prediction_type, schedule)
        np.testing.assert_allclose(weights, expected, rtol=1e-9, err_msg=f"{choice} on {prediction_type}")


@pytest.mark.parametrize("schedule", ["flow", "linear, zero terminal SNR", "cosine, zero terminal SNR"])
def test_rivals_in_closed_form_up_to_no_signal_at_all(schedule: str) -> None:
    snr = process_named(schedule).snr.numpy()
    assert snr[-1] == 0.0
    with np.errstate(divide="ignore", invalid="ignore"):
        expected_by_choice = expected_rivals(snr)
        at_bound = expected_rivals(np.array([1e-6]))
    within = (snr > 1e-6) & (snr < 1e12)
    for (choice, prediction_type), expected in expected_by_choice.items():
        weights = rival(choice, prediction_type, schedule)
        label = f"{choice} on {prediction_type}"
        np.testing.assert_allclose(weights[within], expected[within], rtol=1e-8, err_msg=label)
        bound = at_bound[choice, prediction_type][0]
        if np.isfinite(expected[-1]) and expected[-1] <= bound:
            assert weights[-1] == pytest.approx(expected[-1], abs=1e-12), label
        else:
            # Without limit, or 0/0 in this form: never more than at an SNR of a millionth.
            assert weights[-1] <= bound * (1 + 1e-9), label


def test_min_snr_on_epsilon_is_one_where_no_signal_is_left() -> None:
    assert rival("min_snr", "epsilon", "linear, zero terminal SNR")[-1] == 1.0
    assert rival("debiased", "epsilon", "linear, zero terminal SNR")[-1] == 1000.0


def test_sd3_weights_are_those_of_diffusers() -> None:
    sigma = process_named("flow, shift 3").sigma
    for name in ("sigma_sqrt", "cosmap"):
        np.testing.assert_allclose(
            rival(name, "flow_prediction", "flow, shift 3"),
            compute_loss_weighting_for_sd3(name, sigma).numpy(),
            rtol=1e-6,
        )


def test_the_authors_min_snr_is_not_min_snr() -> None:
    """Theirs is 5 / (SNR + 1), five times P2, on epsilon."""
    snr = process_named("linear").snr.numpy()
    assert np.abs(rival("min_snr", "epsilon", "linear") - 5 / (snr + 1)).max() > 3
    np.testing.assert_allclose(5 * rival("p2", "epsilon", "linear"), 5 / (snr + 1), rtol=1e-9)


def test_seeds_weight_is_the_noise_level() -> None:
    np.testing.assert_allclose(
        rival("p2:k=1,gamma=1", "epsilon", "linear"), process_named("linear").noise_level.numpy(), rtol=1e-9
    )


@pytest.mark.parametrize(
    ("timestep", "weight"),
    [(0, 0.409), (100, 0.539), (219, 0.600), (300, 0.577), (500, 0.458), (699, 0.407), (700, 1.0), (999, 1.0)],
)
def test_official_weights_of_the_authors_code(timestep: int, weight: float) -> None:
    assert float(weights_of("official", tau=700)[timestep]) == pytest.approx(weight, abs=5.1e-4)


def test_official_with_lambda_of_a_half_still_jumps_at_tau() -> None:
    weights = weights_of("official", lambda_=0.5, tau=300)
    assert bool((weights[:300] == 0.5).all()) and bool((weights[300:] == 1.0).all())


def test_theory_has_fixed_ends_and_no_jump() -> None:
    weights = weights_of("theory", lambda_=0.6, tau=700)
    np.testing.assert_allclose(weights.numpy(), weights_of("change_aware", lambda_=0.8).numpy(), rtol=1e-12)


def test_speeds_own_weights_do_not_ask_what_is_predicted() -> None:
    for name in ("change_aware", "official", "theory", "none"):
        for prediction_type in PREDICTIONS[1:]:
            np.testing.assert_array_equal(rival(name, prediction_type, "linear"), rival(name, "epsilon", "linear"))


@pytest.mark.parametrize("num_timesteps", [10, 1000, 10_000])
def test_change_aware_on_a_flow_is_symmetric_about_equal_signal_and_noise(num_timesteps: int) -> None:
    weights = rival("change_aware", "flow_prediction", f"flow, T={num_timesteps}" if num_timesteps != 1000 else "flow")
    middle = num_timesteps // 2 - 1
    assert weights.argmax() == middle and weights[middle] == pytest.approx(0.6)
    # Both ends of the derivative are one-sided, and sigma = 0 is no timestep.
    np.testing.assert_allclose(weights[1 : middle - 1], weights[2 * middle - 1 : middle + 1 : -1], atol=1e-9)


def test_prediction_type_comes_from_the_schedulers_config() -> None:
    timesteps = torch.tensor([0, 500, 999])
    for prediction_type in ("epsilon", "v_prediction", "sample"):
        scheduler = SpeeDDDPMScheduler(prediction_type=prediction_type, speed_weighting="min_snr:gamma=3")
        expected = rival("min_snr:gamma=3", prediction_type, "linear")[timesteps.numpy()]
        np.testing.assert_allclose(scheduler.loss_weights(timesteps).numpy(), expected, rtol=1e-5)
    with pytest.raises(InputError, match="Unknown prediction_type 'v-prediction'. Did you mean 'v_prediction'"):
        SpeeDDDPMScheduler(prediction_type="v-prediction", speed_weighting="min_snr")
