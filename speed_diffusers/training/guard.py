"""Stops an optimizer at the first non-finite gradient without asking the device in every step."""

from collections import deque
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

STEPS_KEPT = 1000
"""Steps since the last look whose images a message can name."""

_NAMED = 8


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
        self._recent: deque[tuple[int, Sequence[tuple[Tensor, Tensor]]]] = deque(maxlen=STEPS_KEPT)
        optimizer.found_inf = self._found  # type: ignore[attr-defined]
        optimizer.grad_scale = None  # type: ignore[attr-defined]

    def observe(self, grad_norm: Tensor, step: int, images: Sequence[tuple[Tensor, Tensor]] = ()) -> None:
        """Raises the flag if the norm of all gradients is not finite; call it before the optimizer's step.

        Args:
            grad_norm: Scalar, the same on every process; no DTensor.
            step: The step's number, from 1.
            images: Timesteps and losses of this process's images, a pair of (B,) for each batch; nothing is computed
                from them unless the step fails.
        """
        bad = (~torch.isfinite(grad_norm)).float()
        self._step += bad * (1.0 - self._found) * step
        torch.maximum(self._found, bad, out=self._found)
        self._recent.append((step, images))

    def failed_step(self) -> int | None:
        """The step whose gradients were not finite, or None. Waits for the device."""
        if self._found.item():
            return int(self._step.item())
        self._recent.clear()
        return None

    def images_of(self, step: int) -> Tensor:
        """Timesteps and losses of the images of a step since the last look: float32 (2, images).

        No images if `observe` was told of none, or has been called more than `STEPS_KEPT` times since.
        """
        batches = next((images for number, images in self._recent if number == step), ())
        pairs = [torch.stack((timesteps.float(), losses)) for timesteps, losses in batches]
        return torch.cat(pairs, dim=1) if pairs else self._found.new_zeros(2, 0)


def describe_images(timesteps: Tensor, losses: Tensor) -> str:
    """Which images of a step whose gradients are not finite had losses that are not finite either, as a sentence.

    Args:
        timesteps: (processes, images), at which the step trained.
        losses: The same shape.
    """
    if not losses.numel():
        return f"Its images are not known any more: more than {STEPS_KEPT} steps were taken since."
    found = (~torch.isfinite(losses)).nonzero().tolist()
    if not found:
        return f"All its losses were finite, at timesteps {timesteps.min():g} to {timesteps.max():g}."
    by_rank: dict[int, list[str]] = {}
    for rank, image in found:
        by_rank.setdefault(rank, []).append(f"{timesteps[rank, image]:g}")
    named = [
        f"rank {rank} at timesteps {', '.join(at[:_NAMED])}" + f" and {len(at) - _NAMED} more" * (len(at) > _NAMED)
        for rank, at in list(by_rank.items())[:_NAMED]
    ]
    return f"{len(found)} of its {losses.numel()} losses were not finite: {'; '.join(named)}."


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
    # A NaN is the smallest and the largest. Many times faster than `isfinite` on every value.
    edges = torch.stack([edge.float() for value in local.values() for edge in torch.aminmax(value.detach())])
    is_finite = torch.isfinite(edges).view(-1, 2).all(1).tolist()
    return [name for name, good in zip(local, is_finite, strict=True) if not good]
