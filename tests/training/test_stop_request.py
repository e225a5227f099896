"""Signals: what asks a run to stop, what is one request, and what ends at once."""

import fcntl
import json
import os
import pty
import signal
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from speed_diffusers.training.step_log import StepLog
from speed_diffusers.training.stop_request import STOP_SIGNALS, StopRequest


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """No signal is ignored, whatever started the tests; afterwards all is as it was."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    for number in set(STOP_SIGNALS) - {signal.SIGINT}:
        signal.signal(number, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_is_noted_and_may_come_twice_at_once(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StopRequest, "SECONDS_OF_ONE_REQUEST", 60.0)  # of a machine that is busy too
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert stop.number == 0
        for each in (number, number, signal.SIGTERM, signal.SIGHUP):
            os.kill(os.getpid(), each)
        assert stop.number == number, "the first of them"
    assert signal.getsignal(number) == before


def test_only_an_insistent_user_ends_a_run_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[int] = []
    monkeypatch.setattr(signal, "raise_signal", ended.append)
    monkeypatch.setattr(StopRequest, "SECONDS_OF_ONE_REQUEST", 0.0)
    with StopRequest():
        # SLURM warns, then asks; neither is a second word.
        for each in (signal.SIGUSR1, signal.SIGUSR1, signal.SIGHUP, signal.SIGHUP, signal.SIGTERM):
            os.kill(os.getpid(), each)
        assert ended == []
        os.kill(os.getpid(), signal.SIGTERM)
        assert ended == [signal.SIGTERM] and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_what_nohup_had_ignored_stays_ignored() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.number == 0 and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_slurms_warning_saves_the_state(
    train: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = StepLog.add

    def warned(log: StepLog, step: object) -> None:
        add(log, step)  # type: ignore[arg-type]
        if log.steps and step.done == 3:  # type: ignore[attr-defined]
            os.kill(os.getpid(), signal.SIGUSR1)

    monkeypatch.setattr(StepLog, "add", warned)
    with pytest.raises(SystemExit) as stopped:
        train(tmp_path / "run")
    assert stopped.value.code == 128 + signal.SIGUSR1
    assert json.loads((tmp_path / "run" / "checkpoint-3" / "state.json").read_text())["step"] == 3


TALKING = """
import sys, time
from speed_diffusers.config.command_line import run_script
from speed_diffusers.training.stop_request import StopRequest

def main(argv):
    with StopRequest() as stop:
        while not stop.number:
            print("working", flush=True)
            time.sleep(0.01)
        for stream in (sys.stdout, sys.stderr):
            print("saving", file=stream, flush=True)
        open(argv[0], "w").write("saved")

run_script(main)
"""


def test_a_terminal_that_closes_lets_the_state_be_saved(tmp_path: Path) -> None:
    ours, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", TALKING, str(tmp_path / "state")],
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(terminal)
    assert b"working" in os.read(ours, 1000)
    os.close(ours)
    assert process.wait(60) == 0
    assert (tmp_path / "state").read_text() == "saved"
