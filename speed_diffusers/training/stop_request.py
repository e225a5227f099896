"""Stopping on a signal, at the same step on all processes."""

import os
import signal
import time
from contextlib import suppress
from types import FrameType

import torch

from .run import TrainingRun

NAMES = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1")
STOP_SIGNALS = tuple(getattr(signal, name) for name in NAMES if hasattr(signal, name))
"""What asks a run to stop: kill, Ctrl-C, a terminal that closes, SLURM's warning. Windows lacks the last two."""


class StopRequest:
    """Notes a signal, so that the state is saved before the end; SIGTERM or Ctrl-C a second time ends at once.

    Launchers and schedulers pass on what the process has received already, so a signal that comes again within a
    second is the same request. SIGHUP and SIGUSR1 are warnings and never end at once. A signal that was ignored
    before, as nohup has SIGHUP, stays so.

    A single process stops after the step at hand. Several agree on it every 5 seconds or so, counted in steps, because
    they must stop at the same one.
    """

    SECONDS_BETWEEN_LOOKS = 5.0
    SECONDS_OF_ONE_REQUEST = 1.0

    def __init__(self) -> None:
        self.received: dict[int, float] = {}
        """When each signal came first, in the order in which they came."""
        self.next_look = 0
        self.looked_at: tuple[int, float] | None = None

    def __enter__(self) -> "StopRequest":
        # Shells have whatever they start in the background ignore Ctrl-C; it can be sent on purpose all the same.
        heard = [each for each in STOP_SIGNALS if each == signal.SIGINT or signal.getsignal(each) != signal.SIG_IGN]
        self._handlers = {number: signal.signal(number, self._note) for number in heard}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    @property
    def number(self) -> int:
        """The signal that came first; 0 if there was none."""
        return next(iter(self.received), 0)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.received:
            _say("Stopping: the state will be saved within seconds; Ctrl-C or SIGTERM a second time ends at once.\n")
        first = self.received.setdefault(number, now)
        if number in (signal.SIGTERM, signal.SIGINT) and now - first > self.SECONDS_OF_ONE_REQUEST:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    def look(self, run: TrainingRun, done: int) -> int | None:
        """The signal that any process has received, the same on all of them; None if there was none to see yet."""
        if run.accelerator.num_processes == 1:
            return self.number or None
        if done < self.next_look:
            return None
        now = time.monotonic()
        step, time_then = self.looked_at or (done - 1, now)
        self.looked_at = (done, now)
        mine = torch.tensor([[float(self.number), (now - time_then) / (done - step)]], device=run.accelerator.device)
        number, seconds_per_step = run.accelerator.gather(mine).amax(0).tolist()
        # The first look has nothing to measure by, and the second comes with the next step.
        steps = int(self.SECONDS_BETWEEN_LOOKS / seconds_per_step) if seconds_per_step else 1
        self.next_look = done + max(1, steps)
        return int(number) or None


def _say(text: str) -> None:
    """Writes to stderr past its buffer, in whose midst the signal may have come."""
    with suppress(OSError):
        os.write(2, text.encode())
