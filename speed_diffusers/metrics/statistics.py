"""Mean and covariance of features that arrive in batches."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from ..errors import InputError


@dataclass(frozen=True)
class FeatureStatistics:
    """Mean and covariance of a set of features.

    Attributes:
        mean: (D,) float64.
        covariance: (D, D) float64, symmetric, the unbiased estimate (divisor count - 1).
        count: Number of feature vectors behind the estimate, at least 2; None in a file that does not say.
        extractor_sha256: Hash of the classifier file that made the features, empty if unknown.
    """

    mean: torch.Tensor
    covariance: torch.Tensor
    count: int | None
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
