"""Scores over a training: by optimizer steps, by images seen and by time, one line per run."""

import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..errors import InputError
from .protocol import require_equal_protocols
from .score_record import ScoreRecord

Place = Callable[[ScoreRecord], float | None]

PANELS: dict[str, Place] = {
    "optimizer steps": lambda record: record.step,
    "images seen": lambda record: record.images_seen,
    "minutes of training": lambda record: None if record.training_seconds is None else record.training_seconds / 60,
}
"""What may stand on the x axis, and where it is found."""

METRIC_NAMES = {
    "frechet_distance": "Fréchet distance (lower is better)",
    "kernel_distance": "kernel distance (lower is better)",
    "precision": "precision (higher is better)",
    "recall": "recall (higher is better)",
    "class_agreement": "class agreement (higher is better)",
    "fid": "FID (lower is better)",
    "sfid": "sFID (lower is better)",
    "clean_fid": "clean FID (lower is better)",
    "kid": "KID (lower is better)",
    "clean_kid": "clean KID (lower is better)",
    "inception_score": "Inception Score (higher is better)",
    "fd_dinov2": "FD-DINOv2 (lower is better)",
    "cmmd": "CMMD (lower is better)",
    "clip_score": "CLIP score (higher is better)",
}


@dataclass(frozen=True)
class ScoreCurve:
    """The scores of one run.

    Attributes:
        name: For the legend.
        records: Its scores, each with its step.
    """

    name: str
    records: Sequence[ScoreRecord]


def save_score_curves(curves: Sequence[ScoreCurve], path: Path, *, metric: str = "frechet_distance") -> list[str]:
    """Saves a PNG of a metric over training, a panel each for the x axes that all scores know.

    Args:
        curves: The runs. Scores without a step are left out.
        path: File to write; its folder is made.
        metric: Name of a number that all scores hold; on a logarithmic axis if it spans a decade.

    Returns:
        The x axes left out because some score does not know its place on them.

    Raises:
        InputError: Two scores were measured under different protocols, one lacks the metric, or none has a step.
    """
    lines = {curve.name: _in_order(curve.records, metric) for curve in curves}
    records = [record for line in lines.values() for record in line]
    if not records:
        raise InputError(f"There is no score with a step and {metric}, so there is no curve to plot.")
    require_equal_protocols(
        {f"{name}, step {record.step}": record.score.protocol for name, line in lines.items() for record in line}
    )
    shown = {label: place for label, place in PANELS.items() if None not in map(place, records)}
    figure = Figure(figsize=(5 * len(shown), 4.4), dpi=110, layout="constrained")
    for axes, (label, place) in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown.items(), strict=True):
        for name, line in lines.items():
            if line:
                values = [record.score.values[metric] for record in line]
                # A legend leaves out what begins with an underscore.
                label_text = f" {name}" if name.startswith("_") else name
                axes.plot([place(record) for record in line], values, marker="o", markersize=4, label=label_text)
        _decorate(axes, label, metric, [record.score.values[metric] for record in records])
    for text in figure.axes[0].legend(frameon=False, fontsize=9).get_texts():
        text.set_parse_math(False)  # a run may be called $a_$b, which is no formula
    words = records[0].score.protocol.in_words()
    figure.suptitle("\n".join(textwrap.wrap(words, width=62 * len(shown))), fontsize=9, parse_math=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")
    return [label for label in PANELS if label not in shown]


def save_sweep(lines: Mapping[str, Sequence[tuple[float, float]]], path: Path, *, metric: str, label: str) -> None:
    """Saves a PNG of a metric over an option that was swept.

    Args:
        lines: Points (value of the option, score) in their order, by the name of what was scored.
        path: File to write; its folder is made.
        metric: Name of the number.
        label: The option, for the axis.
    """
    figure = Figure(figsize=(5.6, 4.4), dpi=110, layout="constrained")
    axes = figure.subplots()
    for name, points in lines.items():
        x, values = zip(*points, strict=True)
        axes.plot(x, values, marker="o", markersize=4, label=f" {name}" if name.startswith("_") else name)
    _decorate(axes, label, metric, [value for points in lines.values() for _, value in points])
    for text in axes.legend(frameon=False, fontsize=9).get_texts():
        text.set_parse_math(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")


def _in_order(records: Sequence[ScoreRecord], metric: str) -> list[ScoreRecord]:
    """The scores that have a step and the metric, by step."""
    found = [record for record in records if record.step is not None and record.score.values.get(metric) is not None]
    return sorted(found, key=lambda record: record.step or 0)


def _decorate(axes: Axes, label: str, metric: str, values: Sequence[float | None]) -> None:
    numbers = [value for value in values if value is not None]
    if min(numbers) > 0 and max(numbers) / min(numbers) >= 10:
        axes.set_yscale("log")
    axes.set_xlabel(label)
    axes.set_ylabel(METRIC_NAMES.get(metric, metric.replace("_", " ")))
    axes.xaxis.set_major_formatter(lambda value, _: _short_number(value))
    axes.grid(alpha=0.25, which="both")


def _short_number(value: float) -> str:
    """A number for an axis: 0.5, 800, 20 k, 1.2 M."""
    if abs(value) >= 1e6:
        return f"{value / 1e6:g} M"
    return f"{value / 1e3:g} k" if abs(value) >= 1e4 else f"{value:g}"
