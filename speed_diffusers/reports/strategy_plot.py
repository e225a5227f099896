"""Strategies side by side over the timesteps: how often each step is drawn, what it counts, and both together."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor

from ..process import Areas
from ..tables import SpeeDTables
from .plots import shade_areas

STYLES = ("-", "--", "-.", ":")
STEEP = 20.0
"""A panel whose largest value is more than so many times its median gets a logarithmic axis."""
LEGEND_LETTERS = 150
"""What one row of the legend holds."""
FLOOR = 0.02
"""Values smaller than this share of the median would only stretch a logarithmic axis; they lie below its edge."""


def relative_density(tables: SpeeDTables) -> Tensor:
    """How many times as often as under uniform draws each timestep is drawn, shape (T,), float64, of mean 1."""
    return tables.drawn_pmf * tables.process.num_train_timesteps


def mean_weight(tables: SpeeDTables) -> float:
    """E_p[w], the mean loss weight of a drawn timestep."""
    return float((tables.drawn_pmf * tables.weights).sum())


def area_shares(tables: SpeeDTables, areas: Areas) -> dict[str, float]:
    """Share of the draws that fall into each area, by its name; they sum to 1."""
    return {name: float(tables.drawn_pmf[area.start : area.stop].sum()) for name, area in vars(areas).items()}


def density_over_log_snr(tables: SpeeDTables) -> Tensor:
    """p(log SNR) at each timestep, shape (T,), float64: the draws per unit of log SNR, whatever the schedule.

    The one coordinate in which the densities of different papers and schedules are the same if they train the same
    noise equally often.
    """
    return tables.drawn_pmf / tables.process.log_snr_speed


def log_snr_moments(tables: SpeeDTables) -> tuple[float, float]:
    """Mean and standard deviation of log SNR under the draws."""
    log_snr, pmf = tables.process.finite_log_snr, tables.drawn_pmf
    mean = float((pmf * log_snr).sum())
    return mean, float((pmf * (log_snr - mean).square()).sum().sqrt())


def save_strategy_plot(strategies: Mapping[str, SpeeDTables], areas: Areas, title: str, path: Path) -> None:
    """Saves a PNG of strategies of one process: noise level, density, weight and their product, and p(log SNR).

    Areas are bands with their names. A strategy whose tau is another than that of `areas` has it as a dotted line in
    its colour.

    Args:
        strategies: Name of each strategy and its tables, one or more, all of the same process.
        areas: The three areas that are marked.
        title: What the picture shows.
        path: PNG file to write.
    """
    # So that the longest name, with its mean weight behind it, fits beside its neighbours.
    columns = min(3, len(strategies), max(1, LEGEND_LETTERS // (max(map(len, strategies)) + 30)))
    legend_rows = -(-len(strategies) // columns)
    figure = Figure(figsize=(9, 10.4 + 0.22 * legend_rows), dpi=100, layout="constrained")
    *panels, over_noise = figure.subplots(5, 1, height_ratios=(0.55, 1, 1, 1, 1))
    noise, density, weight, product = panels
    for axes in panels[:-1]:
        axes.sharex(product)
        axes.tick_params(labelbottom=False)
    first = next(iter(strategies.values()))
    noise.plot(first.process.noise_level, color="black", linewidth=0.9)
    noise.set(ylabel="noise level", ylim=(-0.03, 1.03), xlim=(0, areas.convergence.stop))
    log_snr = first.process.finite_log_snr
    curves: dict[Axes, list[Tensor]] = {density: [], weight: [], product: []}
    handles = []
    for index, (name, tables) in enumerate(strategies.items()):
        # The later, the thinner, so that equal curves show all their colours.
        look: dict[str, Any] = {
            "color": f"C{index % 10}",
            "linestyle": STYLES[index % len(STYLES)],
            "linewidth": max(1.2, 2.8 - 0.4 * index),
        }
        drawn = relative_density(tables)
        for axes, values in zip(curves, (drawn, tables.weights, drawn * tables.weights), strict=True):
            axes.plot(values, **look)
            curves[axes].append(values)
            if tables.settings.tau != areas.convergence.start:
                axes.axvline(tables.settings.tau, color=look["color"], linestyle=":", linewidth=1)
        over_noise.plot(log_snr, density_over_log_snr(tables), **look)
        handles.append(Line2D([], [], label=f"{name}   (mean weight {mean_weight(tables):.3g})", **look))
    density.set(ylabel="density / uniform")
    weight.set(ylabel="loss weight")
    product.set(ylabel="density x weight", xlabel="timestep (0: least noise)")
    # Much noise on the right, as above.
    over_noise.set(ylabel="p(log SNR)", xlabel="log SNR", xlim=(float(log_snr.max()), float(log_snr.min())))
    over_noise.set_ylim(bottom=0)
    over_noise.grid(color="0.9", linewidth=0.8)
    for axes, drawn_values in curves.items():
        _scale(axes, torch.cat(drawn_values))
    shade_areas(panels, areas)
    figure.suptitle(title, fontsize=11, parse_math=False)
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize=8, handlelength=3)
    figure.savefig(path)


def axis_range(values: Tensor) -> tuple[str, float, float]:
    """The scale of an axis ("linear", or "log" where a few values would flatten all others), and its two ends.

    Args:
        values: Everything that is plotted on the axis, any shape, none negative and not all zero.
    """
    highest, median = float(values.max()), float(values.median())
    if highest <= STEEP * median:
        return "linear", 0.0, 1.12 * highest
    lowest = float(values[values > FLOOR * median].min())
    return "log", 0.7 * lowest, 1.4 * highest


def _scale(axes: Axes, values: Tensor) -> None:
    scale, low, high = axis_range(values)
    axes.set(yscale=scale, ylim=(low, high))
    axes.grid(axis="y", color="white", linewidth=0.8)
    axes.set_axisbelow(True)
