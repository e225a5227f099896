"""Errors without their weights, by timestep: what runs with different loss weights can be compared by."""

import torch
from torch import Tensor

MAX_BINS = 20


class ErrorBins:
    """Sums of unweighted errors over equal ranges of timesteps, kept on the device of the training.

    Args:
        num_train_timesteps: T, at least 1.
        device: Where errors and timesteps are.

    Attributes:
        edges: First timestep of each bin, then T.
        totals: float32 (2, bins): sum of the errors, and number of samples, since the last `reset`.
    """

    def __init__(self, num_train_timesteps: int, device: torch.device | str = "cpu") -> None:
        self.num_train_timesteps = num_train_timesteps
        count = min(MAX_BINS, num_train_timesteps)
        # Timestep t is in bin t * count // T.
        self.edges = [-(-index * num_train_timesteps // count) for index in range(count + 1)]
        self.totals = torch.zeros(2, count, device=device)

    def add(self, timesteps: Tensor, squared_error: Tensor) -> None:
        """Takes in a batch without waiting for the device.

        Args:
            timesteps: (B,), int64 or floating point, in [0, T).
            squared_error: (B,), float32, detached.
        """
        count = self.totals.shape[1]
        bins = (timesteps * count / self.num_train_timesteps).long()
        self.totals.index_add_(1, bins, torch.stack((squared_error, torch.ones_like(squared_error))))

    def reset(self) -> None:
        """Forgets everything."""
        self.totals.zero_()


def means_by_bin(sums: list[float], counts: list[float]) -> list[float | None]:
    """Mean error of each bin; None where no sample fell."""
    return [total / count if count else None for total, count in zip(sums, counts, strict=True)]
