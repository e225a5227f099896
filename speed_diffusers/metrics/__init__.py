"""Distances between sets of images, in features of the embedded classifier or of any module; scores and protocols."""

from .agreement import class_agreement_of
from .extractors import EXTRACTORS, FeatureExtractor, load_extractor
from .features import (
    FEATURE_DIM,
    SmallClassifier,
    load_classifier,
)
from .frechet import frechet_distance
from .kernel import kernel_distance
from .metric import METRICS, Metric, Samples, register_metric
from .precision_recall import PrecisionRecall, precision_recall
from .reference import Reference, load_reference, load_reference_statistics, save_statistics
from .statistics import FeatureStatistics, StatisticsAccumulator, statistics_of

__all__ = [
    "EXTRACTORS",
    "FEATURE_DIM",
    "METRICS",
    "FeatureExtractor",
    "FeatureStatistics",
    "Metric",
    "PrecisionRecall",
    "Reference",
    "Samples",
    "SmallClassifier",
    "StatisticsAccumulator",
    "class_agreement_of",
    "frechet_distance",
    "kernel_distance",
    "load_classifier",
    "load_extractor",
    "load_reference",
    "load_reference_statistics",
    "precision_recall",
    "register_metric",
    "save_statistics",
    "statistics_of",
]
