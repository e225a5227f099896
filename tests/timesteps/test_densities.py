"""Every density on every noise schedule, and each against its formula, worked out another way."""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
import torch
from diffusers.training_utils import compute_density_for_timestep_sampling

from noise_schedules import SCHEDULES, chi_square_p_value, process_named, settings_of
from speed_diffusers.errors import InputError
from speed_diffusers.process import ForwardProcess
from speed_diffusers.timesteps import DENSITIES, timestep_pmf


def pmf_of(choice: str, schedule: str = "linear", **changes: object) -> np.ndarray:
    process = process_named(schedule)
    progress = changes.pop("progress", 0.0)
    settings = settings_of(process, **changes)
    object.__setattr__(settings, "progress", progress)
    return timestep_pmf(choice, process, settings).numpy()


def by_noise(log_density: np.ndarray, variable: np.ndarray) -> np.ndarray:
    """A density over a variable as probabilities of timesteps: with how fast the variable changes."""
    density = np.exp(log_density - log_density.max()) * np.abs(np.gradient(variable))
    return density / density.sum()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", DENSITIES)
def test_density_on_any_schedule(name: str, schedule: str) -> None:
    process = process_named(schedule)
    if name == "t_sample" and schedule in ("laplace", "linear, T=10", *(s for s in SCHEDULES if "flow" in s)):
        with pytest.raises(InputError, match="pivot"):
            timestep_pmf(name, process, settings_of(process))
        return
    pmf = timestep_pmf(name, process, settings_of(process))
    assert pmf.shape == (process.num_train_timesteps,) and pmf.dtype == torch.float64
    assert bool(torch.isfinite(pmf).all()) and bool((pmf >= 0).all())
    assert float(pmf.sum()) == pytest.approx(1.0, abs=1e-12)
    # Nothing is left out but what is noise beyond the reach of floating point.
    assert int((pmf == 0).sum()) <= 0.6 * len(pmf) if schedule == "linear, T=10000" else bool((pmf > 0).all())


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-0.5, 0.7), (1.2, 2.0)])
@pytest.mark.parametrize("schedule", ["linear", "cosine", "flow"])
def test_logit_normal_is_normal_in_the_logit(mean: float, std: float, schedule: str) -> None:
    process = process_named(schedule)
    logit = -0.5 * process.finite_log_snr.numpy()
    expected = by_noise(scipy.stats.norm.logpdf(logit, mean, std), logit)
    np.testing.assert_allclose(pmf_of(f"logit_normal:mean={mean},std={std}", schedule), expected, rtol=1e-10)


@pytest.mark.parametrize(
    ("choice", "options"),
    [
        ("logit_normal", {"weighting_scheme": "logit_normal", "logit_mean": 0.0, "logit_std": 1.0}),
        ("logit_normal:mean=0.8,std=0.6", {"weighting_scheme": "logit_normal", "logit_mean": 0.8, "logit_std": 0.6}),
        ("mode", {"weighting_scheme": "mode", "mode_scale": 1.29}),
        ("mode:scale=-0.6", {"weighting_scheme": "mode", "mode_scale": -0.6}),
    ],
)
@pytest.mark.parametrize("schedule", ["flow", "flow, shift 3"])
def test_sd3_densities_are_those_of_diffusers_before_shift(
    choice: str, options: dict[str, float], schedule: str
) -> None:
    time = compute_density_for_timestep_sampling(
        batch_size=200_000, generator=torch.Generator().manual_seed(0), **options
    )
    counts = np.histogram(time.numpy(), bins=np.linspace(0, 1, 51))[0]
    pmf = pmf_of(choice, schedule)
    # Timestep i stands for the times around (i + 1) / T, so a bin of 20 takes halves at its ends.
    edges = np.interp(np.linspace(0, 1, 51) * 1000 - 0.5, np.arange(-1, 1000) + 0.5, np.append(0, pmf.cumsum()))
    assert chi_square_p_value(counts, np.diff(edges) / np.diff(edges).sum()) > 1e-4


def test_mode_in_closed_form() -> None:
    pmf = pmf_of("mode:scale=1.29", "flow")
    # At the middle f(1/2) = 1/2 and |f'| = 1 + s - s pi / 2; towards the ends |f'| = 1 + s.
    assert pmf[499] * 1000 == pytest.approx(1 / (1 + 1.29 - 1.29 * math.pi / 2), rel=1e-3)
    assert pmf[0] * 1000 == pytest.approx(1 / 2.29, rel=0.01)
    assert pmf[999] * 1000 == pytest.approx(1 / 2.29, rel=0.01)
    np.testing.assert_allclose(pmf_of("mode:scale=0", "flow"), 1e-3, rtol=1e-9)


@pytest.mark.parametrize("schedule", ["flow", "flow, shift 3"])
def test_cosmap_in_closed_form(schedule: str) -> None:
    time = np.arange(1, 1001) / 1000
    expected = 2 / (math.pi * (1 - 2 * time + 2 * time**2))
    np.testing.assert_allclose(pmf_of("cosmap", schedule), expected / expected.sum(), rtol=1e-9)


def test_sd3_densities_elsewhere_are_over_the_time_with_the_same_snr() -> None:
    process = process_named("linear")
    time = 1 / (1 + process.snr.sqrt().numpy())
    expected = np.gradient(time) / (1 - 2 * time + 2 * time**2)
    np.testing.assert_allclose(pmf_of("cosmap"), expected / expected.sum(), rtol=1e-9)


@pytest.mark.parametrize("schedule", ["linear", "flow, shift 3", "linear, zero terminal SNR"])
def test_densities_over_the_noise_in_closed_form(schedule: str) -> None:
    log_snr = process_named(schedule).finite_log_snr.numpy()
    for choice, log_density in (
        ("edm", scipy.stats.norm.logpdf(-0.5 * log_snr, -1.2, 1.2)),
        ("edm:mean=-0.4,std=1", scipy.stats.norm.logpdf(-0.5 * log_snr, -0.4, 1.0)),
        ("gaussian:mean=1,std=3", scipy.stats.norm.logpdf(log_snr, 1.0, 3.0)),
        ("laplace", scipy.stats.laplace.logpdf(log_snr, 0.0, 0.5)),
        ("laplace:mean=-2,scale=1.5", scipy.stats.laplace.logpdf(log_snr, -2.0, 1.5)),
    ):
        np.testing.assert_allclose(pmf_of(choice, schedule), by_noise(log_density, log_snr), rtol=1e-9, err_msg=choice)


@pytest.mark.parametrize("choice", ["edm", "laplace", "gaussian"])
def test_the_same_noise_is_drawn_as_often_on_every_schedule(choice: str) -> None:
    edges = np.array([-4.0, -2.0, -0.5, 0.5, 2.0, 4.0])
    masses = []
    for schedule in ("linear", "cosine", "flow", "flow, shift 3", "flow, T=10000"):
        log_snr = process_named(schedule).finite_log_snr.numpy()
        below = np.interp(-edges, -log_snr, pmf_of(choice, schedule).cumsum())
        masses.append(np.diff(below) / (below[-1] - below[0]))
    np.testing.assert_allclose(masses, np.tile(masses[-1], (5, 1)), atol=0.01)


def test_lognorm_is_that_of_the_authors_code() -> None:
    x = process_named("linear").noise_level.sqrt().numpy()
    density = np.exp(-0.5 * np.log(x / (1 - x)) ** 2) / (x * (1 - x)) * x / (1 - x)
    pmf = pmf_of("lognorm")
    np.testing.assert_allclose(pmf, density / density.sum(), rtol=1e-6, atol=1e-18)
    assert pmf.argmax() == 348
    assert [int((pmf.cumsum() < share).sum()) for share in (0.05, 0.95)] == [140, 515]


@pytest.mark.parametrize("alpha", [0.3, 0.8, 1.0, 2.5])
@pytest.mark.parametrize("schedule", ["linear, T=10", "flow"])
def test_beta_is_betas_distribution_function(alpha: float, schedule: str) -> None:
    steps = process_named(schedule).num_train_timesteps
    expected = np.diff(scipy.stats.beta.cdf(np.arange(steps + 1) / steps, alpha, 1.0))
    np.testing.assert_allclose(pmf_of(f"beta:alpha={alpha}", schedule), expected, rtol=1e-9)


def test_clts_goes_from_uniform_to_its_gaussian_and_stays() -> None:
    choice = "clts:mean=0.3,std=0.1,horizon=0.5"
    np.testing.assert_allclose(pmf_of(choice), 1e-3, rtol=1e-12)
    bell = np.exp(-0.5 * ((np.arange(1000) - 300) / 100) ** 2)
    bell /= bell.sum()
    np.testing.assert_allclose(pmf_of(choice, progress=0.5), bell, rtol=1e-9)
    np.testing.assert_allclose(pmf_of(choice, progress=0.25), 0.5 * bell + 0.5e-3, rtol=1e-9)
    # Beyond the horizon the authors' code draws from negative probabilities.
    np.testing.assert_allclose(pmf_of(choice, progress=1.0), bell, rtol=1e-9)
    assert pmf_of("clts", progress=1.0).argmax() == 300


def test_range_bias_multiplies_a_range() -> None:
    expected = np.ones(1000)
    expected[:250] = 2.0
    np.testing.assert_allclose(pmf_of("range_bias"), expected / expected.sum(), rtol=1e-12)
    later = np.ones(1000)
    later[750:] = 0.25
    np.testing.assert_allclose(pmf_of("range_bias:begin=0.75,end=1,multiplier=0.25"), later / later.sum(), rtol=1e-12)
    with pytest.raises(InputError, match="range_bias': no timestep of 1000 from begin=0.5 to end=0.5"):
        pmf_of("range_bias:begin=0.5,end=0.5")
    with pytest.raises(InputError, match="no timestep of 10 from begin=0.0 to end=0.05"):
        pmf_of("range_bias:end=0.05", "linear, T=10")


def test_t_sample_is_the_printed_formula() -> None:
    growth = np.gradient(process_named("linear").noise_level.sqrt().numpy())
    density = np.tanh(1e6 * (growth - 1e-4)) + 1.5
    pmf = pmf_of("t_sample")
    np.testing.assert_allclose(pmf, density / density.sum(), rtol=1e-9)
    assert pmf[0] / pmf[999] == pytest.approx(5.0, rel=1e-9)
    # The last of the steps that are drawn often is 640; m is 642.
    assert np.flatnonzero(growth < 1e-4)[0] + 1 == 642
    assert pmf[642:].sum() == pytest.approx(0.100, abs=5e-4)


@pytest.mark.parametrize("edge", [0.05, 0.5, 3.0])
def test_smooth_edge_runs_from_k_to_1_in_log_snr(edge: float) -> None:
    for schedule in ("linear", "cosine", "flow", "flow, shift 3"):
        process = process_named(schedule)
        settings = settings_of(process, k=7.0)
        pmf = timestep_pmf(f"asymmetric:edge={edge}", process, settings)
        log_snr, tau = process.finite_log_snr, settings.tau
        middle = 0.5 * (log_snr[tau - 1] + log_snr[tau])
        expected = 1 + 6 / (1 + torch.exp(-(log_snr - middle) / edge))
        torch.testing.assert_close(pmf, expected / expected.sum(), rtol=1e-9, atol=0)
        assert bool((pmf.diff() <= 0).all())


def test_a_narrow_edge_is_the_papers_step() -> None:
    np.testing.assert_allclose(pmf_of("asymmetric:edge=1e-6"), pmf_of("asymmetric"), rtol=1e-9)
    np.testing.assert_array_equal(pmf_of("asymmetric:edge=0"), pmf_of("asymmetric"))
    np.testing.assert_allclose(pmf_of("asymmetric:edge=2", tau=1000), 1e-3, rtol=1e-12)


def test_the_smooth_edge_keeps_to_the_noise() -> None:
    """Relative to the steps with little noise, equal noise is drawn equally often on two schedules."""
    curves = []
    for schedule in ("linear", "flow, T=10000"):
        process = process_named(schedule)
        pmf = pmf_of("asymmetric:edge=1", schedule)
        at = np.linspace(-8, 4, 25)
        curves.append(np.interp(at, process.finite_log_snr.flip(0).numpy(), pmf[::-1] / pmf[0]))
    np.testing.assert_allclose(curves[0], curves[1], atol=0.01)


def test_a_narrow_bell_between_two_steps_does_not_vanish() -> None:
    for choice in ("gaussian:mean=0.3,std=1e-3", "laplace:mean=0.3,scale=1e-4", "edm:mean=0.1,std=1e-3"):
        pmf = pmf_of(choice, "linear, T=10000")
        assert math.isclose(pmf.sum(), 1.0, abs_tol=1e-12) and pmf.max() > 0.1


def test_sampling_of_two_timesteps() -> None:
    process = ForwardProcess(torch.tensor([0.2, 0.9], dtype=torch.float64))
    for name in DENSITIES:
        if name != "t_sample":
            choice = "range_bias:end=0.5" if name == "range_bias" else name
            assert float(timestep_pmf(choice, process, settings_of(process)).sum()) == pytest.approx(1.0)


def _over_log_snr(sampling: str, schedule: str = "linear") -> tuple[torch.Tensor, torch.Tensor]:
    """Log SNR, and a density over it up to a factor."""
    process = process_named(schedule)
    return process.finite_log_snr, timestep_pmf(sampling, process, settings_of(process)) / process.log_snr_speed


@pytest.mark.parametrize(
    ("sampling", "formula"),
    [
        ("cosine_scaled:scale=0.5", lambda x: 1 / torch.cosh(0.25 * x)),
        ("cauchy:mean=-1,scale=2", lambda x: 1 / ((x + 1) ** 2 + 4)),
        ("gaussian:edm2", lambda x: torch.exp(-0.5 * ((x + 0.6) / 2) ** 2)),
        ("gaussian:jit,std=1", lambda x: torch.exp(-0.5 * (x + 1.6) ** 2)),
    ],
)
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_density_over_log_snr_is_its_formula(
    sampling: str, formula: Callable[[torch.Tensor], torch.Tensor], schedule: str
) -> None:
    log_snr, density = _over_log_snr(sampling, schedule)
    expected = formula(log_snr)
    torch.testing.assert_close(density / density.max(), expected / expected.max(), rtol=1e-9, atol=1e-12)


def test_sd3s_named_setting_is_its_logit_normal() -> None:
    for name, other in (("gaussian:sd3", "logit_normal"), ("cosine_scaled", "cosine_scaled:scale=1")):
        torch.testing.assert_close(_over_log_snr(name)[1], _over_log_snr(other)[1], rtol=1e-9, atol=0)


def test_a_named_setting_must_be_one() -> None:
    with pytest.raises(InputError, match="Unknown setting of the timestep density .*'edm3'. Did you mean 'edm"):
        DENSITIES.parse("gaussian:edm3")


def test_a_share_of_laplace_is_uniform() -> None:
    process = process_named("linear")
    settings = settings_of(process)
    plain, mixed = (timestep_pmf(name, process, settings) for name in ("laplace", "laplace:uniform=0.1"))
    torch.testing.assert_close(mixed, 0.9 * plain + 0.1 / 1000, rtol=1e-12, atol=0)


def test_two_phases() -> None:
    process = process_named("linear")
    settings = settings_of(process)
    for progress, other in (
        (0.0, "gaussian:mean=-1"),
        (0.399, "gaussian:mean=-1"),
        (0.4, "uniform"),
        (1.0, "uniform"),
    ):
        now = replace(settings, progress=progress)
        pmf = timestep_pmf("two_phase:until=0.4", process, now)
        assert torch.equal(pmf, timestep_pmf(other, process, settings))


@pytest.mark.parametrize("first", [name for name in DENSITIES if name != "two_phase"])
def test_two_phases_over_any_density(first: str) -> None:
    process = process_named("linear")
    for progress in (0.0, 0.5):  # of a density that moves itself too
        now = settings_of(process)
        now = replace(now, progress=progress)
        pmf = timestep_pmf(f"two_phase:first={first}", process, now)
        assert torch.equal(pmf, timestep_pmf(first, process, now))
    done = replace(settings_of(process), progress=0.6)
    uniform = torch.full((1000,), 1e-3, dtype=torch.float64)
    assert torch.equal(timestep_pmf(f"two_phase:first={first}", process, done), uniform)


@pytest.mark.parametrize(
    ("text", "first", "until", "short"),
    [
        ("two_phase", "gaussian:mean=-1", 0.6, "two_phase"),
        (
            "two_phase:std=1,until=0.5",
            "gaussian:mean=-1,std=1",
            0.5,
            "two_phase:until=0.5,first=gaussian:mean=-1,std=1",
        ),
        ("two_phase:first=gaussian", "gaussian", 0.6, "two_phase:first=gaussian"),
        ("two_phase:first=gaussian:edm2,until=0.6", "gaussian:mean=-0.6", 0.6, "two_phase:first=gaussian:mean=-0.6"),
        (
            "two_phase:first=laplace:mean=1,scale=2,until=0.3,uniform=0.1",
            "laplace:mean=1,scale=2,uniform=0.1",
            0.3,
            "two_phase:until=0.3,first=laplace:mean=1,scale=2,uniform=0.1",
        ),
        ("two_phase:scale=2,first=laplace", "laplace:scale=2", 0.6, "two_phase:first=laplace:scale=2"),
    ],
)
def test_a_first_phase_has_its_parameters_beside_those_of_the_whole(
    text: str, first: str, until: float, short: str
) -> None:
    choice = DENSITIES.parse(text)
    assert choice.part == DENSITIES.parse(first) and choice.arguments == {"until": until}
    assert str(choice) == short and DENSITIES.parse(short) == choice


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("two_phase:first=gausian", "'gausian'. Did you mean 'gaussian'"),
        ("two_phase:untl=0.5", "'two_phase' with first=gaussian:mean=-1 'untl'. Did you mean 'until'"),
        ("two_phase:first=laplace,std=2", "with first=laplace 'std'. .*Allowed: first, mean, scale, uniform, until"),
        ("two_phase:first=two_phase", "first=two_phase has a part itself; take another"),
        ("two_phase:first=beta,first=cauchy", "'first' is given twice"),
        ("two_phase:first=gaussian:mean=1,mean=2", "'mean' is given twice"),
        ("two_phase:first=", "cannot read 'first='"),
        ("two_phase:std=0", r"std=0 must be in \[1e-6, 100\]"),
        ("gaussian:first=beta", "Unknown parameter of the timestep density .*'gaussian' 'first'"),
    ],
)
def test_a_first_phase_that_is_none_is_one_line(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        DENSITIES.parse(text)
    assert "\n" not in str(caught.value)
