"""What a page shows of one or several runs, read from their folders, as JSON values."""

import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from ..config.load import config_dict
from ..config.published import published
from ..config.schema import default_of
from ..error_bins import ErrorHistory
from ..errors import InputError
from ..metrics.curves import METRIC_NAMES
from ..metrics.score_record import ScoreRecord, load_scores
from ..reports.strategy_curves import DIGITS, strategy_curves
from ..reports.strategy_report import own_name
from ..reports.web_page import image_url
from ..version import __version__
from .config import TARGET_OPTIONS, TrainConfig
from .parts import make_scheduler
from .run_folder import (
    LOSS_FILE,
    METRICS_FILE,
    SAMPLES_FILE,
    SCORES_FOLDER,
    VALIDATION_FOLDER,
    load_run_config,
)
from .tracking import read_metrics

logger = logging.getLogger(__name__)

MAX_RECORDS = 800
"""Points of a curve over training; of more lines each point is the mean of several."""

MAP_COLUMNS = 120
"""Columns of a map of errors over training."""

LOGGED = ("loss", "variance_bits", "grad_norm", "learning_rate", "images_per_second")
"""Numbers of the log that are plotted as they are; the unweighted errors are treated by themselves."""

ROUNDED = f".{DIGITS}g"


@dataclass(frozen=True)
class ReportedRun:
    """What the folder of a run holds for a report.

    Attributes:
        name: How the run is called on the page.
        config: Its options.
        records: Lines of `metrics.jsonl`; none before the first was written.
        validation: Lines of `validation/loss.jsonl`.
        grids: Grids of samples by their step.
        scores: Its scores, by step.
    """

    name: str
    config: TrainConfig
    records: list[dict[str, Any]]
    validation: list[dict[str, Any]]
    grids: dict[int, Path]
    scores: list[ScoreRecord]

    @classmethod
    def read(cls, folder: Path, name: str) -> "ReportedRun":
        """Reads a folder; what the run has not written yet is empty.

        Raises:
            InputError: The folder holds no run.
        """
        config = load_run_config(folder)
        validation = folder / VALIDATION_FOLDER
        grids = {int(path.stem.removeprefix("step-")): path for path in sorted(validation.glob("step-*[0-9].png"))}
        if (folder / SAMPLES_FILE).is_file():
            grids.setdefault(config.max_train_steps, folder / SAMPLES_FILE)
        return cls(
            name,
            config,
            _lines(folder / METRICS_FILE),
            _lines(validation / LOSS_FILE),
            grids,
            load_scores(folder / SCORES_FOLDER),
        )

    @cached_property
    def global_batch(self) -> float | None:
        """Images of an optimizer step; None before the first line of the log."""
        counted = [(line["images_seen"], line["step"]) for line in self.records if "images_seen" in line]
        return counted[-1][0] / counted[-1][1] if counted and counted[-1][1] else None

    def places(self, steps: Sequence[float]) -> dict[str, list[float | None]]:
        """Where steps lie on the three axes of a training: optimizer steps, images seen, seconds of training."""
        timed = [line for line in self.records if "seconds" in line]
        seconds: list[float | None] = [None] * len(steps)
        if timed:
            known, times = ([0.0, *(float(line[key]) for line in timed)] for key in ("step", "seconds"))
            seconds = [short(value) for value in np.interp(np.array(steps, float), known, times)]
        batch = self.global_batch
        return {
            "step": [float(step) for step in steps],
            "images": [None if batch is None else step * batch for step in steps],
            "seconds": seconds,
        }

    @cached_property
    def errors(self) -> ErrorHistory | None:
        """The unweighted errors that it logged; None before the first line."""
        try:
            return ErrorHistory.from_records(self.records, self.config.num_train_timesteps)
        except InputError:
            return None

    @property
    def target(self) -> tuple[Any, ...]:
        """What must be the same for errors at a timestep to be errors of the same thing."""
        return tuple(getattr(self.config, name) for name in TARGET_OPTIONS)


def report_data(folders: Sequence[Path], *, max_grids: int, max_image_width: int) -> dict[str, Any]:
    """All that a report shows, with a progress bar while pictures are encoded.

    Args:
        folders: Of the runs, none twice.
        max_grids: Grids of samples per run at most, evenly spread over the training, the last one among them.
        max_image_width: Pixels; wider grids are made smaller.

    Raises:
        InputError: A folder holds no run, or its options make no noise schedule.
    """
    runs = [ReportedRun.read(folder, name) for folder, name in zip(folders, run_names(folders), strict=True)]
    targets = list(dict.fromkeys(run.target for run in runs))
    grids = {(index, step) for index, run in enumerate(runs) for step in _spread(sorted(run.grids), max_grids)}
    pictures = {}
    for index, step in tqdm(sorted(grids), desc="Encoding grids", unit="grid"):
        if (url := image_url(runs[index].grids[step], max_image_width)) is not None:
            pictures[index, step] = url
    strategies, groups = _strategies(runs)
    return {
        "version": __version__,
        "runs": [
            {
                **_facts(run),
                "log": logged_curves(run),
                "validation": _validation(run),
                "grids": _grids(run, {step: url for (own, step), url in pictures.items() if own == index}),
                "errors": None if run.errors is None else _errors(run, run.errors),
                "target": targets.index(run.target),
                "process": groups[index],
            }
            for index, run in enumerate(runs)
        ],
        "targets": [target_in_words(run.config) for run in _firsts(runs, [targets.index(run.target) for run in runs])],
        "strategies": strategies,
        "scores": _scores(runs),
        "options": _options(runs),
    }


def run_names(folders: Sequence[Path]) -> list[str]:
    """The fewest last parts of each path that tell the folders apart; no more of the machine than that."""
    whole = [folder.resolve().parts for folder in folders]
    parts = 1
    while len({path[-parts:] for path in whole}) < len(whole):
        parts += 1
    return ["/".join(path[-parts:]) for path in whole]


def target_in_words(config: TrainConfig) -> str:
    """What a run's errors are errors of: the prediction and the noise schedule, for captions."""
    words = config.prediction_type.replace("_prediction", "-prediction")
    if config.prediction_type == "flow_prediction":
        return f"{words}, {config.num_train_timesteps:,} timesteps, shift {config.flow_shift:g}"
    zero = ", zero terminal SNR" if config.rescale_betas_zero_snr else ""
    return f"{words}, {config.beta_schedule} schedule of {config.num_train_timesteps:,} timesteps{zero}"


def short(value: object) -> float | None:
    """A number with as many digits as a page needs; None for what is none, or not finite."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(format(value, ROUNDED))


def _lines(path: Path) -> list[dict[str, Any]]:
    return read_metrics(path) if path.is_file() else []


def _spread(steps: Sequence[int], most: int) -> list[int]:
    """At most so many steps, evenly spread, the last one among them."""
    if len(steps) <= most:
        return list(steps)
    picked = np.linspace(len(steps) - 1, 0, most).round().astype(int)
    return [steps[index] for index in sorted(picked.tolist())]


def _firsts(runs: Sequence[ReportedRun], groups: Sequence[int]) -> list[ReportedRun]:
    """The first run of each group, in the order of the groups."""
    return [runs[groups.index(group)] for group in range(max(groups) + 1)]


def _facts(run: ReportedRun) -> dict[str, Any]:
    """What stands in the run's row of the overview."""
    config = run.config
    last = run.records[-1] if run.records else {}
    speeds = [line["images_per_second"] for line in run.records if short(line.get("images_per_second")) is not None]
    return {
        "name": run.name,
        "model": config.model,
        "target_words": target_in_words(config),
        "optimizer": f"{config.optimizer}, {config.learning_rate:g}, {config.lr_scheduler}",
        "step": last.get("step", 0),
        "max_steps": config.max_train_steps,
        "images": last.get("images_seen"),
        "global_batch": run.global_batch,
        "seconds": short(last.get("seconds")),
        "images_per_second": short(float(np.median(speeds))) if speeds else None,
        "mse": short(_mean_error(run.errors.merged(5))[-1]) if run.errors is not None else None,
        "validation_loss": short(run.validation[-1].get("validation_loss")) if run.validation else None,
    }


def _mean_error(history: ErrorHistory) -> list[float]:
    """Mean over all timesteps alike, of each group of records; NaN where some bin has no sample."""
    widths = np.diff(history.edges)
    means: list[float] = ((history.errors * widths).sum(1) / widths.sum()).tolist()
    return means


def logged_curves(run: ReportedRun) -> dict[str, Any]:
    """The curves of the log, thinned: where the points lie, and each number there."""
    groups = np.array_split(np.arange(len(run.records)), min(len(run.records), MAX_RECORDS) or 1)
    parts = [[run.records[index] for index in group] for group in groups if len(group)]
    known = [name for name in LOGGED if any(name in line for line in run.records)]
    return {
        **run.places([part[-1]["step"] for part in parts]),
        "values": {name: [_mean(line.get(name) for line in part) for part in parts] for name in known},
    }


def _mean(values: Any) -> float | None:
    found = [value for value in map(short, values) if value is not None]
    return short(sum(found) / len(found)) if found else None


def _validation(run: ReportedRun) -> dict[str, Any]:
    """The validation loss over training, and the last errors by log SNR."""
    levels = run.validation[-1].get("error_by_log_snr") if run.validation else None
    by_level = {float(level): short(error) for level, error in (levels or {}).items()}
    return {
        **run.places([line["step"] for line in run.validation]),
        "loss": [short(line.get("validation_loss")) for line in run.validation],
        "log_snr": list(by_level),
        "by_log_snr": list(by_level.values()),
    }


def _grids(run: ReportedRun, urls: Mapping[int, str]) -> list[dict[str, Any]]:
    places = run.places(list(urls))
    return [
        {"url": url, **{axis: values[index] for axis, values in places.items()}}
        for index, url in enumerate(urls.values())
    ]


def _errors(run: ReportedRun, errors: ErrorHistory) -> dict[str, Any]:
    """The unweighted errors over training and timesteps, and how often each range of timesteps was drawn."""
    columns, few = errors.merged(MAP_COLUMNS), errors.merged(60)
    log_snr = make_scheduler(run.config).speed_strategy.process.finite_log_snr
    edges = torch.tensor(errors.edges).clamp(max=len(log_snr) - 1)
    drawn = errors.counts.sum(0) / errors.counts.sum()
    return {
        "edges": errors.edges,
        "log_snr": [short(value) for value in log_snr[edges].tolist()],
        "steps": [0.0, *columns.steps.tolist()],
        "map": [[short(value) for value in row] for row in columns.errors.tolist()],
        "last": [short(value) for value in errors.merged(5).errors[-1].tolist()],
        "mean": {**run.places(few.steps.tolist()), "mse": [short(value) for value in _mean_error(few)]},
        "drawn": [short(value) for value in (drawn / np.diff(errors.edges) * errors.edges[-1]).tolist()],
    }


def _strategies(runs: Sequence[ReportedRun]) -> tuple[list[dict[str, Any]], list[int]]:
    """The curves of the runs' strategies, one group for each noise schedule, and the group of each run."""
    schedulers = []
    for run in runs:
        try:
            schedulers.append(make_scheduler(run.config))
        except InputError as error:
            raise InputError(f"{run.name}: {error}") from error
    areas = [scheduler.speed_areas for scheduler in schedulers]
    levels = [scheduler.speed_strategy.process.noise_level for scheduler in schedulers]
    groups: list[int] = []
    firsts: list[int] = []
    for index, level in enumerate(levels):
        same = [group for group, first in enumerate(firsts) if torch.equal(levels[first], level)]
        groups.append(same[0] if same else len(firsts))
        if not same:
            firsts.append(index)
    found = []
    for group, first in enumerate(firsts):
        own = [index for index in range(len(runs)) if groups[index] == group]
        tables = {runs[index].name: schedulers[index].speed_strategy.tables(0.0) for index in own}
        curves = strategy_curves(tables, areas[first])
        for index, curve in zip(own, curves["strategies"], strict=True):
            strategy = schedulers[index].speed_strategy
            curve |= {"run": index, "strategy": own_name(schedulers[index]), "changes": strategy.needs_progress}
            curve["learns"] = strategy.is_loss_aware
        found.append(curves | {"words": target_in_words(runs[first].config)})
    return found, groups


def _scores(runs: Sequence[ReportedRun]) -> dict[str, Any]:
    """All scores, and the protocols under which they were measured."""
    records = [(index, record) for index, run in enumerate(runs) for record in run.scores]
    protocols = []
    for _, record in records:
        if record.score.protocol not in protocols:
            protocols.append(record.score.protocol)
    measured = dict.fromkeys(name for _, record in records for name in record.score.values)
    numbers = [
        *(name for name in METRIC_NAMES if name in measured),
        *(name for name in measured if name not in METRIC_NAMES),
    ]
    return {
        "names": {name: METRIC_NAMES.get(name, name.replace("_", " ")) for name in numbers},
        "protocols": [
            {
                "words": protocol.in_words(),
                "parts": {name: in_words(value) for name, value in dataclasses.asdict(protocol).items()},
            }
            for protocol in protocols
        ],
        "rows": [
            {
                "run": index,
                "protocol": protocols.index(record.score.protocol),
                "step": record.step,
                "images": record.images_seen,
                "seconds": record.training_seconds,
                "values": {name: short(value) for name, value in record.score.values.items()},
            }
            for index, record in records
        ],
    }


def _options(runs: Sequence[ReportedRun]) -> list[dict[str, Any]]:
    """Every option with its help text and its value in each run."""
    configs = [config_dict(run.config) for run in runs]
    found = []
    for field in dataclasses.fields(TrainConfig):
        default = default_of(field)
        values = [config[field.name] for config in configs]
        found.append(
            {
                "name": field.name,
                "help": field.metadata["help"],
                "default": in_words(default),
                "values": [in_words(value) for value in values],
                "differs": any(value != values[0] for value in values),
                "changed": any(value != default for value in values),
            }
        )
    return found


def in_words(value: object) -> str:
    """A value as one writes it on a command line, without folders of the machine."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return ", ".join(map(in_words, value)) or "none"
    if isinstance(value, Mapping):
        return ", ".join(f"{name}={in_words(each)}" for name, each in value.items()) or "none"
    return f"{value:g}" if isinstance(value, float) else str(published(value))
