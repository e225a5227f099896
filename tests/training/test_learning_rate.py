"""The learning rate with a cooldown: its values, a resumed one, and what does not fit."""

import pytest
import torch

from speed_diffusers.errors import InputError
from speed_diffusers.training.config import TrainConfig
from speed_diffusers.training.learning_rate import make_lr_scheduler
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
