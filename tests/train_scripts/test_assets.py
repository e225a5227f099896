"""The makers of what is embedded, on a few images."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from speed_diffusers.data.images import open_images
from speed_diffusers.errors import InputError
from speed_diffusers.train_scripts.assets import make_emoji_dataset, train_vae


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


def test_emoji_are_put_on_white_and_split_by_class(tmp_path: Path) -> None:
    package = tmp_path / "package"
    images = package / "img" / "google" / "64"
    images.mkdir(parents=True)
    emoji: list[dict[str, object]] = []

    def add(category: str, **changes: object) -> None:
        number = len(emoji)
        picture = Image.new("RGBA", (64, 64), (0, 0, 0, 0))  # black where it is transparent
        picture.paste((200, number, 50, 255), (16, 16, 48, 48))
        picture.save(images / f"{number}.png")
        emoji.append(
            {
                "image": f"{number}.png",
                "category": category,
                "sort_order": number,
                "has_img_google": True,
                **changes,
            }
        )

    for _ in range(7):
        add("Flags")
        add("Activities")
    add("Component")
    add("Flags", has_img_google=False)
    add("Flags", obsoleted_by="1F46D")
    (package / "emoji.json").write_text(json.dumps(emoji))
    make_emoji_dataset.main([f"package_dir={package}", f"output_dir={tmp_path / 'set'}"])
    train, test = (
        open_images(train_data_dir=str(tmp_path / "set" / f"{name}.parquet"), split=name) for name in ("train", "test")
    )
    assert train.label_names == test.label_names == ["Activities", "Flags"]
    assert np.bincount(train.labels).tolist() == [6, 6] and np.bincount(test.labels).tolist() == [1, 1]
    image = train.load(0, 32)
    assert image[0, 0].tolist() == [255, 255, 255] and image[16, 16].tolist()[::2] == [200, 50]
    seen = sorted(int(source.load(row, 32)[16, 16, 1]) for source in (train, test) for row in range(len(source)))
    assert seen == list(range(14)), "each emoji is in one part"
    with pytest.raises(InputError, match="no emoji.json; run: npm install emoji-datasource-google"):
        make_emoji_dataset.main([f"package_dir={tmp_path}", f"output_dir={tmp_path / 'other'}"])
    assert not (tmp_path / "other").exists()
