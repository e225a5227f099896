"""What trackers hold of a run that was killed: every step once, in TensorBoard, W&B and trackio."""

import importlib.util
import json
import signal
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from forked import Forker, forking, run_options
from run_outputs import metrics, tensorboard_scalars
from speed_diffusers.training.told_trackers import _log_records, _wandb_rows
from speed_diffusers.training.trackers import RUN_ID_FILE, History, Trackers

OPTIONS = ("max_train_steps=8", "checkpointing_steps=3", "validation_steps=2", "num_validation_images=1")


def needs(package: str) -> pytest.MarkDecorator:
    """Skips before anything is started for the test."""
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"needs {package} (extra trackers)")


@pytest.fixture(scope="module")
def forker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forker]:
    home = tmp_path_factory.mktemp("trackers")
    environment = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "TRACKIO_DIR": str(home / "trackio")}
    with forking(environment) as made:
        yield made


def killed_and_resumed(forker: Forker, tiny_options: list[str], folder: Path, tracker: str) -> Path:
    """A run that is stopped, which lets trackers write, then killed, which does not, and goes on to its end."""
    command = run_options(tiny_options, folder / "run", *OPTIONS, f"report_to={tracker},tensorboard")
    command.append("resume_from_checkpoint=latest")
    for change, code in (("stopped:0,4", 128 + signal.SIGTERM), ("killed:8", -signal.SIGKILL)):
        assert forker.start(folder, command, changes=[change]).wait() == code, (folder / "output.txt").read_text()
    forker.run(folder, command)
    return folder / "run"


def curves_of(rows: list[tuple[int, dict[str, Any]]]) -> dict[str, list[tuple[int, Any]]]:
    """Each name's steps and values, in the order of steps."""
    found: dict[str, list[tuple[int, Any]]] = {}
    for step, values in rows:
        for name, value in values.items():
            found.setdefault(name, []).append((step, value))
    return {name: sorted(points, key=lambda point: point[0]) for name, points in found.items()}


def assert_one_curve(curves: dict[str, list[tuple[int, Any]]], run: Path) -> None:
    """The numbers of `metrics.jsonl`, each step once, and those that TensorBoard has, by the same names."""
    lines = metrics(run)
    assert [step for step, _ in curves["loss"]] == [line["step"] for line in lines] == list(range(1, 9))
    assert [value for _, value in curves["loss"]] == [line["loss"] for line in lines]
    for name, points in tensorboard_scalars(run).items():
        assert [step for step, _ in curves[name]] == [step for step, _ in points], name
        np.testing.assert_allclose([value for _, value in curves[name]], [value for _, value in points], rtol=1e-6)
    (logs,) = (run / "logs").glob("speed_diffusers")
    pictures = EventAccumulator(str(logs), size_guidance={"images": 0}).Reload().Images("samples")
    assert [each.step for each in pictures] == [2, 4, 6, 8]


@needs("wandb")
def test_wandb_continues_one_run(forker: Forker, tiny_options: list[str], tmp_path: Path) -> None:
    run = killed_and_resumed(forker, tiny_options, tmp_path, "wandb")
    files = sorted(run.glob("logs/wandb/offline-run-*/*.wandb"))
    (run_id,) = {path.stem.removeprefix("run-") for path in files}
    assert run_id == (run / "logs" / RUN_ID_FILE).read_text()
    rows, pictures = [], []
    assert len(files) == 3 and any("loss" in row for row in _wandb_rows(files[0]))
    for path in files:
        for row in _wandb_rows(path):
            values = {name: json.loads(value) for name, value in row.items() if not name.startswith("_")}
            step = values.pop("step")
            if "samples/_type" in values:
                pictures.append(step)
            else:
                rows.append((step, values))
    assert_one_curve(curves_of(rows), run)
    assert Counter(pictures) == Counter([2, 4, 6, 8]), "one grid a step"


@needs("trackio")
def test_trackio_continues_one_run(forker: Forker, tiny_options: list[str], tmp_path: Path) -> None:
    run = killed_and_resumed(forker, tiny_options, tmp_path, "trackio")
    name = f"run-{(run / 'logs' / RUN_ID_FILE).read_text()}"
    code = f"import json; print(json.dumps(SQLiteStorage.get_logs('speed_diffusers', {name!r})))"
    code = f"from trackio.sqlite_storage import SQLiteStorage; {code}"
    done = subprocess.run([sys.executable, "-c", code], env=forker.environment, stdout=subprocess.PIPE, check=True)
    rows, pictures = [], []
    for row in json.loads(done.stdout):
        step = row["step"]
        if "samples" in row:
            pictures.append(step)
        else:
            rows.append((step, {key: value for key, value in row.items() if key not in ("step", "timestamp")}))
    assert_one_curve(curves_of(rows), run)
    assert Counter(pictures) == Counter([2, 4, 6, 8])


class OnlineRun:
    """What W&B's run is for a trainer that is online: a server knows the last values."""

    offline, id = False, "abc"

    def __init__(self, **summary: float) -> None:
        self.summary, self.rows, self.axes = summary, [], []

    def define_metric(self, name: str, **options: Any) -> None:
        self.axes.append((name, options))

    def log(self, row: dict[str, float]) -> None:
        self.rows.append(row)


def test_a_server_is_told_what_it_lacks_and_nothing_twice(tmp_path: Path) -> None:
    run = OnlineRun(loss=0.5, step=5)
    tracker = SimpleNamespace(name="wandb", run=run)
    given: dict[str, Any] = {}
    accelerator = SimpleNamespace(
        is_main_process=True,
        log_with=["wandb"],
        trackers=[tracker],
        init_trackers=lambda project, config, options: given.update(options["wandb"]),
    )
    trackers = Trackers(accelerator, tmp_path / "run" / "logs")  # type: ignore[arg-type]
    history = History([(step, {"loss": 1 / step}) for step in range(1, 8)])
    trackers.start("project", {}, first_step=7, history=history)
    assert [row["step"] for row in run.rows] == [6, 7]
    for step in (5, 8, 8):
        trackers.log({"loss": 1 / step, "grad_norm": 1.0}, step)
    trackers.log({"validation_loss": 0.25}, 8)
    assert [row["step"] for row in run.rows] == [6, 7, 8, 8] and run.rows[-1] == {"validation_loss": 0.25, "step": 8}
    assert run.axes == [("step", {}), ("*", {"step_metric": "step"})]
    run_id = (tmp_path / "run" / "logs" / RUN_ID_FILE).read_text()
    assert (given["id"], given["name"], given["resume"]) == (run_id, "run", "allow")
    again = Trackers(accelerator, tmp_path / "run" / "logs")  # type: ignore[arg-type]
    again.start("project", {}, first_step=7, history=History())
    assert given["id"] == run_id, "the same run"
    again.start("project", {}, first_step=7, history=history, is_another_run=True)
    assert given["id"] != run_id and len(run.rows) == 4, "another one, which begins where it resumes"


def as_log(*records: bytes) -> bytes:
    """A file of W&B: records in blocks of 32 KiB, as LevelDB's log has them."""
    data = b":W&B" + bytes(3)
    for record in records:
        is_first = True
        while True:
            if (left := 32768 - len(data) % 32768) < 7:
                data += bytes(left)
                left = 32768
            part, record = record[: left - 7], record[left - 7 :]
            kind = (1 if not record else 2) if is_first else (4 if not record else 3)
            data += struct.pack("<IHB", 0, len(part), kind) + part
            is_first = False
            if not record:
                break
    return data


def test_records_are_read_over_blocks_and_up_to_a_torn_end() -> None:
    records = [b"a", b"b" * 32740, b"", b"c" * 100_000, b"d" * 32768]
    data = as_log(*records)
    assert list(_log_records(data)) == records
    for cut in (1, 7, 5000, 30_000):
        assert list(_log_records(data[:-cut])) == records[:-1], cut
    assert list(_log_records(data[:7])) == list(_log_records(b"")) == []
