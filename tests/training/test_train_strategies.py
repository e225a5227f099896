"""The training script with other strategies than the paper's: densities that learn or change, and rectified flows."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file

from run_outputs import metrics
from speed_diffusers import SpeeDDDPMScheduler, SpeeDFlowMatchEulerDiscreteScheduler
from speed_diffusers.errors import InputError
from speed_diffusers.generation import GenerationSettings, generate
from speed_diffusers.generation.pretrained import load_pipeline, prediction_type_of
from speed_diffusers.objective import denoising_loss
from speed_diffusers.training import feedback
from speed_diffusers.training.feedback import ErrorFeedback
from speed_diffusers.training.step_draws import StepDraws


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {
        f"{file.stem}/{name}": value
        for file in folder.glob("*.safetensors")
        for name, value in load_file(file).items()
    }


@pytest.mark.parametrize(
    "learning",
    [
        ["speed_sampling=loss_second_moment"],
        ["speed_sampling=two_phase:first=information_rate,until=0.7", "speed_weighting=uncertainty:bins=2"],
    ],
)
def test_what_learns_resumes_exactly_between_two_updates(
    train: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, learning: list[str]
) -> None:
    monkeypatch.setattr(feedback, "STEPS_BETWEEN_UPDATES", 4)  # and checkpoints are saved at 5, 10 and 12
    strategy = [*learning, "num_train_timesteps=8", "num_inference_steps=2"]
    whole = train(tmp_path / "whole", *strategy)
    shutil.copytree(whole, tmp_path / "broken")
    for name in ("checkpoint-10", "checkpoint-12", "pipeline"):
        shutil.rmtree(tmp_path / "broken" / name)
    broken = train(tmp_path / "broken", *strategy, "resume_from_checkpoint=latest")
    one, other = tensors(whole / "checkpoint-12"), tensors(broken / "checkpoint-12")
    names = {name.removeprefix("speed/").split(".")[0] for name in one if name.startswith("speed/")}
    assert one.keys() == other.keys() and names == {"pending", *(option.split("=")[0] for option in learning)}
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
    assert metrics(whole) == metrics(broken)
    (broken / "checkpoint-12" / "speed.safetensors").write_bytes(b"damaged")
    with pytest.raises(InputError, match="speed.safetensors is damaged"):
        train(broken, *strategy, f"resume_from_checkpoint={broken / 'checkpoint-12'}")


def test_feedback_is_the_sum_of_errors_since_the_last_update() -> None:
    scheduler = SpeeDDDPMScheduler(num_train_timesteps=6, speed_sampling="information_rate")
    told: list[torch.Tensor] = []
    scheduler.update_speed = lambda sums, counts: told.extend((sums.clone(), counts.clone()))  # type: ignore[method-assign]
    errors = ErrorFeedback(scheduler, torch.device("cpu"))
    errors.add(torch.tensor([0, 0, 5]), torch.tensor([1.0, 2.0, 7.0]))
    errors.advance(feedback.STEPS_BETWEEN_UPDATES - 1, lambda tensor: tensor)
    assert told == []
    errors.add(torch.tensor([5]), torch.tensor([1.0]))
    errors.advance(feedback.STEPS_BETWEEN_UPDATES, lambda tensor: 2 * tensor)
    assert told[0].tolist() == [6, 0, 0, 0, 0, 16] and told[1].tolist() == [4, 0, 0, 0, 0, 4]
    assert not errors.totals.any()
    with pytest.raises(InputError, match="holds nothing that speed_sampling or speed_weighting has learned"):
        errors.load_state_dict({}, is_main_process=True)


def test_pending_errors_count_once_whatever_the_processes() -> None:
    scheduler = SpeeDDDPMScheduler(num_train_timesteps=6, speed_sampling="loss_second_moment")
    first = ErrorFeedback(scheduler, torch.device("cpu"))
    first.add(torch.tensor([2]), torch.tensor([3.0]))
    state = first.state_dict(lambda tensor: tensor)
    loaded = [ErrorFeedback(scheduler, torch.device("cpu")) for _ in range(3)]
    for rank, each in enumerate(loaded):
        each.load_state_dict(state, is_main_process=rank == 0)
    assert torch.equal(sum(each.totals for each in loaded), first.totals)


def test_progress_is_the_share_of_the_steps_that_are_done() -> None:
    scheduler = SpeeDDDPMScheduler(speed_k=25, speed_anneal_start=0.0, speed_anneal_end=0.5)
    common: dict[str, Any] = {"seed": 0, "step": 3, "class_dropout_prob": 0.0, "random_flip": False}
    shares = []
    for progress in (0.0, 0.25, 0.9):
        draws = StepDraws.at_step(
            scheduler, latent_shape=(20_000, 1, 1, 1), device=torch.device("cpu"), progress=progress, **common
        )
        shares.append(float((draws.timesteps >= 700).float().mean()))
    assert shares[0] == pytest.approx(300 / (700 * 25 + 300), abs=0.004)
    assert shares[1] == pytest.approx(300 / (700 * 13 + 300), abs=0.006)
    assert shares[2] == pytest.approx(0.3, abs=0.012)
    with pytest.raises(InputError, match="pass progress"):
        scheduler.sample_timesteps(4)


@pytest.mark.parametrize(
    "strategy",
    [
        ["speed_anneal_start=0.5", "speed_draw=stratified", "speed_normalize_weights=true"],
        ["speed_sampling=clts", "speed_weighting=min_snr:gamma=3"],
        ["speed_sampling=t_sample", "speed_weighting=p2:k=1,gamma=1", "speed_draw=paired"],
        ["speed_tau=0.7", "speed_sampling=logit_normal:mean=0.5,std=1"],
    ],
)
def test_strategies_train_by_their_names(train: Callable[..., Path], tmp_path: Path, strategy: list[str]) -> None:
    lines = metrics(train(tmp_path / "run", *strategy))
    assert len(lines) == 12 and np.isfinite([line["loss"] for line in lines]).all()


def test_a_flow_is_trained_saved_and_sampled(train: Callable[..., Path], tmp_path: Path) -> None:
    folder = train(tmp_path / "flow", "prediction_type=flow_prediction", "flow_shift=2")
    lines = metrics(folder)
    assert np.isfinite([line["loss"] for line in lines]).all()
    pipeline = load_pipeline(str(folder))
    assert type(pipeline.scheduler) is FlowMatchEulerDiscreteScheduler and pipeline.scheduler.config.shift == 2
    assert prediction_type_of(str(folder)) == "flow_prediction"
    for sampler in (None, "heun"):
        settings = GenerationSettings(sampler=sampler, num_inference_steps=3, guidance_scale=2.0)
        (images,) = generate(pipeline, [0, 1], settings)
        assert images.shape == (2, 32, 32, 3) and np.isfinite(images).all()
    with pytest.raises(InputError, match="trained for flow matching; use euler or heun"):
        list(generate(pipeline, [0], GenerationSettings(sampler="ddim")))
    tuned = train(tmp_path / "tuned", "prediction_type=flow_prediction", f"pretrained_model_name_or_path={folder}")
    assert metrics(tuned)[0]["loss"] < lines[0]["loss"]


@pytest.mark.parametrize("converted", [False, True])
def test_the_loss_of_a_flow_is_the_hand_formula(converted: bool) -> None:
    scheduler = SpeeDFlowMatchEulerDiscreteScheduler(speed_weighting="none")
    if converted:  # its config holds prediction_type="sample", which a flow must not heed
        scheduler = SpeeDFlowMatchEulerDiscreteScheduler.from_config(
            SpeeDDDPMScheduler(speed_weighting="none", prediction_type="sample").config
        )
        assert scheduler.config["prediction_type"] == "sample"
    generator = torch.Generator().manual_seed(0)
    clean, noise, prediction = (torch.randn(5, 4, 2, 2, generator=generator) for _ in range(3))
    timesteps = scheduler.sample_timesteps(5, generator=generator)
    seen = []

    def network(sample: torch.Tensor, timestep: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        seen.append(sample)
        return prediction

    result = denoising_loss(network, scheduler, clean, torch.zeros(5, dtype=torch.int64), timesteps, noise)
    sigma = (timesteps.double() / 1000)[:, None, None, None]
    torch.testing.assert_close(seen[0].double(), (1 - sigma) * clean + sigma * noise, atol=1e-6, rtol=1e-6)
    expected = (prediction.double() - (noise.double() - clean.double())).square().mean()
    assert float(result.loss) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["speed_sampling=logit_norml:mean=0"], r"\(speed_sampling\) 'logit_norml'.*Did you mean 'logit_normal'"),
        (["speed_sampling=logit_normal:men=0"], "Unknown parameter .*'men'.*Did you mean 'mean'"),
        (["speed_weighting=min_snr:gamma=-1"], "gamma=-1 must be in"),
        (["speed_draw=pared"], "Unknown speed_draw 'pared'.*Did you mean 'paired'"),
        (["speed_anneal_start=2"], r"speed_anneal_start=2.0: must lie in \[0, 1\]"),
        (["flow_shift=3"], "flow_shift=3.0: only prediction_type=flow_prediction knows it"),
        (
            ["prediction_type=flow_prediction", "variance_type=learned_range"],
            "variance_type=learned_range: .* does not",
        ),
        (["prediction_type=flow_prediction", "beta_schedule=sigmoid"], "beta_schedule=sigmoid: .* does not know it"),
        (["prediction_type=flow_prediction", "speed_draw=paired"], "pivot"),
    ],
)
def test_what_does_not_fit_is_one_line(
    train: Callable[..., Path], tmp_path: Path, wrong: list[str], message: str
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        train(tmp_path / "run", *wrong)
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()
