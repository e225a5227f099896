"""p(t): how often each timestep is trained on, and how a batch is drawn from that.

To add a density write one function in one file of this folder that maps a process and the settings to T non-negative
numbers and register it; its name is then a value of `speed_sampling` everywhere.
"""

from .speed import UNIFORM  # first, because tables and help keep the order of registration

# isort: split

from . import loss_aware, noise, phases, position  # noqa: F401  (they register their densities)
from .density import DENSITIES, Density, checked_pmf, normalised, timestep_pmf
from .draw import (
    DRAWS,
    INDEPENDENT,
    PAIRED,
    draw_independent,
    drawn_pmf,
    dual_steps,
)
from .loss_aware_state import LossAwareDensity

__all__ = [
    "DENSITIES",
    "DRAWS",
    "INDEPENDENT",
    "PAIRED",
    "UNIFORM",
    "LossAwareDensity",
    "Density",
    "checked_pmf",
    "draw_independent",
    "drawn_pmf",
    "dual_steps",
    "normalised",
    "timestep_pmf",
]
