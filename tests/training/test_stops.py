"""A run that is stopped again and again, wherever it is, ends as one that was left alone."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tensorboard.summary.writer import event_file_writer

from run_outputs import assert_same_run, tensorboard_scalars
from speed_diffusers.training import results, step
from speed_diffusers.training.stop_request import StopRequest

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

STOPS: dict[str, tuple[Any, str, int, tuple[signal.Signals, ...], int]] = {
    "in the first step": (step, "draws_of", 1, (signal.SIGTERM,), 1),
    "inside an accumulation window": (step, "_learn", 6, (signal.SIGTERM,), 3),
    "while a grid is made": (results, "save_grid", 1, (signal.SIGTERM, signal.SIGTERM), 5),
    "within a save, by two signals": (results, "save_checkpoint", 1, (signal.SIGINT, signal.SIGTERM), 7),
}
"""What is called how often, from the start before, when which signals come; and the step that is then saved."""


def signalling(called: Callable[..., Any], number: int, signals: tuple[signal.Signals, ...]) -> Callable[..., Any]:
    """A function in whose so many-th call signals come first."""
    calls: list[None] = []

    def call(*arguments: Any, **given: Any) -> Any:
        calls.append(None)
        for each in signals if len(calls) == number else ():
            os.kill(os.getpid(), each)
        return called(*arguments, **given)

    return call


def test_a_chain_of_stops_is_the_run_that_was_never_stopped(
    train: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StopRequest, "SECONDS_OF_ONE_REQUEST", 60.0)  # of a machine that is busy too
    # All starts are of one process here, and TensorBoard's reader sorts their files by second and number, as text.
    monkeypatch.setattr(event_file_writer._global_uid, "_value", 10**6)
    options = ["train_batch_size=1", "gradient_accumulation_steps=4", "checkpointing_steps=6", "validation_steps=4"]
    options += ["random_flip=true", "report_to=tensorboard", "logging_steps=5", "num_validation_images=1"]
    whole = train(tmp_path / "whole", *options)
    broken = tmp_path / "broken"
    for where, (owner, name, number, signals, saved) in STOPS.items():
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
            patch.setattr(owner, name, signalling(getattr(owner, name), number, signals))
            train(broken, *options, "resume_from_checkpoint=latest")
        assert stopped.value.code == 128 + signals[0], where
        assert (broken / f"checkpoint-{saved}").is_dir(), where
    # The seventh step crosses the turn of an epoch: 26 images in batches of 4.
    train(broken, *options, "resume_from_checkpoint=latest")
    assert_same_run(whole, broken, 12)
    # At its last step there is nothing left to train, and the results are made again.
    train(broken, *options, "resume_from_checkpoint=latest")
    assert_same_run(whole, broken, 12)
    assert tensorboard_scalars(broken) == tensorboard_scalars(whole)
    for picture in ("samples.png", "validation/step-0000004.png", "validation/step-0000012.png"):
        assert (broken / picture).read_bytes() == (whole / picture).read_bytes()


def test_no_token_is_written_anywhere(
    train: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    secrets = {name: f"secret-{name.lower()}" for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY")}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    train(tmp_path / "run", "max_train_steps=1", "lr_warmup_steps=0", "report_to=tensorboard")
    written = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(written) > 10
    assert not [path for path in written if b"secret-" in path.read_bytes()]
    assert "secret-" not in "".join(capfd.readouterr())
