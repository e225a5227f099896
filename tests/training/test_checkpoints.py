"""Checkpoints: exact continuation, what is in the folder, which one is the latest, and which are kept."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from speed_diffusers import InputError
from speed_diffusers.training import checkpoint_folders, checkpoints
from speed_diffusers.training.checkpoint_folders import (
    find_checkpoint,
    list_checkpoints,
    prune_checkpoints,
    set_aside_later_checkpoints,
)
from speed_diffusers.training.checkpoints import read_state, save_checkpoint
from tiny_run import Run, light_run, saved_steps

FILES = {"model.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json", "manifest.json"}


def assert_same_state(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert value.dtype == second[name].dtype and torch.equal(value, second[name]), name


@pytest.mark.parametrize("fused", [True, False])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path: Path, fused: bool) -> None:
    whole = Run(fused=fused)
    whole.train(4)
    saved = whole.state()
    folder = whole.save(tmp_path, note="kept")
    assert_same_state(whole.state(), saved)
    expected = whole.train(5)

    resumed = Run(seed=99, fused=fused)
    resumed.load(find_checkpoint(tmp_path, "latest") or Path())
    assert_same_state(resumed.state(), saved)
    assert resumed.step == 4 and read_state(folder)["note"] == "kept"
    assert resumed.optimizer.param_groups[0]["lr"] == 3e-3
    assert resumed.train(5) == expected
    assert_same_state(resumed.state(), whole.state())


def test_loading_into_a_run_under_way_replaces_everything(tmp_path: Path) -> None:
    run = Run()
    run.train(2)
    folder, saved = run.save(tmp_path), run.state()
    run.train(3)
    run.load(folder)
    assert_same_state(run.state(), saved)


def test_saving_before_the_first_step_changes_nothing(tmp_path: Path) -> None:
    run, untouched = Run(), Run()
    folder = run.save(tmp_path)
    assert folder.name == "checkpoint-0"
    assert run.train(3) == untouched.train(3)
    resumed = Run(seed=99)
    resumed.load(folder)
    resumed.train(3)
    assert_same_state(resumed.state(), untouched.state())


def test_folder_holds_safetensors_and_json_only(tmp_path: Path) -> None:
    folder = saved_steps(tmp_path, 3).save(tmp_path, config={"seed": 1})
    assert {path.name for path in folder.iterdir()} == FILES
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1, "all files are as readable as one another"
    state = json.loads((folder / "state.json").read_text())
    assert state["step"] == 3 and state["format_version"] == 1 and state["config"] == {"seed": 1}


def test_other_processes_write_nothing(tmp_path: Path) -> None:
    run = light_run()
    parts = {"model": run.model, "ema": run.ema, "optimizer": run.optimizer}
    save_checkpoint(tmp_path, step=1, **parts, state={}, is_main_process=False)
    assert list(tmp_path.iterdir()) == []


def test_latest_is_the_highest_step(tmp_path: Path) -> None:
    saved_steps(tmp_path, 9, 100, 20)
    (tmp_path / "checkpoint-abc").mkdir()
    (tmp_path / "checkpoint-7000").write_text("a file, not a folder")
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-100", "checkpoint-20", "checkpoint-9"]
    assert find_checkpoint(tmp_path, "latest") == tmp_path / "checkpoint-100"
    assert find_checkpoint(tmp_path, str(tmp_path / "checkpoint-9")) == tmp_path / "checkpoint-9"


def test_latest_of_nothing_is_none(tmp_path: Path) -> None:
    assert find_checkpoint(tmp_path, "latest") is None
    assert find_checkpoint(tmp_path / "missing", "latest") is None


def test_newer_format_is_refused(tmp_path: Path) -> None:
    folder = saved_steps(tmp_path, 1).save(tmp_path)
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps({**state, "format_version": 2}))
    with pytest.raises(InputError, match="checkpoint format 2; this version reads up to 1"):
        read_state(folder)


@pytest.mark.parametrize("other", [nn.Linear(8, 9), nn.Sequential(nn.Linear(8, 8)), nn.Linear(8, 8, bias=False)])
def test_checkpoint_of_another_model_is_refused(tmp_path: Path, other: nn.Module) -> None:
    folder = saved_steps(tmp_path, 1).save(tmp_path)
    with pytest.raises(InputError, match="is damaged, or of another model: ") as error:
        Run(model=other).load(folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


def test_checkpoint_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    run = saved_steps(tmp_path, 5)
    with torch.no_grad():
        run.model.weight.add_(1.0)
    folder = run.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-5"]
    again = light_run()
    again.load(find_checkpoint(tmp_path, "latest") or Path())
    assert torch.equal(again.model.weight, run.model.weight) and folder.name == "checkpoint-5"


def test_the_old_one_is_there_until_the_new_one_is_in_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the two renames of a replacement, and while one too many is deleted, a start finds whole checkpoints."""
    run = saved_steps(tmp_path, 4, 5)
    before = run.state()
    with torch.no_grad():
        run.model.weight.add_(1.0)
    rename = Path.rename

    def fails(path: Path, target: Path) -> Path:
        if path.name.startswith(".tmp-checkpoint-5"):
            raise KeyboardInterrupt
        return rename(path, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "rename", fails)
        run.save(tmp_path)
    again = light_run()
    found = find_checkpoint(tmp_path, "latest")
    assert found is not None and found.name == "checkpoint-5"
    again.load(found)
    assert_same_state(again.state(), before)

    def dies(path: Path) -> None:
        assert not path.name.startswith("checkpoint-"), "what is half deleted must not look whole"
        if path.exists():
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoint_folders, "remove", dies)
        prune_checkpoints(tmp_path, 1, keep=5)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-5"]


def test_all_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    sync, replace = checkpoints.sync, checkpoint_folders.replace_folder

    def synced(path: Path) -> None:
        done.append(path.name)
        sync(path)

    def replaced(source: Path, target: Path) -> None:
        done.append("rename")
        replace(source, target)

    monkeypatch.setattr(checkpoints, "sync", synced)
    monkeypatch.setattr(checkpoint_folders, "sync", synced)
    monkeypatch.setattr(checkpoints, "replace_folder", replaced)
    saved_steps(tmp_path, 5)
    renamed = done.index("rename")
    assert set(done[:renamed]) == FILES | {".tmp-checkpoint-5"} and done[renamed + 1 :] == [tmp_path.name]


def test_what_a_killed_save_left_is_removed_by_the_next(tmp_path: Path) -> None:
    run = saved_steps(tmp_path, 5)
    for leftover in (".tmp-checkpoint-6", ".tmp-checkpoint-old-1"):
        (tmp_path / leftover).mkdir()
        (tmp_path / leftover / "model.safetensors").write_bytes(b"part")
    assert find_checkpoint(tmp_path, "latest") == tmp_path / "checkpoint-5"
    run.step = 6
    run.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-5", "checkpoint-6"]


@pytest.mark.parametrize(
    ("limit", "kept"), [(None, [9, 20, 100]), (5, [9, 20, 100]), (2, [20, 100]), (1, [100]), (0, [100])]
)
def test_pruning_keeps_the_newest(tmp_path: Path, limit: int | None, kept: list[int]) -> None:
    saved_steps(tmp_path, 9, 100, 20)
    (tmp_path / "checkpoint-abc").mkdir()
    (tmp_path / "pipeline").mkdir()
    prune_checkpoints(tmp_path, limit, keep=100)
    assert sorted(int(path.name.split("-")[1]) for path in list_checkpoints(tmp_path)) == kept
    assert {"checkpoint-abc", "pipeline"} < {path.name for path in tmp_path.iterdir()}
    assert len(list(tmp_path.iterdir())) == len(kept) + 2


def test_pruning_never_deletes_what_was_just_saved(tmp_path: Path) -> None:
    saved_steps(tmp_path, 7, 10, 12)
    prune_checkpoints(tmp_path, 1, keep=7)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-12", "checkpoint-7"]


def test_going_on_from_an_older_checkpoint_sets_the_later_ones_aside(tmp_path: Path) -> None:
    saved_steps(tmp_path, 5, 10, 12)
    set_aside_later_checkpoints(tmp_path, 5)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-5"]
    assert sorted(path.name for path in tmp_path.glob("*.abandoned")) == [
        "checkpoint-10.abandoned",
        "checkpoint-12.abandoned",
    ]


def test_a_checkpoint_is_found_by_its_name_in_the_run(tmp_path: Path) -> None:
    saved_steps(tmp_path, 5)
    assert find_checkpoint(tmp_path, "checkpoint-5") == tmp_path / "checkpoint-5"
