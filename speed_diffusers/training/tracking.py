"""Metrics of a run: `metrics.jsonl` always, and accelerate's trackers by name."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

from ..errors import InputError, unknown_name
from ..files import write_text

_PACKAGES = {"comet_ml": "comet-ml"}
"""Trackers whose package on the index has another name than the tracker."""


def check_trackers(names: Sequence[str]) -> None:
    """Checks that every tracker exists and is installed; accelerate itself only warns and leaves it out.

    Raises:
        InputError: Unknown tracker, or its package is missing; the message gives the pip line.
    """
    known = [str(kind) for kind in LOGGER_TYPE_TO_CLASS]
    available = [str(getattr(kind, "value", kind)) for kind in get_available_trackers()]
    for name in names:
        if name not in known:
            raise unknown_name("tracker (report_to)", name, known)
        if name not in available:
            raise InputError(f"report_to={name}: not installed; run: pip install {_PACKAGES.get(name, name)}")


class MetricsFile:
    """A JSON object per line, appended to and flushed at once.

    Args:
        path: File to write.
        first_step: Step from which the run resumes: lines of later steps, written before a crash, are dropped, and so
            is a last line that was cut short.
    """

    def __init__(self, path: Path, first_step: int = 0) -> None:
        kept = [] if first_step == 0 or not path.exists() else read_metrics(path)
        lines = [json.dumps(values) for values in kept if values["step"] <= first_step]
        write_text(path, "".join(f"{line}\n" for line in lines))
        self._path = path

    def write(self, values: Mapping[str, Any]) -> None:
        """Appends one line; values are what JSON takes."""
        with self._path.open("a") as file:
            file.write(json.dumps(dict(values)) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a run's `metrics.jsonl`, without a last one that was cut short.

    Raises:
        InputError: There is no such file.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file; a run writes it while it trains.")
    records = []
    for line in path.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records
