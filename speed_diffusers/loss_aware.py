"""What learns from the losses of a training, with state that a checkpoint can hold: densities and weightings alike."""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from .errors import InputError
from .process import ForwardProcess


class LossAware(ABC):
    """Something over the timesteps that follows the errors it is told of.

    Its state is float64 and int64 tensors on the CPU, changed by nothing but `update`; processes that are given the
    same sums, reduced over all of them, therefore stay the same to the last bit.

    Args:
        process: The forward process.
    """

    OPTION: ClassVar[str]
    """The option that chooses it, for error messages."""

    def __init__(self, process: ForwardProcess) -> None:
        self.process = process
        self.state: dict[str, Tensor] = {}

    def update(self, error_sums: Tensor, error_counts: Tensor, weights: Tensor) -> None:
        """Takes in the errors of one or more batches.

        Timesteps without an error, or whose sum is not finite, are left as they were.

        Args:
            error_sums: Shape (T,): sum over the samples of each timestep of the prediction's unweighted
                mean squared error.
            error_counts: Shape (T,): how many samples that were.
            weights: Shape (T,), float64: the loss weight of each timestep, without importance weight.

        Raises:
            InputError: Another shape, or a negative count; nothing has changed.
        """
        num_timesteps = self.process.num_train_timesteps
        for name, values in (("error_sums", error_sums), ("error_counts", error_counts)):
            if tuple(values.shape) != (num_timesteps,):
                raise InputError(f"{name}: its shape must be ({num_timesteps},), but is {tuple(values.shape)}.")
        sums = error_sums.detach().to("cpu", torch.float64)
        counts = error_counts.detach().to("cpu", torch.float64)
        if bool((counts < 0).any()):
            raise InputError(f"error_counts: must be at least 0, but the smallest is {float(counts.min())}.")
        counts = torch.where(torch.isfinite(sums), counts, 0.0)
        self._learn(torch.where(counts > 0, sums, 0.0), counts, weights)

    @abstractmethod
    def _learn(self, sums: Tensor, counts: Tensor, weights: Tensor) -> None:
        """Changes the state; the arguments are those of `update`, checked, float64 and on the CPU."""

    def state_dict(self) -> dict[str, Tensor]:
        """A copy of the state, for a checkpoint."""
        return {name: value.clone() for name, value in self.state.items()}

    def check_state_dict(self, state: dict[str, Tensor]) -> None:
        """Checks that a state is one of this kind.

        Raises:
            InputError: The state is that of another choice or process.
        """
        if set(state) != set(self.state):
            raise InputError(f"State of {self.OPTION}: has {sorted(state)}, but {sorted(self.state)} is needed.")
        for name, mine in self.state.items():
            if state[name].shape != mine.shape:
                raise InputError(
                    f"State of {self.OPTION}: '{name}' has the shape {tuple(state[name].shape)}, but "
                    f"{tuple(mine.shape)} is needed; the number of timesteps or a parameter has changed."
                )

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Goes back to a state.

        Raises:
            InputError: The state is that of another choice or process; nothing has changed.
        """
        self.check_state_dict(state)
        self.state = {name: state[name].detach().to("cpu", mine.dtype).clone() for name, mine in self.state.items()}
