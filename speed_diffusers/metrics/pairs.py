"""What the metrics over pairs of samples share: the check of both sets, and rows a part at a time."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..errors import InputError

CHUNK = 256
"""Rows of a matrix of pairs at once: 20 MB in float64 against 10,000 others."""


def check_features(first: Tensor, second: Tensor, *, least: int) -> None:
    """Checks that two sets of features compare.

    Args:
        first: Should be (N, D), finite.
        second: Should be (M, D), finite.
        least: Smallest N and M.

    Raises:
        InputError: They do not.
    """
    for features in (first, second):
        if features.ndim != 2 or len(features) < least:
            raise InputError(f"features of shape {tuple(features.shape)}, expected (N, D) with N >= {least}.")
        if not bool(torch.isfinite(features).all()):
            raise InputError("features contain NaN or infinite values; the images behind them are not finite.")
    if first.shape[1] != second.shape[1]:
        raise InputError(f"features of dimension {first.shape[1]} and {second.shape[1]} do not compare.")


def chunks(rows: Tensor, size: int) -> Iterator[Tensor]:
    """The rows of (N, D), `size` at a time."""
    return (rows[start : start + size] for start in range(0, len(rows), size))
