"""Checkpoints that are damaged, cut short by a full disk, or hold what would run code if it were opened."""

import json
import logging
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save

from speed_diffusers import InputError
from speed_diffusers.training.checkpoint_folders import (
    digest,
    find_checkpoint,
    list_checkpoints,
    prune_checkpoints,
    set_aside_later_checkpoints,
)
from tiny_run import file_size_limit, light_run, saved_steps

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


def test_latest_stops_where_every_checkpoint_is_damaged(two_checkpoints: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(two_checkpoints, tmp_path / "run")
    for broken in list_checkpoints(folder):
        (broken / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"every checkpoint in .* is damaged, .*checkpoint-10/model.safetensors is"):
        find_checkpoint(folder, "latest")


def make_folder(path: Path) -> None:
    path.mkdir()
    (path / "model.safetensors").write_bytes(b"part")


@pytest.mark.parametrize("name", ["6", "old-1", "replaced-checkpoint-9"])
@pytest.mark.parametrize(
    "make",
    [lambda path: path.symlink_to(path.parent / "elsewhere"), lambda path: path.symlink_to("nowhere"), Path.touch],
    ids=["link", "dangling link", "file"],
)
def test_whatever_lies_where_a_save_writes_blocks_no_save(
    tmp_path: Path, make: Callable[[Path], object], name: str
) -> None:
    run = saved_steps(tmp_path, 5)
    make_folder(tmp_path / "elsewhere")
    make(tmp_path / f".tmp-checkpoint-{name}")
    run.step = 6
    run.save(tmp_path)
    assert find_checkpoint(tmp_path, "latest") == tmp_path / "checkpoint-6"
    assert not list(tmp_path.glob(".tmp-*"))
    assert (tmp_path / "elsewhere" / "model.safetensors").read_bytes() == b"part"


def test_checkpoints_that_are_links_are_pruned_replaced_and_set_aside(tmp_path: Path) -> None:
    run = saved_steps(tmp_path / "disk", 5, 6)
    (tmp_path / "run").mkdir()
    for step in (5, 6):
        (tmp_path / "run" / f"checkpoint-{step}").symlink_to(tmp_path / "disk" / f"checkpoint-{step}")
    run.step = 6
    run.save(tmp_path / "run")
    prune_checkpoints(tmp_path / "run", 1, keep=6)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoint-6"]
    assert len(list_checkpoints(tmp_path / "disk")) == 2, "what a link points to is somebody else's"
    (tmp_path / "run" / "checkpoint-6.abandoned").symlink_to(tmp_path / "disk" / "checkpoint-6")
    set_aside_later_checkpoints(tmp_path / "run", 5)
    assert not (tmp_path / "run" / "checkpoint-6.abandoned").is_symlink()


@pytest.mark.parametrize("wanted", ["latest", "checkpoint-10", "path"])
def test_a_replacement_cut_short_is_undone_however_it_is_resumed(
    two_checkpoints: Path, tmp_path: Path, wanted: str
) -> None:
    folder = shutil.copytree(two_checkpoints, tmp_path / "run")
    (folder / "checkpoint-10").rename(folder / ".tmp-checkpoint-replaced-checkpoint-10")
    wanted = str(folder / "checkpoint-10") if wanted == "path" else wanted
    # Of another run, where the path names it.
    output_dir = tmp_path / "other" if wanted.startswith("/") else folder
    assert find_checkpoint(output_dir, wanted) == folder / "checkpoint-10"


def rewritten(checkpoint: Path, name: str, content: bytes) -> None:
    """Puts other content into a file of a checkpoint, with the hash that it needs."""
    (checkpoint / name).write_bytes(content)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    (checkpoint / "manifest.json").write_text(json.dumps({**manifest, name: digest(checkpoint / name)}))


NESTED = b"[" * 100_000 + b"]" * 100_000


@pytest.mark.parametrize("change", [{"step": -5}, {"step": True}, {"param_groups": None}, {"global_batch": 0}, None])
def test_a_state_that_makes_no_sense_is_damaged_whatever_its_hash(
    two_checkpoints: Path, tmp_path: Path, change: dict[str, object] | None
) -> None:
    folder = shutil.copytree(two_checkpoints, tmp_path / "run")
    state = json.loads((folder / "checkpoint-10" / "state.json").read_text())
    rewritten(folder / "checkpoint-10", "state.json", json.dumps(state | change).encode() if change else NESTED)
    with pytest.raises(InputError, match="state.json is damaged: "):
        find_checkpoint(folder, "checkpoint-10")
    assert find_checkpoint(folder, "latest") == folder / "checkpoint-5"
    (folder / "checkpoint-10" / "manifest.json").write_bytes(NESTED)
    assert find_checkpoint(folder, "latest") == folder / "checkpoint-5"


@pytest.mark.parametrize("name", ["model", "ema", "optimizer"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: dict(list(tensors.items())[1:]), "it lacks "),
        (lambda tensors: {}, "it lacks "),
        (lambda tensors: tensors | {"exp_avg/other": torch.ones(1)}, "it has exp_avg/other, which"),
        (lambda tensors: {key: value.flatten() for key, value in tensors.items()}, "is float32"),
        (lambda tensors: {key: value.double() for key, value in tensors.items()}, "is float64"),
    ],
    ids=["a tensor less", "emptied", "a tensor more", "another shape", "another dtype"],
)
def test_a_checkpoint_has_the_tensors_of_its_model_and_no_others(
    tmp_path: Path, name: str, change: Callable[[dict[str, Any]], dict[str, Any]], message: str
) -> None:
    run = light_run()
    run.step = 5
    folder = run.save(tmp_path)
    rewritten(folder, f"{name}.safetensors", save(change(load_file(folder / f"{name}.safetensors"))))
    other = light_run()
    before = other.state()
    with pytest.raises(InputError, match=rf"{name}.safetensors is damaged, or of another model: .*{message}") as error:
        other.load(find_checkpoint(tmp_path, "latest") or Path())
    assert "\n" not in str(error.value)
    assert all(torch.equal(value, before[key]) for key, value in other.state().items()), "nothing was loaded"


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


@pytest.mark.parametrize("limit", [20_000, 45_000], ids=["at the model", "at the optimizer"])
@pytest.mark.parametrize("next_step", [5, 6], ids=["same step", "next step"])
def test_full_disk_leaves_the_last_checkpoint_whole_and_no_part_of_a_new_one(
    tmp_path: Path, limit: int, next_step: int
) -> None:
    run = light_run(width=100)  # 40 kB of parameters, 80 kB of moments
    run.step = 5
    before = contents(run.save(tmp_path))
    run.step = next_step
    needed = r"Could not write .*checkpoint-\d: .* \(161,6\d\d bytes needed, [\d,]+ free\)"
    with file_size_limit(limit), pytest.raises(OSError, match=needed):
        run.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-5"]
    assert contents(tmp_path / "checkpoint-5") == before
    assert find_checkpoint(tmp_path, "latest") == tmp_path / "checkpoint-5"
    run.save(tmp_path)
    assert find_checkpoint(tmp_path, "latest") == tmp_path / f"checkpoint-{next_step}"
