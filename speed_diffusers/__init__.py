"""SpeeD for diffusers: train diffusion models in a fraction of the usual steps (arXiv 2405.17403)."""

from . import functional
from .errors import InputError
from .presets import PRESETS
from .process import ForwardProcess
from .schedulers import (
    SpeeDDDIMScheduler,
    SpeeDDDPMScheduler,
    SpeeDFlowMatchEulerDiscreteScheduler,
    SpeeDSchedulerMixin,
    speed_scheduler,
)
from .strategy import SpeeDOptions, SpeeDStrategy

__version__ = "0.1.0"

__all__ = [
    "PRESETS",
    "ForwardProcess",
    "InputError",
    "SpeeDDDIMScheduler",
    "SpeeDDDPMScheduler",
    "SpeeDFlowMatchEulerDiscreteScheduler",
    "SpeeDOptions",
    "SpeeDSchedulerMixin",
    "SpeeDStrategy",
    "functional",
    "speed_scheduler",
]
