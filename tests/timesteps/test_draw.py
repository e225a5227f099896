"""How batches are drawn: in pairs as the authors' code does, and in strata."""

import math

import numpy as np
import pytest
import torch

from noise_schedules import chi_square_p_value, process_named, settings_of
from speed_diffusers import InputError, SpeeDDDPMScheduler, SpeeDFlowMatchEulerDiscreteScheduler
from speed_diffusers.timesteps import DENSITIES, DRAWS, draw_independent, drawn_pmf, dual_steps, timestep_pmf

MILLION = 1_000_000
LINEAR_PIVOT = 642


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def cumulative_of(pmf: np.ndarray) -> torch.Tensor:
    cumulative = torch.from_numpy(pmf.cumsum()).float()
    cumulative[-1] = 1.0
    return cumulative


def reference_pairs(primary: np.ndarray, pivot: int, size: int) -> np.ndarray:
    """The authors' rule, one step at a time."""
    dual = [pivot - t if t < pivot else t - pivot for t in primary.tolist()]
    return np.array([*primary.tolist(), *dual])[:size]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8, 255, 256])
@pytest.mark.parametrize("preset", [{"speed_k": 5.0, "speed_tau": 700}, {"speed_sampling": "t_sample"}])
def test_pairs_are_the_authors_for_even_and_odd_batches(size: int, preset: dict[str, object]) -> None:
    scheduler = SpeeDDDPMScheduler(speed_draw="paired", **preset)
    draws = scheduler.sample_timesteps(size, generator=seeded(size))
    primary = draw_independent(
        cumulative_of(scheduler.speed_tables.pmf.numpy()), size // 2 + 1, generator=seeded(size)
    )
    assert draws.tolist() == reference_pairs(primary.numpy(), LINEAR_PIVOT, size).tolist()
    assert draws.dtype == torch.int64 and draws.shape == (size,)


@pytest.mark.parametrize("preset", [{"speed_k": 5.0, "speed_tau": 700}, {"speed_sampling": "t_sample"}])
def test_a_million_pairs_follow_both_laws(preset: dict[str, object]) -> None:
    scheduler = SpeeDDDPMScheduler(speed_draw="paired", **preset)
    tables = scheduler.speed_tables
    draws = scheduler.sample_timesteps(2 * MILLION, generator=seeded(3)).numpy()
    assert draws.min() >= 0 and draws.max() < 1000
    primary, dual = draws[: MILLION + 1], draws[MILLION + 1 :]
    law = tables.pmf.numpy()
    dual_law = np.zeros(1000)
    for t in range(1000):
        dual_law[LINEAR_PIVOT - t if t < LINEAR_PIVOT else t - LINEAR_PIVOT] += law[t]
    assert chi_square_p_value(np.bincount(primary, minlength=1000), law) > 1e-4
    counts = np.bincount(dual, minlength=1000)
    assert counts[dual_law == 0].sum() == 0 and dual_law[LINEAR_PIVOT + 1 :].sum() == 0
    assert chi_square_p_value(counts[: LINEAR_PIVOT + 1], dual_law[: LINEAR_PIVOT + 1]) > 1e-4
    np.testing.assert_allclose(tables.drawn_pmf.numpy(), 0.5 * (law + dual_law), atol=1e-15)
    # And each would be told from the other.
    assert chi_square_p_value(counts, law) < 1e-4


@pytest.mark.parametrize(
    ("k", "plain", "paired"), [(1, 0.300, 0.159), (2, 0.176, 0.094), (5, 0.079, 0.042), (10, 0.041, 0.022)]
)
def test_mass_of_the_convergence_area_with_pairs_of_32(k: float, plain: float, paired: float) -> None:
    scheduler = SpeeDDDPMScheduler(speed_k=k, speed_tau=700, speed_draw="paired")
    law = scheduler.speed_tables.pmf
    mirrored = 2 * scheduler.speed_tables.drawn_pmf - law
    assert float(law[700:].sum()) == pytest.approx(plain, abs=6e-4)
    assert float(17 / 32 * law[700:].sum() + 15 / 32 * mirrored[700:].sum()) == pytest.approx(paired, abs=6e-4)


def test_density_with_pairs_of_32_for_k_of_5() -> None:
    scheduler = SpeeDDDPMScheduler(speed_k=5, speed_tau=700, speed_draw="paired")
    law = scheduler.speed_tables.pmf
    ratio = 1000 * (17 / 32 * law + 15 / 32 * (2 * scheduler.speed_tables.drawn_pmf - law))
    # Up to 57 come the duals of 643 to 699 too, which are drawn often.
    at = {0: 1.32, 1: 1.93, 57: 1.93, 58: 1.44, 357: 1.44, 400: 1.32, 642: 1.32, 650: 0.70, 699: 0.70, 700: 0.14}
    for timestep, expected in at.items():
        assert float(ratio[timestep]) == pytest.approx(expected, abs=0.02), timestep


def test_seed_mass_beyond_the_pivot() -> None:
    scheduler = SpeeDDDPMScheduler(speed_sampling="t_sample", speed_draw="paired")
    law = scheduler.speed_tables.pmf
    mirrored = 2 * scheduler.speed_tables.drawn_pmf - law
    assert float(law[642:].sum()) == pytest.approx(0.100, abs=6e-4)
    assert float(17 / 32 * law[642:].sum() + 15 / 32 * mirrored[642:].sum()) == pytest.approx(0.054, abs=1e-3)


def test_dual_of_the_pivot_and_its_neighbours() -> None:
    assert dual_steps(torch.tensor([0, 1, 641, 642, 643, 999]), 642).tolist() == [642, 641, 1, 0, 1, 357]


@pytest.mark.parametrize("make", [SpeeDFlowMatchEulerDiscreteScheduler, lambda **o: SpeeDDDPMScheduler(10, **o)])
def test_pairs_need_a_pivot(make: object) -> None:
    with pytest.raises(InputError, match="the pivot of the authors' code does not exist; use speed_draw="):
        make(speed_draw="paired")  # type: ignore[operator]


def test_unknown_draw_names_the_nearest() -> None:
    with pytest.raises(InputError, match=r"^Unknown draw \(speed_draw\) 'stratfied'. Did you mean 'stratified'\?"):
        SpeeDDDPMScheduler(speed_draw="stratfied")


@pytest.mark.parametrize("size", [1, 2, 3, 7, 256, 1000, 4096, 65536])
def test_every_stratum_is_hit_exactly_once(size: int) -> None:
    cumulative = torch.arange(1, size + 1, dtype=torch.float32) / size
    strata = DRAWS["stratified"].function(cumulative, size, seeded(size), None)
    assert sorted(strata.tolist()) == list(range(size))
    assert size < 100 or strata.tolist() != list(range(size)), "the strata must be permuted"


def test_stratum_is_hit_once_even_where_float32_rounds_up(monkeypatch: pytest.MonkeyPatch) -> None:
    largest = torch.nextafter(torch.tensor(1.0), torch.tensor(0.0))
    monkeypatch.setattr(torch, "rand", lambda size, **_: torch.full((size,), float(largest)))
    for size in (3, 1000, 65536):
        cumulative = torch.arange(1, size + 1, dtype=torch.float32) / size
        strata = DRAWS["stratified"].function(cumulative, size, None, None)
        assert sorted(strata.tolist()) == list(range(size))


@pytest.mark.parametrize("choice", ["asymmetric", "logit_normal", "uniform"])
def test_stratified_draws_follow_the_same_law(choice: str) -> None:
    scheduler = SpeeDDDPMScheduler(speed_sampling=choice, speed_draw="stratified")
    law = scheduler.speed_tables.pmf.numpy()
    # One draw of each of many batches, so that the draws are independent of one another.
    draws = torch.stack([scheduler.sample_timesteps(4, generator=seeded(i))[i % 4] for i in range(20_000)])
    assert chi_square_p_value(np.bincount(draws.numpy(), minlength=1000), law) > 1e-4
    # And a big batch follows it far more closely than independent draws could.
    counts = np.bincount(scheduler.sample_timesteps(MILLION, generator=seeded(0)).numpy(), minlength=1000)
    np.testing.assert_allclose(counts, law * MILLION, atol=2.1)


@pytest.mark.parametrize("choice", ["asymmetric", "logit_normal", "uniform"])
def test_stratified_estimates_vary_strictly_less(choice: str) -> None:
    variances = {}
    for draw in ("independent", "stratified"):
        scheduler = SpeeDDDPMScheduler(speed_sampling=choice, speed_draw=draw)
        means = [
            float(scheduler.loss_weights(scheduler.sample_timesteps(64, generator=seeded(i))).mean())
            for i in range(300)
        ]
        variances[draw] = float(np.var(means))
    assert variances["stratified"] < 0.1 * variances["independent"]


def test_any_slice_of_a_stratified_batch_is_a_fair_sample() -> None:
    scheduler = SpeeDDDPMScheduler(speed_draw="stratified")
    law = scheduler.speed_tables.pmf.numpy()
    first, last = [], []
    for seed in range(2000):
        batch = scheduler.sample_timesteps(32, generator=seeded(seed))
        first.append(batch[:8])
        last.append(batch[-8:])
    mean = float((law * np.arange(1000)).sum())
    deviation = math.sqrt(float((law * (np.arange(1000) - mean) ** 2).sum()) / 16_000)
    for part in (first, last):
        assert float(torch.cat(part).double().mean()) == pytest.approx(mean, abs=4 * deviation)


@pytest.mark.parametrize("choice", ["t_sample", "mode:scale=1", "beta:alpha=0.5", "edm", "laplace:scale=2"])
def test_a_million_draws_of_other_densities(choice: str) -> None:
    scheduler = SpeeDDDPMScheduler(speed_sampling=choice)
    counts = np.bincount(scheduler.sample_timesteps(MILLION, generator=seeded(11)).numpy(), minlength=1000)
    assert chi_square_p_value(counts, scheduler.speed_tables.pmf.numpy()) > 1e-4


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("name", DENSITIES)
def test_every_draw_of_every_density_stays_inside(name: str, draw: str) -> None:
    process = process_named("linear")
    cumulative = cumulative_of(timestep_pmf(name, process, settings_of(process)).numpy())
    for size in (1, 2, 33, 4096):
        draws = DRAWS[draw].function(cumulative, size, seeded(size), LINEAR_PIVOT)
        assert draws.shape == (size,) and draws.dtype == torch.int64
        assert int(draws.min()) >= 0 and int(draws.max()) < 1000


@pytest.mark.parametrize("draw", DRAWS)
def test_draws_depend_on_the_generator_alone(draw: str) -> None:
    scheduler = SpeeDDDPMScheduler(speed_draw=draw)
    first = scheduler.sample_timesteps(64, generator=seeded(5))
    torch.manual_seed(99)
    before = torch.get_rng_state()
    assert torch.equal(scheduler.sample_timesteps(64, generator=seeded(5)), first)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(scheduler.sample_timesteps(64, generator=seeded(6)), first)


def test_only_pairs_change_the_law_of_a_draw() -> None:
    pmf = SpeeDDDPMScheduler().speed_tables.pmf
    for draw in ("independent", "stratified"):
        assert torch.equal(drawn_pmf(pmf, draw, None), pmf)
    assert float(drawn_pmf(pmf, "paired", 642).sum()) == pytest.approx(1.0, abs=1e-12)
