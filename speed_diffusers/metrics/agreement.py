"""Class agreement: whether a classifier sees in an image the class that was asked for.

Source: Shmelkov, Schmid and Alahari 2018, "How good is my GAN?", arXiv:1807.09499, where it is called GAN-test: the
classifier is trained on real images and tested on generated ones.
"""

from .metric import Samples, Values, register_metric


@register_metric(
    "class_agreement",
    summary="Share of images that the extractor's classifier takes for the class asked for; in [0, 1].",
    reference="Shmelkov et al., arXiv 1807.09499, GAN-test",
    needs_reference=False,
)
def class_agreement_of(samples: Samples) -> Values:
    """The share of images in whose class the extractor agrees, or None where it knows no classes."""
    if samples.predicted is None or samples.wanted is None:
        return {"class_agreement": None}
    return {"class_agreement": float((samples.predicted == samples.wanted).double().mean())}
