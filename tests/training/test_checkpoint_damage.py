"""Checkpoints that are damaged, cut short by a full disk, or hold what would run code if it were opened."""

import contextlib
import logging
import pickle
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from speed_diffusers import InputError
from speed_diffusers.training.checkpoint_folders import find_checkpoint, list_checkpoints
from tiny_run import light_run, saved_steps

FILES = ("model.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json", "manifest.json")


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, tuple[str, Callable[[Path], object]]] = {
    **{f"{name} lacks its end": (name, lambda path: path.write_bytes(path.read_bytes()[:-1])) for name in FILES},
    **{f"{name} is missing": (name, Path.unlink) for name in FILES},
    **{f"{name} is empty": (name, lambda path: path.write_bytes(b"")) for name in FILES},
    **{f"{name} has a flipped bit": (name, flip_bit) for name in FILES},
    "the folder is empty": ("manifest.json", lambda path: [file.unlink() for file in path.parent.iterdir()]),
    "the manifest is no object": ("manifest.json", lambda path: path.write_text("[]")),
    "the manifest is null": ("manifest.json", lambda path: path.write_text("null")),
    "the manifest names nothing": ("manifest.json", lambda path: path.write_text("{}")),
    "the manifest is no text": ("manifest.json", lambda path: path.write_bytes(b"\xff\xfe\x00")),
    "a file is a folder": ("ema.safetensors", lambda path: (path.unlink(), path.mkdir())),
}


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    saved_steps(folder, 5, 10)
    return folder


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoint_is_passed_over_or_named(
    two_checkpoints: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    folder = shutil.copytree(two_checkpoints, tmp_path / "run")
    (folder / "checkpoint-abc").mkdir()
    name, inflict = DAMAGES[damage]
    broken = folder / "checkpoint-10"
    inflict(broken / name)
    with caplog.at_level(logging.WARNING):
        assert find_checkpoint(folder, "latest") == folder / "checkpoint-5"
    (warning,) = [record.getMessage() for record in caplog.records]
    assert "damaged" in warning and str(broken / name) in warning
    with pytest.raises(InputError) as error:
        find_checkpoint(folder, str(broken))
    assert str(broken / name) in str(error.value) and "\n" not in str(error.value)
    assert str(error.value).startswith("resume_from_checkpoint=")


def test_nothing_but_damaged_checkpoints(two_checkpoints: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(two_checkpoints, tmp_path / "run")
    for broken in list_checkpoints(folder):
        (broken / "model.safetensors").unlink()
    assert find_checkpoint(folder, "latest") is None


def test_named_folder_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="^resume_from_checkpoint=.*checkpoint-3 is not a folder"):
        find_checkpoint(tmp_path, str(tmp_path / "checkpoint-3"))


class Payload:
    """Runs code when it is unpickled: creates a file."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.sentinel,)


def test_pickles_in_a_checkpoint_are_never_opened(tmp_path: Path) -> None:
    sentinel = tmp_path / "executed"
    payload = pickle.dumps(Payload(sentinel))
    pickle.loads(payload)
    assert sentinel.exists(), "the payload works"
    sentinel.unlink()

    run = light_run()
    folder = run.save(tmp_path / "run")
    for name in ("optimizer.bin", "pytorch_model.bin", "custom_checkpoint_0.pkl", "random_states_0.pkl", "model.ckpt"):
        (folder / name).write_bytes(payload)
    light_run().load(find_checkpoint(tmp_path / "run", "latest") or Path())
    run.save(tmp_path / "run")
    assert not sentinel.exists()

    for name in ("model.safetensors", "optimizer.safetensors", "state.json"):
        (folder / name).write_bytes(payload)
        with pytest.raises(Exception, match="(?i)header|json|decode"):
            light_run().load(folder)
        run.save(tmp_path / "run")
    assert not sentinel.exists()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@contextlib.contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Writes beyond `size` bytes of a file fail as they do on a full disk; Python ignores the signal."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("limit", [20_000, 45_000], ids=["at the model", "at the optimizer"])
@pytest.mark.parametrize("next_step", [5, 6], ids=["same step", "next step"])
def test_full_disk_leaves_the_last_checkpoint_whole_and_no_part_of_a_new_one(
    tmp_path: Path, limit: int, next_step: int
) -> None:
    run = light_run(width=100)  # 40 kB of parameters, 80 kB of moments
    run.step = 5
    before = contents(run.save(tmp_path))
    run.step = next_step
    with file_size_limit(limit), pytest.raises(OSError, match="(?i)too large|space"):
        run.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-5"]
    assert contents(tmp_path / "checkpoint-5") == before
    assert find_checkpoint(tmp_path, "latest") == tmp_path / "checkpoint-5"
    run.save(tmp_path)
    assert find_checkpoint(tmp_path, "latest") == tmp_path / f"checkpoint-{next_step}"
