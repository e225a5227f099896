"""What a weighting is that learns from the losses of the training."""

from abc import abstractmethod
from typing import ClassVar

from torch import Tensor

from ..loss_aware import LossAware


class LossAwareWeighting(LossAware):
    """A weighting that follows the errors it is told of.

    Args:
        process: The forward process.
    """

    OPTION: ClassVar[str] = "speed_weighting"

    @abstractmethod
    def weights(self) -> Tensor:
        """Weights of the prediction's squared error, shape (T,), float64; all 1 until enough has been seen."""
