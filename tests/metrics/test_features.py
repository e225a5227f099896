"""The shipped assets hold what their README says: images, VAE, classifier, reference statistics."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL

from speed_diffusers.data import ImageDataset, ImageSource, open_images
from speed_diffusers.errors import InputError
from speed_diffusers.files import file_sha256
from speed_diffusers.metrics import (
    FEATURE_DIM,
    SmallClassifier,
    frechet_distance,
    load_classifier,
    load_extractor,
    load_reference,
    load_reference_statistics,
    statistics_of,
)
from speed_diffusers.metrics.features import save_classifier

ASSETS = Path(__file__).parents[2] / "speed_diffusers" / "assets" / "fashion_mnist"
LABEL_NAMES = [
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
]


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> ImageSource:
    return open_images(dataset_name="embedded", cache_dir=str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def sample(embedded: ImageSource) -> tuple[torch.Tensor, torch.Tensor]:
    """256 embedded images (256, 3, 32, 32) in [0, 1] and their labels (256,)."""
    batch = ImageDataset(embedded, resolution=32).__getitems__(list(range(256)))
    return batch["pixel_values"].float() / 255, batch["labels"]


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(ASSETS / "pipeline" / "vae", torch_dtype=torch.float32).eval()


def test_embedded_set_is_balanced_grey_and_named(embedded, sample):
    images, _ = sample
    assert len(embedded) == 9000
    assert embedded.label_names == LABEL_NAMES
    assert torch.bincount(torch.from_numpy(embedded.labels)).tolist() == [900] * 10
    assert torch.equal(images[:, 0], images[:, 1]) and torch.equal(images[:, 0], images[:, 2])
    assert images[:, :, :2].max() == 0 and images.max() == 1  # padded by two pixels, the full range of grey


def test_embedded_set_keeps_its_columns_in_plain_datasets(tmp_path):
    datasets = pytest.importorskip("datasets")
    loaded = datasets.load_dataset(
        "parquet", data_files=str(ASSETS / "train.parquet"), split="train", cache_dir=str(tmp_path)
    )
    assert isinstance(loaded.features["image"], datasets.Image)
    assert loaded.features["label"].names == LABEL_NAMES
    assert loaded[0]["image"].size == (32, 32)


def test_classifier_names_embedded_images(sample):
    images, labels = sample
    assert (load_classifier()(images).argmax(dim=1) == labels).float().mean() >= 0.9


def test_accuracy_on_held_out_images_is_recorded_and_at_least_92_percent():
    report = json.loads((ASSETS / "classifier.json").read_text())
    assert report["sha256"] == file_sha256(ASSETS / "classifier.safetensors")
    assert report["validation_images"] == 10_000 and report["validation_accuracy"] >= 0.92
    assert report["classes"] == LABEL_NAMES


def test_features_do_not_depend_on_the_batch_and_ignore_colour(sample):
    images, _ = sample
    classifier = load_classifier()
    whole = classifier.features(images)
    parts = torch.cat([classifier.features(part) for part in images.split(50)])
    assert whole.shape == (256, FEATURE_DIM) and whole.dtype == torch.float32
    torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-4)
    tinted = images * torch.tensor([0.5, 1.0, 1.5]).view(1, 3, 1, 1)
    torch.testing.assert_close(classifier.features(tinted), whole, rtol=1e-3, atol=1e-3)


def test_features_of_real_images_are_about_standardised():
    reference = load_reference_statistics()
    assert reference.mean.abs().max() < 0.3
    assert 0.5 < reference.covariance.diagonal().mean() < 1.5


def test_reference_belongs_to_the_shipped_classifier():
    reference, sha256 = load_reference_statistics(), file_sha256(ASSETS / "classifier.safetensors")
    report = json.loads((ASSETS / "reference_features.json").read_text())
    assert reference.extractor_sha256 == sha256 == report["extractor_sha256"]
    assert reference.count == report["images"] == 10_000
    assert report["reference_sha256"] == file_sha256(ASSETS / "reference_features.safetensors")
    assert reference.mean.dtype == reference.covariance.dtype == torch.float64
    assert reference.covariance.shape == (FEATURE_DIM, FEATURE_DIM)


def test_the_reference_holds_the_features_behind_its_statistics():
    reference = load_reference()
    assert reference.features is not None and reference.features.dtype == torch.float16
    assert (reference.name, reference.resolution) == ("embedded", 32)
    assert reference.sha256 == file_sha256(ASSETS / "reference_features.safetensors")
    again = statistics_of([reference.features.double()])
    assert again.count == reference.statistics.count
    # Half precision rounds features of about 1 by up to 5e-4; the statistics are of the full precision.
    torch.testing.assert_close(again.mean, reference.statistics.mean, rtol=0, atol=1e-4)
    torch.testing.assert_close(again.covariance, reference.statistics.covariance, rtol=0, atol=1e-4)


def test_the_floor_is_recorded():
    report = json.loads((ASSETS / "reference_features.json").read_text())
    real, decoded = report["training_images"], report["reconstructions"]
    assert 0.09 < real["frechet_distance"] < 0.2 < decoded["frechet_distance"] < 0.8
    assert real["kernel_distance"] < 0.001 < decoded["kernel_distance"] < 0.05
    assert min(real["precision"], real["recall"]) > 0.8


def test_distance_tells_real_images_from_blurred_and_noisy_ones(embedded):
    images = ImageDataset(embedded, resolution=32).__getitems__(list(range(2000)))["pixel_values"].float() / 255
    reference = load_reference_statistics()

    extractor = load_extractor()

    def distance(changed: torch.Tensor) -> float:
        return frechet_distance(statistics_of(extractor(part)[0] for part in changed.split(500)), reference)

    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    blurred = torch.nn.functional.avg_pool2d(images, 3, stride=1, padding=1)
    real = distance(images)
    assert real < distance(blurred) / 5
    assert real < distance((images + 0.1 * noise).clamp(0, 1)) / 5


def test_vae_reconstructs_embedded_images(vae, sample):
    images, _ = sample
    with torch.no_grad():
        decoded = vae.decode(vae.encode(images * 2 - 1).latent_dist.mode()).sample
    error = ((decoded / 2 + 0.5).clamp(0, 1) - images).square().mean()
    assert error < 0.0018  # 27.4 dB; the README states 10,000 held-out images


def test_scaled_latents_have_mean_0_and_standard_deviation_1(vae, sample):
    images, _ = sample
    with torch.no_grad():
        latents = vae.encode(images * 2 - 1).latent_dist.mean * vae.config.scaling_factor
    assert latents.shape == (256, 4, 8, 8)
    assert latents.mean(dim=(0, 2, 3)).abs().max() < 0.1
    assert latents.square().mean().sqrt() == pytest.approx(1.0, abs=0.05)
    assert vae.config.shift_factor is None


def test_assets_stay_small():
    limits = {
        "train.parquet": 5.0,
        "pipeline/vae/diffusion_pytorch_model.safetensors": 1.5,
        "classifier.safetensors": 0.4,
        "reference_features.safetensors": 1.3,
    }
    sizes = {name: (ASSETS / name).stat().st_size / 2**20 for name in limits}
    assert all(sizes[name] < limit for name, limit in limits.items()), sizes


def test_classifier_survives_its_file(tmp_path):
    torch.manual_seed(0)
    classifier = SmallClassifier(num_classes=3).eval()
    save_classifier(classifier, tmp_path / "classifier.safetensors")
    loaded = load_classifier(tmp_path / "classifier.safetensors")
    images = torch.rand(4, 3, 48, 40)
    assert loaded.num_classes == 3 and not loaded.training
    torch.testing.assert_close(loaded(images), classifier(images), rtol=0.01, atol=0.01)


def test_wrong_input_is_named(tmp_path):
    classifier = load_classifier()
    with pytest.raises(InputError, match=r"\(4, 1, 32, 32\)"):
        classifier.features(torch.rand(4, 1, 32, 32))
    with pytest.raises(InputError, match="uint8"):
        classifier.features(torch.zeros(4, 3, 32, 32, dtype=torch.uint8))
    with pytest.raises(InputError, match="No classifier at"):
        load_classifier(tmp_path / "missing.safetensors")
    with pytest.raises(InputError, match="holds no classifier"):
        load_classifier(ASSETS / "reference_features.safetensors")
