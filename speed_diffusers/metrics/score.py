"""The score of a pipeline: every metric of images that it generates, with the protocol they were measured under."""

import dataclasses
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import numpy.typing as npt
import torch
from diffusers import DiTPipeline
from torch import Tensor
from tqdm.auto import tqdm

from ..config.schema import option
from ..data.moments import vae_factor, vae_fingerprint
from ..errors import InputError, unknown_name
from ..files import tensors_sha256
from ..generation.generate import GenerationSettings, generate_together, lost_rows, row_names_of, speed_pipeline
from ..generation.image_files import read_images
from ..generation.image_set import Manifest
from ..generation.processes import ALONE, Processes
from ..version import __version__
from .clip_score import prompt_of
from .extractors import FeatureExtractor, load_extractor
from .measurement import Measurement
from .metric import METRICS, MetricSettings, general_metrics
from .precision_recall import NEAREST
from .protocol import Protocol, labels_in_words, sampler_settings, sampler_settings_of_config
from .reference import NO_REFERENCE, Reference, load_reference
from .score_record import Environment, Score

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ScoreSettings(GenerationSettings):
    """How to score a pipeline: how to generate its images, and what they are measured by.

    Attributes:
        class_rows: Rows of the label table, given to the images in turn; None: all classes, or none where the
            pipeline names none.
        weights: What the pipeline holds, "ema" or "model"; goes into the protocol.
        metrics: Names in `METRICS`.
        extractor: Makes the features.
        reference: What the features are compared with.
        num_bootstrap: Draws for intervals around the numbers, as in intervals.py; 0: none.
        kid_subset_size: Images in each of KID's random subsets.
    """

    batch_size: int = option(100, "Images generated at once.", interval="[1, 10^6]")
    num_images: int = option(2000, "Generated images.", interval="[2, 10^7]")
    class_rows: Sequence[int] | None = None
    weights: str = "ema"
    metrics: Sequence[str] = field(default_factory=lambda: tuple(general_metrics()))
    extractor: FeatureExtractor = field(default_factory=load_extractor)
    reference: Reference = field(default_factory=load_reference)
    num_bootstrap: int = option(0, "Draws for 95 % intervals of the numbers; 0: none.", interval="[0, 10^5]")
    kid_subset_size: int = option(1000, "Images in each of KID's 100 subsets.", interval="[2, 10^6]")

    @property
    def metric_settings(self) -> MetricSettings:
        """What the metrics are told."""
        return MetricSettings(self.kid_subset_size, equal_counts=not self.extractor.published)

    @property
    def measures(self) -> dict[str, Any]:
        """The constants of all metrics that are defined in the extractor's features, for the protocol."""
        if not self.extractor.published:
            return {}
        settings = self.metric_settings
        own = {
            name: dict(entry.function.constants(settings))
            for name, entry in METRICS.items()
            if entry.function.extractor == self.extractor.name
        }
        return {**own, "precision_recall": {"equal_counts": settings.equal_counts}}


def make_protocol(pipeline: DiTPipeline, settings: ScoreSettings) -> Protocol:
    """The protocol under which `score_pipeline` would score, after checking that it could.

    Args:
        pipeline: Any DiT pipeline.
        settings: How to score it.

    Raises:
        InputError: What cannot be generated or measured so; nothing has been generated.
    """
    settings.check_fits(pipeline)
    sampling = speed_pipeline(pipeline, settings.sampler)
    rows, table = _class_rows(pipeline, settings), pipeline.transformer.config.num_embeds_ada_norm
    if not rows or min(rows) < 0 or max(rows) > table:
        raise InputError(f"class_rows={rows}: must be rows of the label table, 0 to {table}.")
    resolution = pipeline.transformer.config.sample_size * vae_factor(pipeline.vae)
    check_measurable(settings, resolution)
    guided = settings.guidance_scale != 1
    low, high = settings.guidance_interval
    return Protocol(
        num_images=settings.num_images,
        labels="no class" if rows == [sampling.null_class_id] else labels_in_words(rows),
        sampler=type(sampling.scheduler).__name__,
        sampler_settings=sampler_settings(sampling.scheduler),
        num_inference_steps=settings.num_inference_steps,
        guidance_scale=settings.guidance_scale,
        guidance_channels=settings.guidance_channels if guided else None,
        guidance_interval=(low, high) if guided else (0.0, 1.0),
        seed=settings.seed,
        resolution=resolution,
        weights=settings.weights,
        vae_sha256=vae_fingerprint(pipeline.vae),
        extractor=settings.extractor.name,
        extractor_sha256=settings.extractor.sha256,
        reference=settings.reference.name,
        reference_sha256=settings.reference.sha256,
        num_reference_images=settings.reference.statistics.count,
        nearest=NEAREST,
        measures=settings.measures,
    )


def check_measurable(settings: ScoreSettings, resolution: int) -> None:
    """Checks that images can be measured, before there is a pipeline to make them.

    Args:
        settings: Its metrics, extractor, reference and number of images are looked at.
        resolution: Side of the images in pixels.

    Raises:
        InputError: The reference is of another resolution or extractor, or lacks what a metric needs; or a metric is
            of another extractor's features.
    """
    extractor, reference = settings.extractor, settings.reference
    if settings.num_bootstrap == 1:
        raise InputError("num_bootstrap=1: must be 0 or at least 2.")
    if reference.resolution not in (None, resolution):
        raise InputError(
            f"The reference '{reference.name}' is of {reference.resolution}x{reference.resolution} images, the "
            f"pipeline makes {resolution}x{resolution}: make a reference with make_reference_statistics.py "
            f"resolution={resolution}."
        )
    if reference.statistics.extractor_sha256 not in ("", extractor.sha256):
        raise InputError(
            f"The reference '{reference.name}' was made with another feature extractor than '{extractor.name}' "
            f"({reference.statistics.extractor_sha256[:12]}, not {extractor.sha256[:12]})."
        )
    if not settings.metrics:
        raise InputError(f"metrics is empty; allowed: {', '.join(METRICS)}.")
    for name in settings.metrics:
        if name not in METRICS:
            raise unknown_name("metric", name, METRICS)
        metric = METRICS[name].function
        if metric.extractor not in (None, extractor.name):
            raise InputError(f"metrics={name}: is defined in features of {metric.extractor}, not of {extractor.name}.")
        halves = settings.num_bootstrap > 0
        metric.check(name, settings.num_images, reference, settings.metric_settings, halves=halves)
    features, _ = extractor(torch.full((2, 3, resolution, resolution), 0.5))
    distances = [name for name in settings.metrics if METRICS[name].function.of_statistics]
    if extractor.published and distances and settings.num_images <= features.shape[1]:
        logger.warning(
            "%s of %d images in %d features: their covariance is singular, and the distance compares with others "
            "of as many images only.",
            ", ".join(distances),
            settings.num_images,
            features.shape[1],
        )
    needed = len(reference.statistics.mean)
    if reference is not NO_REFERENCE and features.shape[1] != needed:
        raise InputError(
            f"feature_extractor={extractor.name} makes {features.shape[1]} features, the reference "
            f"'{reference.name}' has {needed}."
        )


def score_pipeline(
    pipeline: DiTPipeline,
    settings: ScoreSettings | None = None,
    *,
    protocol: Protocol | None = None,
    description: str = "Scoring",
    processes: Processes = ALONE,
) -> Score:
    """Generates images, classes in turn, and measures them.

    Args:
        pipeline: Any DiT pipeline.
        settings: How to score it; None: 2,000 images, 50 steps of the pipeline's own sampler, no guidance, in the
            features of the embedded classifier against the embedded reference, which are of Fashion-MNIST at 32x32.
        protocol: From `make_protocol`, where that was called already.
        description: Name of the progress bar.
        processes: Who generates the images; each measures all of them and returns the same score.

    Raises:
        InputError: What cannot be generated or measured so; nothing has been generated.
    """
    settings = settings or ScoreSettings()
    protocol = protocol or make_protocol(pipeline, settings)
    return score_in_each(pipeline, [(settings, protocol)], description=description, processes=processes)[0]


def score_in_each(
    pipeline: DiTPipeline,
    ways: Sequence[tuple[ScoreSettings, Protocol]],
    *,
    description: str = "Scoring",
    processes: Processes = ALONE,
) -> list[Score]:
    """Generates images once, classes in turn, and measures them in the features of several extractors.

    Args:
        pipeline: Any DiT pipeline.
        ways: Settings that differ in extractor, reference and metrics only, each with its protocol.
        description: Name of the progress bar.
        processes: As in `score_pipeline`.

    Returns:
        A score for each.
    """
    began = time.perf_counter()
    shared = ways[0][0]
    rows = _class_rows(pipeline, shared)
    classes = ClassesOfImages(
        [rows[index % len(rows)] for index in range(shared.num_images)],
        row_names_of(pipeline),
        speed_pipeline(pipeline).null_class_id,
    )
    images = _images(pipeline, classes.labels, shared, description, processes)
    measured = _measure(images, classes, [settings for settings, _ in ways])
    weights_sha256 = tensors_sha256(pipeline.transformer.state_dict())
    environment = _environment(pipeline.transformer.device.type, began)
    return [
        Score(values, weights_sha256, protocol, environment, intervals, dict.fromkeys(intervals, shared.num_bootstrap))
        for (_, protocol), (values, intervals) in zip(ways, measured, strict=True)
    ]


def image_set_protocol(manifest: Manifest, settings: ScoreSettings) -> Protocol:
    """The protocol under which `score_image_set` would score, after checking that it could.

    Args:
        manifest: Of the set; all of its images are scored.
        settings: Metrics, extractor, reference and resampling are looked at.

    Raises:
        InputError: The set is not complete, or cannot be measured so.
    """
    made, count = manifest.image_set, manifest.num_images
    if not manifest.complete:
        raise InputError(
            f"The images of {made.model} are not complete ({count:,} are wanted): resume generate_samples.py with its "
            "command."
        )
    settings = dataclasses.replace(settings, num_images=count)
    check_measurable(settings, made.resolution)
    guided = made.guidance_scale != 1
    low, high = made.guidance_interval
    order = "in turn" if made.labels == "balanced" else "at random"
    return Protocol(
        num_images=count,
        labels="no class"
        if list(made.class_rows) == [made.null_class_id]
        else labels_in_words(made.class_rows, order),
        sampler=str(made.scheduler["_class_name"]),
        sampler_settings=sampler_settings_of_config(made.scheduler),
        num_inference_steps=made.num_inference_steps,
        guidance_scale=made.guidance_scale,
        guidance_channels=made.guidance_channels if guided else None,
        guidance_interval=(low, high) if guided else (0.0, 1.0),
        seed=made.seed,
        resolution=made.resolution,
        weights=made.weights,
        vae_sha256=made.vae_sha256,
        extractor=settings.extractor.name,
        extractor_sha256=settings.extractor.sha256,
        reference=settings.reference.name,
        reference_sha256=settings.reference.sha256,
        num_reference_images=settings.reference.statistics.count,
        nearest=NEAREST,
        measures=settings.measures,
        dtype=made.dtype,
        pixels="8 bit",
    )


def score_image_set(
    folder: Path, ways: Sequence[tuple[ScoreSettings, Protocol]], *, description: str = "Scoring"
) -> list[Score]:
    """Measures the images that `generate_samples.py` has left in a folder, all of them.

    Args:
        folder: With the manifest.
        ways: As in `score_in_each`, with protocols of `image_set_protocol`.
        description: Name of the progress bar.

    Returns:
        A score for each.

    Raises:
        InputError: An image is missing or damaged.
    """
    began = time.perf_counter()
    manifest = Manifest.load(folder)
    made = manifest.image_set
    classes = ClassesOfImages(
        [made.label(number) for number in range(manifest.num_images)],
        {int(row): name for row, name in made.class_names.items()},
        made.null_class_id,
    )
    shared = ways[0][0]
    images = _stored_images(folder, manifest, shared.batch_size, description)
    measured = _measure(images, classes, [settings for settings, _ in ways])
    environment = _environment(made.device, began)
    return [
        Score(
            values,
            made.weights_sha256,
            protocol,
            environment,
            intervals,
            dict.fromkeys(intervals, shared.num_bootstrap),
        )
        for (_, protocol), (values, intervals) in zip(ways, measured, strict=True)
    ]


@dataclass(frozen=True)
class ClassesOfImages:
    """What images were asked to show.

    Attributes:
        labels: Row of the label table of each image.
        row_names: Names of rows; empty where they have none.
        null: The row that means "no class".
    """

    labels: Sequence[int]
    row_names: Mapping[int, str]
    null: int


def _measure(
    images: Iterator[Tensor], classes: ClassesOfImages, ways: Sequence[ScoreSettings]
) -> list[tuple[dict[str, float | None], dict[str, tuple[float, float]]]]:
    """The numbers and intervals of batches (B, 3, H, W) in [0, 1], in each way."""
    device = ways[0].extractor.device
    measurements = [
        Measurement(settings.extractor, settings.reference, settings.metrics, settings.metric_settings)
        for settings in ways
    ]
    for images_of_batch in images:
        batch = images_of_batch.to(device)  # once for all of them
        for measurement in measurements:
            measurement.update(batch)
    return [
        measurement.result(
            wanted=wanted_classes(classes, settings.extractor.classes),
            texts=_text_features(classes, settings) if "clip_score" in settings.metrics else None,
            num_bootstrap=settings.num_bootstrap,
        )
        for settings, measurement in zip(ways, measurements, strict=True)
    ]


def _environment(device: str, began: float) -> Environment:
    return Environment(
        torch=str(torch.__version__),
        diffusers=diffusers.__version__,
        speed_diffusers=__version__,
        device=device,
        seconds=round(time.perf_counter() - began, 1),
    )


def _text_features(classes: ClassesOfImages, settings: ScoreSettings) -> Tensor | None:
    """Features of the text that names each image's class, (N, D); None where a class has no name."""
    rows = sorted(set(classes.labels))
    if settings.extractor.texts is None or not set(rows) <= set(classes.row_names):
        return None
    features = settings.extractor.texts([prompt_of(classes.row_names[row]) for row in rows])
    return features[torch.tensor([rows.index(row) for row in classes.labels])]


def _class_rows(pipeline: DiTPipeline, settings: ScoreSettings) -> list[int]:
    """The rows of the label table that images take in turn."""
    if settings.class_rows is not None:
        return list(settings.class_rows)
    if lost := lost_rows(pipeline):
        raise InputError(
            f"The pipeline has lost the names of {len(lost)} classes, such as row {lost[0]}, because others have the "
            "same: load it with load_pipeline, which keeps all names, or give class_rows."
        )
    return list(row_names_of(pipeline)) or [speed_pipeline(pipeline).null_class_id]


def wanted_classes(images: ClassesOfImages, classes: Sequence[str] | None) -> Tensor | None:
    """The extractor's class of each image (N,), by name where both sides name theirs; None where there is none."""
    rows = set(images.labels)
    if images.null in rows or (classes is not None and not classes):
        return None
    if classes is None or not images.row_names:
        # Rows of the table leave out the one that means "no class".
        ids = {row: row - (row > images.null) for row in rows}
    else:
        ids = _classes_by_name(images.row_names, classes)
        if not rows <= set(ids):
            return None
    return torch.tensor([ids[row] for row in images.labels])


def _classes_by_name(row_names: Mapping[int, str], classes: Sequence[str]) -> dict[int, int]:
    """The extractor's class of each row whose name it knows; rows of one name are its classes of that name, in order.

    A name that the two sides give to different numbers of classes is left out.
    """
    found: dict[int, int] = {}
    for name in set(row_names.values()):
        own = [row for row, other in sorted(row_names.items()) if other == name]
        theirs = [number for number, other in enumerate(classes) if other == name]
        if len(own) == len(theirs):
            found |= zip(own, theirs, strict=True)
    return found


def _images(
    pipeline: DiTPipeline, labels: Sequence[int], settings: ScoreSettings, description: str, processes: Processes
) -> Iterator[Tensor]:
    """Batches of generated images, (B, 3, H, W) float32 in [0, 1], under a progress bar."""
    pipeline.set_progress_bar_config(disable=True)
    batches: Iterator[npt.NDArray[np.float32]] = generate_together(pipeline, labels, settings, processes)
    # Nothing where it may show: what is given there, TQDM_DISABLE cannot change.
    hidden: dict[str, Any] = {"disable": True} if processes.rank else {}
    with tqdm(total=len(labels), desc=description, unit="image", **hidden) as progress:
        for batch in batches:
            yield torch.from_numpy(batch).permute(0, 3, 1, 2).contiguous()
            progress.update(len(batch))


def _stored_images(folder: Path, manifest: Manifest, batch_size: int, description: str) -> Iterator[Tensor]:
    """Batches of a set's images, (B, 3, H, W) float32 in [0, 1], under a progress bar."""
    with tqdm(total=manifest.num_images, desc=description, unit="image") as progress:
        for batch in read_images(folder, manifest, batch_size):
            yield torch.from_numpy(batch).permute(0, 3, 1, 2).float().div(255)
            progress.update(len(batch))
