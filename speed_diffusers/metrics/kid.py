"""KID: torch-fidelity's own, over random subsets with its seed, in two kinds of Inception's features."""

from collections.abc import Mapping

from torch import Tensor

from .inception import INCEPTION, INCEPTION_CLEAN
from .metric import MetricSettings, Samples, Values, register_metric

SUBSETS = 100
SEED = 2020


def _constants(settings: MetricSettings) -> Mapping[str, int]:
    return {"subsets": SUBSETS, "subset_size": settings.kid_subset_size, "seed": SEED}


@register_metric(
    "kid",
    summary="Unbiased MMD^2 with a cubic kernel, mean and deviation over 100 subsets; lower is better.",
    reference="Binkowski et al., arXiv 1801.01401, by torch-fidelity",
    numbers=("kid", "kid_std"),
    needs_features=True,
    least_images=lambda settings: settings.kid_subset_size,
    extractor=INCEPTION,
    package="torch_fidelity",
    constants=_constants,
)
def kid_of(samples: Samples) -> Values:
    """KID in the features of FID."""
    mean, std = kid(samples.features, _features(samples), samples.settings.kid_subset_size)
    return {"kid": mean, "kid_std": std}


@register_metric(
    "clean_kid",
    summary="KID behind clean-fid's resizing; does not compare with `kid`.",
    reference="Parmar et al., arXiv 2104.11222, by torch-fidelity",
    numbers=("clean_kid", "clean_kid_std"),
    needs_features=True,
    least_images=lambda settings: settings.kid_subset_size,
    extractor=INCEPTION_CLEAN,
    package="torch_fidelity",
    constants=_constants,
)
def clean_kid_of(samples: Samples) -> Values:
    """KID in the features of clean FID."""
    mean, std = kid(samples.features, _features(samples), samples.settings.kid_subset_size)
    return {"clean_kid": mean, "clean_kid_std": std}


def kid(generated: Tensor, real: Tensor, subset_size: int) -> tuple[float, float]:
    """Mean and standard deviation of the kernel distance over random subsets, as torch-fidelity computes it.

    Args:
        generated: (N, D), N at least `subset_size`.
        real: (M, D), M at least `subset_size`.
        subset_size: Images in each of the 100 subsets.
    """
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

    # In float64: in float32 the cubes of unlike features lose the third digit.
    found = kid_features_to_metric(
        generated.double(),
        real.double(),
        kid_subsets=SUBSETS,
        kid_subset_size=subset_size,
        rng_seed=SEED,
        verbose=False,
    )
    return found[KEY_METRIC_KID_MEAN], found[KEY_METRIC_KID_STD]


def _features(samples: Samples) -> Tensor:
    assert samples.reference.features is not None  # checked before the images were generated
    return samples.reference.features
