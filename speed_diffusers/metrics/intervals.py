"""Intervals of scores by resampling the generated images.

Resampled is half of the images, without replacement: the m-out-of-n bootstrap of Bickel, Götze and van Zwet 1997
("Resampling fewer than n observations", Statistica Sinica 7) and, up to its factor, the delete-half jackknife of Shao
and Wu 1989. The ordinary bootstrap draws images twice, and an image beside its copy is what nearest-neighbour balls
and the pairs of an MMD must not contain: balls shrink to nothing and the kernel distance grows.

An interval says where another score of as many images from the same weights would fall. It says nothing of what all of
them share: the bias of a Fréchet distance for a number of images, the reference, the weights.
"""

from collections.abc import Callable, Mapping

import torch
from tqdm.auto import tqdm

from .metric import Samples, Values

Interval = tuple[float, float]

TWO_SIDED_95 = 1.959964
"""Of the normal distribution: 95 % lie within so many standard deviations."""


def intervals_of(
    measure: Callable[[Samples], Values], samples: Samples, values: Values, *, num_bootstrap: int, seed: int = 0
) -> dict[str, Interval]:
    """95 % intervals around measured numbers, from their spread over random halves of the images.

    For m of n images without replacement, the variance over the draws times m / (n - m) estimates that of the number
    itself (Shao and Wu 1989, Annals of Statistics 17); for a half the factor is about 1.

    Args:
        measure: From samples to numbers.
        samples: All images.
        values: Their numbers; those that are None get no interval.
        num_bootstrap: Draws, at least 2.
        seed: Of the draws.

    Returns:
        Lower and upper end by name: the number less and plus 1.96 standard deviations, which may lie outside the
        number's own range near its end.
    """
    count = len(samples.features)
    half = count // 2
    generator = torch.Generator().manual_seed(seed)
    draws: list[Mapping[str, float | None]] = []
    for _ in tqdm(range(num_bootstrap), desc="Bootstrap", unit="draw"):
        draws.append(measure(samples.part(torch.randperm(count, generator=generator)[:half])))
    factor = (half / (count - half)) ** 0.5
    found = {}
    for name, value in values.items():
        own = [each for draw in draws if (each := draw[name]) is not None]
        if value is not None and len(own) == num_bootstrap:
            reach = TWO_SIDED_95 * factor * float(torch.tensor(own, dtype=torch.float64).std())
            found[name] = (value - reach, value + reach)
    return found
