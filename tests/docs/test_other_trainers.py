"""The diffs of docs/other_trainers.md, applied to the loops of diffusers' training scripts and run with its models."""

import inspect
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import (
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
)
from torch import Tensor

import diffusers_loops as loops
from speed_diffusers import SpeeDDDPMScheduler, SpeeDFlowMatchEulerDiscreteScheduler
from speed_diffusers.functional import draw, speed_tables, weights

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "other_trainers.md").read_text("utf-8")
DIFFS = re.findall(r"```diff\n(.*?)```", PAGE, re.S)
LOSS_AWARE, NO_SCHEDULER = re.findall(r"```python\n(.*?)```", PAGE, re.S)
LOOPS = [loops.unconditional, loops.text_to_image, loops.text_to_image, loops.dreambooth, loops.flow_matching]
UNCONDITIONAL, TEXT_TO_IMAGE, LORA, DREAMBOOTH, FLOW = range(5)
UNIFORM = {"speed_sampling": "uniform", "speed_weighting": "none"}
STABLE_DIFFUSION = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def patched(source: str, diff: str) -> str:
    """The source with each hunk's old lines, which must occur exactly once, replaced by its new ones.

    Hunks are separated by lines of three dots; indentation is that of the source. One without old lines goes on top.
    """
    lines = textwrap.dedent(source).splitlines()
    for hunk in re.split(r"^\.\.\.\n", diff, flags=re.M):
        marked = [(line[0], line[1:].strip()) for line in hunk.splitlines()]
        assert marked and {mark for mark, _ in marked} <= set(" +-")
        old = [text for mark, text in marked if mark in " -"]
        new = [text for mark, text in marked if mark in " +"]
        stripped = [line.strip() for line in lines]
        found = [i for i in range(len(lines)) if stripped[i : i + len(old)] == old] if old else [0]
        assert len(found) == 1, f"{len(found)} times in the loop: {old}"
        start = found[0]
        indent = lines[start][: len(lines[start]) - len(stripped[start])]
        lines[start : start + len(old)] = [indent + text for text in new]
    return "\n".join(lines)


def with_speed(script: int, **speed: Any) -> Callable[..., loops.Trace]:
    """The loop after the page's diff; `speed` are settings that a reader would add where the scheduler is made."""
    source = patched(inspect.getsource(LOOPS[script]), DIFFS[script])
    makes = r"(SpeeD\w+\.from_config\(noise_scheduler\.config|speed_scheduler\(noise_scheduler)\)"
    source, number = re.subn(makes, r"\1, **speed)", source)
    assert number == 1
    names = {**vars(loops), "speed": speed}
    exec(source, names)
    function: Callable[..., loops.Trace] = names[LOOPS[script].__name__]
    return function


def with_adapters(unet: Any) -> Any:
    """Frozen but for peft's LoRA on the attention projections that the LoRA script names."""
    peft = pytest.importorskip("peft", reason="peft, of the extra lora, is not installed")
    unet.requires_grad_(False)
    unet.add_adapter(
        peft.LoraConfig(
            r=2, lora_alpha=2, init_lora_weights="gaussian", target_modules=["to_k", "to_q", "to_v", "to_out.0"]
        )
    )
    return unet


def tiny_model(script: int) -> Any:
    torch.manual_seed(0)
    blocks = {"block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1, "sample_size": 8}
    if script == UNCONDITIONAL:
        types = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
        return UNet2DModel(**blocks, **types, attention_head_dim=4)
    if script == FLOW:
        heads = {"num_attention_heads": 2, "attention_head_dim": 8, "caption_projection_dim": 16}
        size = {"sample_size": 8, "in_channels": 4, "out_channels": 4, "num_layers": 2, "pos_embed_max_size": 8}
        return SD3Transformer2DModel(**heads, **size, joint_attention_dim=8, pooled_projection_dim=8)
    types = {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "cross_attention_dim": 8}
    types["up_block_types"] = ("CrossAttnUpBlock2D", "UpBlock2D")
    unet = UNet2DConditionModel(**blocks, **types, attention_head_dim=4)
    return with_adapters(unet) if script == LORA else unet


def batches_of(script: int, batch_size: int, steps: int) -> list[Any]:
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(batch_size, *shape, generator=generator)

    if script == UNCONDITIONAL:
        return [normal(3, 8, 8) for _ in range(steps)]
    pooled = [(normal(8),) if script == FLOW else () for _ in range(steps)]
    return [(normal(4, 8, 8), normal(5, 8), *extra) for extra in pooled]


@pytest.fixture
def arguments(tmp_path: Path) -> Callable[..., SimpleNamespace]:
    """The scripts' options, and what a pretrained pipeline's folder has for its scheduler."""

    def make(script: int, scheduler: dict[str, Any] | None = None, **changed: Any) -> SimpleNamespace:
        host: Any = FlowMatchEulerDiscreteScheduler if script == FLOW else DDPMScheduler
        host(**(scheduler or {})).save_pretrained(tmp_path / "scheduler")
        options = {"ddpm_num_steps": 1000, "ddpm_beta_schedule": "linear", "snr_gamma": None}
        options |= {"prediction_type": "epsilon", "pretrained_model_name_or_path": str(tmp_path)}
        options |= {"with_prior_preservation": False, "prior_loss_weight": 1.0}
        options |= {"weighting_scheme": "none", "logit_mean": 0.0, "logit_std": 1.0, "mode_scale": 1.29}
        return SimpleNamespace(**(options | {"precondition_outputs": 0} | changed))

    return make


def run(
    loop: Callable[..., loops.Trace], script: int, args: SimpleNamespace, batch_size: int = 4, steps: int = 3
) -> Any:
    """The trace of a loop, and the model that it trained."""
    model = tiny_model(script)
    torch.manual_seed(2)
    return loop(model, batches_of(script, batch_size, steps), args), model


VARIANTS = [
    pytest.param(UNCONDITIONAL, {}, {}, id="unconditional"),
    pytest.param(UNCONDITIONAL, {}, {"prediction_type": "sample"}, id="unconditional-sample"),
    pytest.param(TEXT_TO_IMAGE, STABLE_DIFFUSION, {"prediction_type": None}, id="text_to_image"),
    pytest.param(TEXT_TO_IMAGE, STABLE_DIFFUSION, {"prediction_type": "v_prediction"}, id="text_to_image-v"),
    pytest.param(TEXT_TO_IMAGE, STABLE_DIFFUSION, {"snr_gamma": 5.0}, id="text_to_image-snr_gamma"),
    pytest.param(LORA, STABLE_DIFFUSION, {}, id="lora"),
    pytest.param(DREAMBOOTH, STABLE_DIFFUSION, {}, id="dreambooth"),
    pytest.param(DREAMBOOTH, STABLE_DIFFUSION, {"with_prior_preservation": True}, id="dreambooth-prior"),
    pytest.param(FLOW, {"shift": 3.0}, {"precondition_outputs": 1}, id="sd3"),
    pytest.param(FLOW, {"shift": 3.0, "use_dynamic_shifting": True}, {}, id="flux"),
]


@pytest.mark.parametrize(("script", "scheduler", "options"), VARIANTS)
def test_the_uniform_setting_is_the_unmodified_loop_bit_for_bit(
    script: int, scheduler: dict[str, Any], options: dict[str, Any], arguments: Callable[..., SimpleNamespace]
) -> None:
    args = arguments(script, scheduler, **options)
    before, trained_before = run(LOOPS[script], script, args)
    after, trained_after = run(with_speed(script, **UNIFORM), script, args)
    assert type(after.scheduler) is not type(before.scheduler)
    assert after.losses == before.losses
    assert torch.equal(torch.cat(after.timesteps), torch.cat(before.timesteps))
    initial, mine, theirs = (m.state_dict() for m in (tiny_model(script), trained_after, trained_before))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    changed = [name for name in theirs if not torch.equal(theirs[name], initial[name])]
    assert changed and (script != LORA or all(".lora_" in name for name in changed))


@pytest.mark.parametrize("script", range(4))
def test_speed_trains_with_its_own_draws(script: int, arguments: Callable[..., SimpleNamespace]) -> None:
    trace, _ = run(with_speed(script), script, arguments(script), batch_size=256, steps=4)
    assert torch.tensor(trace.losses).isfinite().all()
    assert trace.losses != run(LOOPS[script], script, arguments(script), batch_size=256, steps=4)[0].losses
    tau, drawn = trace.scheduler.speed_areas.convergence.start, torch.cat(trace.timesteps)
    if script == FLOW:
        drawn = torch.searchsorted(trace.scheduler.timesteps.flip(0), drawn)
    # P(t < tau) of the paper with k = 5; uniform draws are more than ten standard deviations away.
    expected = 5 * tau / (1000 + 4 * tau)
    deviation = (expected * (1 - expected) / len(drawn)) ** 0.5
    assert abs((drawn < tau).float().mean().item() - expected) < 4 * deviation < (expected - tau / 1000) / 2


def test_the_tau_of_the_diffs_is_that_of_the_schedule(arguments: Callable[..., SimpleNamespace]) -> None:
    def tau(script: int, scheduler: dict[str, Any] | None = None) -> int:
        trace, _ = run(with_speed(script), script, arguments(script, scheduler), steps=1)
        start: int = trace.scheduler.speed_areas.convergence.start
        return start

    assert tau(UNCONDITIONAL) == 700
    signal = DDPMScheduler(**STABLE_DIFFUSION).alphas_cumprod
    assert tau(TEXT_TO_IMAGE, STABLE_DIFFUSION) == int((signal > 1 / 145).sum())


def exact_signal(scheduler: Any) -> Tensor:
    """The product of the alphas in float64."""
    return torch.cumprod(1.0 - scheduler.betas.double(), dim=0)


def test_functional_tables_give_what_the_scheduler_in_the_loop_gives(arguments: Callable[..., Any]) -> None:
    trace, _ = run(with_speed(UNCONDITIONAL), UNCONDITIONAL, arguments(UNCONDITIONAL), steps=1)
    tables = speed_tables(alphas_cumprod=exact_signal(DDPMScheduler()))
    torch.manual_seed(2)
    noise = torch.randn(4, 3, 8, 8)
    timesteps = draw(tables, 4)
    assert torch.equal(timesteps, trace.timesteps[0])
    weight = weights(tables, timesteps)
    assert weight.std() > 0.01
    error = (trace.predictions[0] - noise).square().mean(dim=(1, 2, 3))
    assert trace.losses[0] == pytest.approx((weight * error).mean().item(), rel=1e-6)


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_functional_api_agrees_with_the_scheduler(schedule: str) -> None:
    scheduler = SpeeDDDPMScheduler(beta_schedule=schedule)
    # Of the scheduler's own table, in float32, the page promises less.
    for signal, tolerance in ((exact_signal(scheduler), 1e-6), (scheduler.alphas_cumprod, 1e-3)):
        tables = speed_tables(alphas_cumprod=signal)
        mine, theirs = (torch.Generator().manual_seed(3) for _ in range(2))
        timesteps = draw(tables, 1000, mine)
        assert torch.equal(timesteps, scheduler.sample_timesteps(1000, theirs))
        every = torch.arange(1000)
        torch.testing.assert_close(weights(tables, every), scheduler.loss_weights(every), rtol=0, atol=tolerance)


def test_the_loop_without_a_scheduler_is_that_of_the_scheduler() -> None:
    names: dict[str, Any] = {}
    exec(NO_SCHEDULER, names)
    scheduler, clean = SpeeDDDPMScheduler(), torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(4))
    loss = names["training_loss"](
        lambda x, t: 0.5 * x, clean, names["alphas_cumprod"], names["tables"], torch.Generator().manual_seed(5)
    )
    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(clean.shape, generator=generator)
    timesteps = scheduler.sample_timesteps(16, generator)
    error = (0.5 * scheduler.add_noise(clean, noise, timesteps) - noise).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(loss, (scheduler.loss_weights(timesteps) * error).mean())


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_min_snr_weighs_as_snr_gamma_whenever_the_prediction_type_is_set(
    prediction_type: str, arguments: Callable[..., SimpleNamespace]
) -> None:
    options = {"scheduler": STABLE_DIFFUSION, "prediction_type": prediction_type}
    theirs, _ = run(loops.text_to_image, TEXT_TO_IMAGE, arguments(TEXT_TO_IMAGE, snr_gamma=5.0, **options))
    loop = with_speed(TEXT_TO_IMAGE, speed_sampling="uniform", speed_weighting="min_snr:gamma=5")
    mine, _ = run(loop, TEXT_TO_IMAGE, arguments(TEXT_TO_IMAGE, **options))
    assert mine.losses == pytest.approx(theirs.losses, rel=1e-4)
    unweighted, _ = run(loops.text_to_image, TEXT_TO_IMAGE, arguments(TEXT_TO_IMAGE, **options))
    assert mine.losses != pytest.approx(unweighted.losses, rel=1e-2)


def test_the_unconditional_pipeline_is_saved_without_speed(arguments: Callable[..., Any], tmp_path: Path) -> None:
    trace, _ = run(with_speed(UNCONDITIONAL), UNCONDITIONAL, arguments(UNCONDITIONAL), steps=1)
    assert type(trace.pipeline.scheduler) is DDPMScheduler
    trace.pipeline.save_pretrained(tmp_path / "pipeline")
    index = (tmp_path / "pipeline" / "model_index.json").read_text("utf-8")
    assert "DDPMScheduler" in index and "speed" not in index.lower()


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.7, 0.8)])
def test_the_scripts_logit_normal_is_ours_at_the_mean_the_page_states(shift: float, mean: float, std: float) -> None:
    name = f"logit_normal:mean={-mean},std={std}"
    scheduler = SpeeDFlowMatchEulerDiscreteScheduler(shift=shift, speed_sampling=name, speed_weighting="none")
    edges = torch.linspace(0, 1, 1001, dtype=torch.float64)
    below = torch.special.ndtr((torch.logit(edges) - mean) / std)  # P(u < edge), u counting from the most noise
    theirs = (below[1:] - below[:-1]).flip(0).cumsum(0)
    assert (scheduler.speed_tables.pmf.cumsum(0) - theirs).abs().max() < 2e-3


def test_precondition_outputs_multiplies_the_error_by_sigma_squared(arguments: Callable[..., Any]) -> None:
    scheduler = {"shift": 3.0}
    plain, _ = run(with_speed(FLOW), FLOW, arguments(FLOW, scheduler), steps=1)
    loop = "weighting = noise_scheduler_copy.loss_weights(timesteps).view(sigmas.shape)"
    source = patched(inspect.getsource(loops.flow_matching), DIFFS[FLOW])
    assert source.count(loop) == 1
    names: dict[str, Any] = dict(vars(loops))
    exec(source.replace(loop, loop + " / sigmas**2"), names)
    preconditioned, _ = run(names["flow_matching"], FLOW, arguments(FLOW, scheduler, precondition_outputs=1), steps=1)
    assert preconditioned.losses == pytest.approx(plain.losses, rel=1e-4)


@pytest.mark.parametrize("script", [DREAMBOOTH, FLOW], ids=["dreambooth", "sd3"])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_prior_preservation_weighs_each_image_by_its_own_timestep(
    script: int, batch_size: int, arguments: Callable[..., Any]
) -> None:
    options = {"with_prior_preservation": True, "prior_loss_weight": 0.25}
    args = arguments(script, {"shift": 3.0} if script == FLOW else STABLE_DIFFUSION, **options)
    # As the scripts collate them: first the images of the instance, then as many of the class.
    rows = 2 * batch_size
    trace, _ = run(with_speed(script), script, args, rows, steps=1)
    clean = batches_of(script, rows, steps=1)[0][0]
    torch.manual_seed(2)
    noise = torch.randn_like(clean)
    target = noise - clean if script == FLOW else noise
    error = (trace.predictions[0] - target).square().mean(dim=(1, 2, 3)).tolist()
    weight = trace.scheduler.loss_weights(trace.timesteps[0]).tolist()
    assert max(weight) - min(weight) > 0.01
    weighted = [w * e for w, e in zip(weight, error, strict=True)]
    instance, prior = weighted[:batch_size], weighted[batch_size:]
    by_hand = sum(instance) / batch_size + 0.25 * sum(prior) / batch_size
    assert trace.losses[0] == pytest.approx(by_hand, rel=1e-5)
    # With one weight for both halves, as a script that does not chunk it would have it, the loss is another.
    mean = sum(weight) / rows
    assert trace.losses[0] != pytest.approx(
        mean * (sum(error[:batch_size]) + 0.25 * sum(error[batch_size:])), rel=1e-3
    )


def test_the_sd3_scripts_sigma_sqrt_is_the_uniform_setting_without_preconditioning(
    arguments: Callable[..., Any],
) -> None:
    scheduler = {"shift": 3.0}
    theirs_args = arguments(FLOW, scheduler, weighting_scheme="sigma_sqrt", precondition_outputs=1)
    theirs, _ = run(loops.flow_matching, FLOW, theirs_args)
    ours, _ = run(with_speed(FLOW, **UNIFORM), FLOW, arguments(FLOW, scheduler, precondition_outputs=0))
    assert all(torch.equal(a, b) for a, b in zip(theirs.timesteps, ours.timesteps, strict=True))
    assert ours.losses == pytest.approx(theirs.losses, rel=1e-3)


@pytest.mark.parametrize("sampling", ["loss_second_moment:history=2", "information_rate"])
def test_the_loss_aware_loop_learns_and_weighs_as_the_scheduler_says(sampling: str) -> None:
    names: dict[str, Any] = {}
    exec(LOSS_AWARE, names)
    options = {"num_train_timesteps": 10, "speed_sampling": sampling, "speed_weighting": "none"}
    scheduler = names["noise_scheduler"] = SpeeDDDPMScheduler(**options)
    assert scheduler.speed_is_loss_aware
    torch.testing.assert_close(scheduler.speed_tables.pmf, torch.full((10,), 0.1, dtype=torch.float64))
    torch.manual_seed(6)
    clean = torch.zeros(64, 1, 2, 2)
    for step in range(12):
        # From zeros the noisy image is the noise, scaled: this model's error grows with the timestep.
        loss = names["training_loss"](lambda x, t: t.view(-1, 1, 1, 1).float() + 0 * x, clean, step, 12)
        assert torch.isfinite(loss)
    after = scheduler.speed_tables.pmf
    assert after[9] > 0.15 and after[9] > 1.5 * after[1]
    resumed = SpeeDDDPMScheduler(**options)
    resumed.load_speed_state_dict(scheduler.speed_state_dict())
    assert torch.equal(resumed.speed_tables.pmf, after)


def test_the_loss_aware_loop_gives_progress_to_settings_that_ask_for_it() -> None:
    names: dict[str, Any] = {}
    exec(LOSS_AWARE, names)
    scheduler = names["noise_scheduler"] = SpeeDDDPMScheduler(speed_anneal_start=0.5)
    with pytest.raises(ValueError, match="progress"):
        scheduler.sample_timesteps(4)
    for step, k in ((0, 5.0), (9, 1.0)):
        names["training_loss"](lambda x, t: x, torch.zeros(4, 1, 2, 2), step, 9)
        pmf = scheduler.speed_tables.pmf
        assert (pmf[0] / pmf[-1]).item() == pytest.approx(k)
