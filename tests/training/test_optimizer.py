"""Muon against torch's own, its stop, and which parameters it takes."""

import copy

import pytest
import torch
from torch import Tensor

import speed_diffusers.training.optimizer as optimizer_module
from speed_diffusers.models import build_dit, dit_config
from speed_diffusers.training.config import TrainConfig
from speed_diffusers.training.guard import NonFiniteGuard
from speed_diffusers.training.optimizer import Muon, MuonWithAdamW, make_optimizer, orthogonalised

SHAPES = ((6, 6), (6, 6), (12, 6), (6, 12))


def _matrices(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in SHAPES]


def _steps(optimizer: torch.optim.Optimizer, matrices: list[Tensor], steps: int = 3) -> None:
    for step in range(steps):
        for matrix, gradient in zip(matrices, _matrices(100 + step), strict=True):
            matrix.grad = gradient.detach().clone()
        optimizer.step()


@pytest.mark.parametrize("ns_steps", [5, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_muon_equals_torchs(dtype: torch.dtype, ns_steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"lr": 0.01, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw", "ns_steps": ns_steps}
    mine, theirs = _matrices(0), _matrices(0)
    _steps(Muon(mine, dtype=dtype, **options), mine)
    if dtype == torch.float32:
        # Torch's products are always of bfloat16.
        monkeypatch.setattr(Tensor, "bfloat16", Tensor.clone)
    _steps(torch.optim.Muon(theirs, **options), theirs)
    # In bfloat16 a batch of products may round otherwise than one product.
    tolerance = 1e-6 if dtype == torch.float32 else 1e-3
    for matrix, other, begun in zip(mine, theirs, _matrices(0), strict=True):
        assert (other - begun).abs().max() > 2e-3
        torch.testing.assert_close(matrix, other, rtol=0, atol=tolerance)


@pytest.mark.parametrize("shape", [(32, 128), (128, 32), (32, 49), (32, 47)])
@pytest.mark.parametrize("steps", [1, 3, 5, 12])
def test_long_matrices_take_fewer_products_to_the_same_result(shape: tuple[int, int], steps: int) -> None:
    generator = torch.Generator().manual_seed(0)
    # Singular values over six decades; and a matrix without gradients.
    matrices = torch.randn(3, *shape, generator=generator) * torch.logspace(0, -6, shape[1])
    matrices[2] = 0
    settings = (3.4445, -4.775, 2.0315), steps
    found = orthogonalised(matrices, *settings)
    # In float64 as it is written, X <- a X + b (X X') X + c (X X')^2 X, on a norm of one.
    expected = matrices.double() / matrices.double().norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    for _ in range(steps):
        gram = expected @ expected.mT
        expected = 3.4445 * expected + (-4.775 * gram + 2.0315 * gram @ gram) @ expected
    # Entries are of 0.1 to 0.4, and bfloat16 would round them by 1e-3.
    torch.testing.assert_close(found, expected.float(), rtol=0, atol=5e-4)
    assert found.shape == matrices.shape and not found[2].any()


@pytest.mark.parametrize("rank", [0, 2])
def test_each_process_orthogonalises_its_share(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"lr": 0.01, "adjust_lr_fn": "match_rms_adamw", "dtype": torch.float32}
    alone, shared = _matrices(0), _matrices(0)
    _steps(Muon(alone, **options), alone)
    own: list[tuple[int, ...]] = []

    def orthogonalised(matrices: Tensor, *settings: object) -> Tensor:
        own.append(tuple(matrices.shape))
        return whole(matrices, *settings)  # type: ignore[arg-type]

    def all_gather(parts: list[Tensor], mine: Tensor) -> None:
        for number, part in enumerate(parts):
            part.copy_(mine if number == rank else whole(part, (3.4445, -4.775, 2.0315), 5))

    whole = optimizer_module.orthogonalised
    monkeypatch.setattr(optimizer_module, "orthogonalised", orthogonalised)
    for name, value in {"is_initialized": True, "get_world_size": 3, "get_rank": rank}.items():
        monkeypatch.setattr(optimizer_module.dist, name, lambda value=value: value)
    monkeypatch.setattr(optimizer_module.dist, "all_gather", all_gather)
    _steps(Muon(shared, **options), shared)
    assert own == 3 * [(1, 6, 6), (1, 12, 6), (1, 6, 12)]  # of two matrices, one and one
    for matrix, other, before in zip(shared, alone, _matrices(0), strict=True):
        assert (other - before).abs().max() > 2e-3
        torch.testing.assert_close(matrix, other, rtol=0, atol=1e-6)


def _tiny_dit() -> torch.nn.Module:
    config = dit_config("DiT-tiny/2", sample_size=4, in_channels=4, out_channels=4, num_classes=3)
    return build_dit({**config, "num_layers": 2}, torch.Generator().manual_seed(0))


def _muon(model: torch.nn.Module, **options: object) -> torch.optim.Optimizer:
    return make_optimizer(TrainConfig(optimizer="muon", **options), model, torch.device("cpu"))  # type: ignore[arg-type]


def test_muon_takes_the_matrices_of_the_blocks_and_adamw_the_rest() -> None:
    model = _tiny_dit()
    optimizer = _muon(model, learning_rate=1e-3, muon_learning_rate=4e-3)
    adamw, muon = optimizer.param_groups
    assert (adamw["lr"], muon["lr"]) == (1e-3, 4e-3)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    taken = [names[id(parameter)] for parameter in muon["params"]]
    assert len(taken) == 2 * 6 and all(".attn1.to_" in name or ".ff.net." in name for name in taken)
    assert len(taken) + len(adamw["params"]) == len(names)


def test_nothing_is_applied_once_a_gradient_was_not_finite() -> None:
    model = _tiny_dit()
    optimizer = _muon(model)
    guard = NonFiniteGuard(optimizer, torch.device("cpu"))

    def step(number: int, gradient: float) -> list[Tensor]:
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, gradient)
        guard.observe(torch.tensor(gradient), number)
        optimizer.step()
        return [parameter.detach().clone() for parameter in model.parameters()]

    began = [parameter.detach().clone() for parameter in model.parameters()]
    good = step(1, 0.1)
    assert not any(map(torch.equal, began, good))
    assert all(map(torch.equal, good, step(2, float("nan"))))
    assert all(map(torch.equal, good, step(3, 0.1)))
    assert guard.failed_step() == 2


def test_state_goes_back_and_forth() -> None:
    first, second = _tiny_dit(), _tiny_dit()
    optimizers = [_muon(first), _muon(second)]
    generator = torch.Generator().manual_seed(1)

    def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, gradients: list[Tensor]) -> None:
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()

    gradients = [[torch.randn(p.shape, generator=generator) for p in first.parameters()] for _ in range(2)]
    step(first, optimizers[0], gradients[0])
    second.load_state_dict(first.state_dict())
    optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    for model, optimizer in zip((first, second), optimizers, strict=True):
        step(model, optimizer, gradients[1])
        assert isinstance(optimizer, MuonWithAdamW) and len(optimizer.state) == len(list(model.parameters()))
    assert all(map(torch.equal, first.parameters(), second.parameters()))


def test_a_flag_that_is_not_raised_changes_nothing_of_an_update() -> None:
    start = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
    found = {}
    for flag in (None, 0.0, 1.0):
        matrix = torch.nn.Parameter(start.clone())
        muon = Muon([matrix], dtype=torch.float32, lr=0.1, weight_decay=0.5, adjust_lr_fn="match_rms_adamw")
        muon.found_inf = None if flag is None else torch.tensor(flag)
        for seed in (1, 2):
            matrix.grad = torch.randn(16, 8, generator=torch.Generator().manual_seed(seed))
            muon.step()
        found[flag] = matrix.detach()
    torch.testing.assert_close(found[0.0], found[None], rtol=0, atol=1e-6)
    assert torch.equal(found[1.0], start) and not torch.allclose(found[0.0], start, atol=0.05)
