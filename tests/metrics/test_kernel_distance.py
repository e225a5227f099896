"""The kernel distance against a brute-force sum, clean-fid, and the closed form for Gaussians."""

import numpy as np
import pytest
import torch
from torch import Tensor

from speed_diffusers.errors import InputError
from speed_diffusers.metrics import kernel_distance
from speed_diffusers.metrics.kernel import mean_kernel_within

DIM = 5


def normal(count: int, seed: int, dim: int = DIM) -> Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def brute_force(first: Tensor, second: Tensor) -> float:
    """Equation by equation, pair by pair, with numpy."""

    def kernel(x: np.ndarray, y: np.ndarray) -> float:
        return float((np.dot(x, y) / len(x) + 1) ** 3)

    def within(rows: np.ndarray) -> float:
        pairs = [(i, j) for i in range(len(rows)) for j in range(len(rows)) if i != j]
        return float(np.mean([kernel(rows[i], rows[j]) for i, j in pairs]))

    one, other = first.double().numpy(), second.double().numpy()
    return within(one) + within(other) - 2 * float(np.mean([kernel(x, y) for x in one for y in other]))


def expected_kernel(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> float:
    """E[(x . y / D + 1)^3] for independent Gaussians with these means and covariances, by their moments up to 3."""
    (m, s), (n, t) = first, second
    dim = len(m)
    dot = m @ n
    square = ((s + torch.outer(m, m)) * (t + torch.outer(n, n))).sum()
    # The third moment of a Gaussian is m m m + m S in its three orders.
    cube = dot**3 + 3 * dot * (m @ t @ m + n @ s @ n) + 3 * dot * (s * t).sum() + 6 * m @ t @ s @ n
    return float(cube / dim**3 + 3 * square / dim**2 + 3 * dot / dim + 1)


def gaussian(seed: int, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, covariance and a factor of it."""
    factor = normal(DIM, seed, rank)
    return normal(1, seed + 1)[0], factor @ factor.T, factor


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_it_is_the_sum_over_pairs_whatever_the_chunk(chunk: int) -> None:
    first, second = normal(7, 0), normal(11, 1) + 0.5
    assert kernel_distance(first, second, chunk=chunk) == pytest.approx(brute_force(first, second), rel=1e-12)
    known = mean_kernel_within(second, chunk=chunk)
    # In the same chunks: products of other sizes round otherwise.
    whole = kernel_distance(first, second, chunk=chunk)
    assert kernel_distance(first, second, chunk=chunk, mean_within_second=known) == whole


def test_it_is_clean_fids_over_one_subset_of_all() -> None:
    fid = pytest.importorskip("cleanfid.fid")
    first, second = normal(60, 2, 16), 1.3 * normal(60, 3, 16) + 0.2
    theirs = fid.kernel_distance(first.numpy(), second.numpy(), num_subsets=1, max_subset_size=60)
    assert kernel_distance(first, second) == pytest.approx(theirs, rel=1e-10)


@pytest.mark.parametrize("rank", [1, 3, DIM], ids=["rank 1", "rank 3", "full rank"])
def test_its_mean_over_small_samples_is_the_closed_form_for_gaussians(rank: int) -> None:
    m, s, factor = gaussian(10, rank)
    n, t, other_factor = gaussian(20, rank)
    truth = expected_kernel((m, s), (m, s)) + expected_kernel((n, t), (n, t)) - 2 * expected_kernel((m, s), (n, t))
    draws = []
    for repeat in range(400):
        first = m + normal(30, 1000 + repeat, rank) @ factor.T
        second = n + normal(20, 5000 + repeat, rank) @ other_factor.T
        draws.append(kernel_distance(first, second))
    error = float(np.std(draws)) / 400**0.5
    assert abs(np.mean(draws) - truth) < 4 * error
    assert error < 0.1 * truth, "or the test could not fail"


def test_it_is_zero_on_average_for_equal_distributions_and_may_be_negative() -> None:
    draws = [kernel_distance(normal(50, seed), normal(40, 10_000 + seed)) for seed in range(300)]
    assert abs(np.mean(draws)) < 4 * np.std(draws) / 300**0.5
    assert min(draws) < 0 < max(draws)


def test_half_precision_is_raised_before_it_is_multiplied() -> None:
    first, second = normal(40, 4).half(), (100 * normal(40, 5)).half()
    assert kernel_distance(first, second) == pytest.approx(brute_force(first, second), rel=1e-10)


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (torch.zeros(1, DIM), torch.zeros(3, DIM), r"\(1, 5\), expected \(N, D\) with N >= 2"),
        (torch.zeros(3), torch.zeros(3, DIM), r"\(3,\), expected"),
        (torch.zeros(3, DIM), torch.zeros(3, 4), "dimension 5 and 4 do not compare"),
        (torch.zeros(3, DIM), torch.full((3, DIM), torch.inf), "NaN or infinite"),
    ],
)
def test_wrong_input_is_named(first: Tensor, second: Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message):
        kernel_distance(first, second)
