"""The trackers of a run: the same numbers and pictures in each, and every step once, whatever stops the run."""

import os
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from accelerate import Accelerator
from PIL import Image

from ..files import naming_disk_errors, write_text
from .told_trackers import Told, told_trackio, told_wandb

RUN_ID_FILE = "tracker_run_id"
"""In the folder of the logs: by what W&B and trackio find a run again."""

TENSORBOARD, WANDB, TRACKIO = "tensorboard", "wandb", "trackio"
PICTURES = "samples"

STEP = "step"
"""The axis of every curve in W&B, whose own counter takes no step twice: it would lose a picture that comes behind the
numbers of its step, and all that is told late."""


@dataclass(frozen=True)
class History:
    """What earlier starts of a run have left in its folder, up to the step that it resumes from.

    Attributes:
        numbers: Steps, each with what trackers were to be told of it, in order.
        pictures: Steps to files of their grids.
    """

    numbers: Sequence[tuple[int, Mapping[str, float]]] = ()
    pictures: Mapping[int, Path] = field(default_factory=dict)


@dataclass(frozen=True)
class _WithoutTensorBoard:
    """Tells errors of threads, but those of TensorBoard's writer.

    It keeps them for who writes next, which is told in one line; a traceback would come into that line's way.

    Attributes:
        tell: What told them before.
    """

    tell: Callable[[threading.ExceptHookArgs], object]

    def __call__(self, error: threading.ExceptHookArgs) -> None:
        if type(error.thread).__name__ != "_AsyncWriterThread":
            self.tell(error)


class Trackers:
    """Tells accelerate's trackers what a run has to say, each step once.

    A start takes steps again that a killed one had told. TensorBoard forgets those. W&B and trackio continue the run
    that they know by an id in the folder of the logs. They cannot forget, so they are asked what they have: the rest
    of the run's history is told late, and what they have is not told again. All others begin a run at each start.

    Args:
        accelerator: Accelerate's, made with the trackers' names.
        logs: Folder of the logs.
    """

    def __init__(self, accelerator: Accelerator, logs: Path) -> None:
        self.accelerator, self.logs, self.first_step = accelerator, logs, 0
        self._told: dict[str, Told] = {}
        self._told_now: set[tuple[str, int]] = set()

    def start(
        self,
        project: str,
        config: Mapping[str, Any],
        *,
        first_step: int,
        history: History,
        is_another_run: bool = False,
    ) -> None:
        """Starts them; every process must call it.

        Args:
            project: Their project.
            config: The options of the run, without lists or None.
            first_step: Step from which the run resumes, 0 for a new one.
            history: Of the run so far.
            is_another_run: Whether this start computes something else than the run so far.

        Raises:
            OSError: The disk is full, read-only or broken.
        """
        self.first_step = first_step
        if not isinstance(threading.excepthook, _WithoutTensorBoard):
            threading.excepthook = _WithoutTensorBoard(threading.excepthook)
        with naming_disk_errors(self.logs):
            self.accelerator.init_trackers(project, dict(config), self._options(is_another_run))
            for tracker in self._running():
                if tracker.name == WANDB:
                    tracker.run.define_metric(STEP)
                    tracker.run.define_metric("*", step_metric=STEP)
                    self._told[WANDB] = told_wandb(tracker.run, self._wandb_folder(), STEP)
                elif tracker.name == TRACKIO:
                    self._told[TRACKIO] = told_trackio(tracker.run)
            for tracker in self._running():
                if tracker.name in self._told and not is_another_run:
                    self._tell_the_rest(tracker, history)

    def _tell_the_rest(self, tracker: Any, history: History) -> None:
        for step, values in history.numbers:
            if self._wants(tracker, next(iter(values)), step):
                _tell(tracker, values, step)
        for step, path in history.pictures.items():
            if self._wants(tracker, PICTURES, step):
                _show(tracker, _pixels(path), step)

    def _options(self, is_another_run: bool) -> dict[str, dict[str, Any]]:
        """What trackers need to know of this start, by the tracker's name."""
        options: dict[str, dict[str, Any]] = {TENSORBOARD: {"purge_step": self.first_step + 1}}
        names = {str(getattr(name, "value", name)) for name in self.accelerator.log_with}
        if self.accelerator.is_main_process and names & {WANDB, TRACKIO}:
            folder, run_id = self.logs.resolve().parent.name, self._run_id(is_another_run)
            options[WANDB] = {"id": run_id, "name": folder, "resume": "allow", "dir": str(self._wandb_folder())}
            options[TRACKIO] = {"name": f"{folder}-{run_id}", "resume": "allow", "embed": False}
        return options

    def _wandb_folder(self) -> Path:
        return Path(os.environ.get("WANDB_DIR") or self.logs)

    def _run_id(self, is_another_run: bool) -> str:
        """The id of the run in W&B and trackio, kept in the folder of the logs."""
        path = self.logs / RUN_ID_FILE
        if not is_another_run:
            with suppress(OSError, UnicodeDecodeError):
                if (known := path.read_text("utf-8").strip()).isalnum():
                    return known
        self.logs.mkdir(parents=True, exist_ok=True)
        run_id = uuid.uuid4().hex[:8]
        write_text(path, run_id)
        return run_id

    def _running(self) -> list[Any]:
        """The trackers, in the process that they run in."""
        return list(self.accelerator.trackers) if self.accelerator.is_main_process else []

    def _wants(self, tracker: Any, name: str, step: int, is_known: bool = False) -> bool:
        if tracker.name == TENSORBOARD:  # it has forgotten what is later than the first step
            return not (is_known and step <= self.first_step)
        return (name, step) not in self._told.get(tracker.name, ())

    def log(self, values: Mapping[str, float], step: int, *, is_known: bool = False) -> None:
        """Tells them numbers.

        Args:
            values: Names to numbers.
            step: Optimizer steps done.
            is_known: Whether the folder of the run shows that an earlier start has told them.

        Raises:
            OSError: The disk is full, read-only or broken.
        """
        name = next(iter(values))
        if (name, step) in self._told_now:  # the last validation, which is the result's too
            return
        self._told_now.add((name, step))
        with naming_disk_errors(self.logs):
            for tracker in self._running():
                if self._wants(tracker, name, step, is_known):
                    _tell(tracker, values, step)

    def log_picture(self, path: Path, step: int, *, is_known: bool = False) -> None:
        """Shows a grid to those that show pictures here: TensorBoard, W&B, trackio.

        Args:
            path: The file.
            step: Optimizer steps done.
            is_known: As in `log`.

        Raises:
            OSError: The disk is full, read-only or broken.
        """
        if (PICTURES, step) in self._told_now:
            return
        self._told_now.add((PICTURES, step))
        with naming_disk_errors(self.logs):
            for tracker in self._running():
                if self._wants(tracker, PICTURES, step, is_known):
                    _show(tracker, _pixels(path), step)


def _pixels(path: Path) -> npt.NDArray[np.uint8]:
    """A picture, uint8 (height, width, 3)."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def _tell(tracker: Any, values: Mapping[str, float], step: int) -> None:
    if tracker.name == WANDB:
        tracker.run.log({**values, STEP: step})
    else:
        tracker.log(dict(values), step=step)


def _show(tracker: Any, pixels: npt.NDArray[np.uint8], step: int) -> None:
    if tracker.name == TENSORBOARD:
        tracker.log_images({PICTURES: pixels[None]}, step=step, dataformats="NHWC")
        tracker.writer.flush()  # as accelerate does with numbers: a kill before the next would cost the picture
    elif tracker.name == WANDB:
        import wandb

        tracker.run.log({PICTURES: wandb.Image(pixels), STEP: step})
    elif tracker.name == TRACKIO:
        import trackio

        tracker.run.log({PICTURES: trackio.Image(pixels)}, step=step)
