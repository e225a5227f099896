"""What a density is that learns from the losses of the training."""

from abc import abstractmethod
from typing import ClassVar

from torch import Tensor

from ..loss_aware import LossAware


class LossAwareDensity(LossAware):
    """A density that follows the errors it is told of.

    Args:
        process: The forward process.
    """

    OPTION: ClassVar[str] = "speed_sampling"

    @abstractmethod
    def pmf(self) -> Tensor:
        """Probabilities, shape (T,), float64, summing to 1; uniform until enough has been seen."""

    def importance_weights(self) -> Tensor | None:
        """What the loss of each timestep is multiplied by to undo the density, shape (T,); None: it is not undone."""
        return None
