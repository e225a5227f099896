"""Random numbers are float32, whatever torch's default dtype is."""

from collections.abc import Iterator

import pytest
import torch

from speed_diffusers import SpeeDDDPMScheduler, SpeeDFlowMatchEulerDiscreteScheduler
from speed_diffusers.training.step_draws import StepDraws


@pytest.fixture
def half_precision() -> Iterator[None]:
    """bfloat16 as the default dtype, as trainers set it that make their model in it."""
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(torch.float32)


SCHEDULERS = {
    "independent": lambda: SpeeDDDPMScheduler(speed_sampling="asymmetric"),
    "paired": lambda: SpeeDDDPMScheduler(speed_draw="paired"),
    "stratified": lambda: SpeeDDDPMScheduler(speed_draw="stratified"),
    "flow, uniform": lambda: SpeeDFlowMatchEulerDiscreteScheduler(speed_sampling="uniform"),
    "flow": lambda: SpeeDFlowMatchEulerDiscreteScheduler(speed_sampling="logit_normal"),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_draws_do_not_depend_on_the_default(name: str, half_precision: None) -> None:
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        torch.set_default_dtype(dtype)
        scheduler = SCHEDULERS[name]()
        timesteps = scheduler.sample_timesteps(20_000, torch.Generator().manual_seed(0))
        found.append((timesteps, scheduler.loss_weights(timesteps)))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
    assert found[1][1].dtype == torch.float32
    # In bfloat16 fewer than half of all timesteps would ever be drawn.
    assert len(found[1][0].unique()) > 900


def test_what_a_step_draws_is_float32(half_precision: None) -> None:
    options = {"seed": 0, "step": 3, "latent_shape": (64, 4, 2, 2), "class_dropout_prob": 0.1, "random_flip": True}
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        torch.set_default_dtype(dtype)
        found.append(StepDraws.at_step(SpeeDDDPMScheduler(), **options, device=torch.device("cpu")))
    for name, value in vars(found[0]).items():
        other = getattr(found[1], name)
        assert value.dtype == other.dtype and torch.equal(value, other), name
