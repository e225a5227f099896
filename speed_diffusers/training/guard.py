"""Stops an optimizer at the first non-finite gradient without asking the device in every step."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


class NonFiniteGuard:
    """A flag on the device that, once raised, makes fused AdamW apply nothing any more.

    The host reads it at logging steps only, so no step waits for the device, and yet no bad gradient ever reaches the
    parameters.

    Args:
        optimizer: A fused optimizer, which reads its `found_inf` attribute.
        device: Where the gradients live.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
        self._found = torch.zeros((), device=device)
        self._step = torch.zeros((), device=device)
        optimizer.found_inf = self._found  # type: ignore[attr-defined]
        optimizer.grad_scale = None  # type: ignore[attr-defined]

    def observe(self, grad_norm: Tensor, step: int) -> None:
        """Raises the flag if the norm of all gradients is not finite; call it before the optimizer's step."""
        bad = (~torch.isfinite(grad_norm)).float()
        self._step += bad * (1.0 - self._found) * step
        torch.maximum(self._found, bad, out=self._found)

    def failed_step(self) -> int | None:
        """The step whose gradients were not finite, or None. Waits for the device."""
        return int(self._step.item()) if self._found.item() else None


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors, or of this process's shards of them, that hold a NaN or an infinity.

    Reads each value once, where it is, and waits for the device once.

    Args:
        tensors: Names to tensors of one device, of any floating-point dtypes.
    """
    local = {name: value.to_local() if isinstance(value, DTensor) else value for name, value in tensors.items()}
    local = {name: value for name, value in local.items() if value.numel()}
    if not local:
        return []
    # The largest absolute value; a NaN comes through.
    norms = torch._foreach_norm([value.detach() for value in local.values()], float("inf"))
    is_finite = torch.isfinite(torch.stack([norm.float() for norm in norms])).tolist()
    return [name for name, good in zip(local, is_finite, strict=True) if not good]
