"""The validation loss: levels, noise, and the same number for the same network whatever it predicts."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from torch import Tensor

from small_images import image_dataset
from speed_diffusers import SpeeDDDPMScheduler, SpeeDFlowMatchEulerDiscreteScheduler
from speed_diffusers.assets import EMBEDDED_HELD_OUT_IMAGES
from speed_diffusers.data.images import from_dataset, open_images
from speed_diffusers.errors import InputError
from speed_diffusers.generation.pretrained import load_pipeline, load_vae
from speed_diffusers.training.parts import with_classes_of
from speed_diffusers.training.snapshots import check_weights, put_weights, run_places
from speed_diffusers.training.validation import LOG_SNR_LEVELS, ValidationSet, validation_loss

GENERATOR = torch.Generator().manual_seed(0)
IMAGES = ValidationSet(torch.randn(6, 4, 8, 8, generator=GENERATOR), torch.tensor([0, 1, 2, 0, 1, 2]))
CPU = torch.device("cpu")


def guesser(scheduler: SpeeDDDPMScheduler, share: float) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """A network that knows the clean images, but for a share of them, and predicts what its scheduler asks for."""
    latents = {len(part): part for part in (IMAGES.latents,)}

    def network(sample: Tensor, timestep: Tensor, rows: Tensor) -> Tensor:
        assert rows.tolist() == IMAGES.labels.tolist() and len(set(timestep.tolist())) == 1
        signal = scheduler.alphas_cumprod[timestep].sqrt()[:, None, None, None]
        noise = (1 - scheduler.alphas_cumprod[timestep]).sqrt()[:, None, None, None]
        clean = (1 - share) * latents[len(sample)]
        epsilon = (sample - signal * clean) / noise
        kinds = {"epsilon": epsilon, "v_prediction": signal * epsilon - noise * clean, "sample": clean}
        return kinds[scheduler.config.prediction_type]

    return network


def test_the_number_does_not_depend_on_what_is_predicted() -> None:
    losses = []
    for kind in ("epsilon", "v_prediction", "sample"):
        scheduler = SpeeDDDPMScheduler(prediction_type=kind)
        losses.append(validation_loss(guesser(scheduler, 0.1), scheduler, IMAGES, device=CPU))
    for loss in losses:
        assert tuple(loss.by_log_snr) == LOG_SNR_LEVELS
        for level, error in loss.by_log_snr.items():
            # The error of v is that of x_0, 0.01 here, times (1 + SNR); the nearest timestep is not quite the level.
            expected = 0.01 * float(IMAGES.latents.square().mean()) * (1 + math.exp(level))
            assert error == pytest.approx(expected, rel=0.02), level
            assert error == pytest.approx(losses[1].by_log_snr[level], rel=1e-3)
        assert loss.mean == pytest.approx(np.exp(np.mean(np.log(list(loss.by_log_snr.values())))))


@pytest.mark.parametrize("scheduler", [SpeeDDDPMScheduler(), SpeeDFlowMatchEulerDiscreteScheduler(shift=2.0)])
def test_batches_and_calls_change_nothing(scheduler: SpeeDDDPMScheduler) -> None:
    def network(sample: Tensor, timestep: Tensor, rows: Tensor) -> Tensor:
        return 0.5 * sample

    first = validation_loss(network, scheduler, IMAGES, device=CPU, batch_size=4)
    again = validation_loss(network, scheduler, IMAGES, device=CPU, batch_size=6)
    assert first.by_log_snr == pytest.approx(again.by_log_snr, rel=1e-6)
    assert all(0.05 < error < 2000 for error in first.by_log_snr.values())


def test_the_embedded_held_out_images_are_others() -> None:
    train, held_out = (open_images(dataset_name="embedded", split=split) for split in ("train", "test"))
    assert len(held_out) == 500 and held_out.label_names == train.label_names
    assert np.bincount(held_out.labels).tolist() == [50] * 10
    hashes = [{hash(row["image"]["bytes"]) for row in source.dataset} for source in (train, held_out)]
    assert not hashes[0] & hashes[1]
    images = ValidationSet.encode(held_out, load_vae("embedded"), resolution=32, center_crop=True, num_images=20)
    assert images.latents.shape == (20, 4, 8, 8) and 0.7 < float(images.latents.std()) < 1.3
    vae = load_vae("embedded")
    pixels = np.stack([held_out.load_or_next(row, 32, True)[0] for row in held_out.spread(20)])
    with torch.no_grad():
        posterior = vae.encode(torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1).latent_dist
    expected = posterior.mean * vae.config["scaling_factor"]
    torch.testing.assert_close(images.latents, expected, rtol=2e-3, atol=2e-3)
    assert len(images.labels.unique()) > 5


def test_a_run_measures_it_and_resumes(train: Callable[..., Path], tmp_path: Path) -> None:
    options = [
        "dataset_name=embedded",
        "train_data_dir=None",
        "pretrained_vae_model_name_or_path=embedded",
        "max_train_samples=64",
        "validation_split=test",
        "max_validation_samples=8",
        "validation_steps=5",
        "optimizer=muon",
        "conditioning_init=unit",
        "ema_tracks=0.05,0.1",
    ]
    whole = train(tmp_path / "whole", *options)

    def lines(folder: Path) -> list[dict[str, object]]:
        return [json.loads(line) for line in (folder / "validation" / "loss.jsonl").read_text().splitlines()]

    found = lines(whole)
    assert [line["step"] for line in found] == [5, 10, 12]
    assert all(0.5 < line["validation_loss"] < 1.2 and len(line["error_by_log_snr"]) == 8 for line in found)  # type: ignore[operator, arg-type]
    broken = tmp_path / "broken"
    shutil.copytree(whole, broken)
    for name in ("checkpoint-10", "checkpoint-12", "pipeline"):
        shutil.rmtree(broken / name)
    train(broken, *options, "resume_from_checkpoint=latest")
    assert lines(broken) == found
    for name in ("model", "ema", "ema_tracks", "optimizer"):
        file = Path("checkpoint-12") / f"{name}.safetensors"
        assert (broken / file).read_bytes() == (whole / file).read_bytes()
    snapshots = [sorted((folder / "ema_snapshots").iterdir()) for folder in (whole, broken)]
    assert len(snapshots[0]) == 3
    assert [path.read_bytes() for path in snapshots[0]] == [path.read_bytes() for path in snapshots[1]]
    places = run_places(whole, checkpoints=True, stop_checkpoints=False, weights="ema:0.07")
    assert [place.step for place in places] == [5, 10, 12]
    pipeline = load_pipeline(str(whole))
    exported = pipeline.transformer.state_dict()
    assert places[-1].checkpoint is not None
    put_weights(pipeline, places[-1].checkpoint, "ema:0.07")
    made = pipeline.transformer.state_dict()
    distance = sum(float((made[name] - exported[name]).square().sum()) for name in made)
    size = sum(float(exported[name].square().sum()) for name in made)
    assert 0 < distance < 1e-3 * size
    wrong_ones = (
        ("ema:0.5", r"must lie in \(0, 0.28\]"),
        ("emma", "Did you mean 'ema'"),
        ("ema:x", "weights 'ema:x'"),
    )
    for wrong, message in wrong_ones:
        with pytest.raises(InputError, match=message):
            check_weights(wrong)
    with pytest.raises(InputError, match="Unknown split 'tset'. Did you mean 'test'"):
        train(tmp_path / "other", *options[:3], "validation_split=tset")
    with pytest.raises(InputError, match="its 10 classes are not all among the 2 of the training"):
        train(tmp_path / "other", f"validation_data_dir={EMBEDDED_HELD_OUT_IMAGES}")
    with pytest.raises(InputError, match="these are the training images again, so nothing is held out"):
        train(tmp_path / "other", "validation_split=train")


def test_held_out_images_need_not_have_every_class() -> None:
    numbers, texts = ("0", "1", "2", "3"), ("cat", "dog", "eel", "fox")
    train = from_dataset(image_dataset([0, 1, 2, 3], count=4))
    part = with_classes_of(train, from_dataset(image_dataset([2, 0], count=2)), "validation_split=test")
    assert train.label_names == [*numbers] and part.labels_of([0, 1]).tolist() == [2, 0]
    text = datasets.Value("string")
    train = from_dataset(image_dataset([*texts], text, count=4))
    part = with_classes_of(train, from_dataset(image_dataset(["fox", "dog"], text, count=2)), "validation_split=test")
    assert part.labels_of([0, 1]).tolist() == [3, 1] and part.label_names == [*texts]
    for others, feature in (([5, 0], None), (["cow", "dog"], text)):
        with pytest.raises(InputError, match=r"^validation_split=test: its \d classes are not"):
            with_classes_of(train, from_dataset(image_dataset(others, feature, count=2)), "validation_split=test")
