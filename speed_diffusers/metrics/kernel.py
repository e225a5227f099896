"""The kernel distance between two sets of features: the unbiased squared MMD with a cubic polynomial kernel.

Source: Binkowski et al. 2018, "Demystifying MMD GANs", arXiv:1801.01401, section 4. Over Inception
features, averaged over random subsets, the number is known as KID. Over any other features it is not, and is never
called so here. All features enter at once, so there is no choice of subsets and no seed.

Written out because clean-fid, which imports scipy when it is imported, and torch-fidelity average over random subsets.
"""

from functools import lru_cache

from torch import Tensor

from .metric import Samples, Values, register_metric
from .pairs import CHUNK, check_features, chunks
from .reference import Reference


@register_metric(
    "kernel_distance",
    summary="Unbiased MMD^2 with a cubic kernel to the reference's features; lower is better, 0 on average if equal.",
    reference="Binkowski et al., arXiv 1801.01401, over features that need not be Inception's",
    needs_features=True,
)
def kernel_distance_of(samples: Samples) -> Values:
    """The kernel distance of the generated images' features to the reference's."""
    assert samples.reference.features is not None  # checked before the images were generated
    within = _mean_within_reference(samples.reference)
    distance = kernel_distance(samples.features, samples.reference.features, mean_within_second=within)
    return {"kernel_distance": distance}


@lru_cache(maxsize=1)
def _mean_within_reference(reference: Reference) -> float:
    """Most of the work, and the same for every score."""
    assert reference.features is not None
    return mean_kernel_within(reference.features)


def kernel_distance(
    first: Tensor, second: Tensor, *, chunk: int = CHUNK, mean_within_second: float | None = None
) -> float:
    """Unbiased estimate of MMD^2 with the kernel k(x, y) = (x . y / D + 1)^3.

    Binkowski et al., arXiv:1801.01401, section 4: mean of k over the pairs of different samples within each set, minus
    twice its mean over the pairs across. Computed in float64.

    Args:
        first: (N, D), floating point, N at least 2.
        second: (M, D), floating point, M at least 2; N and M may differ.
        chunk: Rows of the kernel matrix held in memory at once.
        mean_within_second: `mean_kernel_within(second)`, where it is known already.

    Returns:
        The estimate. Its mean is the distance of the distributions whatever N and M are, so it can be below 0.

    Raises:
        InputError: If the shapes do not fit or a feature is not finite.
    """
    check_features(first, second, least=2)
    within = mean_kernel_within(first, chunk=chunk)
    within += mean_kernel_within(second, chunk=chunk) if mean_within_second is None else mean_within_second
    return within - 2 * _kernel_sum(first.double(), second.double(), chunk) / (len(first) * len(second))


def mean_kernel_within(features: Tensor, *, chunk: int = CHUNK) -> float:
    """Mean of the kernel over all pairs of different rows of (N, D) features, N at least 2, in float64."""
    rows = features.double()
    count, dim = rows.shape
    with_themselves = float((rows.square().sum(1) / dim + 1).pow(3).sum())
    return (_kernel_sum(rows, rows, chunk) - with_themselves) / (count * (count - 1))


def _kernel_sum(first: Tensor, second: Tensor, chunk: int) -> float:
    """Sum of the kernel over all pairs of rows of (N, D) and (M, D) features."""
    # In place, because the time goes into moving memory.
    products = (rows @ second.T for rows in chunks(first, chunk))
    return sum(float(product.div_(first.shape[1]).add_(1).pow_(3).sum()) for product in products)
