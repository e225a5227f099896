"""The folder of a run before its first step: what file systems refuse, and what killed starts left."""

import errno
import logging
import multiprocessing
from dataclasses import replace
from pathlib import Path

import pytest
from filelock import FileLock

from speed_diffusers.config.load import config_dict
from speed_diffusers.errors import InputError
from speed_diffusers.training.checkpoint_folders import list_checkpoints
from speed_diffusers.training.config import TrainConfig
from speed_diffusers.training.run_folder import check_resumed_config, open_output_dir
from speed_diffusers.training.setup import worker_context
from tiny_run import light_run, saved_steps


@pytest.mark.parametrize("error", [OSError(errno.ENOLCK, "No locks available"), NotImplementedError("no flock")])
def test_a_file_system_without_locks_is_named_and_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(FileLock, "acquire", refuse)
    with caplog.at_level(logging.WARNING):
        assert open_output_dir(TrainConfig(output_dir=str(tmp_path)), 1, None, None) is None
    assert f"output_dir={tmp_path}: no locks there" in caplog.text
    error = PermissionError(errno.EACCES, "Permission denied")
    with pytest.raises(PermissionError):
        open_output_dir(TrainConfig(output_dir=str(tmp_path)), 1, None, None)


def test_what_a_killed_start_left_is_removed_by_the_next(tmp_path: Path) -> None:
    for name in (".tmp-pipeline-1", ".tmp-checkpoint-5", "validation/.tmp-step-0000005.png-1", "mine/.tmp-pipeline-1"):
        (tmp_path / name).mkdir(parents=True)
    lock = open_output_dir(TrainConfig(output_dir=str(tmp_path)), 1, None, None)
    assert lock is not None
    lock.release()
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob(".tmp-*"))
    assert left == ["mine/.tmp-pipeline-1"]


def test_a_checkpoint_too_many_is_pruned_by_the_next_start(tmp_path: Path) -> None:
    saved_steps(tmp_path, 5, 10)
    config = TrainConfig(output_dir=str(tmp_path), checkpoints_total_limit=1)
    lock = open_output_dir(config, 1, tmp_path / "checkpoint-10", None)
    assert lock is not None
    lock.release()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-10"]


def test_workers_start_on_windows_too(monkeypatch: pytest.MonkeyPatch) -> None:
    assert worker_context() == "forkserver"
    monkeypatch.setattr(multiprocessing, "get_all_start_methods", lambda: ["spawn"])
    assert worker_context() == "spawn"


def test_a_checkpoint_that_knows_fewer_options_had_their_defaults(tmp_path: Path) -> None:
    config = TrainConfig(output_dir=str(tmp_path))
    known = config_dict(config)
    for name in known:
        fewer = {key: value for key, value in known.items() if key != name}
        run = light_run()
        run.step = 1
        checkpoint = run.save(tmp_path, config=fewer)
        check_resumed_config(config, checkpoint, {})
    with pytest.raises(InputError, match=r"ema_tracks: \[\] -> \[0.05\]"):
        check_resumed_config(replace(config, ema_tracks=[0.05]), run.save(tmp_path, config={}), {})
