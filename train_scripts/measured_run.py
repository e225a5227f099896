"""The training loop in a temporary folder for a number of steps, for those who measure it."""

import tempfile
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import fields, replace
from typing import TypeVar, cast

from run_results import tracker_config
from speed_diffusers.train_config import TrainConfig
from train_dit_speed import StopRequest, train
from training_setup import Inputs, TrainingRun, check_inputs, start_run

T = TypeVar("T")

TRACKERS = ("tensorboard",)
"""Trackers that write to the folder of the run and nowhere else."""


def trainer_options(config: TrainConfig) -> TrainConfig:
    """The trainer's own options out of those of a script that has some more."""
    return TrainConfig(**{field.name: getattr(config, field.name) for field in fields(TrainConfig)})


@contextmanager
def temporary_run(
    config: TrainConfig, *, steps: int, change: Callable[[Inputs], Inputs] = lambda inputs: inputs
) -> Iterator[TrainingRun]:
    """A run that can take `steps` steps and leaves nothing behind but cached latents.

    Args:
        config: Options of the trainer. The folder of the run is a temporary one, its length is `steps`, and trackers
            that write elsewhere are left out.
        steps: What `run_steps` is going to take.
        change: Replaces parts of the run before it starts.

    Raises:
        InputError: As `check_inputs`.
    """
    with tempfile.TemporaryDirectory(prefix="speed-diffusers-") as folder:
        config = replace(
            config,
            output_dir=folder,
            # One more than are taken: the last step of a run saves and exports.
            max_train_steps=steps + 1,
            report_to=[name for name in config.report_to if name in TRACKERS],
            resume_from_checkpoint=None,
            overwrite_output_dir=False,
        )
        run = start_run(change(check_inputs(config)))
        run.accelerator.init_trackers(config.tracker_project_name, tracker_config(config))
        try:
            yield run
        finally:
            run.accelerator.end_training()
            if run.lock is not None:
                run.lock.release()


def run_steps(run: TrainingRun, measurement: Generator[None, None, T]) -> T:
    """Takes steps by the training script's own loop, for as long as a measurement asks for them.

    Args:
        run: A `temporary_run` of at least so many steps.
        measurement: Each `yield` is one step: from where the loop looks for stop requests, between two steps, to where
            it does so again. What it returns ends the loop.

    Returns:
        What the measurement returned.
    """
    with closing(measurement):
        next(measurement)
        try:
            train(run, _MeasuredStop(measurement))
        except _Enough as enough:
            return cast(T, enough.result)
    raise ValueError(f"The measurement took more than the {run.config.max_train_steps - 1} steps of its run.")


class _Enough(Exception):
    """Leaves the loop without saving anything, with the result of the measurement."""

    def __init__(self, result: object) -> None:
        super().__init__()
        self.result = result


class _MeasuredStop(StopRequest):
    """Hands over to the measurement where the loop asks whether it is to stop; takes no signals."""

    def __init__(self, measurement: Generator[None, None, object]) -> None:
        super().__init__()
        self.measurement = measurement

    def look(self, run: TrainingRun, done: int) -> int | None:
        try:
            next(self.measurement)
        except StopIteration as end:
            raise _Enough(end.value) from None
        return None
