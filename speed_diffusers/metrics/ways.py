"""Which extractor and which reference each metric is measured with, from what a user asked for."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..assets import EMBEDDED
from ..errors import InputError
from .extractors import FASHION_MNIST, FeatureExtractor, load_extractor
from .inception import INCEPTION
from .metric import METRICS
from .npz_reference import is_npz, load_npz_reference
from .published import ExtractorFiles
from .reference import NO_REFERENCE, Reference, load_reference
from .score import ScoreSettings


@dataclass(frozen=True)
class Wanted:
    """What a user asked to be measured.

    Attributes:
        metrics: Names in `METRICS`.
        references: "embedded", files of make_reference_statistics.py, or npz files.
        feature_extractor: Of the metrics that any features will do for; None: Inception where another metric is in its
            pooled features, the embedded classifier otherwise.
        files: Where published weights are.
        generated: Whether images are still to be made, as many as the settings say; those that are there are counted
            where they are opened.
    """

    metrics: Sequence[str]
    references: Sequence[str]
    feature_extractor: str | None
    files: ExtractorFiles
    generated: bool = True


def ways_of(wanted: Wanted, shared: ScoreSettings, device: torch.device) -> list[ScoreSettings]:
    """The settings of one score for each extractor that the metrics need, in the order in which they need them.

    Args:
        wanted: What was asked for.
        shared: All settings but extractor, reference and metrics.
        device: Where extractors go.

    Raises:
        InputError: No such extractor, weights or reference, none that fits, or too few images for a metric.
    """
    groups = extractors_of(wanted.metrics, wanted.feature_extractor)
    for name in wanted.metrics if wanted.generated else ():
        METRICS[name].function.check_images(
            name, shared.num_images, shared.metric_settings, halves=shared.num_bootstrap > 0
        )
    # Small files before large ones, and all names before the first image of an npz is looked at.
    loaded = {name: load_reference(name) for name in wanted.references if not is_npz(name)}
    for name in wanted.references:
        if is_npz(name) and not Path(name).is_file():
            raise InputError(f"reference={name}: there is no such file.")
    ways = []
    for extractor_name, metrics in groups.items():
        extractor = load_extractor(extractor_name, device=device, weights=wanted.files.weights_of(extractor_name))
        reference = NO_REFERENCE
        if any(METRICS[name].function.needs_reference for name in metrics):
            needs_features = any(METRICS[name].function.needs_features for name in metrics)
            reference = _reference_of(extractor, wanted.references, loaded, needs_features=needs_features)
        ways.append(replace(shared, metrics=tuple(metrics), extractor=extractor, reference=reference))
    return ways


def extractors_of(metrics: Sequence[str], feature_extractor: str | None) -> dict[str, list[str]]:
    """The metrics by the name of the extractor in whose features they are measured.

    Args:
        metrics: Names in `METRICS`.
        feature_extractor: As in `Wanted`.

    Raises:
        InputError: There are none.
    """
    if not metrics:
        raise InputError(f"metrics is empty; allowed: {', '.join(METRICS)}.")
    own = {name: METRICS[name].function.extractor for name in metrics}
    general = feature_extractor or (INCEPTION if INCEPTION in own.values() else FASHION_MNIST)
    groups: dict[str, list[str]] = {}
    for name, extractor in own.items():
        groups.setdefault(extractor or general, []).append(name)
    return groups


def _reference_of(
    extractor: FeatureExtractor, names: Sequence[str], loaded: dict[str, Reference], *, needs_features: bool
) -> Reference:
    """The first reference in an extractor's features; npz files count, in their order, if no other does."""
    fitting = [each for each in loaded.values() if each.statistics.extractor_sha256 == extractor.sha256]
    if fitting:
        return fitting[0]
    archives = [name for name in names if is_npz(name)]
    for number, name in enumerate(archives, 1):
        try:
            return load_npz_reference(name, extractor, needs_features=needs_features)
        except InputError:
            if number == len(archives):
                raise
    if len(names) == 1 and (extractor.name == FASHION_MNIST or names[0] != EMBEDDED):
        return loaded[names[0]]  # whatever is wrong with it is said where it is looked at
    raise InputError(
        f"reference={','.join(names)}: none is in features of {extractor.name}; make one with "
        f"make_reference_statistics.py feature_extractor={extractor.name}, or give an npz file with images."
    )
