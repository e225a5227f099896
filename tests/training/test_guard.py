"""The guard against non-finite gradients: nothing is applied after one, and no step waits to find out."""

import copy

import pytest
import torch
from torch import Tensor, nn

from speed_diffusers.training.guard import NonFiniteGuard, describe_images, not_finite
from speed_diffusers.training.profiling import OperationCounter


class Run:
    """A tiny training run with a guarded fused AdamW, as the training script has it."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 4))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2, fused=True)
        self.guard = NonFiniteGuard(self.optimizer, torch.device("cpu"))
        self.step = 0

    def train(self, poison: float | None = None) -> None:
        self.step += 1
        generator = torch.Generator().manual_seed(self.step)
        loss = self.model(torch.randn(16, 4, generator=generator)).square().mean()
        loss.backward()
        if poison is not None:
            self.model[0].weight.grad[1, 2] = poison
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.guard.observe(norm, self.step, [(torch.tensor([10 * self.step]), norm[None])])
        self.optimizer.step()
        self.optimizer.zero_grad()

    def state(self) -> list[Tensor]:
        moments = [value for entry in self.optimizer.state.values() for value in entry.values()]
        return copy.deepcopy([*(parameter.detach() for parameter in self.model.parameters()), *moments])


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_nothing_is_applied_from_the_first_bad_gradient_on(poison: float) -> None:
    run = Run()
    for _ in range(6):
        run.train()
    before = run.state()
    assert run.guard.failed_step() is None
    run.train(poison)
    for _ in range(3):
        run.train()
    for mine, expected in zip(run.state(), before, strict=True):
        assert torch.equal(mine, expected)
    assert run.guard.failed_step() == 7


def test_the_first_bad_step_is_the_one_reported() -> None:
    run = Run()
    for step in range(1, 12):
        run.train(float("nan") if step in (4, 6, 11) else None)
    assert run.guard.failed_step() == 4
    (timestep,), (loss,) = run.guard.images_of(4)
    assert timestep == 40 and loss.isnan()
    assert run.guard.images_of(12).shape == (2, 0), "not taken yet"


def test_images_are_named_by_rank_and_timestep() -> None:
    timesteps = torch.tensor([[3.0, 999.0], [40.0, 41.0]])
    errors = torch.tensor([[0.5, 0.25], [float("inf"), 0.125]])
    assert describe_images(timesteps, errors) == "1 of its 4 losses were not finite: rank 1 at timesteps 40."
    assert describe_images(timesteps, errors.nan_to_num()) == "All its losses were finite, at timesteps 3 to 999."
    assert describe_images(timesteps[:, :0], errors[:, :0]).startswith("Its images are not known any more: more than")
    many = describe_images(torch.arange(20.0)[None], torch.full((1, 20), float("nan")))
    assert many.startswith("20 of its 20 losses") and many.endswith(
        "rank 0 at timesteps 0, 1, 2, 3, 4, 5, 6, 7 and 12 more."
    )


def test_without_a_bad_gradient_training_is_that_of_plain_adamw() -> None:
    guarded, plain = Run(), Run()
    del plain.optimizer.found_inf, plain.optimizer.grad_scale  # type: ignore[attr-defined]
    for _ in range(8):
        guarded.train()
        plain.train()
    for mine, expected in zip(guarded.state(), plain.state(), strict=True):
        assert torch.equal(mine, expected)
    assert guarded.guard.failed_step() is None


def test_without_the_guard_a_bad_gradient_would_be_applied() -> None:
    run = Run()
    del run.optimizer.found_inf, run.optimizer.grad_scale  # type: ignore[attr-defined]
    run.train(float("nan"))
    assert any(not torch.isfinite(value).all() for value in run.state())


def test_step_numbers_beyond_a_million_are_exact() -> None:
    run = Run()
    run.guard.observe(torch.tensor(float("nan")), 7_000_001)
    assert run.guard.failed_step() == 7_000_001


def test_observing_never_waits_for_the_device() -> None:
    run = Run()
    with OperationCounter() as counter:
        run.guard.observe(torch.tensor(1.0), 1, [(torch.ones(4), torch.ones(4))])
        run.guard.observe(torch.tensor(float("nan")), 2, [(torch.ones(4), torch.ones(4))])
    assert counter.total > 0 and counter.host_waits.total() == 0
    with OperationCounter() as counter:
        assert run.guard.failed_step() == 2
    assert counter.scalar_reads == 2, "reading it is what waits"


def test_what_is_not_finite_is_named_with_one_wait_for_the_device() -> None:
    good = {"a": torch.full((3,), 3e38), "empty": torch.zeros(0, 4), "half": torch.ones(2, dtype=torch.bfloat16)}
    bad = {"nan": torch.tensor([[1.0, float("nan")]]), "inf": torch.tensor([float("-inf"), 1.0])}
    assert not_finite(good) == [] == not_finite({})
    with OperationCounter() as counter:
        assert not_finite({**good, **bad}) == ["nan", "inf"]
    assert counter.host_waits.total() <= 1
