"""Exponential moving average of a model's parameters in float32."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

MAX_DECAY = 0.9999
"""DiT's decay, and the most that `fitted_decay` gives."""


def fitted_decay(max_train_steps: int, fraction: float = 0.05) -> float:
    """A decay whose half-life is a fraction of the run, at most DiT's 0.9999.

    DiT's decay remembers the last 10,000 or so steps; in a run of 2,000 it would still hold the initial weights.

    Args:
        max_train_steps: Optimizer steps of the run.
        fraction: Half-life over run length.
    """
    half_life = max(max_train_steps * fraction, 1.0)
    return min(float(0.5 ** (1.0 / half_life)), MAX_DECAY)


class ExponentialMovingAverage:
    """Float32 average of the parameters, updated by one foreach operation per step.

    Make it after the model has been moved, wrapped and sharded, so that the average lives where its parameters do.

    Args:
        model: The model to follow; the average starts as a copy of its parameters.
        decay: Share of the old average that an update keeps, in [0, 1).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self._names = [name for name, _ in model.named_parameters()]
        self._parameters: list[Tensor] = [parameter for _, parameter in model.named_parameters()]
        self._averages = [parameter.detach().float().clone() for parameter in self._parameters]
        self._is_float32 = all(parameter.dtype == torch.float32 for parameter in self._parameters)

    @torch.no_grad()
    def update(self) -> None:
        """Moves the average towards the parameters, once per optimizer step."""
        # Not detached: no gradient is recorded here, and detaching would cost the host an operation per tensor.
        current = self._parameters if self._is_float32 else [parameter.float() for parameter in self._parameters]
        torch._foreach_lerp_(self._averages, current, 1.0 - self.decay)

    def state_dict(self) -> dict[str, Tensor]:
        """Parameter names to averages; the live tensors, not copies."""
        return dict(zip(self._names, self._averages, strict=True))

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copies whole averages in, spread as the model's parameters are.

        Raises:
            KeyError: A parameter has no average in `state`.
        """
        for name, average in zip(self._names, self._averages, strict=True):
            value = state[name]
            if isinstance(average, DTensor):
                value = distribute_tensor(value.to(average.device), average.device_mesh, average.placements)
            average.copy_(value)
