"""The Fréchet distance between two sets of features taken as Gaussians, without a matrix square root routine.

Source: Heusel et al. 2017, "GANs Trained by a Two Time-Scale Update Rule", arXiv:1706.08500, equation 6. Over
Inception features the number is known as FID. Over any other features it is not, and is never called so here.

Written out because clean-fid imports scipy when it is imported, and passes `sqrtm` an argument that SciPy 1.18 no
longer takes. torch-fidelity's entry point takes images and extractors registered with it; references here are files. A
test holds it against torch-fidelity's and torchmetrics'.
"""

from functools import lru_cache

import torch

from ..errors import InputError
from .metric import Samples, Values, register_metric
from .statistics import FeatureStatistics


@register_metric(
    "frechet_distance",
    summary="Distance of mean and covariance to the reference's; lower is better.",
    reference="Heusel et al., arXiv 1706.08500, eq. 6, over features that need not be Inception's",
)
def frechet_distance_of(samples: Samples) -> Values:
    """The Fréchet distance of the generated images' features to the reference."""
    return {"frechet_distance": frechet_distance(samples.statistics, samples.reference.statistics)}


def frechet_distance(first: FeatureStatistics, second: FeatureStatistics) -> float:
    """Squared Fréchet distance |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) of two Gaussians.

    Heusel et al. 2017, arXiv:1706.08500, equation 6. S1 S2 is similar to A A^T with A = S1^(1/2) S2^(1/2), so the
    trace of its root is the sum of the singular values of A. They stay real on rank-deficient covariances (fewer
    images than features), where a general matrix square root turns complex or needs an epsilon, and, unlike the
    eigenvalues of A A^T, they are not squared, so that small directions keep their digits beside large ones.

    Args:
        first: Statistics with features of dimension D.
        second: Statistics with features of dimension D.

    Returns:
        The distance, in squared feature units, at least 0. It is biased upwards by a small number of images, so only
        distances of equal counts compare.

    Raises:
        InputError: If the dimensions or the extractors differ.
    """
    if first.mean.shape != second.mean.shape:
        raise InputError(f"features of dimension {first.mean.shape[0]} and {second.mean.shape[0]} do not compare.")
    if first.extractor_sha256 and second.extractor_sha256 and first.extractor_sha256 != second.extractor_sha256:
        raise InputError(
            f"features of classifier {first.extractor_sha256[:12]} and {second.extractor_sha256[:12]} do not compare."
        )
    product = _positive_square_root(first.covariance) @ _root_of_reference(second.covariance)
    trace_of_root = torch.linalg.svdvals(product).sum()
    mean_part = (first.mean - second.mean).square().sum()
    distance = mean_part + first.covariance.trace() + second.covariance.trace() - 2 * trace_of_root
    return max(float(distance), 0.0)  # rounding can leave -1e-14 where the truth is 0


@lru_cache(maxsize=1)
def _root_of_reference(covariance: torch.Tensor) -> torch.Tensor:
    """The same for all scores and their draws; of 2,048 features a quarter of the time."""
    return _positive_square_root(covariance)


def _positive_square_root(matrix: torch.Tensor) -> torch.Tensor:
    """The symmetric square root of a symmetric positive semi-definite matrix (D, D), float64."""
    eigenvalues, vectors = torch.linalg.eigh(matrix)
    # A zero that came out as 1e-16 would count as its root, 1e-8.
    rounding = eigenvalues.abs().amax() * len(eigenvalues) * torch.finfo(eigenvalues.dtype).eps
    root: torch.Tensor = (vectors * torch.where(eigenvalues > rounding, eigenvalues, 0.0).sqrt()) @ vectors.T
    return root
