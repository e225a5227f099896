"""Numbers of images that arrive in batches: features are taken as they come, metrics at the end."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .extractors import FeatureExtractor
from .intervals import Interval, intervals_of
from .metric import METRICS, MetricSettings, Samples, Values
from .reference import Reference
from .statistics import StatisticsAccumulator


class Measurement:
    """What one extractor sees in a set of images.

    Args:
        extractor: Makes the features.
        reference: What the images are compared with.
        metrics: Names in `METRICS`.
        settings: What else the metrics are told.
    """

    def __init__(
        self,
        extractor: FeatureExtractor,
        reference: Reference,
        metrics: Sequence[str],
        settings: MetricSettings,
    ) -> None:
        self.extractor = extractor
        self.reference = reference
        self.metrics = metrics
        self.settings = settings
        self._keeps_logits = "inception_score" in metrics
        self._statistics = StatisticsAccumulator()
        self._features: list[Tensor] = []
        self._predicted: list[Tensor] = []
        self._num_classes = 0
        self._logits: list[Tensor] = []

    def update(self, images: Tensor) -> None:
        """Adds a batch of images.

        Args:
            images: (B, 3, H, W), float32, in [0, 1].

        Raises:
            InputError: The extractor makes something else of them than features.
        """
        features, logits = self.extractor(images)
        self._statistics.update(features)
        self._features.append(features)
        if logits is not None:
            self._predicted.append(logits.argmax(1))
            self._num_classes = logits.shape[1]
            self._logits += [logits] if self._keeps_logits else []

    def samples(self, wanted: Tensor | None = None, texts: Tensor | None = None) -> Samples:
        """All images so far as metrics see them.

        Args:
            wanted: (N,) int64, the extractor's class that each image was asked to be; left out where the extractor
                has not as many.
            texts: (N, D), features of the text that each was asked to show.
        """
        if wanted is not None and bool((wanted >= self._num_classes).any()):
            wanted = None
        return Samples(
            features=torch.cat(self._features),
            statistics=self._statistics.result(extractor_sha256=self.extractor.sha256),
            predicted=torch.cat(self._predicted) if self._predicted else None,
            wanted=wanted,
            reference=self.reference,
            logits=torch.cat(self._logits) if self._logits else None,
            texts=texts,
            settings=self.settings,
        )

    def result(
        self, *, wanted: Tensor | None = None, texts: Tensor | None = None, num_bootstrap: int = 0
    ) -> tuple[dict[str, float | None], dict[str, Interval]]:
        """The numbers of all images so far, and their intervals if there are draws for them.

        Args:
            wanted: As in `samples`.
            texts: As in `samples`.
            num_bootstrap: Draws, 0 or at least 2.
        """
        samples = self.samples(wanted, texts)
        values = dict(self._measure(samples))
        intervals = {}
        if num_bootstrap:
            intervals = intervals_of(self._measure, samples, values, num_bootstrap=num_bootstrap)
        return values, intervals

    def _measure(self, samples: Samples) -> Values:
        values: dict[str, float | None] = {}
        for name in self.metrics:
            values |= METRICS[name].function(samples)
        return values
