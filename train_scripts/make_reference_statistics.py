r"""Writes mean and covariance of held-out images' features, the reference of the Fréchet distance, and its floor.

    python train_scripts/make_reference_statistics.py train_data_dir=fashion_mnist_train.parquet \
        validation_data_dir=fashion_mnist_test.parquet output_dir=reference

Writes reference_features.safetensors and reference_features.json to output_dir. The JSON holds the hash of the
classifier, and how far real training images and the VAE's reconstructions of the held-out images are from the
reference: no model is to be expected below the first, nor one with this VAE much below the second. Under a minute.
"""

import json
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from command_line import run_script
from image_batches import (
    ImageSettings,
    all_batches,
    open_training_images,
    open_validation_images,
    require_at_least,
)
from run_folder import check_writable
from speed_diffusers.config import load_config
from speed_diffusers.data import ImageSource
from speed_diffusers.errors import InputError
from speed_diffusers.metrics import (
    FeatureStatistics,
    SmallClassifier,
    extract_features,
    file_sha256,
    frechet_distance,
    load_classifier,
    save_statistics,
    statistics_of,
)
from speed_diffusers.metrics.features import SHIPPED_CLASSIFIER

ASSETS = Path(__file__).resolve().parents[1] / "speed_diffusers" / "assets" / "fashion_mnist"


@dataclass
class ReferenceSettings(ImageSettings):
    """All settings of this script; the reference is of validation_data_dir or validation_split."""

    output_dir: str = field(default="reference", metadata={"help": "folder for the two files"})
    classifier: str = field(default=str(SHIPPED_CLASSIFIER), metadata={"help": "the feature extractor"})
    vae: str | None = field(
        default=str(ASSETS / "pipeline" / "vae"), metadata={"help": "VAE folder for the floor, or None"}
    )
    floor_images: int = field(default=10_000, metadata={"help": "training images to compare with"})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_writable("output_dir", Path(self.output_dir))
        require_at_least(2, floor_images=self.floor_images)
        if self.validation_data_dir is None and self.validation_split is None:
            raise InputError("Give the held-out images: validation_data_dir=... or validation_split=...")
        if self.vae is not None and not (Path(self.vae) / "config.json").is_file():
            raise InputError(f"No VAE in '{self.vae}'. Make one with train_scripts/train_vae.py, or say vae=None.")


@torch.no_grad()
def reconstructions(vae: AutoencoderKL, batches: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Decoded posterior means of batches (B, 3, R, R) in [0, 1], in the same range."""
    for images in batches:
        decoded = vae.decode(vae.encode(images * 2 - 1).latent_dist.mode()).sample
        yield (decoded / 2 + 0.5).clamp(0, 1)


def main(argv: list[str]) -> None:
    """Measures the reference, then its floor, then writes both."""
    settings = load_config(ReferenceSettings, argv, Path(__file__).parent)
    classifier, sha256 = load_classifier(settings.classifier), file_sha256(settings.classifier)
    held_out = open_validation_images(settings)
    assert held_out is not None  # checked with the settings
    training = open_training_images(settings, max_train_samples=settings.floor_images)

    def images_of(source: ImageSource, name: str) -> Iterator[torch.Tensor]:
        return (images for images, _ in all_batches(source, settings, description=name))

    reference = measure(classifier, images_of(held_out, "reference"), sha256)
    real = measure(classifier, images_of(training, "training images"), sha256)
    floor = {"training_images": real.count, "training_distance": frechet_distance(real, reference)}
    if settings.vae is not None:
        vae = AutoencoderKL.from_pretrained(settings.vae, torch_dtype=torch.float32).eval()
        decoded = measure(classifier, reconstructions(vae, images_of(held_out, "reconstructions")), sha256)
        floor |= {"reconstructions": decoded.count, "reconstruction_distance": frechet_distance(decoded, reference)}

    output = Path(settings.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    save_statistics(reference, output / "reference_features.safetensors")
    report = {
        "command": shlex.join(["python", "train_scripts/make_reference_statistics.py", *argv]),
        "images": reference.count,
        "classifier_sha256": sha256,
        "reference_sha256": file_sha256(output / "reference_features.safetensors"),
        **floor,
    }
    (output / "reference_features.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


def measure(classifier: SmallClassifier, batches: Iterator[torch.Tensor], sha256: str) -> FeatureStatistics:
    """Statistics of image batches, marked with the classifier's hash."""
    return statistics_of(extract_features(classifier, batches), extractor_sha256=sha256)


if __name__ == "__main__":
    run_script(main, __doc__, ReferenceSettings)
