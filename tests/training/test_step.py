"""The generator of optimizer steps: one at a time, nothing after the last, and the ones that the script takes."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close

from speed_diffusers.config.load import load_config
from speed_diffusers.train_scripts.train_dit_speed import SCRIPT_DIR
from speed_diffusers.training.config import TrainConfig
from speed_diffusers.training.run import TrainingRun
from speed_diffusers.training.setup import temporary_run
from speed_diffusers.training.step import training_steps

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


def state_of(run: TrainingRun) -> dict[str, Tensor]:
    """Copies of the parameters and their EMA."""
    parts = {"model": run.core.state_dict(), "ema": run.ema.state_dict()}
    return {f"{part}/{name}": value.clone() for part, values in parts.items() for name, value in values.items()}


def saved_state(folder: Path, step: int) -> dict[str, Tensor]:
    """The same of a checkpoint."""
    parts = {part: load_file(folder / f"checkpoint-{step}" / f"{part}.safetensors") for part in ("model", "ema")}
    return {f"{part}/{name}": value for part, values in parts.items() for name, value in values.items()}


def different(first: dict[str, Tensor], second: dict[str, Tensor]) -> list[str]:
    """Names of the tensors that are not bit-equal."""
    assert first.keys() == second.keys()
    return [name for name in first if not torch.equal(first[name], second[name])]


def optimizer_steps(run: TrainingRun) -> set[int]:
    """How often each parameter has been updated."""
    return {int(state["step"]) for state in run.optimizer.optimizer.state.values()}


def test_steps_are_taken_one_by_one_and_are_those_of_the_script(
    train: Callable[..., Path], tiny_options: list[str], tmp_path: Path, fresh_accelerate: Callable[[], None]
) -> None:
    folder = train(tmp_path / "script")
    config = load_config(TrainConfig, tiny_options, SCRIPT_DIR)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    fresh_accelerate()
    with temporary_run(config, steps=12) as run:
        before = state_of(run)
        steps = training_steps(run)
        assert different(state_of(run), before) == [] and optimizer_steps(run) == set(), "nothing before it is asked"
        for done, line in enumerate(lines, start=1):
            step = next(steps)
            assert (step.done, step.is_last, len(step.micro_steps)) == (done, done == 12, 1)
            assert optimizer_steps(run) == {done} and run.lr_scheduler.last_epoch == done
            (micro_step,) = step.micro_steps
            assert float(micro_step.result.loss) == line["loss"] and not micro_step.result.loss.requires_grad
            assert float(micro_step.result.squared_error.mean()) == line["squared_error"]
            assert float(step.grad_norm) == line["grad_norm"] and micro_step.timesteps.shape == (4,)
            after = state_of(run)
            assert bool(different(after, before)) == (done > 1), "the warm-up begins at a learning rate of 0"
            if done in (5, 10, 12):
                assert different(after, saved_state(folder, done)) == []
            before = after
        assert next(steps, None) is None
        assert different(state_of(run), before) == [] and optimizer_steps(run) == {12}, "nothing after the last"


def test_a_consumer_that_stops_early_leaves_the_run_at_its_step(
    train: Callable[..., Path], tiny_options: list[str], tmp_path: Path, fresh_accelerate: Callable[[], None]
) -> None:
    accumulated = ["gradient_accumulation_steps=2", "checkpointing_steps=3", "max_train_steps=3"]
    folder = train(tmp_path / "script", *accumulated)
    config = load_config(TrainConfig, [*tiny_options, "gradient_accumulation_steps=2"], SCRIPT_DIR)
    fresh_accelerate()
    with temporary_run(config, steps=12) as run:
        for step in training_steps(run):
            assert [len(micro_step.timesteps) for micro_step in step.micro_steps] == [4, 4]
            if step.done == 3:
                break
        assert optimizer_steps(run) == {3} and run.lr_scheduler.last_epoch == 3
        assert all(parameter.grad is None for parameter in run.core.parameters())
        # The learning rate of a warm-up does not know how long the run will be.
        assert different(state_of(run), saved_state(folder, 3)) == []


def test_images_of_a_step_are_encoded_vae_batch_size_at_a_time(
    tiny_options: list[str], fresh_accelerate: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    encode = AutoencoderKL.encode

    def counting(vae: AutoencoderKL, pixels: Tensor) -> object:
        sizes.append(len(pixels))
        return encode(vae, pixels)

    monkeypatch.setattr(AutoencoderKL, "encode", counting)
    losses = {}
    for size, expected in {3: [3, 1] * 2, 8: [4] * 2}.items():
        fresh_accelerate()
        sizes.clear()
        options = [*tiny_options, "cache_latents=false", f"vae_batch_size={size}"]
        with temporary_run(load_config(TrainConfig, options, SCRIPT_DIR), steps=2) as run:
            losses[size] = [step.micro_steps[0].result.loss for step in training_steps(run)]
        assert sizes == expected
    assert_close(losses[3], losses[8], rtol=1e-5, atol=0)
