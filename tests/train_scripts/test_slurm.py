"""The job script for SLURM, with SLURM's commands played by local processes; real trainers run it in tests/nightly."""

import json
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from fake_slurm import SCRIPT, FakeSlurm

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")

TRAINER = """
import json, os, signal, sys, time
from pathlib import Path
folder = Path(sys.argv[1])
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
names += ("SRUN_CPUS_PER_TASK",)
def stop(number, frame):
    time.sleep(0.5)  # it saves
    (folder / "saved").touch()
    sys.exit(128 + number)
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, stop)
told = {name: os.environ[name] for name in names} | {"options": sys.argv[2:]}
file = folder / f"{os.environ['RANK']}.json"
file.with_suffix(".part").write_text(json.dumps(told))
file.with_suffix(".part").rename(file)
if len(sys.argv) > 3 and sys.argv[2] == "fails":
    sys.exit(3)
while not (folder / "saved").exists():
    time.sleep(0.02)
"""


def test_it_is_a_script() -> None:
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)
    lines = SCRIPT.read_text().splitlines()
    first_command = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    assert all(number < first_command for number, line in enumerate(lines) if line.startswith("#SBATCH")), (
        "sbatch reads none after the first command"
    )


def started(folder: Path, job: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + 60
    while len(list(folder.glob("?.json"))) < 2 and time.monotonic() < deadline and job.poll() is None:
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("number", "code", "is_queued"), [(signal.SIGUSR1, 0, True), (signal.SIGTERM, 143, False)], ids=["limit", "cancel"]
)
def test_processes_are_told_to_save_and_the_job_is_queued_again(
    tmp_path: Path, number: int, code: int, is_queued: bool
) -> None:
    slurm = FakeSlurm(tmp_path / "bin")
    (tmp_path / "train.py").write_text(TRAINER)
    environment = {"TRAIN": str(tmp_path / "train.py"), "MASTER_PORT": "29511", "SLURM_CPUS_PER_TASK": "8"}
    job = slurm.submit(str(tmp_path), "seed=1", output=tmp_path / "job.txt", **environment)
    started(tmp_path, job)
    job.send_signal(number)
    assert job.wait(60) == code, (tmp_path / "job.txt").read_text()
    assert ("requeue 42" in slurm.asked()) == is_queued
    for rank in ("0", "1"):
        told = json.loads((tmp_path / f"{rank}.json").read_text())
        assert told["options"] == ["seed=1", "resume_from_checkpoint=latest"]
        assert [told[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")] == [
            rank,
            rank,
            "2",
            "2",
        ]
        assert (told["MASTER_ADDR"], told["MASTER_PORT"]) == ("localhost", "29511")
        assert told["SRUN_CPUS_PER_TASK"] == "8"
    if is_queued:  # what the queue starts then: here it finds that nothing is left to do
        again = slurm.submit(str(tmp_path), "seed=1", output=tmp_path / "job.txt", **environment)
        assert again.wait(60) == 0 and slurm.asked().count("requeue 42") == 1


def test_a_failure_is_no_reason_to_queue_again(tmp_path: Path) -> None:
    slurm = FakeSlurm(tmp_path / "bin")
    (tmp_path / "train.py").write_text(TRAINER)
    job = slurm.submit(str(tmp_path), "fails", output=tmp_path / "job.txt", TRAIN=str(tmp_path / "train.py"))
    assert job.wait(60) == 3 and "requeue 42" not in slurm.asked()
