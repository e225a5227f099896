"""Tells what is loss-aware the errors of the training, every so many optimizer steps."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError

STEPS_BETWEEN_UPDATES = 50
"""Optimizer steps whose errors make one update: a function of the step, so that a resumed run updates where the other
did. At an update the host waits for the device; between two it does not."""

_PENDING = "pending"


class ErrorFeedback:
    """Sums of unweighted errors by timestep, kept on the device until the next update.

    Args:
        scheduler: A SpeeD scheduler whose `speed_sampling` or `speed_weighting` learns.
        device: Where errors and timesteps are.
    """

    def __init__(self, scheduler: Any, device: torch.device) -> None:
        self.scheduler = scheduler
        self.totals = torch.zeros(2, scheduler.config.num_train_timesteps, device=device)

    def add(self, timesteps: Tensor, squared_error: Tensor) -> None:
        """Takes in a batch without waiting for the device.

        Args:
            timesteps: (B,), as the scheduler drew them.
            squared_error: (B,), float32, detached.
        """
        self.scheduler.speed_strategy.expect_update()
        indices = self.scheduler.timestep_indices(timesteps)
        self.totals.index_add_(1, indices, torch.stack((squared_error, torch.ones_like(squared_error))))

    def advance(self, done: int, reduce: Callable[[Tensor], Tensor]) -> None:
        """Updates density and weighting if it is time.

        Args:
            done: Optimizer steps done.
            reduce: Sums a tensor over all processes; every process must call this.
        """
        if done % STEPS_BETWEEN_UPDATES == 0:
            self.scheduler.update_speed(*reduce(self.totals))
            self.totals.zero_()

    def state_dict(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """What density and weighting have learned, and what they have not been told yet, over all processes."""
        return {**self.scheduler.speed_state_dict(), _PENDING: reduce(self.totals.clone()).cpu()}

    def load_state_dict(self, state: Mapping[str, Tensor], *, is_main_process: bool) -> None:
        """Goes on from a state; the main process takes what is pending, for it counts once.

        Raises:
            InputError: The state is missing, or that of other choices.
        """
        if _PENDING not in state:
            raise InputError("The checkpoint holds nothing that speed_sampling or speed_weighting has learned.")
        self.scheduler.load_speed_state_dict({key: value for key, value in state.items() if key != _PENDING})
        self.totals.copy_(state[_PENDING] if is_main_process else torch.zeros_like(self.totals))
