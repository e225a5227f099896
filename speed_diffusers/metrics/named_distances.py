"""Fréchet distances by the names that the literature has for them in particular features: FID, sFID, FD-DINOv2.

The distance is that of frechet.py, which a test holds against torch-fidelity's.
"""

from .dinov2 import DINOV2
from .frechet import frechet_distance
from .inception import INCEPTION, INCEPTION_CLEAN, INCEPTION_SPATIAL
from .metric import Samples, Values, register_metric


@register_metric(
    "fid",
    summary="Fréchet distance in Inception's features; lower is better.",
    reference="Heusel et al., arXiv 1706.08500",
    extractor=INCEPTION,
)
def fid_of(samples: Samples) -> Values:
    """FID: features after TensorFlow's resizing, as in ADM's and torch-fidelity's figures."""
    return {"fid": frechet_distance(samples.statistics, samples.reference.statistics)}


@register_metric(
    "sfid",
    summary="The same in a spatial layer of Inception; lower is better.",
    reference="Nash et al., arXiv 2103.03841, as in ADM's evaluator",
    extractor=INCEPTION_SPATIAL,
)
def sfid_of(samples: Samples) -> Values:
    """sFID, which sees where things are in an image."""
    return {"sfid": frechet_distance(samples.statistics, samples.reference.statistics)}


@register_metric(
    "clean_fid",
    summary="FID behind clean-fid's resizing; does not compare with `fid`.",
    reference="Parmar et al., arXiv 2104.11222",
    extractor=INCEPTION_CLEAN,
)
def clean_fid_of(samples: Samples) -> Values:
    """Clean FID."""
    return {"clean_fid": frechet_distance(samples.statistics, samples.reference.statistics)}


@register_metric(
    "fd_dinov2",
    summary="Fréchet distance in DINOv2's features; lower is better.",
    reference="Stein et al., arXiv 2306.04675",
    extractor=DINOV2,
)
def fd_dinov2_of(samples: Samples) -> Values:
    """FD-DINOv2."""
    return {"fd_dinov2": frechet_distance(samples.statistics, samples.reference.statistics)}
