"""The formula of a DiT's operations against its paper and against torch's own count."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from speed_diffusers.errors import InputError
from speed_diffusers.models import build_dit, dit_config
from speed_diffusers.reports.training_cost import (
    GPUS,
    TrainingCost,
    forward_macs,
    gpu_of_device,
    model_flops_utilization,
    training_flops,
)
from speed_diffusers.training.config import TrainConfig
from speed_diffusers.training.optimizer import make_optimizer


def config_of(model: str, sample_size: int = 32) -> dict[str, object]:
    return dit_config(model, sample_size=sample_size, in_channels=4, out_channels=8, num_classes=1000)


@pytest.mark.parametrize(
    ("model", "gflops"),
    # Peebles and Xie, arXiv 2212.09748, table 4: what it calls Gflops are multiply-accumulates.
    [("DiT-S/2", 6.06), ("DiT-B/2", 23.01), ("DiT-L/2", 80.71), ("DiT-XL/2", 118.64), ("DiT-XL/8", 7.39)],
)
def test_the_paper_has_the_same_numbers(model: str, gflops: float) -> None:
    assert forward_macs(config_of(model)) / 1e9 == pytest.approx(gflops, abs=0.02)


@pytest.mark.parametrize(("model", "sample_size"), [("DiT-S/2", 32), ("DiT-tiny/4", 16), ("DiT-XL/4", 32)])
def test_torch_counts_the_same(model: str, sample_size: int) -> None:
    config = config_of(model, sample_size)
    with torch.device("meta"):
        core = build_dit(config, None)
        inputs = torch.randn(2, 4, sample_size, sample_size), torch.ones(2), torch.zeros(2, dtype=torch.int64)
    with FlopCounterMode(display=False) as forward:
        output = core(*inputs)
    assert forward.get_total_flops() == pytest.approx(2 * 2 * forward_macs(config), rel=1e-3)
    with FlopCounterMode(display=False) as backward:
        output.sum().backward()
    counted = forward.get_total_flops() + backward.get_total_flops()
    # The first layer's input needs no gradient, which a patch embedding of few channels hardly shows.
    assert counted == pytest.approx(2 * training_flops(config), rel=5e-3)


@pytest.mark.parametrize("ns_steps", [3, 5])
def test_torch_counts_the_same_of_muon(ns_steps: int) -> None:
    config = config_of("DiT-tiny/4", 16)
    with torch.device("meta"):
        core = build_dit(config, None)
    for parameter in core.parameters():
        parameter.grad = torch.zeros_like(parameter)
    options = TrainConfig(optimizer="muon", muon_ns_steps=ns_steps)
    muon = make_optimizer(options, core, torch.device("meta")).parts[1]  # type: ignore[attr-defined]
    with FlopCounterMode(display=False) as counted:
        muon.step()
    parameters = sum(parameter.numel() for parameter in core.parameters())
    plain = TrainingCost(config, parameters, global_batch=8, max_train_steps=2)
    cost = replace(plain, muon_ns_steps=ns_steps)
    assert counted.get_total_flops() == cost.muon_flops == cost.step_flops - plain.step_flops > 0
    under_muon = sum(state["momentum_buffer"].numel() for state in muon.state.values())
    assert cost.state_bytes == 12 * parameters + 4 * under_muon + 8 * (parameters - under_muon) < plain.state_bytes
    assert plain.muon_flops == 0
    assert replace(plain, ema_tracks=2).state_bytes == plain.state_bytes + 8 * parameters


@pytest.mark.parametrize(
    ("device_name", "gpu"),
    [
        ("NVIDIA H200", "H200"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100-PCIe"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA A100 80GB PCIe", "A100"),
        ("NVIDIA A100-PCIE-40GB", "A100-40GB"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA GeForce RTX 4090", "RTX4090"),
        ("AMD Instinct MI300X OAM", "MI300X"),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("Tesla T4", None),
    ],
)
def test_a_card_is_known_by_its_drivers_name_or_not_at_all(device_name: str, gpu: str | None) -> None:
    assert gpu_of_device(device_name) is (None if gpu is None else GPUS[gpu])


def test_utilization_is_that_of_the_precisions_peak() -> None:
    config, gpu = config_of("DiT-XL/2"), GPUS["H200"]
    # 989e12 / 711.7e9: a ceiling of 1,390 images per second.
    assert model_flops_utilization(config, 1390.0, gpu) == pytest.approx(1.0, rel=1e-3)
    assert model_flops_utilization(config, 695.0, gpu, precision="tf32") == pytest.approx(1.0, rel=1e-3)
    with pytest.raises(InputError, match="Unknown precision 'bf17'. Did you mean 'bf16'"):
        model_flops_utilization(config, 1.0, gpu, precision="bf17")


def test_every_peak_has_its_source_and_tf32_is_half_of_bf16() -> None:
    for name, gpu in GPUS.items():
        assert gpu.source and gpu.memory_gb > 0, name
        assert gpu.tf32_tflops == pytest.approx(gpu.bf16_tflops / 2, rel=0.02), name
