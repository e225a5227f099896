"""Images that cannot be read, in a run: replaced, listed, counted, and the same after a resume."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from run_outputs import assert_same_run
from speed_diffusers.data.images import open_images
from speed_diffusers.errors import InputError
from speed_diffusers.training.checkpoint_folders import MANIFEST, STATE, digest
from speed_diffusers.training.checkpoints import read_state

LIST = "bad_images.jsonl"


@pytest.fixture
def damaged_folder(image_folder: Path, tmp_path: Path) -> Path:
    """The images of most runs, with one that is no image and one that is empty: rows 4 and 25 of 26."""
    folder = tmp_path / "damaged"
    shutil.copytree(image_folder, folder)
    (folder / "cat" / "12.png").write_text("<html>not found</html>")
    (folder / "dog" / "9.png").write_bytes(b"")
    return folder


def listed(folder: Path) -> list[tuple[int, str]]:
    """Rows and file names in the list of a run."""
    lines = [json.loads(line) for line in (folder / LIST).read_text().splitlines()]
    assert all(line["reason"] for line in lines)
    return [(line["row"], Path(line["path"]).name) for line in lines]


def sign_as_version_0_1(checkpoint: Path, signature: str) -> None:
    """Puts another data signature into a checkpoint."""
    state = json.loads((checkpoint / STATE).read_text())
    (checkpoint / STATE).write_text(json.dumps(state | {"data_signature": signature}))
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    (checkpoint / MANIFEST).write_text(json.dumps(manifest | {STATE: digest(checkpoint / STATE)}))


def test_run_with_bad_images_resumes_exactly_and_lists_them(
    train: Callable[..., Path], damaged_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [f"train_data_dir={damaged_folder}", "cache_latents=false", "max_bad_images=0.08"]
    whole = train(tmp_path / "whole", *options)
    bad = [(4, "12.png"), (25, "9.png")]
    assert listed(whole) == bad
    assert capsys.readouterr().out.count("2 of 26 images cannot be read; the next good one took the place") == 1

    broken = tmp_path / "broken"
    shutil.copytree(whole, broken)
    for step in (10, 12):
        shutil.rmtree(broken / f"checkpoint-{step}")
    # A checkpoint of version 0.1 is checked by the rule of its signature, and the next one has today's.
    earlier = open_images(train_data_dir=str(damaged_folder)).signature(earlier="")
    sign_as_version_0_1(broken / "checkpoint-5", earlier)
    train(broken, *options, "resume_from_checkpoint=latest")
    assert_same_run(whole, broken, 12)
    assert listed(broken) == bad
    signatures = [read_state(folder / "checkpoint-12")["data_signature"] for folder in (whole, broken)]
    assert signatures[0] == signatures[1] != earlier
    shutil.rmtree(broken / "checkpoint-12")
    sign_as_version_0_1(broken / "checkpoint-10", earlier[::-1])
    with pytest.raises(InputError, match="data signature"):
        train(broken, *options, "resume_from_checkpoint=latest")


def test_too_many_bad_images_stop_before_the_first_step(
    train: Callable[..., Path], damaged_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [f"train_data_dir={damaged_folder}", f"cache_dir={tmp_path / 'cache'}"]
    with pytest.raises(InputError, match=r"2 of 26 images cannot be read.* max_bad_images=0.01 allows: row 4"):
        train(tmp_path / "run", *options)
    assert [file.name for file in (tmp_path / "run").iterdir()] == [LIST]
    train(tmp_path / "run", *options, "max_bad_images=0.08", "max_train_steps=1")
    assert listed(tmp_path / "run") == [(4, "12.png"), (25, "9.png")]

    with pytest.raises(InputError, match=r"2 of 26 images cannot be read.* max_bad_images=0.01 allows: row 4"):
        train(tmp_path / "dry", *options, "dry_run=true", "check_images=true")
    capsys.readouterr()
    train(tmp_path / "dry", *options, "dry_run=true", "check_images=true", "max_bad_images=1")
    assert "2 of 26 images cannot be read" in capsys.readouterr().out
    assert not (tmp_path / "dry").exists()
    with pytest.raises(InputError, match="check_images=true: only with dry_run=true"):
        train(tmp_path / "dry", "check_images=true")
