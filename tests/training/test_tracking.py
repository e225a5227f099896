"""metrics.jsonl and the check of trackers."""

import errno
import json
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from accelerate.tracking import TensorBoardTracker
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from speed_diffusers.errors import InputError
from speed_diffusers.files import write_text
from speed_diffusers.reports.plots import save_class_grid
from speed_diffusers.training.told_trackers import told_wandb
from speed_diffusers.training.trackers import _show
from speed_diffusers.training.tracking import MetricsFile, check_trackers, read_metrics, tracker_names
from tiny_run import file_size_limit


def steps_in(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_lines_are_complete_at_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(path)
    metrics.write({"step": 1, "loss": 0.5})
    assert json.loads(path.read_text()) == {"step": 1, "loss": 0.5}


def test_going_on_drops_later_steps_and_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = MetricsFile(path)
    for step in range(1, 8):
        first.write({"step": step})
    path.write_text(path.read_text() + '{"step": 8, "lo')
    second = MetricsFile(path, first_step=5)
    assert steps_in(path) == [1, 2, 3, 4, 5]
    second.write({"step": 6})
    assert steps_in(path) == [1, 2, 3, 4, 5, 6]
    MetricsFile(path)
    assert steps_in(path) == []


def test_a_bad_line_costs_no_other(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "metrics.jsonl"
    bad = [b"{torn", b"\x00\xff", b"[1]", b'{"loss": 1}', b"[" * 100_000]
    path.write_bytes(b"\n".join([b'{"step": 1}', *bad, b'{"step": 7}', b'{"step": 8', b""]))
    assert [line["step"] for line in read_metrics(path)] == [1, 7]
    numbers = [int(record.getMessage().split("line ")[1].split(":")[0]) for record in caplog.records]
    assert numbers == [2, 3, 4, 5, 6, 8] and str(path) in caplog.text
    MetricsFile(path, first_step=7).write({"step": 8})
    assert steps_in(path) == [1, 7, 8]
    caplog.clear()
    path.write_bytes(path.read_bytes() + b'{"step": 9')
    assert [line["step"] for line in read_metrics(path)] == [1, 7, 8] and not caplog.records, "a kill's torn end"


def test_a_full_disk_is_named_whatever_is_written(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    images = np.zeros((2, 8, 8, 3), np.float32)
    writers: dict[str, Callable[[], None]] = {
        "metrics.jsonl": lambda: metrics.write({"step": 1, "loss": 0.12345678}),
        "samples.png": lambda: save_class_grid(images, ["a", "b"], "title", tmp_path / "samples.png"),
        "score.json": lambda: write_text(tmp_path / "score.json", "x" * 1000),
    }
    for name, write in writers.items():
        with file_size_limit(20), pytest.raises(OSError, match=rf"Could not write {tmp_path}/{name}: .*\d free\)$"):
            write()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"], "no half of a file"


def test_trackers_are_checked_before_anything_starts() -> None:
    check_trackers([])
    check_trackers(["tensorboard"])
    with pytest.raises(InputError, match="Unknown tracker.*'tensorbord'. Did you mean 'tensorboard'"):
        check_trackers(["tensorbord"])
    with pytest.raises(InputError, match="report_to=comet_ml: not installed; run: pip install comet-ml"):
        check_trackers(["tensorboard", "comet_ml"])


def test_none_and_all_are_what_diffusers_scripts_make_of_them() -> None:
    assert tracker_names([]) == tracker_names(["none"]) == []
    assert "tensorboard" in tracker_names(["all"]) and "comet_ml" not in tracker_names(["all"])
    assert tracker_names(["all", "tensorboard"]) == tracker_names(["all"])
    check_trackers(["none"])
    check_trackers(["all"], "mine")
    with pytest.raises(InputError, match="report_to=none,tensorboard: 'none' stands alone"):
        check_trackers(["none", "tensorboard"])


def test_a_picture_is_on_the_disk_at_once(tmp_path: Path) -> None:
    tracker = TensorBoardTracker("run", logging_dir=tmp_path)
    tracker.start()
    _show(tracker, np.zeros((4, 6, 3), np.uint8), 3)
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    ((tag, shown),) = ((tag, events.Images(tag)) for tag in events.Tags()["images"])
    assert tag.startswith("samples") and [(each.step, each.width) for each in shown] == [(3, 6)]
    tracker.finish()


def test_what_a_server_has_is_not_listed_step_by_step(tmp_path: Path) -> None:
    run = SimpleNamespace(offline=False, summary={"loss": 0.5, "step": 3_000_000})
    told = told_wandb(run, tmp_path, "step")
    assert ("loss", 3_000_000) in told and ("loss", 1) in told
    assert ("loss", 3_000_001) not in told and ("samples", 1) not in told


@pytest.mark.parametrize("project", ["../../x", "..", "/tmp/x", "a/../../x"])
def test_a_project_whose_folder_lies_outside_the_run_is_refused(project: str) -> None:
    with pytest.raises(InputError, match=f"tracker_project_name={project}: tensorboard makes a folder"):
        check_trackers(["tensorboard"], project)
    with pytest.raises(InputError, match="tracker_project_name"):
        check_trackers(["all"], project)
    check_trackers([], project)  # no folder is made of it


def test_a_project_may_have_parts() -> None:
    check_trackers(["tensorboard"], "team/..speed")


def test_an_error_of_tensorboards_thread_is_told_once(
    train: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[threading.ExceptHookArgs] = []
    failed = threading.Event()

    def fails(writer: object, data: bytes) -> None:
        failed.set()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(threading, "excepthook", told.append)
    monkeypatch.setattr("tensorboard.summary.writer.record_writer.RecordWriter.write", fails)
    with pytest.raises(OSError, match=r"Could not write .*logs.*No space left on device"):
        train(tmp_path / "run", "report_to=tensorboard")
    for thread in threading.enumerate():
        if type(thread).__name__ == "_AsyncWriterThread":
            thread.join(10)
    assert failed.is_set() and told == []
    other = threading.Thread(target=lambda: [].pop())
    other.start()
    other.join()
    assert [error.exc_type for error in told] == [IndexError], "errors of other threads are told as before"
