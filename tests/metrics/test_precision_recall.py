"""Precision and recall against a brute-force reference and in cases whose answer is known."""

import numpy as np
import pytest
import torch
from torch import Tensor

from speed_diffusers.errors import InputError
from speed_diffusers.metrics import (
    METRICS,
    PrecisionRecall,
    Reference,
    Samples,
    precision_recall,
    statistics_of,
)


def normal(count: int, seed: int, dim: int = 4) -> Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def brute_force(generated: Tensor, real: Tensor, nearest: int) -> PrecisionRecall:
    """Equations 1 and 2, point by point, with numpy."""

    def inside(points: np.ndarray, centres: np.ndarray) -> float:
        radii = [sorted(np.linalg.norm(centre - other) for other in centres)[nearest] for centre in centres]
        covered = [
            any(np.linalg.norm(point - centre) <= radius for centre, radius in zip(centres, radii, strict=True))
            for point in points
        ]
        return float(np.mean(covered))

    one, other = generated.double().numpy(), real.double().numpy()
    return PrecisionRecall(inside(one, other), inside(other, one))


@pytest.mark.parametrize("nearest", [1, 3])
@pytest.mark.parametrize("chunk", [7, 1000])
def test_it_is_what_the_equations_say(nearest: int, chunk: int) -> None:
    generated, real = 0.9 * normal(40, 0) + 1.2, normal(40, 1)
    expected = brute_force(generated, real, nearest)
    assert precision_recall(generated, real, nearest=nearest, chunk=chunk) == expected
    assert 0.1 < expected.precision < 0.9 and 0.1 < expected.recall < 0.9
    assert expected.precision != expected.recall


def test_the_same_set_is_all_precise_and_all_covered() -> None:
    features = normal(50, 2)
    assert precision_recall(features, features[torch.randperm(50)]) == PrecisionRecall(1.0, 1.0)


def test_far_sets_share_nothing() -> None:
    assert precision_recall(normal(50, 3), normal(50, 4) + 1000) == PrecisionRecall(0.0, 0.0)


def test_one_of_two_modes_is_precise_and_covers_half() -> None:
    mode = normal(60, 5)
    real = torch.cat((mode[:30], mode[30:] + 1000))
    assert precision_recall(mode, real).precision > 0.5
    generated = torch.cat((mode[:30], mode[:30] + 1e-3))
    # Every image lies on the first mode; of the real ones only those are near.
    assert precision_recall(generated, real) == PrecisionRecall(1.0, 0.5)


def test_half_of_the_images_are_noise() -> None:
    real = normal(60, 6)
    # Far from the real ones, and far from one another: their balls are small beside the distance.
    noise = 1e6 + 10 * normal(30, 7)
    result = precision_recall(torch.cat((real[:30], noise)), real)
    assert result.precision == 0.5 and result.recall > 0.5


def test_by_hand_on_a_line() -> None:
    real = torch.tensor([[0.0], [1.0], [3.0]])  # radii with k = 1: 1, 1, 2
    generated = torch.tensor([[-1.0], [5.5], [100.0]])  # radii with k = 1: 6.5, 6.5, 94.5
    # -1 lies in [-1, 1]; 5.5 and 100 lie in no ball. All real ones lie in [-7.5, 5.5].
    assert precision_recall(generated, real, nearest=1) == PrecisionRecall(1 / 3, 1.0)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_copies_of_points_lie_in_their_balls_of_radius_0(scale: float) -> None:
    # The rounding of a distance decides here: in this many dimensions a plain comparison misses some.
    generator = torch.Generator().manual_seed(0)
    features = (scale * (torch.randn(7, 200, generator=generator, dtype=torch.float64) + 5)).repeat(13, 1)
    other = features[torch.randperm(91, generator=generator)]
    assert precision_recall(features, other, chunk=30) == PrecisionRecall(1.0, 1.0)
    near = torch.cat((features[:42], features[42:] + 1e-3 * scale))
    assert precision_recall(near, features).precision == pytest.approx(42 / 91)


def test_a_reference_sorted_by_class_is_not_cut_at_its_first_classes() -> None:
    modes = torch.arange(4, dtype=torch.float64).repeat_interleave(50)[:, None] * 1000
    real = modes + normal(200, 9)
    statistics = statistics_of([real])
    generated = real[torch.arange(200).reshape(4, 50).T.flatten()][:80] + 1e-3  # 20 of each mode in turn
    samples = Samples(generated, statistics, None, None, Reference("sorted", "", statistics, real))
    values = METRICS["precision_recall"].function(samples)
    assert values["precision"] > 0.8 and values["recall"] > 0.8
    # The other way round the images' first ones are taken.
    samples = Samples(real, statistics, None, None, Reference("few", "", statistics, generated))
    assert METRICS["precision_recall"].function(samples)["recall"] < 0.6


@pytest.mark.parametrize(
    ("generated", "real", "message"),
    [
        (torch.zeros(3, 4), torch.zeros(3, 4), "3 generated samples: precision and recall with k=3 need at least 4"),
        (torch.zeros(9, 4), torch.zeros(2, 4), "2 real samples"),
        (torch.zeros(9, 4), torch.zeros(8, 4), "9 generated and 8 real samples.*equally many"),
        (torch.zeros(9, 4), torch.zeros(9, 5), "dimension 4 and 5"),
        (torch.full((9, 4), torch.nan), torch.zeros(9, 4), "NaN"),
        (torch.zeros(9), torch.zeros(9), r"\(9,\), expected \(N, D\)"),
    ],
)
def test_wrong_input_is_named(generated: Tensor, real: Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message):
        precision_recall(generated, real)
    with pytest.raises(InputError, match="nearest=0: must be at least 1"):
        precision_recall(normal(9, 0), normal(9, 1), nearest=0)
