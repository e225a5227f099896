"""Distances between sets of images, in features of the embedded classifier or of any module; scores and protocols."""

# The registry of metrics lists them in the order of these imports: those of any features first.
from .agreement import class_agreement_of
from .extractors import EXTRACTORS, FeatureExtractor, load_extractor
from .features import (
    FEATURE_DIM,
    SmallClassifier,
    load_classifier,
)
from .frechet import frechet_distance
from .kernel import kernel_distance
from .metric import METRICS, Metric, MetricSettings, Samples, general_metrics, register_metric
from .precision_recall import PrecisionRecall, precision_recall
from .reference import NO_REFERENCE, Reference, load_reference, load_reference_statistics, save_statistics
from .statistics import FeatureStatistics, StatisticsAccumulator, statistics_of

# isort: split
from .clip_score import clip_score_of
from .cmmd import cmmd
from .inception_score import inception_score_of
from .kid import kid
from .measurement import Measurement
from .named_distances import fid_of
from .npz_reference import load_npz_reference
from .published import ExtractorFiles

__all__ = [
    "EXTRACTORS",
    "FEATURE_DIM",
    "METRICS",
    "NO_REFERENCE",
    "ExtractorFiles",
    "FeatureExtractor",
    "FeatureStatistics",
    "Measurement",
    "Metric",
    "MetricSettings",
    "PrecisionRecall",
    "Reference",
    "Samples",
    "SmallClassifier",
    "StatisticsAccumulator",
    "class_agreement_of",
    "clip_score_of",
    "cmmd",
    "fid_of",
    "frechet_distance",
    "general_metrics",
    "inception_score_of",
    "kernel_distance",
    "kid",
    "load_classifier",
    "load_extractor",
    "load_npz_reference",
    "load_reference",
    "load_reference_statistics",
    "precision_recall",
    "register_metric",
    "save_statistics",
    "statistics_of",
]
