"""AdamW for all parameters, or Muon for the matrices of the blocks and AdamW for the rest, as one optimizer."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from ..errors import unknown_name
from .config import OPTIMIZERS, TrainConfig

MUON_MATRICES = (
    "attn1.to_q.weight",
    "attn1.to_k.weight",
    "attn1.to_v.weight",
    "attn1.to_out.0.weight",
    "ff.net.0.proj.weight",
    "ff.net.2.weight",
)
"""Ends of the names of the parameters that Muon takes: what maps activations to activations inside a block. Not the
adaLN projections, which begin at zero and carry the conditioning, nor the patches, embedders and output layers."""


def make_optimizer(config: TrainConfig, model: nn.Module, device: torch.device) -> torch.optim.Optimizer:
    """The optimizer of a run.

    Args:
        config: Options of the run.
        model: The model in training form.
        device: Where it is trained.

    Raises:
        InputError: No such optimizer.
    """
    adamw: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "weight_decay": config.adam_weight_decay,
        "eps": config.adam_epsilon,
        "fused": True,
    }
    if config.optimizer == "adamw":
        return torch.optim.AdamW(model.parameters(), **adamw)
    if config.optimizer != "muon":
        raise unknown_name("optimizer", config.optimizer, OPTIMIZERS)
    named = list(model.named_parameters())
    matrices = [parameter for name, parameter in named if name.endswith(MUON_MATRICES)]
    rest = [parameter for name, parameter in named if not name.endswith(MUON_MATRICES)]
    muon = Muon(
        matrices,
        lr=config.muon_learning_rate if config.muon_learning_rate is not None else config.learning_rate,
        weight_decay=config.adam_weight_decay,
        momentum=config.muon_momentum,
        ns_steps=config.muon_ns_steps,
        adjust_lr_fn="match_rms_adamw",
        dtype=torch.bfloat16 if multiplies_bfloat16(device) else torch.float32,
    )
    return MuonWithAdamW(torch.optim.AdamW(rest, **adamw), muon)


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether a device has instructions for products of bfloat16 matrices.

    CPUs without them take hundreds of times as long as in float32.
    """
    if device.type == "cpu":
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return True


class Muon(torch.optim.Muon):
    """`torch.optim.Muon` (arXiv 2502.16982) with a stop and a choice of dtype.

    Its parameter groups and state are torch's, and so is the update. What differs: matrices of one shape are
    orthogonalised together, in one batch of products, of which each process of a process group takes its share; they
    may be so in float32, for devices that emulate bfloat16, and then with fewer products where one side is long; and
    while `found_inf` is not 0 nothing is applied, without waiting for the device. All processes must hold the same
    matrices and gradients, as DDP leaves them.

    Args:
        params: Matrices.
        dtype: Of the products.
        options: Those of `torch.optim.Muon`.
    """

    def __init__(self, params: Iterable[Tensor], *, dtype: torch.dtype, **options: Any) -> None:
        super().__init__(params, **options)
        self.dtype = dtype
        self.found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Takes a step; `closure` must be None."""
        assert closure is None
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault(parameter.shape, []).append(parameter)
            for parameters in by_shape.values():
                self._step(parameters, group)

    def _step(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if "momentum_buffer" not in self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(gradient)
        momentum = group["momentum"]
        buffers = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
        torch._foreach_lerp_(buffers, gradients, 1.0 - momentum)
        updates = torch._foreach_lerp(gradients, buffers, momentum) if group["nesterov"] else buffers
        stacked = _orthogonalised_by_all(torch.stack(list(updates)).to(self.dtype), group).to(parameters[0].dtype)
        decay, rate = 1.0 - group["lr"] * group["weight_decay"], group["lr"] * _rms_of_adamw(parameters[0], group)
        if self.found_inf is None:
            torch._foreach_mul_(parameters, decay)
            torch._foreach_add_(parameters, list(stacked.unbind()), alpha=-rate)
            return
        # As AdamW's fused kernel does with the same flag.
        stopped = self.found_inf != 0
        for parameter, update in zip(parameters, stacked.unbind(), strict=True):
            parameter.copy_(torch.where(stopped, parameter, parameter * decay - rate * update))


def orthogonalised(
    matrices: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float = 1e-7
) -> Tensor:
    """Each matrix with its singular values brought near 1, by Newton-Schulz steps of the fifth degree.

    Args:
        matrices: (N, A, B), in the dtype of the products.
        coefficients: a, b, c of a X + b (X X') X + c (X X')^2 X.
        steps: How many.
        eps: Smallest norm to divide by.

    Returns:
        Shape and dtype of `matrices`; zero where a matrix is zero.
    """
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    wide = matrices.mT if is_tall else matrices
    wide = wide / torch.linalg.matrix_norm(wide, keepdim=True).clamp_min(eps)
    # Squares and nearly squares gain nothing. Squared, a matrix needs twice the digits, and what rounding leaves below
    # zero grows twelvefold with each step: five leave it at 1e-3 in float32, but not in bfloat16, and ten would not.
    by_gram = 2 * wide.shape[-1] > 3 * wide.shape[-2] and wide.dtype in (torch.float32, torch.float64) and steps <= 5
    result = (_steps_on_gram if by_gram else _steps_on_matrix)(wide, coefficients, steps)
    return result.mT if is_tall else result


def _steps_on_matrix(matrices: Tensor, coefficients: tuple[float, float, float], steps: int) -> Tensor:
    """Newton-Schulz steps as they are written: three products each, two of which take the long side."""
    a, b, c = coefficients
    for _ in range(steps):
        gram = matrices @ matrices.mT
        matrices = torch.baddbmm(matrices, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), matrices, beta=a)
    return matrices


def _steps_on_gram(matrices: Tensor, coefficients: tuple[float, float, float], steps: int) -> Tensor:
    """The same on X X' alone, so that the long side is in two products whatever the number of steps.

    What the steps multiply X by are polynomials of X X', which commute, so their product is gathered and applied once
    (Gram Newton-Schulz, Dao AI Lab, 2026).
    """
    a, b, c = coefficients

    def factor_of(gram: Tensor) -> Tensor:
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal(dim1=-2, dim2=-1).add_(a)
        return factor

    gram = matrices @ matrices.mT
    gathered = factor = factor_of(gram)
    for _ in range(steps - 1):
        gram = gram @ factor @ factor
        factor = factor_of(gram)
        gathered = gathered @ factor
    return gathered @ matrices


def _orthogonalised_by_all(matrices: Tensor, group: dict[str, Any]) -> Tensor:
    """`orthogonalised`, of which each process does its share (arXiv 2502.16982, section 2.3, without sharded states).

    The work does not depend on the batch. Done by each process, in DiT-XL/2 with 32 images of 256 tokens a process, it
    would be more than half of what the passes need.
    """
    processes = dist.get_world_size() if dist.is_initialized() else 1
    settings = group["ns_coefficients"], group["ns_steps"], group["eps"]
    if processes == 1:
        return orthogonalised(matrices, *settings)
    share = -(-len(matrices) // processes)
    padded = functional.pad(matrices, (0, 0, 0, 0, 0, share * processes - len(matrices)))
    parts = list(padded.chunk(processes))
    dist.all_gather(parts, orthogonalised(parts[dist.get_rank()], *settings).contiguous())
    return padded[: len(matrices)]


def _rms_of_adamw(matrix: Tensor, group: dict[str, Any]) -> float:
    """What makes an update as large as AdamW's usually is (arXiv 2502.16982, equation 4)."""
    assert group["adjust_lr_fn"] == "match_rms_adamw"
    return float(0.2 * float(max(matrix.shape)) ** 0.5)


class MuonWithAdamW(torch.optim.Optimizer):
    """Two optimizers that look like one: AdamW's group comes first, Muon's after it.

    Args:
        adamw: Of all other parameters; fused.
        muon: Of the matrices.
    """

    def __init__(self, adamw: torch.optim.AdamW, muon: Muon) -> None:
        self.parts: tuple[torch.optim.Optimizer, ...] = (adamw, muon)
        self.found_inf: Tensor | None = None
        # Schedules of diffusers ask the defaults for the rate, which is AdamW's.
        super().__init__([group for part in self.parts for group in part.param_groups], {"lr": adamw.defaults["lr"]})
        self._share()

    def _share(self) -> None:
        """Lets the two work on this optimizer's groups and state, so that there is one of each."""
        groups = iter(self.param_groups)
        for part in self.parts:
            part.param_groups = [next(groups) for _ in part.param_groups]
            part.state = self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes back to a state, as every optimizer does."""
        super().load_state_dict(state_dict)
        self._share()

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Takes a step of both; `closure` must be None."""
        for part in self.parts:
            part.found_inf = self.found_inf  # type: ignore[attr-defined]
            part.grad_scale = None  # type: ignore[attr-defined]
            part.step(closure)
