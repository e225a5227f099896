"""Intervals by resampling: their width is the spread of scores of other images."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from speed_diffusers.metrics import METRICS, FeatureStatistics, Reference, Samples, statistics_of
from speed_diffusers.metrics.intervals import TWO_SIDED_95, intervals_of
from speed_diffusers.metrics.metric import Values

DIM = 6


def normal(count: int, seed: int) -> Tensor:
    return torch.randn(count, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


REAL = 1.2 * normal(300, 0) + 0.3
REFERENCE = Reference("real", "", statistics_of([REAL]), REAL)


def samples_of(features: Tensor) -> Samples:
    statistics: FeatureStatistics = statistics_of([features])
    return Samples(features, statistics, None, None, REFERENCE)


@pytest.mark.parametrize("metric", ["frechet_distance", "kernel_distance", "precision_recall"])
def test_the_reach_is_the_spread_of_scores_of_other_images(metric: str) -> None:
    measure: Callable[[Samples], Values] = METRICS[metric].function
    truth = [measure(samples_of(normal(300, 1000 + seed))) for seed in range(60)]
    reaches: dict[str, list[float]] = {}
    for seed in range(6):
        samples = samples_of(normal(300, 1000 + seed))
        values = measure(samples)
        for name, (low, high) in intervals_of(measure, samples, values, num_bootstrap=40).items():
            value = values[name]
            assert value is not None and low + high == pytest.approx(2 * value)
            reaches.setdefault(name, []).append((high - low) / 2)
    for name, own in reaches.items():
        spread = torch.tensor([float(each[name] or 0) for each in truth], dtype=torch.float64).std()
        estimated = torch.tensor(own).mean() / TWO_SIDED_95
        assert 0.75 < estimated / spread < 1.5, name


def test_of_a_mean_it_is_the_standard_error() -> None:
    # Half of 401: the factor for odd counts is not 1.
    features = normal(401, 1)

    def measure(samples: Samples) -> Values:
        return {"mean": float(samples.features[:, 0].mean()), "none": None}

    samples = samples_of(features)
    found = intervals_of(measure, samples, measure(samples), num_bootstrap=3000)
    assert list(found) == ["mean"]
    low, high = found["mean"]
    assert (high - low) / 2 / TWO_SIDED_95 == pytest.approx(float(features[:, 0].std()) / 401**0.5, rel=0.05)
    assert found == intervals_of(measure, samples, measure(samples), num_bootstrap=3000), "the draws have a seed"


def test_a_part_is_what_would_have_been_without_the_rest() -> None:
    features, chosen = normal(10, 2), torch.tensor([7, 1, 4])
    classes = torch.arange(10)
    whole = Samples(features, statistics_of([features]), classes, classes + 1, REFERENCE, features * 2, features * 3)
    part = whole.part(chosen)
    own = features[chosen]
    assert torch.equal(part.features, own) and torch.equal(part.statistics.covariance, statistics_of([own]).covariance)
    assert part.predicted is not None and part.predicted.tolist() == [7, 1, 4]
    assert part.wanted is not None and part.wanted.tolist() == [8, 2, 5]
    assert part.logits is not None and torch.equal(part.logits, own * 2)
    assert part.texts is not None and torch.equal(part.texts, own * 3)
    assert part.reference is REFERENCE and part.statistics.count == 3
