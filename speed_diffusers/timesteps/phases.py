"""Densities that are others, one after another, in the course of a training."""

import torch
from torch import Tensor

from ..process import ForwardProcess
from ..registry import Choice, Parameter, Part
from ..settings import SpeeDSettings
from .density import DENSITIES, Density
from .loss_aware_state import LossAwareDensity


@DENSITIES.register(
    "two_phase",
    summary="Another density at first; from a share of the training on every timestep is drawn alike.",
    reference="[arXiv 2603.12517](https://arxiv.org/abs/2603.12517): mid-biased densities help early and end worse "
    "than uniform; the default of the first phase is ours to choose",
    parameters=(Parameter("until", 0.6, "(0, 1]", "share of the training after which draws are uniform"),),
    needs_progress=True,
    part=Part("first", "gaussian:mean=-1", "density of the first phase, whose parameters may stand here too"),
)
def two_phase(
    process: ForwardProcess, settings: SpeeDSettings, *, until: float, first: Choice[Density]
) -> Tensor | LossAwareDensity:
    """A density, loss-aware or not, then uniform."""
    if settings.progress >= until:
        return torch.ones(process.num_train_timesteps, dtype=torch.float64)
    density: Tensor | LossAwareDensity = first(process, settings)
    return density
