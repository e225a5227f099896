"""SpeeD for diffusers: train diffusion models in a fraction of the usual steps (arXiv 2405.17403)."""

from .errors import InputError
from .presets import PRESETS
from .schedulers import SpeeDDDIMScheduler, SpeeDDDPMScheduler, SpeeDSchedulerMixin

__version__ = "0.1.0"

__all__ = ["PRESETS", "InputError", "SpeeDDDIMScheduler", "SpeeDDDPMScheduler", "SpeeDSchedulerMixin"]
