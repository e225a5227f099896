"""The forward process: noise level, increments, areas and tau against numpy and published numbers."""

import math

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)

from noise_schedules import SCHEDULES, process_named
from speed_diffusers.errors import InputError
from speed_diffusers.process import ForwardProcess
from speed_diffusers.settings import SpeeDSettings

SCHEDULES_OF_THE_AUTHORS = {
    "linear": {},
    "quadratic": {"beta_schedule": "scaled_linear"},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "stable diffusion": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
}


def process_of(**config: object) -> ForwardProcess:
    return ForwardProcess.from_scheduler(DDPMScheduler(**config))


def linear_noise_level(num_timesteps: int = 1000) -> np.ndarray:
    """1 - alphas_cumprod of DiT's schedule in float64, from its definition."""
    return 1.0 - np.cumprod(1.0 - np.linspace(1e-4, 0.02, num_timesteps, dtype=np.float64))


def test_noise_level_is_that_of_the_definition() -> None:
    process = process_of()
    assert process.noise_level.dtype == torch.float64 and process.noise_level.device.type == "cpu"
    np.testing.assert_allclose(process.noise_level.numpy(), linear_noise_level(), atol=1e-7)


@pytest.mark.parametrize("name", SCHEDULES_OF_THE_AUTHORS)
def test_noise_level_agrees_with_the_schedulers_own_table(name: str) -> None:
    scheduler = DDPMScheduler(**SCHEDULES_OF_THE_AUTHORS[name])
    process = ForwardProcess.from_scheduler(scheduler)
    torch.testing.assert_close(1.0 - process.noise_level, scheduler.alphas_cumprod.double(), atol=2e-6, rtol=0)


def test_snr_inverts_to_the_noise_level() -> None:
    process = process_of(rescale_betas_zero_snr=True)
    torch.testing.assert_close(1.0 / (1.0 + process.snr), process.noise_level, rtol=1e-12, atol=0)
    assert float(process.snr[-1]) == 0.0


@pytest.mark.parametrize("name", SCHEDULES_OF_THE_AUTHORS)
def test_change_is_numpys_gradient(name: str) -> None:
    process = process_of(**SCHEDULES_OF_THE_AUTHORS[name])
    np.testing.assert_allclose(process.change.numpy(), np.gradient(process.noise_level.numpy()), rtol=1e-13, atol=0)


@pytest.mark.parametrize(
    ("name", "pivot"), [("linear", 219), ("quadratic", 411), ("cosine", 495), ("stable diffusion", 313)]
)
def test_pivot_between_acceleration_and_deceleration(name: str, pivot: int) -> None:
    assert process_of(**SCHEDULES_OF_THE_AUTHORS[name]).fastest_step == pivot


@pytest.mark.parametrize(
    ("name", "r", "tau"),
    [
        ("linear", 10, 475),
        ("linear", 100, 673),
        ("linear", 140, 698),
        ("linear", 145, 700),
        ("quadratic", 100, 850),
        ("cosine", 10, 793),
        ("cosine", 140, 945),
        ("stable diffusion", 10, 674),
        ("stable diffusion", 140, 963),
    ],
)
def test_tau_is_the_first_step_with_one_rth_of_the_signal(name: str, r: float, tau: int) -> None:
    process = process_of(**SCHEDULES_OF_THE_AUTHORS[name])
    assert process.first_settled_step(r) == tau
    signal = 1.0 - process.noise_level.numpy()
    assert signal[tau] <= 1 / r < signal[tau - 1]


def test_tau_is_t_where_the_process_never_settles() -> None:
    assert process_of(beta_end=0.002).first_settled_step(145) == 1000


@pytest.mark.parametrize("tau", [1, 100, 219, 220, 700, 999, 1000])
def test_areas_cover_every_timestep_once(tau: int) -> None:
    areas = process_of().areas(tau)
    assert [*areas.acceleration, *areas.deceleration, *areas.convergence] == list(range(1000))
    assert areas.convergence == range(tau, 1000)
    assert areas.acceleration == range(min(219, tau))


@pytest.mark.parametrize("num_timesteps", [2, 3, 4, 10, 4000, 10000])
def test_any_number_of_timesteps(num_timesteps: int) -> None:
    process = process_of(num_train_timesteps=num_timesteps)
    settings = SpeeDSettings.resolve(process)
    areas = process.areas(settings.tau)
    assert 1 <= settings.tau <= num_timesteps
    assert [*areas.acceleration, *areas.deceleration, *areas.convergence] == list(range(num_timesteps))
    assert bool(torch.isfinite(process.change).all()) and bool((process.noise_level.diff() >= 0).all())
    assert bool(((process.noise_level > 0) & (process.noise_level <= 1)).all())


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace"])
def test_every_schedule_of_diffusers_is_read(schedule: str) -> None:
    process = process_of(beta_schedule=schedule)
    assert bool(torch.isfinite(process.snr).all()) and bool(torch.isfinite(process.change).all())
    assert bool((process.noise_level.diff() >= 0).all())


@pytest.mark.parametrize("host", [DDPMScheduler, DDIMScheduler, EulerDiscreteScheduler])
def test_zero_terminal_snr_is_finite(host: type) -> None:
    process = ForwardProcess.from_scheduler(host(rescale_betas_zero_snr=True))
    assert float(process.noise_level[-1]) == 1.0
    assert bool(torch.isfinite(process.change).all()) and bool(torch.isfinite(process.snr).all())
    assert process.first_settled_step(145) < 1000


def test_trained_betas_are_read() -> None:
    betas = [0.1, 0.2, 0.5]
    process = process_of(trained_betas=betas)
    np.testing.assert_allclose(process.noise_level.numpy(), [0.1, 1 - 0.9 * 0.8, 1 - 0.9 * 0.8 * 0.5], rtol=1e-6)


def test_scheduler_without_betas_is_refused() -> None:
    with pytest.raises(InputError, match="^EDMEulerScheduler has neither 'betas' nor the sigmas of a") as error:
        ForwardProcess.from_scheduler(EDMEulerScheduler())
    assert "\n" not in str(error.value)


def test_one_timestep_is_a_process_in_which_nothing_changes() -> None:
    process = process_of(num_train_timesteps=1)
    assert process.num_train_timesteps == 1 and float(process.noise_level[0]) == pytest.approx(1e-4)
    for name in ("change", "fastest_step", "dual_pivot", "log_snr_speed"):
        with pytest.raises(InputError, match="num_train_timesteps=1: .*at least 2"):
            getattr(process, name)


# Rectified flows, other tables, and what holds on every schedule.


def test_tau_is_at_the_same_noise_on_every_schedule_that_settles() -> None:
    for name in SCHEDULES:
        process = process_named(name)
        tau = process.first_settled_step(145)
        signal = 1.0 - process.noise_level
        if name in ("laplace", "linear, T=10"):
            assert tau == process.num_train_timesteps and float(signal[-1]) > 1 / 145, name
        else:
            assert float(signal[tau]) <= (1 + 1e-6) / 145 < float(signal[tau - 1]), name


@pytest.mark.parametrize("shift", [1.0, 3.0, 0.5, 12.0])
@pytest.mark.parametrize("num_timesteps", [10, 1000, 10_000])
def test_flow_is_its_sigmas(shift: float, num_timesteps: int) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=num_timesteps, shift=shift)
    process = ForwardProcess.from_scheduler(scheduler)
    sigma = scheduler.sigmas.flip(0).double()  # the scheduler counts from the most noise
    torch.testing.assert_close(process.sigma, sigma, atol=1e-6, rtol=0)
    torch.testing.assert_close(process.noise_level, sigma**2 / ((1 - sigma) ** 2 + sigma**2), atol=2e-6, rtol=0)
    assert float(process.log_snr[-1]) == -float("inf") and float(process.snr[-1]) == 0.0
    assert float(process.noise_level[-1]) == 1.0
    torch.testing.assert_close(process.log_snr[:-1], 2 * ((1 - sigma[:-1]) / sigma[:-1]).log(), atol=1e-3, rtol=1e-3)


def test_flow_reads_the_config_and_not_the_sigmas_of_inference() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    before = ForwardProcess.from_scheduler(scheduler)
    scheduler.set_timesteps(7)
    assert torch.equal(ForwardProcess.from_scheduler(scheduler).noise_level, before.noise_level)
    dynamic = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    assert torch.equal(
        ForwardProcess.from_scheduler(dynamic).noise_level, ForwardProcess.rectified_flow(1000).noise_level
    )


def test_areas_of_a_rectified_flow() -> None:
    process = process_named("flow")
    assert process.fastest_step == 499  # sigma = 1/2, where signal and noise are equal
    # 1 - n <= 1/145 where ((1 - s) / s)^2 <= 1/144, that is s >= 12/13
    assert process.first_settled_step(145) == 923


def test_a_step_that_has_settled_but_for_rounding_counts() -> None:
    # With shift 3 the time 800/1000 has sigma = 12/13, so exactly 1/145 of the signal, in whatever precision.
    assert process_named("flow, shift 3").first_settled_step(145) == 799
    sigmas = FlowMatchEulerDiscreteScheduler(shift=3.0).sigmas.flip(0)
    assert ForwardProcess.from_sigmas(sigmas).first_settled_step(145) == 799


def test_log_snr_keeps_its_digits_where_the_noise_level_is_one() -> None:
    process = process_named("linear, T=10000")
    assert float(process.noise_level[-1]) == 1.0
    betas = DDPMScheduler(num_train_timesteps=10_000).betas.double().numpy()
    log_signal = np.log1p(-betas).cumsum()
    assert float(process.log_snr[-1]) == pytest.approx(log_signal[-1], rel=1e-9)
    assert float(process.log_snr[-1]) < -100
    np.testing.assert_allclose(process.log_snr[:5].numpy(), (log_signal - np.log(-np.expm1(log_signal)))[:5])


def test_schedule_of_its_own_is_read_as_add_noise_has_it() -> None:
    scheduler = SCHEDULES["CogVideoX"]()
    process = ForwardProcess.from_scheduler(scheduler)
    torch.testing.assert_close(1.0 - process.noise_level, scheduler.alphas_cumprod.double(), atol=1e-12, rtol=0)
    clean, noise = torch.ones(1000, 1), torch.full((1000, 1), 2.0)
    level = process.noise_level[:, None].float()
    torch.testing.assert_close(
        scheduler.add_noise(clean, noise, torch.arange(1000)), (1 - level).sqrt() + 2 * level.sqrt(), atol=1e-3, rtol=0
    )


def test_constructors_agree() -> None:
    scheduler = DDPMScheduler()
    by_table = ForwardProcess.from_alphas_cumprod(scheduler.alphas_cumprod)
    torch.testing.assert_close(
        by_table.noise_level, ForwardProcess.from_scheduler(scheduler).noise_level, atol=1e-6, rtol=0
    )
    torch.testing.assert_close(by_table.log_snr, ForwardProcess(by_table.noise_level).log_snr, atol=1e-9, rtol=1e-9)
    flow = ForwardProcess.rectified_flow(1000)
    by_sigmas = ForwardProcess.from_sigmas(torch.arange(1, 1001).double() / 1000)
    torch.testing.assert_close(by_sigmas.noise_level, flow.noise_level, atol=1e-12, rtol=0)
    torch.testing.assert_close(by_sigmas.finite_log_snr, flow.finite_log_snr, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ForwardProcess.from_sigmas(torch.tensor([])), "num_train_timesteps=0: must be at least 1"),
        (lambda: ForwardProcess.from_sigmas(torch.ones(2, 2)), r"sigmas: must have one axis.*\(2, 2\)"),
        (lambda: ForwardProcess.from_sigmas(torch.tensor([0.5, 14.6])), r"sigmas: must lie in \[0, 1\]"),
        (lambda: ForwardProcess.from_sigmas(torch.tensor([0.5, float("nan")])), r"sigmas: must lie in \[0, 1\]"),
        (lambda: ForwardProcess.from_sigmas(torch.tensor([0.9, 0.5, 0.1])), "sigmas: must not fall .*from 0 to 1"),
        (lambda: ForwardProcess.from_alphas_cumprod(torch.tensor([0.9, 0.2, 0.3])), "alphas_cumprod: must not grow"),
        (lambda: ForwardProcess.rectified_flow(1000, shift=0.0), "shift=0.0: must be a finite number above 0"),
        (lambda: ForwardProcess.from_alphas_cumprod(torch.zeros(3)).finite_log_snr, "Every timestep .* pure noise"),
    ],
)
def test_bad_schedules_are_refused_in_one_line(make: object, message: str) -> None:
    with pytest.raises(InputError, match=f"^{message}") as error:
        make()  # type: ignore[operator]
    assert "\n" not in str(error.value)


def test_infinite_log_snr_is_continued_at_the_spacing_of_its_neighbours() -> None:
    process = ForwardProcess.from_alphas_cumprod(torch.tensor([1.0, 0.9, 0.5, 0.0, 0.0], dtype=torch.float64))
    first, second = math.log(9.0), 0.0
    np.testing.assert_allclose(
        process.finite_log_snr.numpy(), [2 * first - second, first, second, -first, -2 * first], atol=1e-12
    )
    alone = ForwardProcess.from_alphas_cumprod(torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64))
    np.testing.assert_allclose(alone.finite_log_snr.numpy(), [1.0, 0.0, -1.0], atol=1e-12)
    untouched = process_named("linear")
    assert torch.equal(untouched.finite_log_snr, untouched.log_snr)


def test_flow_time_is_before_shift_and_the_noise_after() -> None:
    plain, shifted = process_named("flow"), process_named("flow, shift 3")
    torch.testing.assert_close(shifted.flow_logit[:-1], plain.flow_logit[:-1], atol=1e-12, rtol=1e-12)
    time = torch.arange(1, 1000).double() / 1000
    torch.testing.assert_close(plain.flow_logit[:-1].sigmoid(), time, atol=1e-12, rtol=0)
    torch.testing.assert_close(shifted.sigma[:-1], 3 * time / (1 + 2 * time), atol=1e-12, rtol=0)


def test_fastest_step_is_the_first_of_equals() -> None:
    level = torch.tensor([0.1, 0.2, 0.4, 0.6, 0.8, 0.9], dtype=torch.float64)
    level[3] += 1e-16  # rounding, which must not decide
    process = ForwardProcess(level)
    assert process.fastest_step == 2
    assert ForwardProcess(torch.linspace(0.1, 0.9, 9, dtype=torch.float64)).fastest_step == 0


@pytest.mark.parametrize(
    ("name", "pivot"), [("linear", 642), ("quadratic", 829), ("cosine", 959), ("stable diffusion", 866)]
)
def test_pivot_of_the_authors_pairs(name: str, pivot: int) -> None:
    assert process_of(**SCHEDULES_OF_THE_AUTHORS[name]).dual_pivot == pivot


@pytest.mark.parametrize("name", ["flow", "flow, shift 3", "flow, T=10", "flow, T=10000", "linear, T=10", "laplace"])
def test_pivot_does_not_exist_everywhere(name: str) -> None:
    with pytest.raises(InputError, match="the pivot of the authors' code does not exist; use speed_draw="):
        _ = process_named(name).dual_pivot
