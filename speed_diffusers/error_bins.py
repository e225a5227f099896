"""Errors without their weights, by timestep: what runs with different loss weights can be compared by."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .errors import InputError

MAX_BINS = 20

ERRORS_KEY = "squared_error_by_timestep"
SAMPLES_KEY = "samples_by_timestep"
"""Keys in `metrics.jsonl`: mean of each bin (None where no sample fell), and samples behind it."""


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
            timesteps: (B,), int64 or floating point, in [0, T].
            squared_error: (B,), float32, detached.
        """
        count = self.totals.shape[1]
        # A flow's last timestep is T itself.
        bins = (timesteps * count / self.num_train_timesteps).long().clamp_(max=count - 1)
        self.totals.index_add_(1, bins, torch.stack((squared_error, torch.ones_like(squared_error))))

    def reset(self) -> None:
        """Forgets everything."""
        self.totals.zero_()


def means_by_bin(sums: list[float], counts: list[float]) -> list[float | None]:
    """Mean error of each bin; None where no sample fell."""
    return [total / count if count else None for total, count in zip(sums, counts, strict=True)]


@dataclass(frozen=True)
class ErrorHistory:
    """What a run logged of its errors by timestep.

    Attributes:
        steps: (N,) optimizer steps of the records.
        edges: First timestep of each bin, then T.
        errors: float64 (N, bins), mean unweighted squared error; NaN where no sample fell.
        counts: float64 (N, bins), samples behind each mean.
    """

    steps: npt.NDArray[np.float64]
    edges: list[int]
    errors: npt.NDArray[np.float64]
    counts: npt.NDArray[np.float64]

    @classmethod
    def from_records(cls, records: Sequence[Mapping[str, Any]], num_train_timesteps: int) -> "ErrorHistory":
        """Takes the errors out of the lines of a run's `metrics.jsonl` (`tracking.read_metrics`).

        Args:
            records: The lines; those without errors by timestep are passed over.
            num_train_timesteps: T of the run.

        Raises:
            InputError: No line has errors by timestep.
        """
        records = [record for record in records if ERRORS_KEY in record]
        if not records:
            raise InputError(f"The metrics of the run have no line with {ERRORS_KEY}.")
        return cls(
            np.array([record["step"] for record in records], np.float64),
            ErrorBins(num_train_timesteps).edges,
            np.array([record[ERRORS_KEY] for record in records], np.float64),
            np.array([record[SAMPLES_KEY] for record in records], np.float64),
        )

    def merged(self, groups: int) -> "ErrorHistory":
        """Neighbouring records taken together, weighted by their samples, so that at most `groups` are left."""
        parts = np.array_split(np.arange(len(self.steps)), min(groups, len(self.steps)))
        counts = np.stack([self.counts[part].sum(0) for part in parts])
        sums = np.stack([np.nansum(self.errors[part] * self.counts[part], axis=0) for part in parts])
        errors = np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)
        return ErrorHistory(np.array([self.steps[part[-1]] for part in parts]), self.edges, errors, counts)
