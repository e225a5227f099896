r"""Writes held-out images' features with their mean and covariance, the reference of every score, and its floor.

    python train_scripts/make_reference_statistics.py train_data_dir=fashion_mnist_train.parquet \
        validation_data_dir=fashion_mnist_test.parquet output_dir=reference

Writes reference_features.safetensors and reference_features.json to output_dir. The JSON holds the hash of the feature
extractor, and how real training images and the VAE's reconstructions of the held-out images score against the
reference: no model is to be expected at a smaller distance than the first, nor one with this VAE much below the
second. About a minute for 10,000 images of 32x32. feature_extractor= also takes the literature's by name (inception,
inception_spatial, inception_clean, dinov2, clip) and any module, as package.module:attribute or
path/to/file.py:attribute. Where the held-out images are the training images again, the JSON says "held_out": false and
has no score of training images.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from speed_diffusers.assets import EMBEDDED
from speed_diffusers.config.command_line import run_script
from speed_diffusers.config.load import load_config
from speed_diffusers.config.published import published_command
from speed_diffusers.config.schema import option
from speed_diffusers.data import ImageSource
from speed_diffusers.data.batches import (
    ImageSettings,
    all_batches,
    open_training_images,
    open_validation_images,
)
from speed_diffusers.errors import InputError
from speed_diffusers.files import check_writable, file_sha256
from speed_diffusers.generation import load_vae
from speed_diffusers.hardware import accelerator_or_cpu
from speed_diffusers.metrics import (
    METRICS,
    NO_REFERENCE,
    ExtractorFiles,
    FeatureExtractor,
    Measurement,
    MetricSettings,
    Samples,
    load_extractor,
    load_reference,
    save_statistics,
)
from speed_diffusers.metrics.extractors import FASHION_MNIST
from speed_diffusers.metrics.published import clip_option, dinov2_option, inception_option
from speed_diffusers.metrics.score import ClassesOfImages, wanted_classes

REFERENCE_FILE = "reference_features.safetensors"


@dataclass
class ReferenceSettings(ImageSettings):
    """All settings of this script; the reference is of validation_data_dir or validation_split."""

    output_dir: str = option("reference", "Folder for the two files.", path=True)
    feature_extractor: str = option(
        FASHION_MNIST, "A name, a classifier's .safetensors, or module:attribute.", path=True
    )
    inception_weights: str | None = inception_option()
    dinov2_model: str = dinov2_option()
    clip_model: str = clip_option()
    store_features: bool = option(True, "Keep the features too, for kernel distance, precision and recall.")
    vae: str | None = option(EMBEDDED, "VAE of the floor: 'embedded', a folder or a Hub id; or None.", path=True)
    floor_images: int = option(10_000, "Training images to compare with.", interval="[2, 10^7]")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_writable("output_dir", Path(self.output_dir))
        if self.validation_data_dir is None and self.validation_split is None:
            raise InputError("Give the held-out images: validation_data_dir=... or validation_split=...")


def measure(extractor: FeatureExtractor, source: ImageSource, batches: Iterator[tuple[Tensor, Tensor]]) -> Samples:
    """What an extractor sees in batches of images (B, 3, R, R) in [0, 1] with labels (B,), of a source's classes."""
    measurement = Measurement(extractor, NO_REFERENCE, [], MetricSettings(equal_counts=not extractor.published))
    shown: list[int] = []
    for images, labels in batches:
        measurement.update(images)
        shown += labels.tolist()
    names = dict(enumerate(source.label_names or []))
    classes = ClassesOfImages(shown, names, null=0 if source.label_column is None else source.num_classes)
    # A published network's classes are not those of the images.
    return measurement.samples(None if extractor.published else wanted_classes(classes, extractor.classes))


@torch.no_grad()
def reconstructions(vae: AutoencoderKL, batches: Iterator[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Decoded posterior means of batches (B, 3, R, R) in [0, 1], in the same range, with their labels."""
    for images, labels in batches:
        decoded = vae.decode(vae.encode(images * 2 - 1).latent_dist.mode()).sample
        yield (decoded / 2 + 0.5).clamp(0, 1), labels


def score_of(samples: Samples, reference_file: Path, extractor: str) -> dict[str, float | None]:
    """Every metric of the extractor's features that the reference and the number of images allow."""
    reference = load_reference(reference_file)
    samples = replace(samples, reference=reference)
    values: dict[str, float | None] = {"images": len(samples.features)}
    smallest = min(len(samples.features), reference.statistics.count or 0)
    for entry in METRICS.values():
        metric = entry.function
        # Without one in any features it is of these images, in published ones it is quoted elsewhere.
        there = (metric.needs_reference or metric.extractor is None) and (
            reference.features is not None or not metric.needs_features
        )
        if there and metric.extractor in (None, extractor) and smallest >= metric.least(samples.settings):
            values |= metric(samples)
    return values


def main(argv: list[str]) -> None:
    """Measures the reference, writes it, and measures its floor.

    Raises:
        InputError: Wrong options, images or VAE; nothing has been written.
    """
    settings = load_config(ReferenceSettings, argv, Path(__file__).parent)
    files = ExtractorFiles(settings.inception_weights, settings.dinov2_model, settings.clip_model)
    extractor = load_extractor(
        settings.feature_extractor, device=accelerator_or_cpu(), weights=files.weights_of(settings.feature_extractor)
    )
    vae = None if settings.vae is None else load_vae(settings.vae).eval()
    training = open_training_images(settings)
    held_out = open_validation_images(settings, training)
    real = training if held_out is None else held_out

    def images_of(source: ImageSource, name: str) -> Iterator[tuple[Tensor, Tensor]]:
        return all_batches(source, settings, description=name)

    measured = measure(extractor, real, images_of(real, "reference"))
    floor = {}
    if held_out is not None:
        some = open_training_images(settings, max_train_samples=settings.floor_images)
        floor["training_images"] = measure(extractor, some, images_of(some, "training images"))
    if vae is not None:
        floor["reconstructions"] = measure(extractor, real, reconstructions(vae, images_of(real, "reconstructions")))

    output = Path(settings.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    file = output / REFERENCE_FILE
    save_statistics(
        measured.statistics,
        file,
        features=measured.features if settings.store_features else None,
        resolution=settings.resolution,
    )
    report = {
        "command": published_command("train_scripts/make_reference_statistics.py", argv),
        "held_out": held_out is not None,
        "images": measured.statistics.count,
        "feature_extractor": extractor.name,
        "extractor_sha256": extractor.sha256,
        "reference_sha256": file_sha256(file),
        **{name: score_of(each, file, extractor.name) for name, each in floor.items()},
    }
    file.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    run_script(main, __doc__, ReferenceSettings)
