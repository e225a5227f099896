"""The law of the timesteps: closed forms, a chi-square test of a million draws, and the exact uniform baseline."""

import logging
import math

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

from noise_schedules import chi_square_p_value
from speed_diffusers import SpeeDDDIMScheduler, SpeeDDDPMScheduler
from speed_diffusers.errors import InputError
from speed_diffusers.process import ForwardProcess
from speed_diffusers.settings import SpeeDOptions, SpeeDSettings
from speed_diffusers.timesteps import draw_independent, timestep_pmf

MILLION = 1_000_000


def pmf_of(name: str, *, num_timesteps: int = 1000, k: float = 5.0, tau: int | None = None) -> torch.Tensor:
    process = ForwardProcess.from_scheduler(DDPMScheduler(num_train_timesteps=num_timesteps))
    return timestep_pmf(name, process, SpeeDSettings.resolve(process, SpeeDOptions(k=k, tau=tau)))


def paper_pmf(num_timesteps: int, k: float, tau: int) -> np.ndarray:
    """P(t) of the paper: k / (T + tau (k-1)) before tau, 1 / (T + tau (k-1)) from it on."""
    return np.where(np.arange(num_timesteps) < tau, k, 1.0) / (num_timesteps + tau * (k - 1))


@pytest.mark.parametrize("k", [1.0, 2.5, 5.0, 25.0])
@pytest.mark.parametrize("tau", [1, 219, 700, 1000])
def test_asymmetric_is_the_papers_law(k: float, tau: int) -> None:
    np.testing.assert_allclose(pmf_of("asymmetric", k=k, tau=tau).numpy(), paper_pmf(1000, k, tau), rtol=1e-12)


@pytest.mark.parametrize("num_timesteps", [2, 3, 10, 10000])
def test_law_for_any_number_of_timesteps(num_timesteps: int) -> None:
    pmf = pmf_of("asymmetric", num_timesteps=num_timesteps)
    assert pmf.shape == (num_timesteps,) and bool((pmf > 0).all())
    assert float(pmf.sum()) == pytest.approx(1.0, abs=1e-12)


def test_mass_of_the_convergence_area_for_k_5() -> None:
    assert float(pmf_of("asymmetric")[700:].sum()) == pytest.approx(0.0789, abs=5e-5)


def test_k_of_one_is_uniform() -> None:
    assert torch.equal(pmf_of("asymmetric", k=1.0), pmf_of("uniform"))


def test_unknown_density_names_the_nearest() -> None:
    with pytest.raises(InputError, match=r"Unknown timestep density \(speed_sampling\) 'unifrom'.*'uniform'"):
        pmf_of("unifrom")


@pytest.mark.parametrize(
    ("config", "tau"),
    [({}, 700), ({"speed_k": 25.0, "speed_tau": 100}, 100), ({"beta_schedule": "squaredcos_cap_v2"}, 946)],
)
def test_a_million_draws_follow_the_law(config: dict[str, object], tau: int) -> None:
    scheduler = SpeeDDDPMScheduler(**config)
    draws = scheduler.sample_timesteps(MILLION, generator=torch.Generator().manual_seed(7))
    assert draws.dtype == torch.int64 and draws.shape == (MILLION,)
    assert int(draws.min()) == 0 and int(draws.max()) == 999
    expected = paper_pmf(1000, float(config.get("speed_k", 5.0)), tau)
    counts = np.bincount(draws.numpy(), minlength=1000)
    assert chi_square_p_value(counts, expected) > 1e-4
    mass = float(expected[tau:].sum())
    assert counts[tau:].sum() / MILLION == pytest.approx(mass, abs=4 * math.sqrt(mass / MILLION))


def test_the_chi_square_test_sees_a_shift_by_one_step() -> None:
    draws = SpeeDDDPMScheduler().sample_timesteps(MILLION, generator=torch.Generator().manual_seed(7))
    counts = np.bincount(draws.numpy(), minlength=1000)
    assert chi_square_p_value(counts, paper_pmf(1000, 5.0, 701)) < 1e-4


@pytest.mark.parametrize("num_timesteps", [2, 3, 10000])
def test_draws_stay_inside_any_process(num_timesteps: int) -> None:
    scheduler = SpeeDDDPMScheduler(num_train_timesteps=num_timesteps, speed_weighting="none")
    draws = scheduler.sample_timesteps(200_000, generator=torch.Generator().manual_seed(1))
    assert int(draws.min()) >= 0 and int(draws.max()) < num_timesteps
    assert len(draws.unique()) > 0.99 * num_timesteps


def test_inversion_meets_no_gap_at_the_end() -> None:
    cumulative = torch.tensor([0.25, 0.5, 1.0])
    largest = torch.nextafter(torch.tensor(1.0), torch.tensor(0.0))
    assert int(torch.searchsorted(cumulative, largest, right=True)) == 2
    draws = draw_independent(cumulative, 100_000, generator=torch.Generator().manual_seed(0))
    np.testing.assert_allclose(np.bincount(draws.numpy()) / 100_000, [0.25, 0.25, 0.5], atol=0.008)


def test_draw_on_a_boundary_belongs_to_the_step_above() -> None:
    cells = 2**20  # torch draws multiples of 2**-24, so one draw in 16 lies on a boundary
    cumulative = torch.arange(1, cells + 1, dtype=torch.float32) / cells
    draws = draw_independent(cumulative, 10_000, generator=torch.Generator().manual_seed(0))
    uniform = torch.rand(10_000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(draws, (uniform.double() * cells).floor().long())


def test_step_without_mass_is_never_drawn() -> None:
    cumulative = torch.tensor([0.0, 0.5, 0.5, 1.0])
    draws = draw_independent(cumulative, 100_000, generator=torch.Generator().manual_seed(0))
    assert draws.unique().tolist() == [1, 3]


@pytest.mark.parametrize("host", [SpeeDDDPMScheduler, SpeeDDDIMScheduler])
@pytest.mark.parametrize("num_timesteps", [2, 1000])
def test_uniform_is_torch_randint_bit_for_bit(host: type, num_timesteps: int) -> None:
    scheduler = host(num_train_timesteps=num_timesteps, speed_sampling="uniform", speed_weighting="none")
    ours, theirs = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    for size in (1, 7, 4096):
        expected = torch.randint(0, num_timesteps, (size,), generator=theirs, device="cpu")
        assert torch.equal(scheduler.sample_timesteps(size, generator=ours, device="cpu"), expected)
    assert torch.equal(ours.get_state(), theirs.get_state())


@pytest.mark.parametrize("device", [None, "cpu", torch.device("cpu")])
def test_uniform_takes_the_global_generator_as_plain_loops_do(device: torch.device | str | None) -> None:
    scheduler = SpeeDDDPMScheduler(speed_sampling="uniform", speed_weighting="none")
    torch.manual_seed(11)
    expected = torch.randint(0, 1000, (64,))
    after = torch.rand(1)
    torch.manual_seed(11)
    assert torch.equal(scheduler.sample_timesteps(64, device=device), expected)
    assert torch.equal(torch.rand(1), after)


def test_asymmetric_draws_depend_on_the_generator_alone() -> None:
    scheduler = SpeeDDDPMScheduler()
    first = scheduler.sample_timesteps(64, generator=torch.Generator().manual_seed(5))
    torch.manual_seed(99)
    again = SpeeDDDIMScheduler().sample_timesteps(64, generator=torch.Generator().manual_seed(5), device="cpu")
    other = scheduler.sample_timesteps(64, generator=torch.Generator().manual_seed(6))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_process_that_never_settles_warns_once_and_is_uniform(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="speed_diffusers"):
        scheduler = SpeeDDDPMScheduler(beta_end=0.002)
        scheduler.sample_timesteps(8)
        scheduler.loss_weights(torch.arange(8))
        scheduler.sample_timesteps(8)
    warnings = [record.getMessage() for record in caplog.records if record.name.startswith("speed_diffusers")]
    assert len(warnings) == 1
    assert "tau = T = 1000" in warnings[0] and "speed_tau" in warnings[0] and "speed_r" in warnings[0]
    assert torch.equal(scheduler.speed_tables.pmf, torch.full((1000,), 1e-3, dtype=torch.float64))


def test_process_that_settles_warns_of_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="speed_diffusers"):
        SpeeDDDPMScheduler().sample_timesteps(8)
        SpeeDDDPMScheduler(beta_end=0.002, speed_tau=500).sample_timesteps(8)
        SpeeDDDPMScheduler(beta_end=0.002, speed_sampling="uniform").sample_timesteps(8)
    assert [record for record in caplog.records if record.name.startswith("speed_diffusers")] == []
