"""Stopping on a signal, at the same step on all processes."""

import signal
import sys
import time
from types import FrameType

import torch

from .run import TrainingRun

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Notes SIGTERM and Ctrl-C, so that the state is saved before the end; a second signal ends at once.

    A single process stops after the step at hand. Several agree on it every 5 seconds or so, counted in steps, because
    they must stop at the same one.
    """

    SECONDS_BETWEEN_LOOKS = 5.0

    def __init__(self) -> None:
        self.number = 0
        self.next_look = 0
        self.looked_at: tuple[int, float] | None = None

    def __enter__(self) -> "StopRequest":
        self._handlers = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        print("Stopping: the state will be saved within seconds; a second signal ends at once.", file=sys.stderr)
        for each in STOP_SIGNALS:
            signal.signal(each, signal.SIG_DFL)

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
