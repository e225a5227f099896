"""SpeeD for diffusers: which timesteps to train on how often, and how much each counts (arXiv 2405.17403)."""

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
from .settings import SpeeDOptions
from .strategy import SpeeDStrategy
from .version import __version__, warn_of_untried

warn_of_untried("diffusers")

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
    "__version__",
    "functional",
    "speed_scheduler",
]
