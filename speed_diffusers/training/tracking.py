"""Metrics of a run: `metrics.jsonl` always, and accelerate's trackers by name."""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

from ..error_bins import ERRORS_KEY, ErrorBins
from ..errors import InputError, unknown_name
from ..files import naming_disk_errors, write_text

logger = logging.getLogger(__name__)

_PACKAGES = {"comet_ml": "comet-ml"}
"""Trackers whose package on the index has another name than the tracker."""


NONE, ALL = "none", "all"
"""What diffusers' scripts take instead of the trackers' names."""


def tracker_names(report_to: Sequence[str]) -> list[str]:
    """The trackers that an option asks for: those named, or every one that is installed for "all"; "none" is none.

    Raises:
        InputError: "none" stands beside others.
    """
    if NONE in report_to and set(report_to) != {NONE}:
        raise InputError(f"report_to={','.join(report_to)}: '{NONE}' stands alone.")
    if ALL in report_to:
        return _available()
    return [name for name in report_to if name != NONE]


def _available() -> list[str]:
    return [str(getattr(kind, "value", kind)) for kind in get_available_trackers()]


def check_trackers(report_to: Sequence[str], project: str = "") -> None:
    """Checks that every tracker exists and is installed; accelerate itself only warns and leaves it out.

    Args:
        report_to: Names of trackers, or "all" or "none".
        project: The project's name, of which TensorBoard makes a folder.

    Raises:
        InputError: Unknown tracker, or its package is missing (the message gives the pip line), or the project's
            folder would lie outside the run.
    """
    known = [str(kind) for kind in LOGGER_TYPE_TO_CLASS]
    available, names = _available(), tracker_names(report_to)
    if "tensorboard" in names and (Path(project).anchor or ".." in Path(project).parts):
        raise InputError(
            f"tracker_project_name={project}: tensorboard makes a folder of it in the logs of the run; it must not "
            "begin at the root nor hold '..'."
        )
    for name in names:
        if name not in known:
            raise unknown_name("tracker (report_to)", name, [*known, ALL, NONE])
        if name not in available:
            raise InputError(f"report_to={name}: not installed; run: pip install {_PACKAGES.get(name, name)}")


class MetricsFile:
    """A JSON object per line, appended to and flushed at once.

    Args:
        path: File to write.
        first_step: Step from which the run resumes: lines of later steps, written before a crash, are dropped, and so
            are lines that cannot be read.
    """

    def __init__(self, path: Path, first_step: int = 0) -> None:
        kept = [] if first_step == 0 or not path.exists() else read_metrics(path)
        lines = [json.dumps(values) for values in kept if values["step"] <= first_step]
        write_text(path, "".join(f"{line}\n" for line in lines))
        self._path = path

    def write(self, values: Mapping[str, Any]) -> None:
        """Appends one line; values are what JSON takes."""
        with naming_disk_errors(self._path), self._path.open("a") as file:
            file.write(json.dumps(dict(values)) + "\n")


def tracked_values(line: Mapping[str, Any], num_train_timesteps: int) -> dict[str, float]:
    """What trackers are told of a line of `metrics.jsonl`: its numbers, and the errors by their ranges of timesteps.

    Args:
        line: From `read_metrics`.
        num_train_timesteps: T of the run.
    """
    values = {name: value for name, value in line.items() if isinstance(value, int | float) and name != "step"}
    edges = ErrorBins(num_train_timesteps).edges
    for first, end, mean in zip(edges, edges[1:], line.get(ERRORS_KEY, ()), strict=False):
        if mean is not None:
            values[f"{ERRORS_KEY}/{first:04d}-{end - 1:04d}"] = mean
    return values


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a run's `metrics.jsonl`, without a last one that was cut short.

    Any other line that is no record with a step is left out with a warning that gives its number.

    Raises:
        InputError: There is no such file.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file; a run writes it while it trains.")
    records = []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
        elif number < len(lines):  # behind the last newline stands nothing, or what a killed process was writing
            logger.warning("%s, line %d: no record of a step; it is left out.", path, number)
    return records
