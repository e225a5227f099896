"""Densities that learn from the losses of a training: what they become, their state, and what they refuse."""

import warnings

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, PNDMScheduler

from noise_schedules import process_named
from speed_diffusers import (
    InputError,
    SpeeDDDPMScheduler,
    SpeeDFlowMatchEulerDiscreteScheduler,
    SpeeDOptions,
    SpeeDStrategy,
    speed_scheduler,
)
from speed_diffusers.predictions import epsilon_error_ratio
from speed_diffusers.timesteps import DENSITIES

LEARNING = ("loss_second_moment", "information_rate", "infonoise")


def strategy(schedule: str = "linear", **options: object) -> SpeeDStrategy:
    return SpeeDStrategy(process_named(schedule), SpeeDOptions(**options))  # type: ignore[arg-type]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def feed(learner: SpeeDStrategy, errors: torch.Tensor, times: int, count: float = 3.0) -> None:
    for _ in range(times):
        learner.update(errors * count, torch.full_like(errors, count))


@pytest.mark.parametrize("sampling", LEARNING)
def test_learning_starts_uniform_and_waits_until_everything_was_seen(sampling: str) -> None:
    learner = strategy(sampling=sampling, weighting="none")
    errors = torch.linspace(1.0, 2.0, 1000, dtype=torch.float64)
    feed(learner, errors, 9)
    np.testing.assert_allclose(learner.tables().pmf.numpy(), 1e-3, rtol=1e-12)
    counts = torch.ones(1000).double()
    counts[500:] = 0  # the tenth time only half of the timesteps
    learner.update(errors * counts, counts)
    np.testing.assert_allclose(learner.tables().pmf.numpy(), 1e-3, rtol=1e-12)
    learner.update(errors * (1 - counts), 1 - counts)
    assert float(learner.tables().pmf.std()) > 0


def test_loss_second_moment_is_the_root_of_the_mean_square_of_the_last_ten() -> None:
    learner = strategy("linear, T=10", sampling="loss_second_moment:uniform=0.001", weighting="none")
    history = torch.rand(13, 10, generator=seeded(1)).double()
    for errors in history:
        feed(learner, errors, 1)
    density = history[-10:].square().mean(0).sqrt()
    expected = 0.999 * density / density.sum() + 0.001 / 10
    tables = learner.tables()
    torch.testing.assert_close(tables.pmf, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(tables.weights, 1 / (10 * expected), rtol=1e-12, atol=0)
    # The mean loss under the draws is that under uniform ones.
    losses = torch.rand(10, generator=seeded(2)).double()
    assert float((tables.pmf * tables.weights * losses).sum()) == pytest.approx(float(losses.mean()), abs=1e-12)


def test_loss_second_moment_is_of_the_weighted_loss() -> None:
    learner = strategy(sampling="loss_second_moment", weighting="min_snr")
    feed(learner, torch.ones(1000).double(), 10)
    weights = strategy(weighting="min_snr").tables().weights
    expected = 0.999 * weights / weights.sum() + 1e-6
    torch.testing.assert_close(learner.tables().pmf, expected, rtol=1e-9, atol=0)
    torch.testing.assert_close(learner.tables().weights, weights / (1000 * expected), rtol=1e-9, atol=0)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_information_rate_is_epsilon_error_times_speed_of_log_snr(prediction_type: str) -> None:
    options = {"sampling": "information_rate:bins=1000,uniform=0", "prediction_type": prediction_type}
    learner = strategy(weighting="min_snr", **options)
    errors = torch.rand(1000, generator=seeded(0)).double() + 0.1
    feed(learner, errors, 10)
    process = learner.process
    density = errors * epsilon_error_ratio(process, prediction_type) * process.log_snr_speed
    torch.testing.assert_close(learner.tables().pmf, density / density.sum(), rtol=1e-9, atol=0)
    torch.testing.assert_close(learner.tables().weights, strategy(weighting="min_snr", **options).tables().weights)


def test_information_rate_averages_over_ranges_of_timesteps() -> None:
    learner = strategy("linear, T=10", sampling="information_rate:bins=2,uniform=0,decay=0.5", weighting="none")
    sums = torch.tensor([2.0, 4.0, 0, 0, 0, 9.0, 0, 0, 0, 0]).double()
    counts = torch.tensor([1.0, 2.0, 0, 0, 0, 3.0, 0, 0, 0, 0]).double()
    for _ in range(10):
        learner.update(sums, counts)
    learner.update(2 * sums, counts)
    mean = torch.tensor([2.0] * 5 + [3.0] * 5).double() * (0.5 + 0.5 * 2)
    expected = mean * learner.process.log_snr_speed
    torch.testing.assert_close(learner.tables().pmf, expected / expected.sum(), rtol=1e-9, atol=0)


@pytest.mark.parametrize("sampling", LEARNING)
def test_state_goes_on_exactly_where_it_was(sampling: str) -> None:
    errors = torch.rand(25, 1000, generator=seeded(4)).double() + 0.1
    first, second = (SpeeDDDPMScheduler(speed_sampling=sampling) for _ in range(2))
    assert first.speed_is_loss_aware
    for row in errors[:15]:
        first.update_speed(row, torch.ones(1000))
    state = first.speed_state_dict()
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    second.load_speed_state_dict(state)
    for row in errors[15:]:
        for scheduler in (first, second):
            scheduler.update_speed(row, torch.ones(1000))
    assert torch.equal(first.speed_tables.pmf, second.speed_tables.pmf)
    assert torch.equal(first.speed_tables.weights, second.speed_tables.weights)
    draws = [s.sample_timesteps(512, generator=seeded(8)) for s in (first, second)]
    assert torch.equal(*draws)
    # The state that was handed out did not change with what came later.
    fresh = SpeeDDDPMScheduler(speed_sampling=sampling)
    fresh.load_speed_state_dict(state)
    assert not torch.equal(fresh.speed_tables.pmf, first.speed_tables.pmf)


@pytest.mark.parametrize("sampling", LEARNING)
def test_errors_that_are_not_finite_are_left_out(sampling: str) -> None:
    clean, dirty = (strategy(sampling=sampling) for _ in range(2))
    errors, counts = torch.ones(1000).double(), torch.ones(1000).double()
    spoilt, without = errors.clone(), counts.clone()
    spoilt[3], spoilt[4], without[3], without[4] = float("nan"), float("inf"), 0.0, 0.0
    for _ in range(12):
        clean.update(errors * without, without)
        dirty.update(spoilt, counts)
    for name, value in clean.state_dict().items():
        assert torch.equal(dirty.state_dict()[name], value) and bool(torch.isfinite(value.double()).all())


@pytest.mark.parametrize("sampling", LEARNING)
def test_errors_of_zero_everywhere_leave_it_uniform(sampling: str) -> None:
    learner = strategy(sampling=sampling)
    feed(learner, torch.zeros(1000).double(), 12)
    np.testing.assert_allclose(learner.tables().pmf.numpy(), 1e-3, rtol=1e-9)
    assert bool(torch.isfinite(learner.tables().weights).all())


@pytest.mark.parametrize("name", [name for name in DENSITIES if name not in LEARNING])
def test_a_density_that_does_not_learn_says_so(name: str) -> None:
    scheduler = SpeeDDDPMScheduler(speed_sampling=name)
    assert not scheduler.speed_is_loss_aware
    for call in (
        lambda: scheduler.update_speed(torch.ones(1000), torch.ones(1000)),
        lambda: scheduler.speed_state_dict(),
        lambda: scheduler.load_speed_state_dict({}),
    ):
        with pytest.raises(
            InputError, match="learns nothing; those that do: loss_second_moment, information_rate, .*y"
        ):
            call()


@pytest.mark.parametrize(
    ("sums", "counts", "message"),
    [
        (torch.ones(999), torch.ones(1000), r"^error_sums: its shape must be \(1000,\), but is \(999,\)"),
        (torch.ones(1000), torch.ones(1000, 1), r"^error_counts: its shape must be \(1000,\), but is \(1000, 1\)"),
        (torch.ones(1000), -torch.ones(1000), "^error_counts: must be at least 0, but the smallest is -1.0"),
    ],
)
def test_bad_errors_are_refused(sums: torch.Tensor, counts: torch.Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message):
        strategy(sampling="information_rate").update(sums, counts)


def test_state_of_another_density_or_process_is_refused() -> None:
    learner = strategy(sampling="information_rate")
    with pytest.raises(
        InputError, match=r"State of speed_sampling: has \['seen', 'squares'\], but \['mean', 'seen'\]"
    ):
        learner.load_state_dict(strategy(sampling="loss_second_moment").state_dict())
    with pytest.raises(InputError, match=r"'mean' has the shape \(50,\), but \(100,\) is needed"):
        learner.load_state_dict(strategy(sampling="information_rate:bins=50").state_dict())


MAKERS = {
    "constructor": lambda sampling: SpeeDDDPMScheduler(speed_sampling=sampling),
    "from_config": lambda sampling: SpeeDDDPMScheduler.from_config(DDPMScheduler().config, speed_sampling=sampling),
    "flow": lambda sampling: SpeeDFlowMatchEulerDiscreteScheduler(speed_sampling=sampling),
    "factory": lambda sampling: speed_scheduler(PNDMScheduler(), speed_sampling=sampling),
}


@pytest.mark.parametrize("sampling", LEARNING)
@pytest.mark.parametrize("maker", MAKERS)
def test_learning_without_being_told_anything_warns_once(sampling: str, maker: str) -> None:
    """As a Python warning: scripts configure loggers, and drop what a library logs."""
    scheduler = MAKERS[maker](sampling)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2000):
            scheduler.sample_timesteps(1)
    messages = [str(each.message) for each in caught]
    assert len(messages) == 1 and f"'{sampling}' is loss-aware" in messages[0] and "update_speed" in messages[0]
    assert caught[0].filename == __file__


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_infonoise_on_the_gaussian_channel(prediction_type: str) -> None:
    # For data of variance 1 the least error of x_0 is sigma^2 / (1 + sigma^2). With the loss weight that makes every
    # target's error that of v, and without a gate, the density over log SNR is Logistic(0, 1).
    learner = strategy(
        sampling="infonoise:gate=0,uniform=0,bins=1000",
        weighting="p2:k=1,gamma=0",
        prediction_type=prediction_type,
    )
    process = learner.process
    snr = process.finite_log_snr.exp()
    errors = 1.0 / (1.0 + snr) * snr / epsilon_error_ratio(process, prediction_type)
    as_v = (1.0 + snr) / snr * epsilon_error_ratio(process, prediction_type)
    learner._weights = as_v
    feed(learner, errors, 10)
    logistic = torch.sigmoid(process.finite_log_snr) * torch.sigmoid(-process.finite_log_snr) * process.log_snr_speed
    torch.testing.assert_close(learner.tables().pmf, logistic / logistic.sum(), rtol=1e-9, atol=0)


def test_infonoise_falls_off_below_its_gate_and_where_nothing_is_weighed() -> None:
    gated, free = (strategy(sampling=f"infonoise:gate={gate},uniform=0", weighting="none") for gate in (0.3, 0))
    for learner in (gated, free):
        feed(learner, torch.ones(1000).double(), 10)
    ratio = gated.tables().pmf / free.tables().pmf
    sigma = torch.exp(-0.5 * gated.process.finite_log_snr)
    expected = sigma.pow(3) / (sigma.pow(3) + 0.3**3)
    torch.testing.assert_close(ratio / ratio[-1], expected / expected[-1], rtol=1e-9, atol=0)
    free._weights = torch.ones(1000).double().index_fill(0, torch.arange(100), 0.0)
    feed(free, torch.ones(1000).double(), 1)
    assert not free.tables().pmf[:100].any() and bool((free.tables().pmf[100:] > 0).all())


def test_infonoise_finds_its_gate_where_the_error_over_sigma_cubed_begins_to_count() -> None:
    searched = strategy(sampling="infonoise:search=0.002,uniform=0,bins=1000", weighting="none")
    process = searched.process
    sigma = torch.exp(-0.5 * process.finite_log_snr)
    assert searched._learned_density.gate == 0.3  # type: ignore[union-attr]
    feed(searched, 1.0 / (1.0 + sigma.square()), 10)  # of epsilon on the Gaussian channel
    # There error / sigma^3 is 1 / (sigma (1 + sigma^2)), whose peak is at the least noise.
    level = 0.002 / float(sigma[0] * (1.0 + sigma[0] ** 2))
    roots = np.roots([1.0, 0.0, 1.0, -1.0 / level])
    (root,) = roots[np.isreal(roots)].real
    gate = searched._learned_density.gate  # type: ignore[union-attr]
    assert 1.0 < root < 3.0
    assert gate == float(sigma[sigma <= root][-1])
    pinned = strategy(sampling=f"infonoise:gate={gate!r},uniform=0,bins=1000", weighting="none")
    feed(pinned, 1.0 / (1.0 + sigma.square()), 10)
    torch.testing.assert_close(searched.tables().pmf, pinned.tables().pmf, rtol=1e-12, atol=0)


def test_a_loss_aware_first_phase_learns_and_is_undone_only_while_it_lasts() -> None:
    scheduler = SpeeDDDPMScheduler(
        speed_sampling="two_phase:first=loss_second_moment,until=0.5", speed_weighting="none"
    )
    assert scheduler.speed_is_loss_aware
    scheduler.sample_timesteps(4, progress=0.2)
    alone = strategy(sampling="loss_second_moment", weighting="none")
    errors = torch.linspace(1.0, 2.0, 1000, dtype=torch.float64)
    for _ in range(10):
        scheduler.update_speed(errors, torch.ones(1000))
    feed(alone, errors, 10, count=1.0)
    during = scheduler.speed_strategy.tables(0.2)
    assert torch.equal(during.pmf, alone.tables().pmf) and torch.equal(during.weights, alone.tables().weights)
    after = scheduler.speed_strategy.tables(0.5)
    assert torch.equal(after.pmf, torch.full_like(errors, 1e-3))
    assert torch.equal(after.weights, torch.ones_like(errors))
    scheduler.update_speed(errors, torch.ones(1000))  # later than the phase, as a loop does to its end
    assert torch.equal(scheduler.speed_tables.weights, torch.ones_like(errors))
    resumed = SpeeDDDPMScheduler.from_config(scheduler.config)
    resumed.load_speed_state_dict(scheduler.speed_state_dict())
    for progress in (0.3, 0.7):
        mine, theirs = (each.speed_strategy.tables(progress) for each in (scheduler, resumed))
        assert torch.equal(mine.pmf, theirs.pmf) and torch.equal(mine.weights, theirs.weights)
