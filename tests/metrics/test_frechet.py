"""The Fréchet distance against closed forms, against scipy, and where a matrix square root would fail."""

import math

import pytest
import torch

from speed_diffusers.errors import InputError
from speed_diffusers.metrics import (
    METRICS,
    FeatureStatistics,
    StatisticsAccumulator,
    frechet_distance,
    load_reference,
    load_reference_statistics,
    save_statistics,
    statistics_of,
)

DIM = 6


def gaussian(mean: torch.Tensor, covariance: torch.Tensor, sha256: str = "") -> FeatureStatistics:
    return FeatureStatistics(mean.double(), covariance.double(), 1000, sha256)


def random_covariance(seed: int, *, rank: int = DIM, dim: int = DIM) -> torch.Tensor:
    factor = torch.randn(dim, rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return factor @ factor.T


def random_gaussian(seed: int, *, rank: int = DIM) -> FeatureStatistics:
    mean = torch.randn(DIM, generator=torch.Generator().manual_seed(seed + 100), dtype=torch.float64)
    return gaussian(mean, random_covariance(seed, rank=rank))


def test_equal_covariances_leave_the_squared_distance_of_the_means():
    covariance = random_covariance(0)
    shift = torch.arange(DIM, dtype=torch.float64)
    distance = frechet_distance(gaussian(torch.zeros(DIM), covariance), gaussian(shift, covariance))
    assert distance == pytest.approx(float(shift.square().sum()), rel=1e-10)


def test_diagonal_covariances_give_the_squared_distance_of_the_standard_deviations():
    first, second = torch.tensor([1.0, 2.0, 0.0, 3.0]), torch.tensor([2.0, 2.0, 5.0, 0.5])
    zero = torch.zeros(4)
    distance = frechet_distance(gaussian(zero, first.square().diag()), gaussian(zero, second.square().diag()))
    assert distance == pytest.approx(1 + 0 + 25 + 6.25, rel=1e-10)


def test_scaled_covariance_in_rotated_axes():
    # Commuting covariances: tr(S + a^2 S - 2 a S) = (1 - a)^2 tr(S)
    covariance = random_covariance(3)
    zero = torch.zeros(DIM)
    distance = frechet_distance(gaussian(zero, covariance), gaussian(zero, 9 * covariance))
    assert distance == pytest.approx(4 * float(covariance.trace()), rel=1e-10)


@pytest.mark.parametrize("seed", range(5))
def test_agrees_with_scipys_matrix_square_root(seed: int):
    linalg = pytest.importorskip("scipy.linalg")
    first, second = random_gaussian(seed), random_gaussian(seed + 10)
    root = linalg.sqrtm((first.covariance @ second.covariance).numpy())
    expected = (first.mean - second.mean).square().sum() + (first.covariance + second.covariance).trace()
    assert frechet_distance(first, second) == pytest.approx(float(expected) - 2 * root.real.trace(), rel=1e-8)


@pytest.mark.parametrize("rank", [1, 3, DIM])
def test_symmetric_and_zero_on_itself_at_any_rank(rank: int):
    first, second = random_gaussian(1, rank=rank), random_gaussian(2)
    assert frechet_distance(first, second) == pytest.approx(frechet_distance(second, first), rel=1e-9)
    assert frechet_distance(first, first) == pytest.approx(0.0, abs=1e-6)
    assert frechet_distance(first, second) > 0.1


def test_rank_one_covariances_have_a_closed_form():
    # S1 = u u', S2 = v v': tr((S1 S2)^(1/2)) = |u . v|
    u, v = torch.tensor([3.0, 0.0, 4.0]), torch.tensor([1.0, 2.0, 2.0])
    zero = torch.zeros(3)
    distance = frechet_distance(gaussian(zero, torch.outer(u, u)), gaussian(zero, torch.outer(v, v)))
    assert distance == pytest.approx(25 + 9 - 2 * 11, rel=1e-7)


def test_fewer_images_than_features_gives_a_finite_distance():
    features = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    few = statistics_of([features])
    assert math.isfinite(frechet_distance(few, load_reference_statistics()))


def test_estimates_of_two_samples_of_one_gaussian_come_close():
    generator = torch.Generator().manual_seed(0)
    first, second = (statistics_of([torch.randn(20_000, 8, generator=generator)]) for _ in range(2))
    assert frechet_distance(first, second) < 0.01


def test_statistics_do_not_depend_on_the_batches():
    features = torch.randn(101, DIM, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    whole, parts = statistics_of([features]), statistics_of(features.split(7))
    assert parts.count == 101
    torch.testing.assert_close(parts.mean, features.mean(dim=0))
    torch.testing.assert_close(parts.covariance, torch.cov(features.T))
    torch.testing.assert_close(whole.covariance, parts.covariance)


def test_a_large_mean_does_not_cancel_a_small_variance():
    features = torch.randn(1000, DIM, generator=torch.Generator().manual_seed(5), dtype=torch.float64) * 1e-3
    shifted = statistics_of((features + 1e5).split(100))
    torch.testing.assert_close(shifted.covariance, torch.cov(features.T), rtol=1e-4, atol=0)


def test_statistics_survive_the_file(tmp_path):
    statistics = gaussian(torch.randn(DIM), random_covariance(0), sha256="abc")
    save_statistics(statistics, tmp_path / "reference.safetensors")
    loaded = load_reference_statistics(tmp_path / "reference.safetensors")
    assert torch.equal(loaded.mean, statistics.mean) and torch.equal(loaded.covariance, statistics.covariance)
    assert (loaded.count, loaded.extractor_sha256) == (1000, "abc")


def test_features_travel_with_their_statistics(tmp_path):
    features = torch.randn(50, DIM, generator=torch.Generator().manual_seed(6))
    path = tmp_path / "reference.safetensors"
    save_statistics(statistics_of([features]), path, features=features, resolution=16)
    loaded = load_reference(path)
    assert (loaded.name, loaded.resolution, loaded.statistics.count) == ("reference.safetensors", 16, 50)
    assert loaded.features is not None and torch.equal(loaded.features, features.half())
    assert torch.equal(loaded.statistics.covariance, statistics_of([features]).covariance)
    large = features * 1e5  # beyond half precision
    save_statistics(statistics_of([large]), path, features=large)
    loaded = load_reference(path)
    assert loaded.features is not None and torch.equal(loaded.features, large) and loaded.resolution is None
    with pytest.raises(InputError, match=r"features of shape \(49, 6\), but the statistics are of 50 images"):
        save_statistics(statistics_of([features]), path, features=features[1:])


def test_a_reference_without_features_still_loads_and_says_what_it_cannot_do(tmp_path):
    path = tmp_path / "old.safetensors"
    save_statistics(gaussian(torch.zeros(DIM), torch.eye(DIM)), path)
    reference = load_reference(path)
    assert reference.features is None and reference.resolution is None
    METRICS["frechet_distance"].function.check("frechet_distance", 10, reference)
    for name in ("kernel_distance", "precision_recall"):
        with pytest.raises(InputError, match=f"metrics={name}: the reference 'old.safetensors' holds mean and cov"):
            METRICS[name].function.check(name, 10, reference)
    (tmp_path / "broken.safetensors").write_bytes(b"no tensors")
    with pytest.raises(InputError, match="holds no reference statistics"):
        load_reference(tmp_path / "broken.safetensors")


def test_wrong_input_is_named():
    with pytest.raises(InputError, match="at least 2"):
        statistics_of([torch.zeros(1, DIM)])
    with pytest.raises(InputError, match="at least 2"):
        StatisticsAccumulator().result()
    with pytest.raises(InputError, match=r"\(N, D\)"):
        statistics_of([torch.zeros(DIM)])
    with pytest.raises(InputError, match="dimension 4 after"):
        statistics_of([torch.zeros(2, DIM), torch.zeros(2, 4)])
    with pytest.raises(InputError, match="NaN"):
        statistics_of([torch.full((2, DIM), float("nan"))])
    with pytest.raises(InputError, match="do not compare"):
        frechet_distance(random_gaussian(0), gaussian(torch.zeros(2), torch.eye(2)))
    with pytest.raises(InputError, match="No reference statistics"):
        load_reference_statistics("nowhere.safetensors")


def test_statistics_of_different_extractors_do_not_compare():
    zero, one = torch.zeros(DIM), torch.eye(DIM)
    with pytest.raises(InputError, match="classifier aaa and bbb"):
        frechet_distance(gaussian(zero, one, "aaa"), gaussian(zero, one, "bbb"))


def test_an_ill_conditioned_set_is_at_no_distance_from_itself():
    """Scales of 1e-3 to 10: squared eigenvalues would lose the small directions."""
    features = torch.randn(2000, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scales = torch.logspace(-3, 1, 64, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)).Q
    statistics = statistics_of([features * scales @ rotation])
    assert frechet_distance(statistics, statistics) < 1e-10
