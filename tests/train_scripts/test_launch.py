"""The commands that the README gives, launched as a user launches them."""

import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from speed_diffusers.training import optimizer

ROOT = Path(__file__).resolve().parents[2]
TRAIN = "train_scripts/train_dit_speed.py"
BIN = Path(sys.executable).parent


def launch(command: list[str], cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a command with one torch thread and returns what it printed."""
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def one_line_error(result: subprocess.CompletedProcess[str]) -> str:
    """The single error line; no traceback of ours."""
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, result.stderr
    return lines[0]


def test_the_first_command_trains_and_saves(tmp_path: Path, cache_dir: Path) -> None:
    """The README's first command, with its defaults but for the length of the run."""
    command = ["accelerate", "launch", "--quiet", "--config_file", "accelerate_configs/cpu.yaml", TRAIN]
    short = ["max_train_steps=2", f"output_dir={tmp_path / 'run'}", f"cache_dir={cache_dir}", "num_inference_steps=2"]
    short.append("num_score_images=50")
    result = launch([BIN / command[0], *command[1:], *short])
    assert result.returncode == 0, result.stderr
    assert "9,000 images, 10 classes" in result.stdout
    assert "Training: 100%" in result.stderr and "step/s" in result.stderr and "loss=" in result.stderr
    for name in ("pipeline/model_index.json", "samples.png", "metrics.jsonl", "config.yaml"):
        assert (tmp_path / "run" / name).is_file()


OFFLINE = """
import runpy, socket, sys
def refuse(*address):
    sys.exit(f"the network was asked for {address}")
socket.getaddrinfo = refuse
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_the_default_never_asks_the_network(tmp_path: Path) -> None:
    run = [f"output_dir={tmp_path / 'run'}", "max_train_steps=1", "num_inference_steps=1", "num_validation_images=1"]
    run += ["max_train_samples=64", "num_score_images=20"]
    caches = {"HF_DATASETS_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "0"}
    result = launch([sys.executable, "-c", OFFLINE, TRAIN, *run], TQDM_DISABLE="1", **caches)
    assert result.returncode == 0, result.stderr
    # With everything to be made anew, every bar there is would have shown.
    assert "it/s" not in result.stderr and "step/s" not in result.stderr and "%|" not in result.stderr


def test_wrong_input_from_inside_train_scripts_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    result = launch(
        [sys.executable, "train_dit_speed.py", "speed_tau=2000", f"output_dir={folder}"], cwd=ROOT / "train_scripts"
    )
    assert result.returncode == 2
    assert one_line_error(result).startswith("error: speed_tau=2000.0: must be a whole number in [1, 1000], or None")
    assert "Traceback" not in result.stderr
    assert not folder.exists()


def test_wrong_input_under_torchrun_is_one_line(tmp_path: Path) -> None:
    """The worker exits with 2 and says so once; torchrun itself answers every failure with 1 and a report."""
    folder = tmp_path / "run"
    command = [BIN / "torchrun", "--standalone", "--nproc_per_node", "2", TRAIN]
    result = launch([*command, "speed_lambda=5", f"output_dir={folder}"])
    assert result.returncode == 1
    assert "speed_lambda=5.0: must lie in [0.5, 1]" in one_line_error(result)
    assert "exitcode  : 2" in result.stderr
    assert not folder.exists()


def test_sigterm_saves_the_state_and_the_run_goes_on_exactly(
    train: Callable[..., Path], tiny_options: list[str], tmp_path: Path
) -> None:
    named = ("max_train_steps", "output_dir", "checkpointing_steps")
    options = [sys.executable, str(ROOT / TRAIN), *(part for part in tiny_options if not part.startswith(named))]
    longer = ["max_train_steps=60", "checkpointing_steps=None"]
    process = subprocess.Popen(
        [*options, *longer, f"output_dir={tmp_path / 'stopped'}"],
        stderr=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        text=True,
    )
    metrics = tmp_path / "stopped" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") >= 3) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert "resume with resume_from_checkpoint=latest" in output
    (stopped,) = (tmp_path / "stopped").glob("checkpoint-*")
    step = int(stopped.name.removeprefix("checkpoint-"))
    assert 3 <= step < 60
    train(tmp_path / "stopped", *longer, "resume_from_checkpoint=latest")
    train(tmp_path / "whole", *longer)
    for name in ("model", "ema", "optimizer"):
        resumed, uninterrupted = (
            load_file(tmp_path / folder / "checkpoint-60" / f"{name}.safetensors") for folder in ("stopped", "whole")
        )
        assert all(torch.equal(resumed[key], uninterrupted[key]) for key in uninterrupted)


# Muon multiplies in bfloat16 where the CPU can, and rounding then parts what differed in the last digit of float32.
MUON_IN_FLOAT32 = """
import runpy, sys
from speed_diffusers.training import optimizer
optimizer.multiplies_bfloat16 = lambda device: False
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_two_processes_train_as_one_does(
    train: Callable[..., Path], tiny_options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optimizer, "multiplies_bfloat16", lambda device: False)
    script = tmp_path / "muon_in_float32.py"
    script.write_text(MUON_IN_FLOAT32)
    named = ("train_batch_size", "output_dir", "max_train_steps", "checkpointing_steps", "logging_steps")
    options = [part for part in tiny_options if not part.startswith(named)]
    extra = ["optimizer=muon", "ema_tracks=0.05,0.1"]  # AdamW has its share of the parameters
    # What learns is told at step 50.
    extra += ["speed_sampling=information_rate:bins=2", "speed_weighting=uncertainty:bins=2", "num_train_timesteps=8"]
    extra += ["max_train_steps=54", "checkpointing_steps=None", "logging_steps=10"]
    train(tmp_path / "one", *extra)
    pair = [BIN / "torchrun", "--standalone", "--nproc_per_node", "2", script, TRAIN, *options, *extra]
    together = launch([*pair, "train_batch_size=2", f"output_dir={tmp_path / 'two'}"])
    assert together.returncode == 0, together.stderr
    assert "2 per device x 2 process(es) x 1 accumulated" in together.stdout
    for file in ("ema", "ema_tracks", "speed"):
        first, second = (
            load_file(tmp_path / name / "checkpoint-54" / f"{file}.safetensors") for name in ("one", "two")
        )
        assert first.keys() == second.keys()
        for name, value in first.items():
            torch.testing.assert_close(value, second[name], rtol=1e-3, atol=1e-5)


def test_sample_takes_the_embedded_checkpoint_and_refuses_unknown_classes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "grid.png"
    options = [f"output={output}", "guidance_scale=1.5"]
    command = [sys.executable, "train_scripts/sample.py", *options]
    result = launch([*command, "class_labels=Sneaker,Dress", "num_inference_steps=4", "num_images_per_class=2"])
    assert result.returncode == 0, result.stderr
    assert output.stat().st_size > 1000
    # The script itself, but in this process, which has imported everything.
    for name in ("stdout", "stderr"):  # which a script puts others in the place of
        monkeypatch.setattr(sys, name, getattr(sys, name))
    monkeypatch.setattr(sys, "argv", ["sample.py", *options, "class_labels=Sneeker"])
    with pytest.raises(SystemExit) as exited:
        runpy.run_path(str(ROOT / "train_scripts/sample.py"), run_name="__main__")
    assert exited.value.code == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Unknown class label 'Sneeker'. Did you mean 'Sneaker'?" in lines[0]
