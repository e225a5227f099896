"""Distances between sets of images, measured in the features of a small classifier that ships with the package."""

from .features import (
    FEATURE_DIM,
    SmallClassifier,
    extract_features,
    file_sha256,
    load_classifier,
)
from .frechet import (
    FeatureStatistics,
    StatisticsAccumulator,
    frechet_distance,
    load_reference_statistics,
    save_statistics,
    statistics_of,
)

__all__ = [
    "FEATURE_DIM",
    "FeatureStatistics",
    "SmallClassifier",
    "StatisticsAccumulator",
    "extract_features",
    "file_sha256",
    "frechet_distance",
    "load_classifier",
    "load_reference_statistics",
    "save_statistics",
    "statistics_of",
]
