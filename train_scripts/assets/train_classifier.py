r"""Trains the small classifier whose features measure how close generated images are to real ones.

    python train_scripts/assets/train_classifier.py train_data_dir=fashion_mnist_train.parquet \
        validation_data_dir=fashion_mnist_test.parquet output_dir=classifier

Writes classifier.safetensors and classifier.json (accuracy, command) to output_dir. About five minutes on one CPU
core for the 60,000 images of Fashion-MNIST (make_embedded_dataset.py beside this file writes the two parquet files).
Without data settings it trains on the 9,000 images in the package. A quick try: max_train_steps=20.
"""

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

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
    training_batches,
)
from speed_diffusers.errors import InputError
from speed_diffusers.files import check_writable, file_sha256
from speed_diffusers.metrics import load_classifier
from speed_diffusers.metrics.features import SmallClassifier, save_classifier


@dataclass
class ClassifierSettings(ImageSettings):
    """All settings of this script."""

    output_dir: str = option("classifier", "Folder for the two files.", path=True)
    max_train_steps: int = option(3600, "Optimizer steps.", interval="[1, inf)")
    train_batch_size: int = option(128, "Images per step.", interval="[1, inf)")
    learning_rate: float = option(4e-3, "Peak of the cosine schedule.", interval="(0, inf)")
    weight_decay: float = option(0.05, "AdamW weight decay.", interval="[0, inf)")
    label_smoothing: float = option(0.05, "Share of the target spread over all classes.", interval="[0, 1)")
    max_shift: int = option(1, "Largest random shift in pixels, each way; 0 for none.", interval="[0, inf)")
    device: str = option("cpu", "Torch device.")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_writable("output_dir", Path(self.output_dir))
        if self.label_column is None:
            raise InputError("label_column=None, but a classifier needs the classes.")


def random_shift(images: torch.Tensor, max_shift: int, generator: torch.Generator) -> torch.Tensor:
    """Shifts each image (N, C, H, W) by its own up to `max_shift` pixels each way, filling with zeros.

    No flipping: shoes of Fashion-MNIST all point left, and a flipped generated shoe should count as odd.
    """
    if max_shift == 0:
        return images
    height, width = images.shape[2:]
    padded = nn.functional.pad(images, [max_shift] * 4)
    offsets = torch.randint(0, 2 * max_shift + 1, (2, len(images)), generator=generator)
    rows = torch.arange(height) + offsets[0][:, None]  # (N, H)
    columns = torch.arange(width) + offsets[1][:, None]  # (N, W)
    sample = torch.arange(len(images))[:, None, None]
    return padded[sample, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def train(source: ImageSource, settings: ClassifierSettings) -> SmallClassifier:
    """The trained classifier, in evaluation mode."""
    torch.manual_seed(settings.seed)
    generator = torch.Generator().manual_seed(settings.seed)
    classifier = SmallClassifier(source.num_classes).to(settings.device).train()
    optimizer = torch.optim.AdamW(
        classifier.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True
    )
    steps = settings.max_train_steps
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=settings.learning_rate, total_steps=steps + 1, pct_start=0.1
    )
    batches = training_batches(source, settings, batch_size=settings.train_batch_size, steps=steps)
    progress = tqdm(batches, total=steps, desc="train", unit="step", mininterval=1.0)
    for step, (images, labels) in enumerate(progress):
        logits = classifier(random_shift(images, settings.max_shift, generator).to(settings.device))
        loss = nn.functional.cross_entropy(
            logits, labels.to(settings.device), label_smoothing=settings.label_smoothing
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}")
    return classifier.eval()


@torch.no_grad()
def accuracy(classifier: SmallClassifier, source: ImageSource, settings: ClassifierSettings) -> float:
    """Share of the images that the classifier names right, in [0, 1]."""
    correct = 0
    for images, labels in all_batches(source, settings, description="validate"):
        correct += int((classifier(images).argmax(dim=1) == labels).sum())
    return correct / len(source)


def main(argv: list[str]) -> None:
    """Trains, writes, reads back and measures."""
    settings = load_config(ClassifierSettings, argv, Path(__file__).parent)
    source = open_training_images(settings)
    validation = open_validation_images(settings, source)
    if validation is not None and validation.num_classes > source.num_classes:
        raise InputError(f"{validation.num_classes} validation classes, but {source.num_classes} to train on.")
    started = time.perf_counter()
    classifier = train(source, settings)
    seconds = time.perf_counter() - started
    output = Path(settings.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    weights = output / "classifier.safetensors"
    save_classifier(classifier, weights)
    stored = load_classifier(weights)  # measured as stored, after rounding to half precision
    measured = None if validation is None else accuracy(stored, validation, settings)
    report = {
        "command": published_command("train_scripts/assets/train_classifier.py", argv),
        "sha256": file_sha256(weights),
        "classes": source.label_names,
        "parameters": sum(parameter.numel() for parameter in stored.parameters()),
        "train_images": len(source),
        "validation_images": 0 if validation is None else len(validation),
        "validation_accuracy": measured,
        "seconds": math.ceil(seconds),
        "threads": torch.get_num_threads(),
    }
    (output / "classifier.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    run_script(main, __doc__, ClassifierSettings)
