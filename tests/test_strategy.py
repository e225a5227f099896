"""What changes in the course of a training: k that falls, curricula, weights of mean 1; and bad options."""

import logging

import numpy as np
import pytest
import torch

from noise_schedules import process_named
from speed_diffusers import InputError, SpeeDDDPMScheduler, SpeeDOptions, SpeeDStrategy
from speed_diffusers.timesteps import DENSITIES, DRAWS
from speed_diffusers.weightings import WEIGHTINGS

LEARNING = ("loss_second_moment", "information_rate")


def strategy(schedule: str = "linear", **options: object) -> SpeeDStrategy:
    return SpeeDStrategy(process_named(schedule), SpeeDOptions(**options))  # type: ignore[arg-type]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# k that falls


@pytest.mark.parametrize(
    ("progress", "k"), [(0.0, 5.0), (0.4, 5.0), (0.5, 4.0), (0.6, 3.0), (0.8, 1.0), (0.9, 1.0), (1.0, 1.0)]
)
def test_k_falls_linearly_between_start_and_end(progress: float, k: float) -> None:
    tables = strategy(anneal_start=0.4, anneal_end=0.8).tables(progress)
    assert tables.settings.k == pytest.approx(k) and tables.settings.tau == 700
    expected = np.where(np.arange(1000) < 700, k, 1.0) / (1000 + 700 * (k - 1))
    np.testing.assert_allclose(tables.pmf.numpy(), expected, rtol=1e-9)


def test_k_drops_at_once_where_start_is_end() -> None:
    falling = strategy(anneal_start=0.5, anneal_end=0.5)
    assert [falling.tables(progress).settings.k for progress in (0.499, 0.5, 0.4)] == [5.0, 1.0, 5.0]


def test_by_default_nothing_changes() -> None:
    plain = strategy()
    assert plain.tables() is plain.tables(0.0) is plain.tables(0.7) is plain.tables(1.0)


def test_tables_are_made_again_only_a_thousand_times() -> None:
    falling = strategy(anneal_start=0.0)
    first = falling.tables(0.25)
    assert falling.tables(0.2502) is first and falling.tables(0.2507) is not first
    assert falling.tables(0.2507).settings.progress == 0.251


def test_progress_is_asked_for_where_it_is_needed() -> None:
    for options in ({"anneal_start": 0.5}, {"sampling": "clts"}):
        changing = SpeeDDDPMScheduler(**{f"speed_{key}": value for key, value in options.items()})
        for call in (lambda s: s.sample_timesteps(4), lambda s: s.loss_weights(torch.arange(4))):
            with pytest.raises(InputError, match="pass progress, the share that is done, in \\[0, 1\\]"):
                call(changing)
        assert changing.sample_timesteps(4, progress=0.5).shape == (4,)
        assert changing.loss_weights(torch.arange(4), progress=0.5).shape == (4,)
        assert changing.speed_tables.settings.progress == 0.5


@pytest.mark.parametrize("progress", [-0.1, 1.001, float("nan")])
def test_progress_outside_its_range_is_refused(progress: float) -> None:
    with pytest.raises(InputError, match=r"^progress=.*: must lie in \[0, 1\]"):
        SpeeDDDPMScheduler().sample_timesteps(4, progress=progress)


def test_annealed_draws_reach_uniform() -> None:
    scheduler = SpeeDDDPMScheduler(speed_anneal_start=0.0)
    early = scheduler.sample_timesteps(100_000, generator=seeded(0), progress=0.0)
    late = scheduler.sample_timesteps(100_000, generator=seeded(0), progress=1.0)
    assert float((early >= 700).float().mean()) == pytest.approx(0.0789, abs=0.004)
    assert float((late >= 700).float().mean()) == pytest.approx(0.3, abs=0.006)
    again = scheduler.sample_timesteps(100_000, generator=seeded(0), progress=0.0)
    assert torch.equal(early, again), "going back in a resumed run gives the same draws"


def test_process_that_never_settles_warns_once_in_a_whole_annealing(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="speed_diffusers"):
        falling = strategy("linear, T=10", anneal_start=0.0)
        for progress in (0.0, 0.5, 1.0):
            falling.tables(progress)
    assert len(caplog.records) == 1 and "tau = T = 10" in caplog.records[0].getMessage()


# Weights of mean 1


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("weighting", ["change_aware", "official", "min_snr", "none"])
def test_normalised_weights_have_mean_one_under_the_draws(draw: str, weighting: str) -> None:
    tables = strategy(weighting=weighting, draw=draw, tau=700, normalize_weights=True).tables()
    assert float((tables.drawn_pmf * tables.weights).sum()) == pytest.approx(1.0, abs=1e-12)
    plain = strategy(weighting=weighting, draw=draw, tau=700).tables()
    ratio = tables.weights / plain.weights
    np.testing.assert_allclose(ratio.numpy(), float(ratio[0]), rtol=1e-9)


def test_mean_weight_of_the_authors_code() -> None:
    for draw, mean in (("independent", 0.544), ("paired", 0.528)):
        tables = strategy(weighting="official", tau=700, draw=draw).tables()
        assert float((tables.drawn_pmf * tables.weights).sum()) == pytest.approx(mean, abs=2e-3)


def test_normalised_weights_follow_k_as_it_falls() -> None:
    falling = strategy(anneal_start=0.0, normalize_weights=True)
    for progress in (0.0, 0.5, 1.0):
        tables = falling.tables(progress)
        assert float((tables.pmf * tables.weights).sum()) == pytest.approx(1.0, abs=1e-12)


# Bad options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"anneal_start": -0.1}, r"^speed_anneal_start=-0.1: must lie in \[0, 1\]"),
        ({"anneal_start": 1.5}, r"^speed_anneal_start=1.5: must lie in \[0, 1\]"),
        ({"anneal_start": "soon"}, "^speed_anneal_start='soon': must be a number"),
        ({"anneal_start": True}, "^speed_anneal_start=True: must be a number"),
        ({"anneal_start": 0.5, "anneal_end": 0.4}, r"^speed_anneal_end=0.4: must lie in .*\[0.5, 1\]"),
        ({"anneal_end": 0.4}, r"^speed_anneal_end=0.4: must lie in"),
        ({"anneal_start": 0.5, "anneal_end": 1.1}, r"^speed_anneal_end=1.1: must lie in"),
        ({"normalize_weights": 1}, "^speed_normalize_weights=1: must be true or false"),
        ({"sampling": "logit_normal:men=1"}, "Unknown parameter of .* 'logit_normal' 'men'. Did you mean 'mean'"),
        ({"sampling": "logit_normal:std=0"}, r"logit_normal:std=0': std=0 must be in \[1e-6, 100\]"),
        ({"weighting": "min_snr:gamma=-5"}, r"min_snr:gamma=-5': gamma=-5 must be in \[1e-12, inf\)"),
        ({"weighting": "min_snr=5"}, "Unknown loss weighting"),
        ({"draw": "pared"}, r"Unknown draw \(speed_draw\) 'pared'. Did you mean 'paired'"),
        (
            {"draw": "paired", "sampling": "loss_second_moment"},
            "^speed_draw='paired': .*'independent' or 'stratified'",
        ),
        ({"draw": None}, r"Unknown draw \(speed_draw\) 'None'"),
        ({"k": True}, "^speed_k=True: must be a number"),
    ],
)
def test_bad_options_are_one_line(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        strategy(**options)
    assert "\n" not in str(error.value)


def test_every_combination_works_on_a_flow_and_on_a_long_process() -> None:
    for schedule, prediction_type in (("flow", "flow_prediction"), ("linear, zero terminal SNR", "v_prediction")):
        for sampling in DENSITIES:
            for weighting in WEIGHTINGS:
                if sampling == "t_sample" and schedule == "flow":
                    continue
                tables = strategy(
                    schedule,
                    sampling=sampling,
                    weighting=weighting,
                    prediction_type=prediction_type,
                    draw="stratified",
                    normalize_weights=True,
                ).tables(0.5)
                assert float((tables.pmf * tables.weights).sum()) == pytest.approx(1.0, abs=1e-9)
                assert bool(torch.isfinite(tables.weights).all()) and bool((tables.weights >= 0).all())
