"""How a batch is drawn from a density: each draw on its own, in pairs, or spread evenly."""

from typing import Protocol

import torch
from torch import Tensor

from ..registry import Registry


class Draw(Protocol):
    """A way to draw a batch, without host synchronisation.

    It is called with the cumulative probabilities, float32 (T,), on the device of the generator, the last being 1; the
    number of draws; the source of randomness on the same device (None: torch's global one); and the pivot of the pairs
    (None for draws without). It returns int64 (batch_size,) in [0, T).
    """

    def __call__(
        self, cumulative: Tensor, batch_size: int, generator: torch.Generator | None, pivot: int | None
    ) -> Tensor: ...


DRAWS: Registry[Draw] = Registry("draw (speed_draw)")

INDEPENDENT, PAIRED = "independent", "paired"


def draw_independent(cumulative: Tensor, batch_size: int, *, generator: torch.Generator | None) -> Tensor:
    """Independent draws by inversion of the cumulative distribution, without host synchronisation.

    Args:
        cumulative: Cumulative probabilities, float32 (T,), on the device of the generator; the last is 1.
        batch_size: Number of draws.
        generator: Source of randomness on the same device; None takes torch's global one.

    Returns:
        int64 (batch_size,) in [0, T).
    """
    uniform = torch.rand(batch_size, generator=generator, device=cumulative.device, dtype=torch.float32)
    return torch.searchsorted(cumulative, uniform, right=True)


@DRAWS.register(
    INDEPENDENT,
    summary="Every draw on its own.",
    reference="DDPM, [arXiv 2006.11239](https://arxiv.org/abs/2006.11239), algorithm 1",
)
def independent(cumulative: Tensor, batch_size: int, generator: torch.Generator | None, pivot: int | None) -> Tensor:
    """Independent draws by inversion."""
    return draw_independent(cumulative, batch_size, generator=generator)


@DRAWS.register(
    PAIRED,
    summary="SpeeD's dual draw: to most draws t the mirrored step m - t, or t - m from m on.",
    reference="NUS-HPC-AI-Lab/SpeeD and kaiwang960112/SpeeD on GitHub; not in the paper",
)
def paired(cumulative: Tensor, batch_size: int, generator: torch.Generator | None, pivot: int | None) -> Tensor:
    """n // 2 + 1 independent draws, then their duals, cut to n; in this order, as the authors' code has it."""
    assert pivot is not None
    primary = draw_independent(cumulative, batch_size // 2 + 1, generator=generator)
    return torch.cat([primary, dual_steps(primary, pivot)])[:batch_size]


@DRAWS.register(
    "stratified",
    summary="One draw from each of n equally likely strata, in random order: less noise, the same distribution.",
    reference="u_i = (i + r_i) / n over the batch as in k-diffusion, pushed through the inverse distribution function",
)
def stratified(cumulative: Tensor, batch_size: int, generator: torch.Generator | None, pivot: int | None) -> Tensor:
    """One draw per stratum; strata are permuted, so that any slice of the batch is a fair sample of the density."""
    device = cumulative.device
    # By sorting, because randperm may wait for the device.
    stratum = (
        torch.rand(batch_size, generator=generator, device=device, dtype=torch.float32).argsort().to(torch.float32)
    )
    within = torch.rand(batch_size, generator=generator, device=device, dtype=torch.float32)
    # In float32 the sum may round up into the next stratum, or to 1.
    last = torch.nextafter((stratum + 1.0) / batch_size, torch.zeros((), device=device, dtype=torch.float32))
    return torch.searchsorted(cumulative, torch.minimum((stratum + within) / batch_size, last), right=True)


def dual_steps(timesteps: Tensor, pivot: int) -> Tensor:
    """The authors' mirrored timesteps: pivot - t below the pivot, t - pivot from it on."""
    return torch.where(timesteps < pivot, pivot - timesteps, timesteps - pivot)


def drawn_pmf(pmf: Tensor, draw: str, pivot: int | None) -> Tensor:
    """The distribution of one draw taken at random from a large batch, shape (T,), float64.

    The density itself, except with pairs: half of those draws follow it and half are mirrored.
    """
    if draw != PAIRED or pivot is None:
        return pmf
    mirrored = torch.zeros_like(pmf).index_add_(0, dual_steps(torch.arange(len(pmf)), pivot), pmf)
    return 0.5 * (pmf + mirrored)
