"""The cache of latents: what it stores, when it is used again, and that nothing half-made is ever taken for whole."""

import errno
import json
import logging
import pickle
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from speed_diffusers.data import latents_shard
from speed_diffusers.data.bad_images import BadImages
from speed_diffusers.data.images import ImageSource, collate, from_dataset
from speed_diffusers.data.latents import (
    CACHE_FOLDER,
    LatentDataset,
    check_resolution,
    sample_latents,
    vae_fingerprint,
)
from speed_diffusers.errors import InputError
from tiny_latents import COUNT, SIZE, cache, count_encodings, shards_in, tiny_dataset, tiny_vae


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    """The autoencoder of most tests."""
    return tiny_vae()


@pytest.fixture(scope="module")
def source() -> ImageSource:
    """The images of most tests."""
    return from_dataset(tiny_dataset())


@pytest.fixture(scope="module")
def cached(source: ImageSource, vae: AutoencoderKL, tmp_path_factory: pytest.TempPathFactory) -> LatentDataset:
    """The cache of `source` and `vae`."""
    return cache(source, vae, tmp_path_factory.mktemp("latents"))


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards of 16 rows: three for the images of most tests."""
    monkeypatch.setattr(latents_shard, "MIN_SHARD_ROWS", 16)


# What is stored


@torch.no_grad()
def test_moments_are_those_of_the_vae_for_both_mirror_images(
    source: ImageSource, vae: AutoencoderKL, cached: LatentDataset
) -> None:
    rows = [7, 0, 39, 7]
    batch = cached.__getitems__(rows)
    pixels = torch.stack([torch.from_numpy(source.load(row, SIZE)).permute(2, 0, 1) for row in rows])
    images = pixels / 127.5 - 1
    for name, view in (("moments", images), ("moments_flipped", images.flip(-1))):
        assert batch[name].dtype == torch.float16
        expected = vae.encode(view).latent_dist.parameters
        torch.testing.assert_close(batch[name].float(), expected, rtol=2**-10, atol=1e-6)
    assert not torch.equal(batch["moments"], batch["moments_flipped"].flip(-1))
    assert batch["labels"].tolist() == [1, 0, 0, 1]
    assert batch["labels"].dtype == torch.int64


@torch.no_grad()
def test_half_precision_moves_latents_by_less_than_a_thousandth(
    source: ImageSource, vae: AutoencoderKL, cached: LatentDataset
) -> None:
    pixels = torch.stack([torch.from_numpy(source.load(row, SIZE)).permute(2, 0, 1) for row in range(COUNT)])
    exact = vae.encode(pixels / 127.5 - 1).latent_dist.parameters
    noise = torch.randn(COUNT, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    drawn = sample_latents(exact, noise, 1.0)
    error = sample_latents(cached.__getitems__(list(range(COUNT)))["moments"], noise, 1.0) - drawn
    assert error.square().mean().sqrt() < 1e-3 * drawn.std()


def test_sampling_is_that_of_diffusers() -> None:
    generator = torch.Generator().manual_seed(0)
    moments = torch.randn(3, 8, 4, 4, generator=generator) * 40  # beyond the clamp of the log-variance
    distribution = DiagonalGaussianDistribution(moments)
    theirs = distribution.sample(generator=torch.Generator().manual_seed(1)) * 0.18215
    noise = torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    assert torch.equal(sample_latents(moments, noise, 0.18215), theirs)
    assert torch.equal(sample_latents(moments, torch.zeros_like(noise), 2.0), 2 * distribution.mode())
    assert sample_latents(moments.half(), noise.half(), 1.0).dtype == torch.float32


def test_extreme_log_variances_are_stored_finite(source: ImageSource, tmp_path: Path) -> None:
    vae = tiny_vae()
    vae.quant_conv.bias.data[4:] = -1e6
    moments = cache(source, vae, tmp_path).__getitems__([0])["moments"]
    assert (moments[:, 4:] == -30).all()


def test_without_flips_the_mirror_images_are_left_out(source: ImageSource, vae: AutoencoderKL, tmp_path: Path) -> None:
    batch = cache(source, vae, tmp_path, random_flip=False).__getitems__([1, 2])
    assert sorted(batch) == ["labels", "moments"]
    assert batch["moments"].shape == (2, 8, 4, 4)


# Reading


def test_batches_come_whole_and_in_the_asked_order(cached: LatentDataset) -> None:
    assert len(cached) == COUNT
    everything = cached.__getitems__(list(range(COUNT)))
    order = np.random.default_rng(0).permutation(COUNT).tolist()
    loader = torch.utils.data.DataLoader(cached, batch_sampler=[order[:9], order[9:]], collate_fn=collate)
    for rows, batch in zip((order[:9], order[9:]), loader, strict=True):
        for name, values in batch.items():
            assert torch.equal(values, everything[name][rows])
    assert torch.equal(cached[5]["moments"], everything["moments"][5])


def test_worker_processes_get_a_path_instead_of_the_data(cached: LatentDataset) -> None:
    pickled = pickle.dumps(cached)
    assert len(pickled) < 10_000
    copy = pickle.loads(pickled)
    assert torch.equal(copy.__getitems__([3, 1])["moments"], cached.__getitems__([3, 1])["moments"])


def test_random_batches_are_read_in_milliseconds(source: ImageSource, vae: AutoencoderKL, tmp_path: Path) -> None:
    # 20 copies of the images: 800 rows in record batches of 16, as a long run of encoding leaves them.
    large = from_dataset(datasets.concatenate_datasets([tiny_dataset()] * 20))
    dataset = cache(large, vae, tmp_path)
    generator = np.random.default_rng(0)
    seconds = []
    for _ in range(20):
        rows = generator.permutation(len(dataset))[:128].tolist()
        started = time.perf_counter()
        dataset.__getitems__(rows)
        seconds.append(time.perf_counter() - started)
    assert np.median(seconds) < 0.01


# When it is used again


def test_second_run_encodes_nothing(source: ImageSource, tmp_path: Path) -> None:
    vae = tiny_vae()
    calls = count_encodings(vae)
    first = cache(source, vae, tmp_path)
    assert sum(calls) == 2 * COUNT
    second = cache(source, vae, tmp_path, batch_size=7)
    assert sum(calls) == 2 * COUNT
    assert torch.equal(first.__getitems__([0, 39])["moments"], second.__getitems__([0, 39])["moments"])
    assert shards_in(tmp_path) == ["shard-00000.safetensors"]


def test_anything_that_changes_the_latents_makes_a_new_cache(
    source: ImageSource, vae: AutoencoderKL, tmp_path: Path
) -> None:
    relabelled = from_dataset(tiny_dataset(), label_column=None)
    shorter = from_dataset(tiny_dataset(), max_train_samples=30)
    variants = [
        cache(source, vae, tmp_path),
        cache(source, vae, tmp_path, resolution=8),
        cache(source, vae, tmp_path, center_crop=False),
        cache(source, vae, tmp_path, random_flip=False),
        cache(source, tiny_vae(1), tmp_path),
        cache(relabelled, vae, tmp_path),
        cache(shorter, vae, tmp_path),
    ]
    assert len(shards_in(tmp_path)) == len(variants)
    assert [len(variant) for variant in variants] == [COUNT] * 6 + [30]
    assert variants[1].__getitems__([0])["moments"].shape == (1, 8, 2, 2)
    assert variants[5].__getitems__([1, 2])["labels"].tolist() == [0, 0]


def test_a_cache_that_differs_in_one_thing_is_named_in_one_line(
    source: ImageSource, vae: AutoencoderKL, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    first = cache(source, vae, tmp_path)
    assert caplog.messages == []
    expected = {
        "resolution": ({"resolution": 8}, "the resolution (16, not 8)"),
        "crop": ({"center_crop": False}, "the crop (center_crop True, not False)"),
        "flip": ({"random_flip": False}, "the flips (random_flip True, not False)"),
        "vae": ({"vae_fingerprint": "other"}, f"the VAE (hash {vae_fingerprint(vae)}, not other)"),
    }
    for name, (changes, words) in expected.items():
        caplog.clear()
        cache_dir = tmp_path / name
        shutil.copytree(tmp_path / CACHE_FOLDER, cache_dir / CACHE_FOLDER)
        cache(source, vae, cache_dir, **changes)
        folder = cache_dir / CACHE_FOLDER / first.folder.name
        assert caplog.messages == [f"The latents in '{folder}' differ in {words}; encoding."]


def test_fingerprint_is_that_of_configuration_and_weights(vae: AutoencoderKL, tmp_path: Path) -> None:
    vae.save_pretrained(tmp_path)
    assert (
        vae_fingerprint(AutoencoderKL.from_pretrained(tmp_path)) == vae_fingerprint(vae) == vae_fingerprint(tiny_vae())
    )
    other = tiny_vae()
    other.encoder.conv_in.bias.data[0] += 1e-6
    assert vae_fingerprint(other) != vae_fingerprint(vae)
    assert vae_fingerprint(tiny_vae().to(torch.bfloat16)) != vae_fingerprint(vae)


@pytest.mark.parametrize("kind", ["memory", "disk", "parquet"])
def test_images_may_lie_in_memory_on_disk_or_in_parquet(
    kind: str, vae: AutoencoderKL, cached: LatentDataset, tmp_path: Path
) -> None:
    dataset = tiny_dataset()
    if kind == "disk":
        dataset.save_to_disk(tmp_path / "saved")
        dataset = datasets.load_from_disk(tmp_path / "saved")
    elif kind == "parquet":
        dataset.to_parquet(tmp_path / "images.parquet")
        dataset = datasets.Dataset.from_parquet(str(tmp_path / "images.parquet"), cache_dir=str(tmp_path / "hf"))
    latents = cache(from_dataset(dataset), vae, tmp_path)
    rows = list(range(COUNT))
    for name, values in cached.__getitems__(rows).items():
        assert torch.equal(latents.__getitems__(rows)[name], values)


# What can go wrong


@pytest.mark.usefixtures("small_shards")
def test_two_runs_at_once_do_the_work_once(source: ImageSource, tmp_path: Path) -> None:
    vae = tiny_vae()
    calls = count_encodings(vae)
    with ThreadPoolExecutor(2) as runs:
        first, second = runs.map(lambda _: cache(source, vae, tmp_path), range(2))
    assert sum(calls) == 2 * COUNT
    assert torch.equal(first.__getitems__([0, 39])["moments"], second.__getitems__([0, 39])["moments"])


def damaged_source(*bad_rows: int) -> ImageSource:
    """The images of most tests, some of them damaged."""
    rows = tiny_dataset().cast_column("image", datasets.Image(decode=False)).to_list()
    for row in bad_rows:
        rows[row]["image"] = {"bytes": b"damaged", "path": f"{row}.png"}
    return from_dataset(datasets.Dataset.from_list(rows, features=tiny_dataset().features))


def test_the_next_good_image_and_its_label_are_stored_for_a_bad_one(
    vae: AutoencoderKL, cached: LatentDataset, tmp_path: Path
) -> None:
    # The last of a batch, two in a row, and the last of all.
    source = damaged_source(15, 20, 21, 39)
    for _ in range(2):  # made, then found
        bad = BadImages(COUNT, 0.1)
        latents = cache(source, vae, tmp_path, bad_images=bad)
        assert [(image.row, image.path) for image in bad] == [(row, f"{row}.png") for row in (15, 20, 21, 39)]
        found = latents.__getitems__([14, 15, 20, 21, 39])
        whole = cached.__getitems__([14, 16, 22, 22, 0])
        assert torch.equal(found["labels"], whole["labels"])
        torch.testing.assert_close(found["moments"], whole["moments"], rtol=1e-2, atol=1e-3)


@pytest.mark.usefixtures("small_shards")
def test_too_many_bad_images_stop_with_the_list_and_lose_nothing(tmp_path: Path) -> None:
    vae, source = tiny_vae(), damaged_source(20, 38)
    calls = count_encodings(vae)
    listed = tmp_path / "run" / "bad_images.jsonl"
    with pytest.raises(
        InputError, match=r"^2 of 40 images cannot be read, .* max_bad_images=0.04 allows: row 20"
    ) as caught:
        cache(source, vae, tmp_path, bad_images=BadImages(COUNT, 0.04, listed))
    assert "\n" not in str(caught.value)
    reason = "not an image in a format that is read"
    lines = [json.loads(line) for line in listed.read_text().splitlines()]
    assert [(line["row"], line["path"]) for line in lines] == [(20, "20.png"), (38, "38.png")]
    assert all(line["reason"].startswith(reason) for line in lines)
    assert calls == [16, 16, 16, 16]
    cache(source, vae, tmp_path, bad_images=BadImages(COUNT, 0.05, listed))
    assert calls[4:] == [8, 8], "only the shard that was not finished"
    with pytest.raises(InputError, match="max_bad_images=0 allows"):
        cache(source, vae, tmp_path, bad_images=BadImages(COUNT, 0))


def test_cache_in_one_file_is_encoded_again_with_a_line(
    source: ImageSource, vae: AutoencoderKL, cached: LatentDataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / CACHE_FOLDER / cached.folder.name
    folder.mkdir(parents=True)
    for name in ("latents.arrow", "parts.jsonl", "lock"):
        (folder / name).write_bytes(b"of an earlier version")
    again = cache(source, vae, tmp_path)
    (line,) = caplog.messages
    assert line == f"'{folder / 'latents.arrow'}' is of an earlier version, which kept latents in one file; " + (
        "they are encoded again."
    )
    assert shards_in(tmp_path) == ["shard-00000.safetensors"]
    assert torch.equal(again.__getitems__([0, 39])["moments"], cached.__getitems__([0, 39])["moments"])


def test_finished_cache_may_lie_on_a_read_only_disk(
    source: ImageSource, vae: AutoencoderKL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache(source, vae, tmp_path)
    opened = Path.open

    def read_only(self: Path, mode: str = "r", **options: object) -> object:
        if mode not in ("r", "rb"):
            raise OSError(errno.EROFS, "Read-only file system")
        return opened(self, mode, **options)

    monkeypatch.setattr(Path, "open", read_only)
    monkeypatch.setattr(Path, "mkdir", None)
    assert cache(source, vae, tmp_path)[COUNT - 1]["moments"].shape == (8, 4, 4)


def test_vae_that_yields_nan_is_told(source: ImageSource, tmp_path: Path) -> None:
    vae = tiny_vae()
    vae.encoder.conv_in.bias.data[0] = float("nan")
    with pytest.raises(InputError, match=r"The VAE \(torch.float32\) yields NaN or infinity on rows 0 to 15"):
        cache(source, vae, tmp_path)


def test_place_that_cannot_hold_the_cache_is_told(
    source: ImageSource, vae: AutoencoderKL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="Cannot keep latents in '.*file"):
        cache(source, vae, tmp_path / "file")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(
        InputError, match=r"The latents need 21,120 bytes in .*, where 1,000 are free. Give another cache_dir"
    ):
        cache(source, vae, tmp_path)
    assert shards_in(tmp_path / CACHE_FOLDER) == []


@pytest.mark.parametrize(("resolution", "nearest"), [(18, "16 or 20"), (257, "256 or 260"), (3, "4"), (0, "4")])
def test_size_that_does_not_divide_is_told_with_the_nearest(resolution: int, nearest: str, vae: AutoencoderKL) -> None:
    with pytest.raises(InputError, match=rf"Image size {resolution} is not .* factor 4 .*Nearest: {nearest}\."):
        check_resolution(resolution, vae)


def test_size_that_divides_gives_the_side_of_the_latents(vae: AutoencoderKL) -> None:
    assert check_resolution(256, vae) == 64
    grey = AutoencoderKL(in_channels=1, block_out_channels=(8,), norm_num_groups=4)
    with pytest.raises(InputError, match="takes 1 channels; training images have 3"):
        check_resolution(256, grey)
