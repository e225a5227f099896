"""The formula of a DiT's operations against its paper and against torch's own count."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from speed_diffusers.models import build_dit, dit_config
from speed_diffusers.reports.training_cost import forward_macs, training_flops


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
