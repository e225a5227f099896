"""What a metric is given, what it returns, and the registry of all: one function in one file each."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from typing import Any

from torch import Tensor

from ..errors import InputError
from ..registry import Registry
from .reference import NO_REFERENCE, Reference
from .statistics import FeatureStatistics, statistics_of

Values = Mapping[str, float | None]
"""Numbers by name, as they stand in a score; None where the metric has no meaning for these images."""


@dataclass(frozen=True)
class MetricSettings:
    """What metrics are told besides the images.

    Attributes:
        kid_subset_size: Images in each of KID's random subsets.
        equal_counts: Whether precision and recall compare equally many images, or all that there are, as in the field.
    """

    kid_subset_size: int = 1000
    equal_counts: bool = True


@dataclass(frozen=True)
class Samples:
    """The generated images as metrics see them.

    Attributes:
        features: (N, D) float32, on the CPU.
        statistics: Mean and covariance of all of them.
        predicted: (N,) int64, the extractor's class of each image; None where it has no classes.
        wanted: (N,) int64, the extractor's class that each image was asked to be; None where that is not known.
        reference: What the images are compared with.
        logits: (N, classes) float32; None where the extractor has no classes.
        texts: (N, D) float32, features of the text that each image was asked to show; None where there are none.
        settings: What else a metric needs to know.
    """

    features: Tensor
    statistics: FeatureStatistics
    predicted: Tensor | None
    wanted: Tensor | None
    reference: Reference
    logits: Tensor | None = None
    texts: Tensor | None = None
    settings: MetricSettings = field(default_factory=MetricSettings)

    def part(self, chosen: Tensor) -> "Samples":
        """Some of the images, by their numbers (n,), as if no others had been generated."""

        def of(values: Tensor | None) -> Tensor | None:
            return None if values is None else values[chosen]

        features = self.features[chosen]
        return replace(
            self,
            features=features,
            statistics=statistics_of([features], extractor_sha256=self.statistics.extractor_sha256),
            predicted=of(self.predicted),
            wanted=of(self.wanted),
            logits=of(self.logits),
            texts=of(self.texts),
        )


@dataclass(frozen=True)
class Metric:
    """A metric and what it needs, so that what cannot be measured is refused before any image is generated.

    Attributes:
        function: From samples to numbers.
        numbers: Their names.
        needs_features: Whether the reference must hold the features of its images, not only their statistics.
        least_images: Images needed, on both sides; a function where the settings say how many.
        extractor: Name of the one extractor in whose features it is defined; None: any.
        needs_reference: Whether the images are compared with others.
        package: What it imports that only the extra `eval` installs.
        constants: Numbers of its own, from the settings, that a protocol keeps.
    """

    function: Callable[[Samples], Values]
    numbers: tuple[str, ...]
    needs_features: bool = False
    least_images: int | Callable[[MetricSettings], int] = 2
    extractor: str | None = None
    needs_reference: bool = True
    package: str | None = None
    constants: Callable[[MetricSettings], Mapping[str, Any]] = lambda settings: {}

    def __call__(self, samples: Samples) -> Values:
        """The numbers of these samples."""
        return self.function(samples)

    @property
    def of_statistics(self) -> bool:
        """Whether it compares means and covariances, of which an image too few makes a singular one."""
        return self.needs_reference and not self.needs_features and self.extractor is not None

    def least(self, settings: MetricSettings) -> int:
        """Images needed, on both sides."""
        return self.least_images if isinstance(self.least_images, int) else self.least_images(settings)

    def check(
        self,
        name: str,
        num_images: int,
        reference: Reference,
        settings: MetricSettings | None = None,
        *,
        halves: bool = False,
    ) -> None:
        """Checks that the metric can be measured.

        Args:
            name: Its name, for the message.
            num_images: Images to generate.
            reference: What they will be compared with.
            settings: What else the metric is told; None: the defaults.
            halves: Whether halves of the images will be measured too.

        Raises:
            InputError: Too few images, no reference, one without features, or a package that is not installed.
        """
        settings = settings or MetricSettings()
        self.check_images(name, num_images, settings, halves=halves)
        if not self.needs_reference:
            return
        if reference is NO_REFERENCE:
            raise InputError(f"metrics={name}: needs a reference.")
        known = reference.statistics.count
        if self.needs_features:
            if reference.features is None:
                raise InputError(
                    f"metrics={name}: the reference '{reference.name}' holds mean and covariance only; make it anew "
                    "with make_reference_statistics.py, or leave this metric out."
                )
            known = len(reference.features)
        if known is not None and known < self.least(settings):
            raise InputError(f"images of the reference={known}: {name} needs at least {self.least(settings)}.")

    def check_images(self, name: str, num_images: int, settings: MetricSettings, *, halves: bool = False) -> None:
        """Checks what can be checked without a reference; arguments and errors as in `check`."""
        if self.package is not None and find_spec(self.package) is None:
            raise InputError(f"metrics={name}: not installed; run: pip install 'speed-diffusers[eval]'")
        least = self.least(settings)
        if num_images < least:
            raise InputError(f"num_images={num_images}: {name} needs at least {least}.")
        if halves and num_images < 2 * least:
            raise InputError(f"num_images={num_images}: {name} with num_bootstrap needs at least {2 * least}.")


METRICS: Registry[Metric] = Registry("metric")


def general_metrics() -> list[str]:
    """Names of the metrics that any features will do for."""
    return [name for name, entry in METRICS.items() if entry.function.extractor is None]


def register_metric(
    name: str,
    *,
    summary: str,
    reference: str,
    numbers: tuple[str, ...] | None = None,
    needs_features: bool = False,
    least_images: int | Callable[[MetricSettings], int] = 2,
    extractor: str | None = None,
    needs_reference: bool = True,
    package: str | None = None,
    constants: Callable[[MetricSettings], Mapping[str, Any]] = lambda settings: {},
) -> Callable[[Callable[[Samples], Values]], Callable[[Samples], Values]]:
    """Decorator that adds a function from `Samples` to `Values` to `METRICS`.

    Args:
        name: Under which it is asked for.
        summary: One sentence for help texts.
        reference: Paper and equation.
        numbers: Names of what it returns, if it is not one number of the metric's own name.
        needs_features: As in `Metric`.
        least_images: As in `Metric`.
        extractor: As in `Metric`.
        needs_reference: As in `Metric`.
        package: As in `Metric`.
        constants: As in `Metric`.
    """

    def add(function: Callable[[Samples], Values]) -> Callable[[Samples], Values]:
        metric = Metric(
            function, numbers or (name,), needs_features, least_images, extractor, needs_reference, package, constants
        )
        METRICS.register(name, summary=summary, reference=reference)(metric)
        return function

    return add
