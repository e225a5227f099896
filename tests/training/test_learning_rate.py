"""The learning rate with a cooldown: its values, a resumed one, and what does not fit."""

from dataclasses import fields

import pytest
import torch

from speed_diffusers.errors import InputError
from speed_diffusers.training.config import TrainConfig
from speed_diffusers.training.learning_rate import make_lr_scheduler
from speed_diffusers.training.optimizer import make_optimizer
from speed_diffusers.training.parts import set_learning_rate

COOLDOWN = {"lr_scheduler": "warmup_stable_decay", "lr_warmup_steps": 4, "lr_decay_steps": 16, "max_train_steps": 40}


def rates(options: dict[str, object], *, resumed_at: int = 0) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    schedule = make_lr_scheduler(TrainConfig(**options), optimizer)  # type: ignore[arg-type]
    set_learning_rate(schedule, resumed_at)
    found = []
    for _ in range(resumed_at, 41):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


def test_it_grows_stays_and_falls_by_the_root_of_the_share_that_is_done() -> None:
    found = rates(COOLDOWN)
    assert found[:5] == [0.0, 0.125, 0.25, 0.375, 0.5] and set(found[4:25]) == {0.5}
    assert found[28] == pytest.approx(0.25) and found[33] == pytest.approx(0.5 * (1 - 0.75)) and found[40] == 0.0
    assert found[39] > 0.0  # the last step still learns
    assert rates(COOLDOWN, resumed_at=26) == found[26:]
    assert found[:20] == rates({**COOLDOWN, "lr_scheduler": "constant_with_warmup", "lr_decay_steps": 0})[:20]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"lr_decay_steps": 0},
            r"=0: lr_scheduler=warmup_stable_decay needs some in .*, here \[1, 36\]",
        ),
        ({"lr_decay_steps": 37}, r"lr_decay_steps=37: .*here \[1, 36\]"),
        ({"lr_scheduler": "cosine"}, "lr_decay_steps=16: only lr_scheduler=warmup_stable_decay knows it"),
    ],
)
def test_steps_that_do_not_fit_are_one_line(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        TrainConfig(**{**COOLDOWN, **options})  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


(SCHEDULES,) = [field.metadata["choices"] for field in fields(TrainConfig) if field.name == "lr_scheduler"]


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_scales_both_rates_of_muon(name: str) -> None:
    options: dict[str, object] = {"lr_warmup_steps": 0, "max_train_steps": 10} | (
        {"lr_decay_steps": 5} if name == "warmup_stable_decay" else {}
    )
    rates = {"learning_rate": 0.25, "muon_learning_rate": 0.5}
    config = TrainConfig(lr_scheduler=name, optimizer="muon", **rates, **options)  # type: ignore[arg-type]
    model = torch.nn.ModuleDict({"attn1": torch.nn.ModuleDict({"to_q": torch.nn.Linear(2, 2)})})
    optimizer = make_optimizer(config, model, torch.device("cpu"))
    schedule = make_lr_scheduler(config, optimizer)
    seen = []
    for _ in range(10):
        adamw, muon = (float(group["lr"]) for group in optimizer.param_groups)
        assert muon == pytest.approx(2 * adamw)
        seen.append(adamw)
        optimizer.step()
        schedule.step()
    assert seen[0] == 0.25 and (seen[-1] < 0.25) == (not name.startswith("constant"))
