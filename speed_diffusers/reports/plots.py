"""Pictures of results."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from ..error_bins import ErrorHistory
from ..files import written_whole
from ..process import Areas

matplotlib.use("Agg")

AREA_SHADES = ("0.97", "0.93", "0.88")
"""Greys of the acceleration, deceleration and convergence areas."""

LONGEST_NAME = 200
"""Letters of a name that are shown; a picture has a largest width."""


def save_png(figure: Figure, path: Path, **options: Any) -> None:
    """Saves a figure as PNG, whole or not at all; options are those of `savefig`."""
    with written_whole(path) as temporary:
        figure.savefig(temporary, format="png", **options)


def shown_name(name: str) -> str:
    """A name for a legend, which leaves out those that begin with an underscore, or for an axis, cut where endless."""
    name = name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}\N{HORIZONTAL ELLIPSIS}"
    return f" {name}" if name.startswith("_") else name


def add_legend(axes: Axes) -> None:
    """A legend whose texts are what they are: runs and classes may be called `$a_$b`, which is no formula."""
    for text in axes.legend(fontsize=8).get_texts():
        text.set_parse_math(False)


def mosaic(images: npt.NDArray[np.float32], columns: int, gap: int = 2) -> npt.NDArray[np.uint8]:
    """Images side by side, row by row, with white gaps.

    Args:
        images: (N, H, W, 3) in [0, 1].
        columns: Images per row; N is a multiple of it.
        gap: Pixels between images.

    Returns:
        uint8 (height, width, 3).
    """
    count, height, width, _ = images.shape
    rows = count // columns
    sheet = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, dtype=np.uint8)
    pixels = (images.clip(0, 1) * 255).round().astype(np.uint8)
    for index, image in enumerate(pixels):
        top, left = (index // columns) * (height + gap), (index % columns) * (width + gap)
        sheet[top : top + height, left : left + width] = image
    return sheet


def save_class_grid(
    images: npt.NDArray[np.float32], row_names: Sequence[str], title: str, path: Path, gap: int = 2
) -> None:
    """Saves a PNG with one row of images per class, the class's name at the left and a title above.

    Args:
        images: (rows x columns, H, W, 3) in [0, 1], row by row.
        row_names: Name of each row.
        title: What the picture shows.
        path: PNG file to write.
        gap: Pixels between images.
    """
    columns = len(images) // len(row_names)
    height = images.shape[1]
    sheet = mosaic(images, columns, gap)
    # A pixel of a small image becomes a whole number of pixels on the page, so that nothing is blurred.
    scale = max(1, round(64 / height))
    dpi = 100
    names = [shown_name(name) for name in row_names]
    label_inches = 0.09 * max(map(len, names)) + 0.3
    size = (sheet.shape[1] * scale / dpi + label_inches, sheet.shape[0] * scale / dpi + 0.5)
    figure = Figure(figsize=size, dpi=dpi)
    axes = figure.add_axes(
        (
            label_inches / size[0],
            0.0,
            sheet.shape[1] * scale / dpi / size[0],
            sheet.shape[0] * scale / dpi / size[1],
        )
    )
    axes.imshow(sheet, interpolation="nearest")
    axes.set_yticks([row * (height + gap) + height / 2 for row in range(len(names))], names, parse_math=False)
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    figure.text(0.5, 1 - 0.25 / size[1], title, ha="center", va="center", fontsize=10, parse_math=False)
    save_png(figure, path, dpi=dpi)


def save_error_map(history: ErrorHistory, areas: Areas, title: str, path: Path) -> None:
    """Saves a PNG of a run's unweighted errors: over training and timesteps, and by timestep at four moments.

    Args:
        history: What the run logged.
        areas: The three areas of its process, which are marked.
        title: What the picture shows.
        path: PNG file to write.
    """
    shown = history.merged(120)
    figure = Figure(figsize=(11, 4.2), dpi=110, layout="constrained")
    over_training, by_timestep = figure.subplots(1, 2, width_ratios=(1.25, 1))
    lefts = np.concatenate(([0.0], shown.steps))
    colours = over_training.pcolormesh(lefts, shown.edges, shown.errors.T, norm=LogNorm(), cmap="viridis")
    # Above the bar: beside it, it would stand next to the same words of the other panel.
    figure.colorbar(colours, ax=over_training).ax.set_title("unweighted MSE", fontsize=8)
    for name, area in vars(areas).items():
        if len(area):
            over_training.axhline(area.stop, color="white", linewidth=1, linestyle="--")
            middle = (area.start + area.stop) / 2
            text = over_training.text(lefts[-1] * 0.98, middle, name, color="white", ha="right", va="center")
            text.set_path_effects([withStroke(linewidth=2, foreground="black")])
    over_training.set(xlabel="optimizer step", ylabel="timestep", ylim=(0, shown.edges[-1]))
    moments = history.merged(min(20, len(history.steps)))
    picked = np.unique(np.linspace(0, len(moments.steps) - 1, 4).round().astype(int))
    for index in picked:
        _plot_errors(by_timestep, moments.edges, moments.errors[index], f"to step {moments.steps[index]:,.0f}")
    _label_errors(by_timestep, areas)
    figure.suptitle(title, fontsize=11, parse_math=False)
    save_png(figure, path)


def save_error_comparison(runs: Mapping[str, ErrorHistory], areas: Areas, title: str, path: Path) -> None:
    """Saves a PNG with the unweighted errors of several runs by timestep, over the last fifth of each.

    Args:
        runs: Name of each run and what it logged; processes and targets must be the same.
        areas: The three areas of their process, which are marked.
        title: What the picture shows.
        path: PNG file to write.
    """
    figure = Figure(figsize=(7.5, 4.5), dpi=110, layout="constrained")
    axes = figure.subplots()
    for name, history in runs.items():
        last = history.merged(5)
        _plot_errors(axes, last.edges, last.errors[-1], shown_name(name))
    _label_errors(axes, areas)
    axes.set_title(title, fontsize=11, pad=18, parse_math=False)
    save_png(figure, path)


def _plot_errors(axes: Axes, edges: Sequence[int], errors: npt.NDArray[np.float64], label: str) -> None:
    axes.stairs(errors, edges, label=label, baseline=None, linewidth=1.5)


def _label_errors(axes: Axes, areas: Areas) -> None:
    """Names the axes of unweighted errors by timestep, and shades the areas."""
    axes.set(xlabel="timestep", ylabel="unweighted MSE", yscale="log", xlim=(0, areas.convergence.stop))
    shade_areas([axes], areas)
    add_legend(axes)


def shade_areas(panels: Sequence[Axes], areas: Areas) -> None:
    """Shades the three areas behind panels that share their timesteps, with their names above the first.

    Args:
        panels: From top to bottom, timesteps on the x axis.
        areas: The areas; empty ones are left out.
    """
    for (name, area), shade in zip(vars(areas).items(), AREA_SHADES, strict=True):
        if not len(area):
            continue
        for axes in panels:
            axes.axvspan(area.start, area.stop, color=shade, zorder=0)
        # A name that is wider than its area would run into its neighbour's.
        label = name if len(area) > 0.13 * areas.convergence.stop else f"{name[:4]}."
        above = panels[0].get_xaxis_transform()
        panels[0].text((area.start + area.stop) / 2, 1.02, label, transform=above, ha="center", fontsize=8)
