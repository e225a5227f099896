"""Strategies as plain numbers for a page that plots them itself: over timesteps and over log SNR."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..process import Areas
from ..tables import SpeeDTables
from .strategy_plot import (
    area_shares,
    axis_range,
    density_over_log_snr,
    log_snr_moments,
    mean_weight,
    relative_density,
)

MAX_POINTS = 400
"""Points of a curve; a page of 10^6 timesteps would be slow, and a screen has no more."""

DIGITS = 5
"""Significant digits of a number on a page."""


def strategy_curves(strategies: Mapping[str, SpeeDTables], areas: Areas) -> dict[str, Any]:
    """Strategies of one process as JSON values.

    Args:
        strategies: Name of each strategy and its tables, one or more, all of the same process.
        areas: The three areas that are marked.

    Returns:
        `timesteps`, `log_snr` and `noise_level`: one value per point, from the least noise to the most. `areas`: of
        each that is not empty its name, and where it begins and ends in timesteps (half open) and in log SNR.
        `strategies`: of each the name, tau, draw, mean weight, shares of the draws in the areas, mean and deviation of
        log SNR, and per point the density over timesteps relative to uniform draws, p(log SNR) and the weight.
        `axes`: for density, weight and product the scale of an axis that holds all of them, and its two ends.
    """
    process = next(iter(strategies.values())).process
    points = _points(areas, process.num_train_timesteps)
    densities = {name: relative_density(tables) for name, tables in strategies.items()}
    axes = {
        "density": torch.cat(list(densities.values())),
        "weight": torch.cat([tables.weights for tables in strategies.values()]),
        "product": torch.cat([densities[name] * tables.weights for name, tables in strategies.items()]),
    }
    return {
        "timesteps": points.tolist(),
        "log_snr": rounded(process.finite_log_snr[points]),
        "noise_level": rounded(process.noise_level[points]),
        "areas": _areas(areas, process.finite_log_snr),
        "strategies": [
            {
                "name": name,
                "tau": tables.settings.tau,
                "draw": tables.draw,
                "mean_weight": mean_weight(tables),
                "shares": area_shares(tables, areas),
                "log_snr": log_snr_moments(tables),
                "density": rounded(densities[name][points]),
                "density_over_log_snr": rounded(density_over_log_snr(tables)[points]),
                "weight": rounded(tables.weights[points]),
            }
            for name, tables in strategies.items()
        ],
        "axes": {name: axis_range(values) for name, values in axes.items()},
    }


def rounded(values: Tensor) -> list[float]:
    """Numbers with as many digits as a page needs."""
    return [float(f"{value:.{DIGITS}g}") for value in values.tolist()]


def _points(areas: Areas, total: int) -> Tensor:
    """Timesteps at which curves are given: all, or evenly spaced ones and both sides of each edge."""
    if total <= MAX_POINTS:
        return torch.arange(total)
    edges = {step for area in vars(areas).values() for edge in (area.start, area.stop) for step in (edge - 1, edge)}
    even = torch.linspace(0, total - 1, MAX_POINTS).round().long().tolist()
    return torch.tensor(sorted({*even, *(step for step in edges if 0 <= step < total)}))


def _areas(areas: Areas, log_snr: Tensor) -> list[dict[str, Any]]:
    found = []
    for name, area in vars(areas).items():
        if len(area):
            ends = rounded(log_snr[[area.start, min(area.stop, len(log_snr) - 1)]])
            found.append({"name": name, "timesteps": [area.start, area.stop], "log_snr": ends})
    return found
