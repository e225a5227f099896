"""docs/kohya_and_others.md: its lines run, with stand-ins for what those trainers have at hand."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from speed_diffusers import SpeeDDDPMScheduler, SpeeDFlowMatchEulerDiscreteScheduler, functional

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "kohya_and_others.md").read_text("utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.S)
TRAINED = {"epsilon": SpeeDDDPMScheduler(), "flow": SpeeDFlowMatchEulerDiscreteScheduler(shift=3.0)}


NAMES = {"torch": torch, "SpeeDDDPMScheduler": SpeeDDDPMScheduler, "speed_tables": functional.speed_tables}
NAMES |= {"draw": functional.draw, "weights": functional.weights}


def block(*words: str) -> str:
    """The one block with these words."""
    (found,) = [text for text in BLOCKS if all(word in text for word in words)]
    return found


def run(text: str, **given: Any) -> dict[str, Any]:
    names: dict[str, Any] = NAMES | given
    exec(text, names)
    return names


def run_last_line(text: str, **given: Any) -> Any:
    *_, last = text.strip().splitlines()
    return eval(last.removeprefix("return "), NAMES | given)


def spread(timesteps: Tensor, T: int = 1000) -> None:
    assert timesteps.shape == (512,) and timesteps.min() >= 0 and timesteps.max() <= T
    assert timesteps.float().std() > 100


def test_there_is_a_section_for_each_trainer_with_its_commit() -> None:
    assert re.findall(r"^## (\S+), commit (\w{7})$", PAGE, re.M) == [
        ("kohya-ss/sd-scripts", "48d368f"),
        ("bghira/SimpleTuner", "bc8e6ab"),
        ("Nerogar/OneTrainer", "23df383"),
        ("ostris/ai-toolkit", "27a03a9"),
    ]
    assert len(BLOCKS) == 14


@pytest.mark.parametrize("v_prediction", [False, True])
def test_kohyas_scheduler_draws_and_weighs(v_prediction: bool) -> None:
    args = SimpleNamespace(
        v_parameterization=v_prediction, zero_terminal_snr=v_prediction, min_timestep=None, max_timestep=None
    )
    made = run(block("beta_start"), args=args)["noise_scheduler"]
    assert made.config.prediction_type == ("v_prediction" if v_prediction else "epsilon")
    assert (made.alphas_cumprod[-1] < 1e-6) == v_prediction
    names = run(block("b_size"), args=args, noise_scheduler=made, b_size=512, latents=torch.zeros(1))
    spread(names["timesteps"])
    loss = run(
        "loss = loss * noise_scheduler.loss_weights(timesteps)",
        loss=torch.ones(512),
        noise_scheduler=made,
        timesteps=names["timesteps"],
    )["loss"]
    assert torch.equal(loss, made.loss_weights(names["timesteps"]))
    plain = made.to_inference()
    assert "timesteps" not in run(block("b_size"), args=args, noise_scheduler=plain, b_size=4, latents=loss)
    args.min_timestep = args.max_timestep = 200
    assert "timesteps" not in run(block("b_size"), args=args, noise_scheduler=made, b_size=4, latents=loss)


def test_kohyas_sd3_draws_but_where_it_validates() -> None:
    given = {"speed": TRAINED["flow"], "bsz": 512, "device": "cpu", "dtype": torch.float32}
    args = SimpleNamespace(min_timestep=None, max_timestep=None)
    spread(run(block("speed.sample_timesteps(bsz).to(device=device"), args=args, **given)["timesteps"])
    args.min_timestep = 200
    assert "timesteps" not in run(block("speed.sample_timesteps(bsz).to(device=device"), args=args, **given)


def test_kohyas_flux_gets_sigmas_of_the_scheduler() -> None:
    scheduler = TRAINED["flow"]
    drawn = run(block("num_timesteps"), noise_scheduler=scheduler, bsz=512, device="cpu", num_timesteps=1000)
    spread(drawn["timesteps"])
    assert drawn["sigmas"].min() > 0 and drawn["sigmas"].max() <= 1
    weighed = run(block("weighting ="), noise_scheduler=scheduler, timesteps=drawn["timesteps"])["weighting"]
    assert weighed.shape == (512, 1, 1, 1) and weighed.std() > 0.01


@pytest.mark.parametrize("kind", TRAINED)
def test_simpletuner_draws_and_weighs(kind: str) -> None:
    model = SimpleNamespace(speed=TRAINED[kind], accelerator=SimpleNamespace(device="cpu"))
    if kind == "flow":
        names = run(block("/ 1000.0"), self=model, bsz=512)
        timesteps = names["timesteps"]
        assert torch.equal(names["sigmas"], timesteps / 1000)
    else:
        timesteps = run(block('batch["timesteps"] ='), self=model, bsz=512, batch={})["batch"]["timesteps"]
    spread(timesteps)
    loss = run(block("prepared_batch"), self=model, loss=torch.ones(512), prepared_batch={"timesteps": timesteps})
    assert torch.equal(loss["loss"], model.speed.loss_weights(timesteps))


def test_onetrainer_draws_and_weighs_by_tables_of_its_own_convention() -> None:
    lines = block("speed_tables(alphas").splitlines()
    given = {"alphas_cumprod": torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)}
    for line in (line for line in lines if line.startswith("tables")):
        tables = run(line, **given)["tables"]
        generator = torch.Generator().manual_seed(0)
        timesteps = run_last_line(block("return draw"), tables=tables, batch_size=512, generator=generator)
        assert timesteps.dtype == torch.int32
        spread(timesteps, 999)
        losses = run(block("losses *="), tables=tables, losses=torch.ones(512), data={"timestep": timesteps})["losses"]
        assert torch.equal(losses, functional.weights(tables, timesteps.long()))
    # Its timestep i has sigma (i + 1) / 1000, as the unshifted scheduler of diffusers has it.
    every = torch.arange(1000)
    scheduler = SpeeDFlowMatchEulerDiscreteScheduler()
    torch.testing.assert_close(functional.weights(tables, every), scheduler.loss_weights(every + 1.0))


@pytest.mark.parametrize("kind", ["epsilon", "flow"])
def test_ai_toolkits_indices_find_the_timesteps_that_were_drawn(kind: str) -> None:
    speed: Any = SpeeDFlowMatchEulerDiscreteScheduler() if kind == "flow" else SpeeDDDPMScheduler()
    model = SimpleNamespace(speed=speed, device_torch="cpu")
    names = run(block("timestep_indices"), self=model, batch_size=512, num_train_timesteps=1000)
    table = torch.linspace(1000, 1, 1000) if kind == "flow" else torch.arange(999, -1, -1)
    timesteps = table[names["timestep_indices"]]
    spread(timesteps)
    torch.testing.assert_close(timesteps, names["drawn"])
    loss = run(block("self.speed.loss_weights(timesteps)"), self=model, loss=torch.ones(512), timesteps=timesteps)
    assert torch.equal(loss["loss"], speed.loss_weights(names["drawn"]))
