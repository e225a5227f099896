"""The score of a pipeline: every metric of images that it generates, with the protocol they were measured under."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

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
from ..generation.generate import GenerationSettings, generate, lost_rows, row_names_of, speed_pipeline
from ..version import __version__
from .extractors import FeatureExtractor, load_extractor
from .metric import METRICS, Samples
from .precision_recall import NEAREST
from .protocol import Protocol, labels_in_words, sampler_settings
from .reference import Reference, load_reference
from .score_record import Environment, Score
from .statistics import StatisticsAccumulator


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
    """

    batch_size: int = option(100, "Images generated at once.", interval="[1, 10^6]")
    num_images: int = option(2000, "Generated images.", interval="[2, 10^7]")
    class_rows: Sequence[int] | None = None
    weights: str = "ema"
    metrics: Sequence[str] = field(default_factory=lambda: tuple(METRICS))
    extractor: FeatureExtractor = field(default_factory=load_extractor)
    reference: Reference = field(default_factory=load_reference)


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
    )


def check_measurable(settings: ScoreSettings, resolution: int) -> None:
    """Checks that images can be measured, before there is a pipeline to make them.

    Args:
        settings: Its metrics, extractor, reference and number of images are looked at.
        resolution: Side of the images in pixels.

    Raises:
        InputError: The reference is of another resolution or extractor, or lacks what a metric needs.
    """
    extractor, reference = settings.extractor, settings.reference
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
        METRICS[name].function.check(name, settings.num_images, reference)
    features, _ = extractor(torch.full((2, 3, resolution, resolution), 0.5))
    needed = len(reference.statistics.mean)
    if features.shape[1] != needed:
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
) -> Score:
    """Generates images, classes in turn, and measures them.

    Args:
        pipeline: Any DiT pipeline.
        settings: How to score it; None: 2,000 images, 50 steps of the pipeline's own sampler, no guidance, in the
            features of the embedded classifier against the embedded reference, which are of Fashion-MNIST at 32x32.
        protocol: From `make_protocol`, where that was called already.
        description: Name of the progress bar.

    Raises:
        InputError: What cannot be generated or measured so; nothing has been generated.
    """
    settings = settings or ScoreSettings()
    began = time.perf_counter()
    protocol = protocol or make_protocol(pipeline, settings)
    rows = _class_rows(pipeline, settings)
    labels = [rows[index % len(rows)] for index in range(settings.num_images)]
    statistics, features, predicted = StatisticsAccumulator(), list[Tensor](), list[Tensor]()
    for images in _images(pipeline, labels, settings, description):
        made, logits = settings.extractor(images)
        statistics.update(made)
        features.append(made)
        predicted += [] if logits is None else [logits.argmax(1)]
    samples = Samples(
        features=torch.cat(features),
        statistics=statistics.result(extractor_sha256=settings.extractor.sha256),
        predicted=torch.cat(predicted) if predicted else None,
        wanted=_wanted_classes(pipeline, labels, settings.extractor.classes),
        reference=settings.reference,
    )
    values: dict[str, float | None] = {}
    for name in settings.metrics:
        values |= METRICS[name].function(samples)
    environment = Environment(
        torch=str(torch.__version__),
        diffusers=diffusers.__version__,
        speed_diffusers=__version__,
        device=pipeline.transformer.device.type,
        seconds=round(time.perf_counter() - began, 1),
    )
    return Score(values, tensors_sha256(pipeline.transformer.state_dict()), protocol, environment)


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


def _wanted_classes(pipeline: DiTPipeline, labels: Sequence[int], classes: Sequence[str] | None) -> Tensor | None:
    """The extractor's class of each image (N,), by name where both sides name theirs; None where there is none."""
    rows, row_names, null = set(labels), row_names_of(pipeline), speed_pipeline(pipeline).null_class_id
    if null in rows:
        return None
    if classes is None or not row_names:
        # Rows of the table leave out the one that means "no class".
        ids = {row: row - (row > null) for row in rows}
    else:
        ids = _classes_by_name(row_names, classes)
        if not rows <= set(ids):
            return None
    return torch.tensor([ids[row] for row in labels])


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
    pipeline: DiTPipeline, labels: Sequence[int], settings: ScoreSettings, description: str
) -> Iterator[Tensor]:
    """Batches of generated images, (B, 3, H, W) float32 in [0, 1], under a progress bar."""
    pipeline.set_progress_bar_config(disable=True)
    batches: Iterator[npt.NDArray[np.float32]] = generate(pipeline, labels, settings)
    with tqdm(total=len(labels), desc=description, unit="image") as progress:
        for batch in batches:
            yield torch.from_numpy(batch).permute(0, 3, 1, 2).contiguous()
            progress.update(len(batch))
