"""What result files say of the command that made them."""

from pathlib import Path

import pytest

from speed_diffusers.config.published import published, published_command


def test_no_folder_of_this_machine_is_in_a_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    inside, outside = tmp_path / "work" / "out" / "vae", tmp_path / "private" / "my images"
    argv = [f"train_data_dir={outside}", "--output_dir", str(inside), f"models=[{inside},{outside}]", "vae=~/models/a"]
    argv += ["seed=3", "dataset_name=owner/name", f"feature_extractor={outside}.py:maker", "vae=../b"]
    assert published_command("train_scripts/a.py", argv) == (
        "python train_scripts/a.py 'train_data_dir=my images' --output_dir out/vae 'models=[out/vae,my images]' vae=a "
        "seed=3 dataset_name=owner/name 'feature_extractor=my images.py:maker' vae=../b"
    )
    assert [published(value) for value in (3, None, "no", str(inside))] == [3, None, "no", "out/vae"]
