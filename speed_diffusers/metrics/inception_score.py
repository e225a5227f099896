"""Inception Score: torch-fidelity's own, over ten splits of the images in an order of its own."""

from .inception import INCEPTION
from .metric import Samples, Values, register_metric

SPLITS = 10
SEED = 2020


@register_metric(
    "inception_score",
    summary="How sure and how varied Inception's classes are, over ten splits; higher is better.",
    reference="Salimans et al., arXiv 1606.03498, by torch-fidelity",
    numbers=("inception_score", "inception_score_std"),
    least_images=2 * SPLITS,
    extractor=INCEPTION,
    needs_reference=False,
    package="torch_fidelity",
    constants=lambda settings: {"splits": SPLITS, "seed": SEED},
)
def inception_score_of(samples: Samples) -> Values:
    """Mean and standard deviation over the splits, of softmax outputs without the bias, as in ADM's evaluator."""
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric

    assert samples.logits is not None  # the extractor has them
    found = isc_features_to_metric(samples.logits, splits=SPLITS, shuffle=True, rng_seed=SEED)
    return {"inception_score": found[KEY_METRIC_ISC_MEAN], "inception_score_std": found[KEY_METRIC_ISC_STD]}
