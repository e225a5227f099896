"""The moving average: its recurrence in float64, its precision, the swap, and what an update costs."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from speed_diffusers.training.ema import MAX_DECAY, ExponentialMovingAverage, fitted_decay
from speed_diffusers.training.profiling import OperationCounter


def scalar_model(value: float, dtype: torch.dtype = torch.float32) -> nn.Module:
    model = nn.Module()
    model.weight = nn.Parameter(torch.tensor([value], dtype=dtype))
    return model


def set_weight(model: nn.Module, value: float) -> None:
    with torch.no_grad():
        model.weight.fill_(value)


def small_network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.SiLU(), nn.Linear(4, 2))


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.99, 0.9999])
def test_recurrence_is_the_closed_form(decay: float) -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=200).astype(np.float32)
    model = scalar_model(1.0)
    ema = ExponentialMovingAverage(model, decay)
    for value in values:
        set_weight(model, float(value))
        ema.update()
    steps = len(values)
    powers = decay ** np.arange(steps - 1, -1, -1.0)
    expected = decay**steps * 1.0 + (1 - decay) * (powers * values.astype(np.float64)).sum()
    scale = max(abs(expected), 0.05)
    assert float(ema.state_dict()["weight"]) == pytest.approx(expected, abs=1e-6 * scale + 1e-7)


def test_constant_parameters_are_their_own_average() -> None:
    model = small_network()
    ema = ExponentialMovingAverage(model, 0.9999)
    for _ in range(50):
        ema.update()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(ema.state_dict()[name], parameter.detach(), rtol=1e-6, atol=0)


def test_small_steps_are_not_lost_in_float32() -> None:
    model = scalar_model(1.0)
    ema = ExponentialMovingAverage(model, 0.9999)
    set_weight(model, 1.5)
    for _ in range(20_000):
        ema.update()
    assert float(ema.state_dict()["weight"]) == pytest.approx(1.5 - 0.5 * 0.9999**20_000, abs=0.002)
    assert float(ema.state_dict()["weight"]) == pytest.approx(1.43, abs=0.01)


def test_average_of_half_precision_parameters_is_float32() -> None:
    model = scalar_model(1.0, torch.bfloat16)
    ema = ExponentialMovingAverage(model, 0.999)
    set_weight(model, 2.0)
    for _ in range(100):
        ema.update()
    average = ema.state_dict()["weight"]
    assert average.dtype == torch.float32 and model.weight.dtype == torch.bfloat16
    assert float(average) == pytest.approx(2.0 - 0.999**100, rel=1e-5)


def test_average_is_a_copy_and_needs_no_gradient() -> None:
    model = small_network()
    ema = ExponentialMovingAverage(model, 0.9)
    before = {name: value.clone() for name, value in ema.state_dict().items()}
    model(torch.ones(1, 3)).sum().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert all(torch.equal(value, before[name]) for name, value in ema.state_dict().items())
    ema.update()
    assert not any(value.requires_grad for value in ema.state_dict().values())
    assert all(not torch.equal(value, before[name]) for name, value in ema.state_dict().items())


def test_state_goes_into_another_average() -> None:
    first, second = (ExponentialMovingAverage(small_network(seed), 0.9) for seed in (0, 1))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for name, value in first.state_dict().items():
        assert torch.equal(second.state_dict()[name], value)
        assert second.state_dict()[name].data_ptr() != value.data_ptr()


def test_state_without_a_parameter_is_refused() -> None:
    ema = ExponentialMovingAverage(small_network(), 0.9)
    state = ema.state_dict()
    del state["2.bias"]
    with pytest.raises(KeyError, match="2.bias"):
        ema.load_state_dict(state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_update_is_one_operation_however_many_tensors(dtype: torch.dtype) -> None:
    model = nn.ParameterList([torch.ones(3, 3, dtype=dtype) for _ in range(50)])
    ema = ExponentialMovingAverage(model, 0.9)
    with OperationCounter() as counter:
        ema.update()
    casts = {} if dtype == torch.float32 else {"aten._to_copy.default": 50}
    assert counter.operations == {"aten._foreach_lerp_.Scalar": 1} | casts


@pytest.mark.parametrize(
    ("steps", "decay"), [(1, 0.5), (20, 0.5), (200, 0.5**0.1), (2_000, 0.5**0.01), (10**6, MAX_DECAY)]
)
def test_fitted_decay(steps: int, decay: float) -> None:
    assert fitted_decay(steps) == pytest.approx(decay, rel=1e-12)


def test_fitted_decay_halves_over_its_share_of_the_run() -> None:
    assert fitted_decay(10_000) ** 500 == pytest.approx(0.5)
    assert fitted_decay(10_000, fraction=0.1) ** 1_000 == pytest.approx(0.5)
    assert fitted_decay(138_000) < MAX_DECAY == fitted_decay(139_000) == 0.9999
