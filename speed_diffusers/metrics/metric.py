"""What a metric is given, what it returns, and the registry of all: one function in one file each."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from ..errors import InputError
from ..registry import Registry
from .reference import Reference
from .statistics import FeatureStatistics

Values = Mapping[str, float | None]
"""Numbers by name, as they stand in a score; None where the metric has no meaning for these images."""


@dataclass(frozen=True)
class Samples:
    """The generated images as metrics see them.

    Attributes:
        features: (N, D) float32, on the CPU.
        statistics: Mean and covariance of all of them.
        predicted: (N,) int64, the extractor's class of each image; None where it has no classes.
        wanted: (N,) int64, the extractor's class that each image was asked to be; None where that is not known.
        reference: What the images are compared with.
    """

    features: Tensor
    statistics: FeatureStatistics
    predicted: Tensor | None
    wanted: Tensor | None
    reference: Reference


@dataclass(frozen=True)
class Metric:
    """A metric and what it needs, so that what cannot be measured is refused before any image is generated.

    Attributes:
        function: From samples to numbers.
        numbers: Their names.
        needs_features: Whether the reference must hold the features of its images, not only their statistics.
        least_images: Images needed, on both sides.
    """

    function: Callable[[Samples], Values]
    numbers: tuple[str, ...]
    needs_features: bool = False
    least_images: int = 2

    def __call__(self, samples: Samples) -> Values:
        """The numbers of these samples."""
        return self.function(samples)

    def check(self, name: str, num_images: int, reference: Reference) -> None:
        """Checks that the metric can be measured.

        Args:
            name: Its name, for the message.
            num_images: Images to generate.
            reference: What they will be compared with.

        Raises:
            InputError: Too few images, or a reference without features.
        """
        if self.needs_features and reference.features is None:
            raise InputError(
                f"metrics={name}: the reference '{reference.name}' holds mean and covariance only; make it anew with "
                "make_reference_statistics.py, or leave this metric out."
            )
        for what, number in (("num_images", num_images), ("images of the reference", reference.statistics.count)):
            if number < self.least_images:
                raise InputError(f"{what}={number}: {name} needs at least {self.least_images}.")


METRICS: Registry[Metric] = Registry("metric")


def register_metric(
    name: str,
    *,
    summary: str,
    reference: str,
    numbers: tuple[str, ...] | None = None,
    needs_features: bool = False,
    least_images: int = 2,
) -> Callable[[Callable[[Samples], Values]], Callable[[Samples], Values]]:
    """Decorator that adds a function from `Samples` to `Values` to `METRICS`.

    Args:
        name: Under which it is asked for.
        summary: One sentence for help texts.
        reference: Paper and equation.
        numbers: Names of what it returns, if it is not one number of the metric's own name.
        needs_features: As in `Metric`.
        least_images: As in `Metric`.
    """

    def add(function: Callable[[Samples], Values]) -> Callable[[Samples], Values]:
        metric = Metric(function, numbers or (name,), needs_features, least_images)
        METRICS.register(name, summary=summary, reference=reference)(metric)
        return function

    return add
