"""The course of a training in one picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from .plots import add_legend, save_png

Points = Sequence[tuple[float, float]]
"""Optimizer steps and values."""


def save_training_curve(panels: Mapping[str, Mapping[str, Points]], title: str, path: Path) -> None:
    """Saves a PNG with one panel per quantity over optimizer steps.

    Args:
        panels: Name of each quantity, for its axis, and its lines by name; a single line needs no legend. At least
            one, and no line is empty.
        title: What the picture shows.
        path: PNG file to write.
    """
    figure = Figure(figsize=(4.6 * len(panels) + 0.4, 3.6), dpi=110, layout="constrained")
    for axes, (quantity, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for name, points in lines.items():
            steps, values = zip(*points, strict=True)
            axes.plot(steps, values, linewidth=1.5, marker="o" if len(points) < 30 else "", markersize=3, label=name)
        axes.set(xlabel="optimizer step", ylabel=quantity)
        axes.set_xlim(left=0)
        axes.grid(alpha=0.25)
        if len(lines) > 1:
            add_legend(axes)
    figure.suptitle(title, fontsize=10, parse_math=False)
    save_png(figure, path)
