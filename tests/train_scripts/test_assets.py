"""The makers of what is embedded, on a few images."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL

from speed_diffusers.train_scripts.assets import train_vae


@pytest.mark.parametrize("copied", [True, False])
def test_a_vae_says_what_it_was_measured_on_and_computes_in_float32(
    copied: bool,
    image_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.copytree(image_folder, tmp_path / "other")
    if not copied:
        (tmp_path / "other" / "cat" / "3.png").unlink()
    dtypes: list[torch.dtype] = []
    decode = AutoencoderKL.decode

    def noted(vae: AutoencoderKL, latents: torch.Tensor) -> object:
        decoded = decode(vae, latents)
        dtypes.append(decoded.sample.dtype)
        return decoded

    monkeypatch.setattr(AutoencoderKL, "decode", noted)
    data = [f"train_data_dir={image_folder}", f"validation_data_dir={tmp_path / 'other'}"]
    short = ["max_train_steps=1", "train_batch_size=8", "block_out_channels=8,8"]
    train_vae.main([*data, *short, f"output_dir={tmp_path / 'vae'}"])
    report = json.loads((tmp_path / "vae" / "quality.json").read_text())
    assert (report["held_out"], report["images"]) == ((False, 26) if copied else (True, 25))
    assert report["command"].startswith(
        f"python train_scripts/assets/train_vae.py train_data_dir={image_folder.name} validation_data_dir=other "
    )
    assert set(dtypes) == {torch.float32}
