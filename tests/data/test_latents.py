"""The cache of latents: what it stores, when it is used again, and that nothing half-made is ever taken for whole."""

import errno
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from speed_diffusers.data.bad_images import BadImages
from speed_diffusers.data.images import ImageSource, collate, from_dataset
from speed_diffusers.data.latents import (
    CACHE_FOLDER,
    PARTS_FILE,
    LatentDataset,
    cache_latents,
    check_resolution,
    sample_latents,
    vae_fingerprint,
)
from speed_diffusers.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
SIZE = 16
COUNT = 40


def tiny_vae(seed: int = 0) -> AutoencoderKL:
    """An untrained autoencoder, 16 x 16 pixels to 4 x 4 latents of 4 channels."""
    torch.manual_seed(seed)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8),
        norm_num_groups=4,
        layers_per_block=1,
    )
    return vae.eval().requires_grad_(False)


def tiny_dataset(count: int = COUNT) -> datasets.Dataset:
    """Noise images in memory with labels 0, 1, 2, 0, ..."""
    values = np.random.default_rng(0).integers(0, 256, (count, SIZE, SIZE, 3), dtype=np.uint8)
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["bag", "coat", "shoe"]))
    columns = {"image": list(values), "label": [row % 3 for row in range(count)]}
    return datasets.Dataset.from_dict(columns, features=features)


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    """The autoencoder of most tests."""
    return tiny_vae()


@pytest.fixture(scope="module")
def source() -> ImageSource:
    """The images of most tests."""
    return from_dataset(tiny_dataset())


def cache(source: ImageSource, vae: AutoencoderKL, cache_dir: Path, **changes: object) -> LatentDataset:
    """`cache_latents` with the settings of most tests."""
    settings: dict[str, object] = {
        "vae_fingerprint": vae_fingerprint(vae),
        "resolution": SIZE,
        "center_crop": True,
        "random_flip": True,
        "batch_size": 16,
        "device": torch.device("cpu"),
        "cache_dir": str(cache_dir),
    }
    return cache_latents(source, vae, **(settings | changes))


@pytest.fixture(scope="module")
def cached(source: ImageSource, vae: AutoencoderKL, tmp_path_factory: pytest.TempPathFactory) -> LatentDataset:
    """The cache of `source` and `vae`."""
    return cache(source, vae, tmp_path_factory.mktemp("latents"))


def count_encodings(vae: AutoencoderKL) -> list[int]:
    """A list that grows by the batch size at every call of the encoder."""
    calls: list[int] = []
    vae.encoder.register_forward_hook(lambda module, inputs, output: calls.append(len(output)))
    return calls


def files_in(cache_dir: Path) -> list[str]:
    """Names of the files under the cache's folder, without the locks and the checksums."""
    beside = ("lock", PARTS_FILE)
    return sorted(file.name for file in cache_dir.rglob("*") if file.is_file() and file.name not in beside)


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
    assert files_in(tmp_path) == ["latents.arrow"]


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
    assert len(files_in(tmp_path)) == len(variants)
    assert [len(variant) for variant in variants] == [COUNT] * 6 + [30]
    assert variants[1].__getitems__([0])["moments"].shape == (1, 8, 2, 2)
    assert variants[5].__getitems__([1, 2])["labels"].tolist() == [0, 0]


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


@pytest.mark.parametrize("damage", ["truncated", "other rows", "empty", "flipped byte", "header", "label"])
def test_damaged_cache_is_made_again(damage: str, source: ImageSource, vae: AutoencoderKL, tmp_path: Path) -> None:
    whole = cache(source, vae, tmp_path).__getitems__([COUNT - 1])
    (file,) = tmp_path.rglob("latents.arrow")
    content = file.read_bytes()
    file.unlink()  # the reader above keeps its memory map
    if damage == "other rows":
        datasets.Dataset.from_dict({"label": [1, 2]}).map(lambda row: row, cache_file_name=str(file))
    else:
        changed = bytearray(content[: len(content) // 2] if damage == "truncated" else content)
        if damage == "empty":
            changed.clear()
        elif damage == "flipped byte":
            changed[len(content) // 2] ^= 1
        elif damage == "header":
            changed[content.index(b"info")] ^= 1
        elif damage == "label":
            # As a file without checksums has it, whose bytes alone tell nothing.
            labels = np.array([row % 3 for row in range(32, COUNT)]).tobytes()
            changed[content.index(labels)] = 77
            (file.parent / PARTS_FILE).unlink()
        file.write_bytes(changed)
    again = cache(source, vae, tmp_path).__getitems__([COUNT - 1])
    assert torch.equal(again["moments"], whole["moments"])


def test_two_runs_at_once_do_the_work_once(source: ImageSource, tmp_path: Path) -> None:
    vae = tiny_vae()
    calls = count_encodings(vae)
    with ThreadPoolExecutor(2) as runs:
        first, second = runs.map(lambda _: cache(source, vae, tmp_path), range(2))
    assert sum(calls) == 2 * COUNT
    assert torch.equal(first.__getitems__([0, 39])["moments"], second.__getitems__([0, 39])["moments"])


# Encodes two batches, says so, and stops inside the third.
STUCK_RUN = """
import sys, time
from pathlib import Path
sys.path[:0] = [{tests!r}, {root!r}]
from test_latents import cache, from_dataset, tiny_dataset, tiny_vae
calls = []
def stop(module, inputs, output):
    calls.append(1)
    if len(calls) == 5:
        print("stuck", flush=True)
        time.sleep(600)
vae = tiny_vae()
vae.encoder.register_forward_hook(stop)
cache(from_dataset(tiny_dataset()), vae, Path({cache_dir!r}))
"""


@pytest.mark.slow
def test_killed_run_leaves_nothing_that_is_taken_for_whole(
    source: ImageSource, vae: AutoencoderKL, cached: LatentDataset, tmp_path: Path
) -> None:
    code = STUCK_RUN.format(tests=str(Path(__file__).parent), root=str(ROOT), cache_dir=str(tmp_path))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == b"stuck\n"
        assert [name[:3] for name in files_in(tmp_path)] == ["tmp"]
        # A second run starts now, waits, and takes over when the first is killed.
        with ThreadPoolExecutor(1) as runs:
            second = runs.submit(cache, source, vae, tmp_path)
            time.sleep(0.3)
            assert not second.done()
            run.send_signal(signal.SIGKILL)
            latents = second.result(timeout=60)
    assert files_in(tmp_path) == ["latents.arrow"]
    rows = list(range(COUNT))
    assert torch.equal(latents.__getitems__(rows)["moments"], cached.__getitems__(rows)["moments"])


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
    assert calls[4:] == [8, 8], "only what was not encoded before"
    with pytest.raises(InputError, match="max_bad_images=0 allows"):
        cache(source, vae, tmp_path, bad_images=BadImages(COUNT, 0))


def test_cache_of_version_0_1_stays_valid_and_gets_checksums(source: ImageSource, tmp_path: Path) -> None:
    vae = tiny_vae()
    whole = cache(source, vae, tmp_path)
    (parts,) = tmp_path.rglob(PARTS_FILE)
    parts.unlink()
    calls = count_encodings(vae)
    again = cache(source, vae, tmp_path)
    assert not calls
    assert torch.equal(again.__getitems__([0, 39])["moments"], whole.__getitems__([0, 39])["moments"])
    (file,) = tmp_path.rglob("latents.arrow")
    content = bytearray(file.read_bytes())
    content[-500] ^= 1
    file.unlink()
    file.write_bytes(content)
    assert torch.equal(cache(source, vae, tmp_path).__getitems__([39])["moments"], whole.__getitems__([39])["moments"])
    assert sum(calls) == 2 * COUNT


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
    assert len(cache(source, vae, tmp_path)) == COUNT
    (parts,) = tmp_path.rglob(PARTS_FILE)
    parts.unlink()  # as version 0.1 left it
    assert len(cache(source, vae, tmp_path)) == COUNT


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
        InputError, match=r"The latents need 0.0 GB in .*, where 0.0 GB are free. Give another cache_dir"
    ):
        cache(source, vae, tmp_path)
    assert files_in(tmp_path / CACHE_FOLDER) == []


@pytest.mark.parametrize(("resolution", "nearest"), [(18, "16 or 20"), (257, "256 or 260"), (3, "4"), (0, "4")])
def test_size_that_does_not_divide_is_told_with_the_nearest(resolution: int, nearest: str, vae: AutoencoderKL) -> None:
    with pytest.raises(InputError, match=rf"Image size {resolution} is not .* factor 4 .*Nearest: {nearest}\."):
        check_resolution(resolution, vae)


def test_size_that_divides_gives_the_side_of_the_latents(vae: AutoencoderKL) -> None:
    assert check_resolution(256, vae) == 64
    grey = AutoencoderKL(in_channels=1, block_out_channels=(8,), norm_num_groups=4)
    with pytest.raises(InputError, match="takes 1 channels; training images have 3"):
        check_resolution(256, grey)
