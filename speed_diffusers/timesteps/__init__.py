"""p(t): how often each timestep is trained on, and how a batch is drawn from that.

To add a density write one function in one file of this folder that maps a process and the settings to T non-negative
numbers and register it; its name is then a value of `speed_sampling` everywhere.
"""

from .speed import UNIFORM  # first, because tables and help keep the order of registration

# isort: split

from . import index, learned, noise  # noqa: F401  (they register their densities)
from .adaptive import AdaptiveDensity
from .density import DENSITIES, Density, normalised, timestep_density, timestep_pmf
from .draw import (
    DRAWS,
    INDEPENDENT,
    PAIRED,
    draw_independent,
    draw_uniform,
    drawn_pmf,
    dual_steps,
)

__all__ = [
    "DENSITIES",
    "DRAWS",
    "INDEPENDENT",
    "PAIRED",
    "UNIFORM",
    "AdaptiveDensity",
    "Density",
    "draw_independent",
    "draw_uniform",
    "drawn_pmf",
    "dual_steps",
    "normalised",
    "timestep_density",
    "timestep_pmf",
]
