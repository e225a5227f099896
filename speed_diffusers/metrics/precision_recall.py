"""Precision and recall of generated images: how many look real, and how much of the real is covered.

Source: Kynkäänniemi et al. 2019, "Improved Precision and Recall Metric for Assessing Generative Models",
arXiv:1904.06991, equations 1 and 2. Each set's manifold is taken as the union of balls around its samples that reach
to their k-th nearest neighbour in the set.

Written out because clean-fid has no precision and recall, and torch-fidelity holds whole matrices of distances, of
50,000 images 10 GB each; a test holds it against torch-fidelity's.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InputError
from .metric import Samples, Values, register_metric
from .pairs import CHUNK, check_features, chunks

NEAREST = 3
"""k, the paper's choice."""


@dataclass(frozen=True)
class PrecisionRecall:
    """Shares in [0, 1].

    Attributes:
        precision: Of the generated samples that lie in the real samples' manifold: quality.
        recall: Of the real samples that lie in the generated samples' manifold: coverage.
    """

    precision: float
    recall: float


@register_metric(
    "precision_recall",
    summary="Shares of images that look real, and of real ones that are covered; in [0, 1], higher is better.",
    reference="Kynkäänniemi et al., arXiv 1904.06991, eq. 1 and 2, k = 3",
    numbers=("precision", "recall"),
    needs_features=True,
    least_images=NEAREST + 1,
)
def precision_recall_of(samples: Samples) -> Values:
    """Precision and recall against as many of the reference's features as there are images, or the other way round.

    The measure compares equally many samples. Of the larger set those are taken that a fixed permutation puts first:
    a reference may be sorted by class. Generated images go through their classes in turn, so their first ones do.
    In published features all images of both sides count, as in ADM's evaluator and torch-fidelity.
    """
    assert samples.reference.features is not None  # checked before the images were generated
    generated, real = samples.features, samples.reference.features
    if not samples.settings.equal_counts:
        result = precision_recall(generated, real, equal_counts=False)
        return {"precision": result.precision, "recall": result.recall}
    count = min(len(generated), len(real))
    chosen = torch.randperm(len(real), generator=torch.Generator().manual_seed(0))[:count]
    result = precision_recall(generated[:count], real[chosen])
    return {"precision": result.precision, "recall": result.recall}


def precision_recall(
    generated: Tensor, real: Tensor, *, nearest: int = NEAREST, chunk: int = CHUNK, equal_counts: bool = True
) -> PrecisionRecall:
    """Precision and recall by k-nearest-neighbour manifolds, in float64.

    Kynkäänniemi et al., arXiv:1904.06991, equations 1 and 2.

    Args:
        generated: (N, D), floating point.
        real: (N, D), floating point: equally many, because a manifold grows with the number of its samples.
        nearest: k: a ball reaches to its centre's k-th nearest neighbour, at least 1 and below N.
        chunk: Rows of the distance matrix held in memory at once.
        equal_counts: Whether other counts are refused. ADM's figures compare 50,000 generated images with 10,000 real
            ones.

    Raises:
        InputError: If there are too few samples, or the sizes differ and must not.
    """
    if nearest < 1:
        raise InputError(f"nearest={nearest}: must be at least 1.")
    for name, features in (("generated", generated), ("real", real)):
        if features.ndim == 2 and len(features) < nearest + 1:
            raise InputError(
                f"{len(features)} {name} samples: precision and recall with k={nearest} need at least {nearest + 1}."
            )
    check_features(generated, real, least=nearest + 1)
    if equal_counts and len(generated) != len(real):
        raise InputError(
            f"{len(generated)} generated and {len(real)} real samples: precision and recall compare equally many."
        )
    # Near the origin, where the rounding of squared distances is smallest.
    centre = real.double().mean(0)
    one, other = generated.double() - centre, real.double() - centre
    return PrecisionRecall(
        precision=_share_inside(one, other, _squared_radii(other, nearest, chunk), chunk),
        recall=_share_inside(other, one, _squared_radii(one, nearest, chunk), chunk),
    )


def _squared_radii(samples: Tensor, nearest: int, chunk: int) -> Tensor:
    """Squared distance of each sample (N, D) to its k-th nearest other one, (N,), float64."""
    # A sample is its own nearest, so the k-th other one is the (k + 1)-th smallest.
    radii = [torch.cdist(rows, samples).kthvalue(nearest + 1, dim=1).values for rows in chunks(samples, chunk)]
    return torch.cat(radii).square()


def _share_inside(points: Tensor, centres: Tensor, squared_radii: Tensor, chunk: int) -> float:
    """Share of points (N, D) that lie in at least one ball around centres (M, D)."""
    # Distances of equal points come out within rounding of 0, and a ball around copies of one point has radius 0.
    largest = max(float(points.square().sum(1).max()), float(centres.square().sum(1).max()))
    reach = squared_radii + 16 * torch.finfo(torch.float64).eps * largest  # (M,)
    inside = [(torch.cdist(rows, centres).square() <= reach).any(dim=1) for rows in chunks(points, chunk)]
    return float(torch.cat(inside).double().mean())
