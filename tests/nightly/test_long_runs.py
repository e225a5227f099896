"""What takes minutes: many kills, a disk that is really full, real launchers, real compilers, ranks that stall."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import kills
from fake_slurm import FakeSlurm
from forked import Forker, forking, run_options
from free_port import free_port
from run_outputs import assert_same_checkpoint, final_tensors, metrics

pytestmark = [pytest.mark.nightly, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
TRAIN = "train_scripts/train_dit_speed.py"
BIN = Path(sys.executable).parent
Record = Callable[[str, object], None]


@pytest.fixture(scope="module")
def forker() -> Iterator[Forker]:
    with forking(imports=["torch._dynamo", "torch._inductor.compile_fx"]) as made:
        yield made


def test_twenty_kills_leave_the_same_bits(tmp_path: Path, record_property: Record) -> None:
    """Of the benchmark, at other places than the committed ones: the day decides."""
    seed = int(time.time()) // 86400
    command = [sys.executable, "benchmarks/kills.py", "kills=20", f"seed={seed}", f"results_dir={tmp_path}"]
    subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True, timeout=3000)
    result = json.loads((tmp_path / "result.json").read_text())
    for name in ("kills", "inside_a_save", "bit_equal", "seed"):
        record_property(name, result[name])
    assert result["bit_equal"] == result["kills"] == 20 and result["inside_a_save"] >= 5


@pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts file systems")
def test_a_file_system_that_is_full_loses_nothing(
    forker: Forker, tiny_options: list[str], tmp_path: Path, record_property: Record
) -> None:
    """Of every size from too small for the start to just large enough; then room is made, and the run resumed."""
    options = ["max_train_steps=6", "checkpointing_steps=2", "checkpoints_total_limit=2", "validation_steps=4"]
    options += ["report_to=tensorboard"]
    whole = tmp_path / "whole"
    forker.run(whole, run_options(tiny_options, whole / "run", f"cache_dir={whole / 'cache'}", *options))
    largest = sum(path.stat().st_size for path in whole.rglob("*") if path.is_file())
    wrong, stopped = [], 0
    sizes = range(64 * 1024, 2 * largest, largest // 8)
    for size in sizes:
        disk = tmp_path / f"disk-{size}"
        disk.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)], check=True)
        try:
            command = run_options(tiny_options, disk / "run", f"cache_dir={disk / 'cache'}", *options)
            trainer = forker.start(tmp_path, command)
            code, said = trainer.wait(), trainer.text()
            stopped += code != 0
            errors = re.findall(r"error: .*", said)  # it may stand behind a progress bar
            tracebacks = said.count("Traceback")
            if code != 0 and (code not in (1, 2) or len(errors) != 1 or tracebacks or str(disk) not in errors[0]):
                wrong.append(f"{size} bytes: ends with {code} and says {said[-1000:]}")
            subprocess.run(["mount", "-o", f"remount,size={4 * largest}", str(disk)], check=True)
            trainer = forker.start(tmp_path, [*command, "resume_from_checkpoint=latest"])
            if (code := trainer.wait()) != 0:
                wrong.append(f"{size} bytes: resumes with {code} and says {trainer.text()[-1000:]}")
            elif found := kills.differences(whole / "run", disk / "run"):
                wrong.append(f"{size} bytes: {found}")
        finally:
            subprocess.run(["umount", str(disk)], check=True)
    record_property("sizes", len(sizes))
    record_property("stopped", stopped)
    assert not wrong, "\n".join(wrong)
    assert len(sizes) / 4 <= stopped < len(sizes), "some were too small and some were not"


def test_a_rank_that_stalls_is_named_and_the_run_ends(
    forker: Forker, tiny_options: list[str], tmp_path: Path, record_property: Record
) -> None:
    timeout = 20
    options = run_options(tiny_options, tmp_path / "run", "train_batch_size=2", f"ddp_timeout={timeout}")
    trainers = forker.start_ranks(tmp_path, options, changes=["stalls:7"])
    began = time.monotonic()
    code = trainers[0].wait(120)
    record_property("seconds", round(time.monotonic() - began, 1))
    forker.end(trainers)
    said = trainers[0].text()
    assert code == 1, said
    assert re.search(
        rf"Rank 1 holds up the run at step \d.*After ddp_timeout={timeout} s of waiting the run ends", said
    )
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]


COMPILED = {"alone": (1, []), "DDP": (2, []), "FSDP2": (2, ["sharded"])}


@pytest.mark.parametrize(
    ("kind", "backend"),
    [("alone", "inductor"), ("DDP", "inductor"), ("FSDP2", "inductor"), ("DDP", "aot_eager"), ("FSDP2", "aot_eager")],
)
def test_compiled_blocks_train_and_resume_to_the_same_bits(
    forker: Forker, tiny_options: list[str], tmp_path: Path, kind: str, backend: str
) -> None:
    if backend == "inductor" and not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("inductor needs a C++ compiler for CPUs")
    size, changes = COMPILED[kind]
    common = [f"train_batch_size={4 // size}", "max_train_steps=4", "checkpointing_steps=2", "lr_warmup_steps=1"]
    compiled = [*common, "compile=true", f"compile_backend={backend}"]
    runs = {"plain": common, "whole": compiled}
    runs["resumed"] = [*compiled, f"resume_from_checkpoint={tmp_path / 'whole' / 'run' / 'checkpoint-2'}"]
    for name, options in runs.items():
        command = run_options(tiny_options, tmp_path / name / "run", *options)
        forker.run(tmp_path / name, command, size=size, changes=changes)
    assert_same_checkpoint(tmp_path / "whole" / "run", tmp_path / "resumed" / "run", 4)
    plain, whole = (final_tensors(tmp_path / name / "run", 4) for name in ("plain", "whole"))
    for name, value in plain.items():
        if backend == "aot_eager":
            assert torch.equal(value, whole[name]), name
        else:  # its kernels round otherwise
            torch.testing.assert_close(value, whole[name], rtol=1e-3, atol=1e-5)


LAUNCHERS = {
    "multi_gpu.yaml": [["--num_processes", "2"]],
    "multi_node.yaml": [
        ["--num_processes", "2", "--main_process_ip", "127.0.0.1", "--machine_rank", rank] for rank in ("0", "1")
    ],
}


@pytest.mark.parametrize("name", LAUNCHERS)
def test_accelerates_launcher_starts_two_processes_by_each_file(
    tiny_options: list[str], train: Callable[..., Path], tmp_path: Path, name: str
) -> None:
    """On CPUs instead of GPUs, over gloo; the machines of multi_node.yaml are two launchers here."""
    options = ["train_batch_size=2", "max_train_steps=4", "lr_warmup_steps=1", "mixed_precision=no"]
    port = str(free_port())
    launchers = [
        subprocess.Popen(
            [BIN / "accelerate", "launch", "--config_file", f"accelerate_configs/{name}", "--main_process_port", port]
            + [*own, TRAIN, *run_options(tiny_options, tmp_path / "run", *options)],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for own in LAUNCHERS[name]
    ]
    said = [launcher.communicate(timeout=600)[0] for launcher in launchers]
    assert [launcher.returncode for launcher in launchers] == [0] * len(launchers), "\n".join(said)
    assert "2 per device x 2 process(es) x 1 accumulated" in said[0]
    alone = train(tmp_path / "alone", "max_train_steps=4", "lr_warmup_steps=1")
    for value, other in zip(
        final_tensors(alone, 4).values(), final_tensors(tmp_path / "run", 4).values(), strict=True
    ):
        torch.testing.assert_close(value, other, rtol=1e-3, atol=1e-5)


def test_a_job_of_slurm_is_stopped_queued_again_and_finished(tiny_options: list[str], tmp_path: Path) -> None:
    slurm = FakeSlurm(tmp_path / "bin")
    own = ["train_batch_size=2", "max_train_steps=400", "logging_steps=20", "checkpointing_steps=None"]
    options = run_options(tiny_options, tmp_path / "run", *own, "mixed_precision=no")
    environment = {"MASTER_PORT": str(free_port()), "CUDA_VISIBLE_DEVICES": ""}
    job = slurm.submit(*options, output=tmp_path / "job.txt", **environment)
    log, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 300
    while not (log.is_file() and log.read_text().count("\n") >= 2) and time.monotonic() < deadline:
        assert job.poll() is None, (tmp_path / "job.txt").read_text()
        time.sleep(0.1)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(120) == 0, (tmp_path / "job.txt").read_text()
    assert slurm.asked()[-1] == "requeue 42"
    (stopped,) = (tmp_path / "run").glob("checkpoint-*")
    again = slurm.submit(*options, output=tmp_path / "again.txt", **environment)
    assert again.wait(600) == 0, (tmp_path / "again.txt").read_text()
    assert slurm.asked().count("requeue 42") == 1
    assert [line["step"] for line in metrics(tmp_path / "run")] == list(range(20, 401, 20))
    assert stopped.is_dir() and load_file(tmp_path / "run" / "checkpoint-400" / "ema.safetensors")
