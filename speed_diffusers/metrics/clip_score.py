"""CLIP score: how well images fit the names of their classes.

Source: Hessel et al. 2021, arXiv:2104.08718, in the form that torchmetrics has: 100 times the cosine, in the mean at
least 0. Written out because torchmetrics would run CLIP again on every image, whose embeddings are here already; a
test holds it against torchmetrics'.
"""

from .clip import CLIP
from .metric import Samples, Values, register_metric

PROMPT = "a photo of a {}."
"""CLIP's own for classes (Radford et al. 2021, arXiv:2103.00020)."""


@register_metric(
    "clip_score",
    summary="100 times the cosine of image and 'a photo of a CLASS.' in CLIP; higher is better.",
    reference="Hessel et al., arXiv 2104.08718, as torchmetrics has it",
    extractor=CLIP,
    needs_reference=False,
    constants=lambda settings: {"prompt": PROMPT},
)
def clip_score_of(samples: Samples) -> Values:
    """The mean over the images, or None where their classes have no names."""
    if samples.texts is None:
        return {"clip_score": None}
    return {"clip_score": max(100 * float((samples.features * samples.texts).sum(1).double().mean()), 0.0)}


def prompt_of(class_name: str) -> str:
    """The text for a class: the first of its names, as ImageNet's classes have several."""
    return PROMPT.format(class_name.partition(",")[0].strip())
