"""EDM2's learned uncertainty: its minimum, found by descent as EDM2 does too, its state, and whom it works with."""

import math
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from noise_schedules import process_named
from speed_diffusers import InputError, SpeeDDDPMScheduler, SpeeDOptions, SpeeDStrategy
from speed_diffusers.predictions import epsilon_error_ratio
from speed_diffusers.process import ForwardProcess
from speed_diffusers.training.feedback import ErrorFeedback
from speed_diffusers.weightings import WEIGHTINGS, timestep_weights


def strategy(schedule: str = "linear", **options: object) -> SpeeDStrategy:
    return SpeeDStrategy(
        process_named(schedule), SpeeDOptions(**{"sampling": "uniform", "weighting": "uncertainty", **options})
    )  # type: ignore[arg-type]


def feed(learner: SpeeDStrategy, errors: Tensor, count: float = 1000.0, times: int = 1) -> None:
    """The errors that are to be expected, each so many times."""
    for _ in range(times):
        learner.update(errors * count, torch.full_like(errors, count))


def channel_error(process: ForwardProcess, prediction_type: str) -> Tensor:
    """The least error of a prediction for Gaussian data of variance 1: that of x_0 is 1 / (1 + SNR)."""
    snr = process.finite_log_snr.exp()
    return snr / (1.0 + snr) / epsilon_error_ratio(process, prediction_type)


def test_errors_that_are_collected_are_no_reason_to_warn() -> None:
    """With accumulation more than 200 batches are weighed between two updates."""
    scheduler = SpeeDDDPMScheduler(speed_sampling="uniform", speed_weighting="uncertainty")
    feedback = ErrorFeedback(scheduler, torch.device("cpu"))
    timesteps = torch.tensor([3, 500])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(300):
            scheduler.loss_weights(timesteps)
            feedback.add(timesteps, torch.ones(2))


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample"])
def test_on_the_gaussian_channel_every_noise_level_counts_alike(prediction_type: str) -> None:
    learner = strategy(prediction_type=prediction_type)
    expected = channel_error(learner.process, prediction_type)
    assert float(expected.max() / expected.min()) > 1e3
    feed(learner, expected)
    difference = (-learner.tables().weights.log() - expected.log()).abs()
    # Exact but for the width of a range, 0.3 of log SNR, half of which has no neighbour at either end.
    log_snr = learner.process.finite_log_snr
    assert float(difference[(log_snr < log_snr.max() - 0.2) & (log_snr > log_snr.min() + 0.2)].max()) < 0.02
    assert float(difference.max()) < 0.17


def test_a_timestep_that_has_its_range_to_itself_gets_the_reciprocal_of_its_mean_error() -> None:
    learner = strategy("linear, T=10", weighting="uncertainty:bins=1000")
    errors = torch.rand(10, generator=torch.Generator().manual_seed(0)).double() + 0.1
    feed(learner, errors)
    torch.testing.assert_close(learner.tables().weights, 1.0 / errors, rtol=1e-12, atol=0)


class FourierFeatures(nn.Module):
    """EDM2's u(sigma) on its own: random Fourier features of the noise level, then one linear layer."""

    def __init__(self, channels: int, generator: torch.Generator) -> None:
        super().__init__()
        self.register_buffer("frequencies", 2 * math.pi * torch.randn(channels, generator=generator))
        self.register_buffer("phases", 2 * math.pi * torch.rand(channels, generator=generator))
        self.linear = nn.Linear(channels, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, level: Tensor) -> Tensor:
        features = torch.cos(level[:, None] * self.frequencies + self.phases) * 2**0.5
        return self.linear(features)[:, 0]


@pytest.mark.parametrize("sampling", ["gaussian:mean=-1", "uniform"])
def test_descent_on_edm2s_objective_ends_at_the_same_weights(sampling: str) -> None:
    """weight * error / exp(u) + u by Adam over a network, weight being EDM2's own: the weight that is left is ours."""
    generator = torch.Generator().manual_seed(0)
    learner = strategy(sampling=sampling, prediction_type="v_prediction")
    process, pmf = learner.process, learner.tables().pmf
    expected = 0.6 * channel_error(process, "v_prediction") + 0.4 * torch.sigmoid(process.finite_log_snr)
    fixed = timestep_weights("edm:sigma_data=1", process, learner.settings) * torch.rand(1, generator=generator)
    network = FourierFeatures(128, generator)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2, betas=(0.9, 0.99))
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 1500)
    level = (process.finite_log_snr / 8.0).float()
    told = torch.zeros(2, 1000, dtype=torch.float64)
    for step in range(1500):
        timesteps = pmf.multinomial(256, replacement=True, generator=generator)
        # An image's mean squared error is near a Gamma variable: a mean of squares.
        noisy = torch.randn(256, 16, generator=generator).square().mean(1) * expected[timesteps]
        u = network(level[timesteps])
        loss = (fixed[timesteps] * noisy / u.exp() + u).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rates.step()
        told.index_add_(1, timesteps, torch.stack((noisy, torch.ones_like(noisy))))
        if step % 50 == 49:  # as the trainer does
            learner.update(*told)
            told.zero_()
    with torch.no_grad():
        theirs = fixed.log() - network(level)
    ours = learner.tables().weights.log()
    difference = (theirs - ours).abs()
    assert float((pmf * difference).sum()) < 0.06
    assert float(difference[pmf > 0.1 * pmf.max()].max()) < 0.25
    assert float((pmf * (ours + expected.log()).abs()).sum()) < 0.03
    assert float(ours.max() - ours.min()) > 0.5


def test_old_errors_are_forgotten_by_the_samples_since() -> None:
    learner = strategy("linear, T=10", weighting="uncertainty:bins=1,samples=500")
    ones = torch.ones(10).double()
    learner.update(40.0 * ones, 20.0 * ones)  # 200 samples of error 2
    learner.update(30.0 * ones, 5.0 * ones)  # then 50 of error 6
    kept = math.exp(-50 / 500)
    mean = (2.0 * 200 * kept + 6.0 * 50) / (200 * kept + 50)
    torch.testing.assert_close(learner.tables().weights, ones / mean, rtol=1e-12, atol=0)


def test_all_count_1_at_first_and_ranges_that_are_not_drawn_take_the_nearest_ones() -> None:
    learner = strategy("linear, T=10", weighting="uncertainty:bins=1000")
    counts = torch.zeros(10).double()
    counts[3:6] = 33.0
    errors = torch.arange(1.0, 11.0).double()
    learner.update(errors * counts, counts)  # 99 samples, fewer than 10 for each of 10 ranges
    assert torch.equal(learner.tables().weights, torch.ones(10).double())
    learner.update(errors * counts, counts)
    expected = 1.0 / torch.tensor([4.0, 4, 4, 4, 5, 6, 6, 6, 6, 6]).double()
    torch.testing.assert_close(learner.tables().weights, expected, rtol=1e-12, atol=0)


def test_what_is_not_finite_is_left_out_and_no_error_has_no_limitless_weight() -> None:
    learner = strategy("linear, T=10", weighting="uncertainty:bins=1000")
    errors = torch.ones(10).double()
    spoilt = errors.clone()
    spoilt[2], spoilt[3], spoilt[7] = float("nan"), float("inf"), 0.0
    feed(learner, spoilt, times=3)
    weights = learner.tables().weights
    expected = errors.clone()
    expected[7] = 1e12
    torch.testing.assert_close(weights, expected, rtol=1e-6, atol=0)


def test_both_learn_and_the_density_is_that_of_the_weighted_losses() -> None:
    learner = strategy(sampling="loss_second_moment:history=1,uniform=0.001", normalize_weights=True)
    assert learner.learning == ["sampling", "weighting"]
    errors = torch.linspace(1.0, 3.0, 1000, dtype=torch.float64)
    feed(learner, errors)
    first = learner.tables()
    torch.testing.assert_close(first.pmf, 0.999 * errors / errors.sum() + 1e-6, rtol=1e-9, atol=0)
    feed(learner, errors)  # weighted by now, so that all losses are alike
    second = learner.tables()
    torch.testing.assert_close(second.pmf, torch.full_like(errors, 1e-3), rtol=2e-2, atol=0)
    assert float((second.pmf * second.weights).sum()) == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize("sampling", ["gaussian:mean=-1", "infonoise", "two_phase:first=information_rate"])
def test_state_goes_on_exactly_where_it_was(sampling: str) -> None:
    options = {"speed_sampling": sampling, "speed_weighting": "uncertainty"}
    first, second = (SpeeDDDPMScheduler(**options) for _ in range(2))
    assert first.speed_is_loss_aware
    rows = torch.rand(24, 1000, generator=torch.Generator().manual_seed(4)).double() + 0.1
    for row in rows[:14]:
        first.update_speed(row, torch.ones(1000))
    state = first.speed_state_dict()
    assert {name.split(".")[0] for name in state} == {
        "speed_weighting",
        *([] if "gaussian" in sampling else ["speed_sampling"]),
    }
    second.load_speed_state_dict(state)
    timesteps = torch.arange(1000)
    assert torch.equal(first.loss_weights(timesteps, 0.3), second.loss_weights(timesteps, 0.3))
    for row in rows[14:]:
        for scheduler in (first, second):
            scheduler.update_speed(row, torch.ones(1000))
    assert torch.equal(first.speed_tables.weights, second.speed_tables.weights)
    assert torch.equal(first.speed_tables.pmf, second.speed_tables.pmf)
    assert float(first.speed_tables.weights.std()) > 0


def test_a_state_of_version_0_1_is_a_densitys() -> None:
    now, then = (strategy("linear, T=10", sampling="information_rate", weighting="none") for _ in range(2))
    feed(now, torch.arange(1.0, 11.0).double(), times=12)
    unnamed = {name.removeprefix("speed_sampling."): value for name, value in now.state_dict().items()}
    assert set(unnamed) == {"mean", "seen"}
    then.load_state_dict(unnamed)
    assert torch.equal(then.tables().pmf, now.tables().pmf)


def test_a_state_of_something_else_is_refused_and_changes_nothing() -> None:
    both = strategy(sampling="information_rate")
    feed(both, torch.rand(1000, generator=torch.Generator().manual_seed(1)).double() + 0.1, times=12)
    before = both.state_dict()
    other = strategy(sampling="information_rate", weighting="uncertainty:bins=8").state_dict()
    other["speed_sampling.mean"] += 1.0
    for state, message in (
        (other, r"State of speed_weighting: '(errors|counts)' has the shape \(8,\), but \(6\d,\) is needed"),
        (
            {name: value for name, value in before.items() if "sampling" in name},
            r"State of speed_weighting: has \[\], but \['counts', 'errors'\] is needed",
        ),
        ({**before, "speed_draw.mean": torch.ones(1)}, "The state is of speed_draw too, which learns nothing here"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            both.load_state_dict(state)
        assert "\n" not in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in both.state_dict().items())
    with pytest.raises(InputError, match="The state is of speed_weighting too, which learns nothing here"):
        strategy(sampling="information_rate", weighting="none").load_state_dict(before)


def test_a_loop_that_weighs_and_tells_nothing_is_warned_once() -> None:
    scheduler = SpeeDDDPMScheduler(speed_sampling="uniform", speed_weighting="uncertainty")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(1000):  # its timesteps are its own
            scheduler.loss_weights(torch.tensor([3]))
    (message,) = (str(each.message) for each in caught)
    assert "speed_weighting='uncertainty' is loss-aware" in message and "update_speed" in message
    assert caught[0].filename == __file__


def test_plain_tables_cannot_hold_it() -> None:
    from speed_diffusers.functional import speed_tables

    with pytest.raises(InputError, match="^weighting='uncertainty' learns from the losses of the training"):
        speed_tables(num_train_timesteps=10, weighting="uncertainty")


def test_the_choice_says_that_it_learns() -> None:
    assert WEIGHTINGS.parse("uncertainty:samples=1000").learns and not WEIGHTINGS.parse("min_snr").learns
    np.testing.assert_array_equal(
        timestep_weights("uncertainty", process_named("linear"), strategy().settings).numpy(), np.ones(1000)
    )
