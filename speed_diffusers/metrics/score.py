"""The score of a pipeline and the protocol it was measured under; scores compare only under equal protocols."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt
import torch
from diffusers import DiTPipeline
from torch import Tensor
from tqdm.auto import tqdm

from ..embedded import SHIPPED_CLASSIFIER, SHIPPED_REFERENCE
from ..sampling import generate
from .features import file_sha256, load_classifier
from .frechet import StatisticsAccumulator, frechet_distance, load_reference_statistics


@dataclass(frozen=True)
class Protocol:
    """All that a score depends on besides the weights.

    Attributes:
        num_images: Generated images; the Fréchet distance falls with it.
        labels: How classes are given to images.
        sampler: Class of the pipeline's scheduler.
        num_inference_steps: Solver steps.
        guidance_scale: Classifier-free guidance on all latent channels; 1 is none.
        seed: Seed of the images' noise.
        extractor_sha256: Hash of the feature extractor's file.
        reference_sha256: Hash of the reference statistics' file.
    """

    num_images: int
    labels: str
    sampler: str
    num_inference_steps: int
    guidance_scale: float
    seed: int
    extractor_sha256: str
    reference_sha256: str


@dataclass(frozen=True)
class Score:
    """Quality of generated images in the shipped classifier's features.

    Attributes:
        frechet_distance: To the 10,000 held-out images, in squared feature units; lower is better. Not an FID.
        class_agreement: Share of images that the classifier takes for the class they were asked to be, in [0, 1].
        protocol: How it was measured.
    """

    frechet_distance: float
    class_agreement: float
    protocol: Protocol

    def to_dict(self) -> dict[str, object]:
        """The score as JSON values."""
        return asdict(self)


@torch.no_grad()
def score_pipeline(
    pipeline: DiTPipeline,
    *,
    num_images: int = 2000,
    num_classes: int = 10,
    seed: int = 0,
    batch_size: int = 100,
    guidance_scale: float = 1.0,
    num_inference_steps: int = 50,
) -> Score:
    """Generates images, classes in turn, and scores them against the shipped reference.

    Args:
        pipeline: A pipeline of garments, classes 0 to num_classes - 1 in the shipped order.
        num_images: Images to generate, at least 2.
        num_classes: Classes to generate.
        seed: Seed of the noise: image i has the same noise whatever is scored.
        batch_size: Images generated at once.
        guidance_scale: Classifier-free guidance; 1 is none.
        num_inference_steps: Solver steps.
    """
    classifier = load_classifier()
    labels = [index % num_classes for index in range(num_images)]
    statistics, agreeing = StatisticsAccumulator(), 0
    pipeline.set_progress_bar_config(disable=True)
    batches = generate(
        pipeline,
        labels,
        seed=seed,
        batch_size=batch_size,
        guidance_scale=guidance_scale,
        num_inference_steps=num_inference_steps,
    )
    for images, wanted in _with_labels(batches, labels, num_images):
        features = classifier.features(images)
        statistics.update(features)
        agreeing += int((classifier(images).argmax(1) == wanted).sum())
    extractor = file_sha256(SHIPPED_CLASSIFIER)
    distance = frechet_distance(statistics.result(extractor_sha256=extractor), load_reference_statistics())
    protocol = Protocol(
        num_images=num_images,
        labels=f"0..{num_classes - 1} in turn",
        sampler=type(pipeline.scheduler).__name__,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        seed=seed,
        extractor_sha256=extractor,
        reference_sha256=file_sha256(SHIPPED_REFERENCE),
    )
    return Score(distance, agreeing / num_images, protocol)


def _with_labels(
    batches: Iterator[npt.NDArray[np.float32]], labels: list[int], total: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches as (B, 3, H, W) tensors with the labels they were made for, under a progress bar."""
    done = 0
    with tqdm(total=total, desc="Scoring", unit="image") as progress:
        for batch in batches:
            images = torch.from_numpy(batch).permute(0, 3, 1, 2).contiguous()
            yield images, torch.tensor(labels[done : done + len(images)])
            done += len(images)
            progress.update(len(images))
