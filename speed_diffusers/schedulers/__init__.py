"""SpeeD schedulers: diffusers' own with timestep sampling and loss weights added.

The modules are imported eagerly and their paths never change: both are part of the on-disk format, because diffusers
records a scheduler by its module path and finds it in `sys.modules`.
"""

from .ddim import SpeeDDDIMScheduler
from .ddpm import SpeeDDDPMScheduler
from .factory import speed_scheduler, speed_scheduler_class
from .flow import SpeeDFlowMixin
from .flow_match_euler_discrete import SpeeDFlowMatchEulerDiscreteScheduler
from .mixin import SpeeDSchedulerMixin

__all__ = [
    "SpeeDDDIMScheduler",
    "SpeeDDDPMScheduler",
    "SpeeDFlowMatchEulerDiscreteScheduler",
    "SpeeDFlowMixin",
    "SpeeDSchedulerMixin",
    "speed_scheduler",
    "speed_scheduler_class",
]
