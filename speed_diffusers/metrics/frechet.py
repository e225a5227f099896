"""The Fréchet distance between two sets of features taken as Gaussians, without a matrix square root routine.

Source: Heusel et al. 2017, "GANs Trained by a Two Time-Scale Update Rule", arXiv:1706.08500, equation 6. Over
Inception features the number is known as FID. Over any other features it is not, and is never called so here.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ..embedded import SHIPPED_REFERENCE
from ..errors import InputError

HEADER_KEY = "feature_statistics"


@dataclass(frozen=True)
class FeatureStatistics:
    """Mean and covariance of a set of features.

    Attributes:
        mean: (D,) float64.
        covariance: (D, D) float64, symmetric, the unbiased estimate (divisor count - 1).
        count: Number of feature vectors behind the estimate, at least 2.
        extractor_sha256: Hash of the classifier file that made the features, empty if unknown.
    """

    mean: torch.Tensor
    covariance: torch.Tensor
    count: int
    extractor_sha256: str = ""


class StatisticsAccumulator:
    """Mean and covariance of features that arrive in batches, in float64 and without keeping the features.

    Batches are merged by their means and centred second moments (Chan, Golub, LeVeque 1983), so that a large mean
    does not cancel the digits of a small variance.
    """

    def __init__(self) -> None:
        self._count = 0
        self._mean: torch.Tensor | None = None
        self._scatter: torch.Tensor | None = None

    def update(self, features: torch.Tensor) -> None:
        """Adds a batch.

        Args:
            features: (N, D), floating point, N at least 1, the same D at every call.

        Raises:
            InputError: If the shape does not fit or a feature is not finite.
        """
        if features.ndim != 2 or features.shape[0] == 0:
            raise InputError(f"features of shape {tuple(features.shape)}, expected (N, D) with N >= 1.")
        if self._mean is not None and features.shape[1] != self._mean.shape[0]:
            raise InputError(f"features of dimension {features.shape[1]} after features of {self._mean.shape[0]}.")
        batch = features.detach().to(device="cpu", dtype=torch.float64)
        if not bool(torch.isfinite(batch).all()):
            raise InputError("features contain NaN or infinite values; the images behind them are not finite.")
        count, mean = batch.shape[0], batch.mean(dim=0)
        centred = batch - mean
        scatter = centred.T @ centred  # (D, D)
        if self._mean is None or self._scatter is None:
            self._count, self._mean, self._scatter = count, mean, scatter
            return
        total, shift = self._count + count, mean - self._mean
        self._mean = self._mean + shift * (count / total)
        self._scatter = self._scatter + scatter + torch.outer(shift, shift) * (self._count * count / total)
        self._count = total

    def result(self, *, extractor_sha256: str = "") -> FeatureStatistics:
        """The statistics of everything added so far.

        Args:
            extractor_sha256: Hash of the classifier file, kept with the statistics.

        Raises:
            InputError: With fewer than two feature vectors there is no covariance.
        """
        if self._mean is None or self._scatter is None or self._count < 2:
            raise InputError(f"statistics of {self._count} images, but a covariance needs at least 2.")
        covariance = self._scatter / (self._count - 1)
        return FeatureStatistics(self._mean, (covariance + covariance.T) / 2, self._count, extractor_sha256)


def statistics_of(feature_batches: Iterable[torch.Tensor], *, extractor_sha256: str = "") -> FeatureStatistics:
    """Mean and covariance of batches (N, D) of features; errors as in `StatisticsAccumulator`."""
    accumulator = StatisticsAccumulator()
    for features in feature_batches:
        accumulator.update(features)
    return accumulator.result(extractor_sha256=extractor_sha256)


def frechet_distance(first: FeatureStatistics, second: FeatureStatistics) -> float:
    """Squared Fréchet distance |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) of two Gaussians.

    Heusel et al. 2017, arXiv:1706.08500, equation 6. S1 S2 is similar to the symmetric, positive semi-definite
    S1^(1/2) S2 S1^(1/2), so the trace of its root is the sum of the roots of that matrix's eigenvalues. Symmetric
    eigenvalues stay real on rank-deficient covariances (fewer images than features), where a general matrix square
    root turns complex or needs an epsilon.

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
    root = _positive_square_root(first.covariance)
    product = root @ second.covariance @ root
    trace_of_root = _roots(torch.linalg.eigvalsh((product + product.T) / 2)).sum()
    mean_part = (first.mean - second.mean).square().sum()
    distance = mean_part + first.covariance.trace() + second.covariance.trace() - 2 * trace_of_root
    return max(float(distance), 0.0)  # rounding can leave -1e-14 where the truth is 0


def _positive_square_root(matrix: torch.Tensor) -> torch.Tensor:
    """The symmetric square root of a symmetric positive semi-definite matrix (D, D), float64."""
    eigenvalues, vectors = torch.linalg.eigh(matrix)
    root: torch.Tensor = (vectors * _roots(eigenvalues)) @ vectors.T
    return root


def _roots(eigenvalues: torch.Tensor) -> torch.Tensor:
    """Square roots of the eigenvalues (D,) of a positive semi-definite matrix, with those within rounding of 0 as 0.

    Without the cut a zero that came out as 1e-16 would count as its root, 1e-8.
    """
    rounding = eigenvalues.abs().amax() * len(eigenvalues) * torch.finfo(eigenvalues.dtype).eps
    return torch.where(eigenvalues > rounding, eigenvalues, 0.0).sqrt()


def save_statistics(statistics: FeatureStatistics, path: str | Path) -> None:
    """Writes statistics as safetensors: mean, covariance (float64), and count and extractor hash in the header."""
    # one header entry: safetensors writes several in a random order, and the file's hash names the reference
    header = {"count": statistics.count, "extractor_sha256": statistics.extractor_sha256}
    save_file(
        {"mean": statistics.mean.contiguous(), "covariance": statistics.covariance.contiguous()},
        path,
        metadata={HEADER_KEY: json.dumps(header, sort_keys=True)},
    )


def load_reference_statistics(path: str | Path | None = None) -> FeatureStatistics:
    """Statistics written by `save_statistics`.

    Args:
        path: The file. None is the shipped one: the 10,000 held-out Fashion-MNIST images.

    Raises:
        InputError: If there is no such file or it holds no statistics.
    """
    path = SHIPPED_REFERENCE if path is None else Path(path)
    if not path.is_file():
        raise InputError(f"No reference statistics at '{path}'. Make them with make_reference_statistics.py.")
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        if HEADER_KEY not in metadata or set(file.keys()) != {"mean", "covariance"}:
            raise InputError(f"'{path}' holds no reference statistics of make_reference_statistics.py.")
        mean, covariance = file.get_tensor("mean"), file.get_tensor("covariance")
    header = json.loads(metadata[HEADER_KEY])
    return FeatureStatistics(mean, covariance, int(header["count"]), str(header["extractor_sha256"]))
