"""The trainer: its options, a run and its parts, one step, and what makes it resume exactly."""

from ..version import warn_of_untried

warn_of_untried("accelerate", "datasets")
