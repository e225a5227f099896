"""w(t): how much the error at each timestep counts in the loss.

To add a weighting write one function in one file of this folder that maps a process and the settings to T numbers and
register it; its name is then a value of `speed_weighting` everywhere.
"""

from . import fixed  # noqa: F401  (first, because tables and help keep the order of registration)

# isort: split

from . import loss_aware  # noqa: F401  (it registers its weightings)
from .loss_aware_state import LossAwareWeighting
from .weighting import WEIGHTINGS, Weighting, checked_weights, timestep_weights

__all__ = ["WEIGHTINGS", "LossAwareWeighting", "Weighting", "checked_weights", "timestep_weights"]
