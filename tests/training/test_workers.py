"""Processes that load data, when the trainer that they load for is killed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def processes_of(session: int) -> list[str]:
    """Command lines of the processes of a session that are alive."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            # Behind the name, which may hold anything: state, parent, group, session.
            state, _, _, number = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
            if int(number) == session and state != "Z":
                found.append((folder / "cmdline").read_text().replace("\0", " "))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="sessions are read from Linux's /proc")
def test_no_process_outlives_a_trainer_that_is_killed(tiny_options: list[str], tmp_path: Path) -> None:
    given = ("max_train_steps", "checkpointing_steps")
    options = [part for part in tiny_options if not part.startswith(given)]
    options += ["max_train_steps=100000", "cache_latents=false", "dataloader_num_workers=1"]
    trainer = subprocess.Popen(
        [sys.executable, str(ROOT / "train_scripts/train_dit_speed.py"), *options],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text()) and time.monotonic() < deadline and trainer.poll() is None:
        time.sleep(0.05)
    try:
        others = len(processes_of(trainer.pid)) - 1
        assert others >= 2, "a worker and its server at the least"
        trainer.send_signal(signal.SIGKILL)
        trainer.wait()
        deadline = time.monotonic() + 30
        while (left := processes_of(trainer.pid)) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert left == []
    finally:
        if processes_of(trainer.pid):
            os.killpg(trainer.pid, signal.SIGKILL)
