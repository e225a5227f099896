"""Every scheduler class of diffusers: the stock pipeline's bits, or one line that says why not."""

import inspect
from types import SimpleNamespace
from typing import Any

import diffusers.schedulers
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DiTPipeline, SchedulerMixin
from diffusers.pipelines.dit import pipeline_dit
from torch import Tensor

from pipeline_parts import SCHEDULE, autoencoder, pipeline_of, transformer
from speed_diffusers.pipelines import SpeeDDiTPipeline

pytestmark = [
    # diffusers takes arrays of tensors in a way that numpy will change, and some of its schedulers are deprecated.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

LABELS = [5, 999, 3]
REFUSED = {
    "BlockRefinementScheduler": "no num_train_timesteps",
    "CogVideoXDPMScheduler": "its step also needs old_pred_original_sample and timestep_back",
    "ConsistencyDecoderScheduler": "it is for the consistency decoder",
    "DDPMWuerstchenScheduler": "no num_train_timesteps",
    "DiscreteDDIMScheduler": "no num_train_timesteps",
    "EntropyBoundScheduler": "no num_train_timesteps",
    "HeliosDMDScheduler": "video",
    "HeliosScheduler": "video",
    "MiniMaxH3Scheduler": "no num_train_timesteps",
    "PiflowScheduler": "a whole policy",
    "RePaintScheduler": "its step also needs original_image and mask",
    "SCMScheduler": "time is an angle",
    "ScoreSdeVeScheduler": "no step",
    "UnCLIPScheduler": "must be told the next timestep",
}


def scheduler_names() -> list[str]:
    """Schedulers of the installed diffusers that can be made from their defaults."""
    found = []
    for name in dir(diffusers.schedulers):
        kind = getattr(diffusers.schedulers, name, None)
        if not inspect.isclass(kind) or not issubclass(kind, SchedulerMixin):
            continue
        needed = [one for one in inspect.signature(kind).parameters.values() if one.default is one.empty]
        if not any(one.kind is one.POSITIONAL_OR_KEYWORD for one in needed) and kind is not SchedulerMixin:
            found.append(name)
    return found


@pytest.fixture(scope="module")
def model() -> Any:
    return transformer(rows=1000)


def stock_of(model: Any, scheduler: Any) -> DiTPipeline:
    pipeline = DiTPipeline(transformer=model, vae=autoencoder(), scheduler=scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def stock_as_meant(
    pipeline: DiTPipeline, scale: float, generator: Any, monkeypatch: pytest.MonkeyPatch
) -> DiTPipeline:
    """The stock pipeline without what we leave out on purpose.

    That is: for solvers in sigmas, noise of unit variance and steps from the network's scaled input in the sample's
    place; a generator that never reaches the steps; and noise for the half of the batch that is thrown away.
    """
    scheduler, step = pipeline.scheduler, pipeline.scheduler.step
    # Flow matching's schedulers have none, and the stock pipeline asks for it.
    scale_input = getattr(scheduler, "scale_model_input", lambda sample, timestep: sample)
    samples: list[Tensor] = []
    options = {"generator": generator} if "generator" in inspect.signature(step).parameters else {}
    draw = pipeline_dit.randn_tensor

    def sized(shape: Any, generator: Any, device: Any, dtype: Any) -> Tensor:
        scheduler.set_timesteps(5)
        return draw(shape, generator=generator, device=device, dtype=dtype) * getattr(scheduler, "init_noise_sigma", 1)

    def scaled(sample: Tensor, timestep: Any) -> Tensor:
        samples.append(sample)
        return scale_input(sample, timestep)

    def halved(output: Tensor, timestep: Any, sample: Tensor) -> Any:
        parts = 2 if scale > 1 else 1
        count = len(sample) // parts
        before = step(output[:count], timestep, samples.pop()[:count], **options).prev_sample
        return SimpleNamespace(prev_sample=torch.cat([before] * parts))

    monkeypatch.setattr(pipeline_dit, "randn_tensor", sized)
    scheduler.step, scheduler.scale_model_input = halved, scaled
    return pipeline


def test_the_list_of_refused_ones_is_of_this_diffusers() -> None:
    known = scheduler_names()
    assert len(known) >= 30 and set(REFUSED) <= set(known)


@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize("name", scheduler_names())
def test_equal_bits_or_a_reason(name: str, scale: float, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    make = getattr(diffusers.schedulers, name)
    ours = pipeline_of(model, make())
    if name in REFUSED:
        with pytest.raises(ValueError, match=f"does not sample with {name}: .*{REFUSED[name]}") as error:
            ours(LABELS, scale, None, 5)
        assert "\n" not in str(error.value)
        return
    generator = torch.Generator().manual_seed(3)
    torch.manual_seed(0)
    found = ours(LABELS, scale, generator, 5, "pt").images
    generator = torch.Generator().manual_seed(3)
    stock = stock_as_meant(stock_of(model, make()), scale, generator, monkeypatch)
    torch.manual_seed(0)  # DPMSolverSDE, which needs torchsde, knows no generator
    expected = stock(LABELS, scale, generator, 5, "pt").images
    assert torch.isfinite(found).all() and torch.equal(found, expected)


UNTOUCHED = (
    *("DDIMScheduler", "DDIMParallelScheduler", "CogVideoXDDIMScheduler", "DPMSolverMultistepScheduler"),
    *("DPMSolverSinglestepScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler", "PNDMScheduler"),
    *("IPNDMScheduler", "DDIMInverseScheduler"),
)
NOISY = ("DDPMScheduler", "DDPMParallelScheduler", "SASolverScheduler", "LCMScheduler", "TCDScheduler")


@pytest.mark.parametrize(
    ("name", "scale", "seeded"),
    [
        *((name, scale, seeded) for name in UNTOUCHED for scale in (1.0, 4.0) for seeded in (False, True)),
        *((name, 1.0, False) for name in NOISY),
    ],
)
def test_bits_of_the_stock_pipeline_as_it_comes(name: str, scale: float, seeded: bool, model: Any) -> None:
    make, images = getattr(diffusers.schedulers, name), []
    for pipeline in (stock_of(model, make()), pipeline_of(model, make())):
        torch.manual_seed(0)
        generator = torch.Generator().manual_seed(3) if seeded else None
        images.append(pipeline(LABELS, scale, generator, 5, "pt").images)
    assert torch.equal(*images)


def test_guided_ddpm_differs_from_the_stock_pipeline_and_a_generator_decides_all(model: Any) -> None:
    images = []
    for pipeline in (stock_of(model, DDPMScheduler()), pipeline_of(model, DDPMScheduler())):
        for seed in (0, 1):
            torch.manual_seed(seed)
            images.append(pipeline(LABELS, 4.0, torch.Generator().manual_seed(3), 5, "pt").images)
    assert not torch.equal(images[0], images[1]), "the stock pipeline's generator does not reach the steps"
    assert torch.equal(images[2], images[3])


@pytest.mark.parametrize("name", ["DDIMScheduler", "DDPMScheduler", "PNDMScheduler", "CogVideoXDDIMScheduler"])
def test_steps_offset_that_leads_past_the_last_timestep_is_one_line(name: str, model: Any) -> None:
    own = {"skip_prk_steps": True} if name == "PNDMScheduler" else {}
    options = {**SCHEDULE, "timestep_spacing": "leading", "steps_offset": 1, **own}
    draw = pipeline_of(model, getattr(diffusers.schedulers, name)(**options))
    with pytest.raises(ValueError, match="num_inference_steps=1000: with steps_offset=1 .* timestep 1000") as error:
        draw(1, num_inference_steps=1000)
    assert "\n" not in str(error.value)
    assert draw(1, 1.0, num_inference_steps=2, output_type="latent").images.shape == (1, 4, 4, 4)


def test_what_a_scheduler_itself_refuses_is_one_line(model: Any) -> None:
    with pytest.raises(ValueError, match="num_inference_steps=60: LCMScheduler refuses it: .*50") as error:
        pipeline_of(model, diffusers.schedulers.LCMScheduler())(1, num_inference_steps=60)
    assert "\n" not in str(error.value)


def test_a_solver_whose_timesteps_are_no_shares_guides_everywhere_or_not_at_all(model: Any) -> None:
    seen: list[int] = []
    hook = model.register_forward_pre_hook(lambda module, given: seen.append(len(given[0])))
    draw = pipeline_of(model, diffusers.schedulers.EDMEulerScheduler())
    draw(1, 4.0, num_inference_steps=5)
    hook.remove()
    assert seen == [2] * 5, "their timesteps are logarithms, some of them negative"
    with pytest.raises(ValueError, match=r"guidance_interval=\(0\.2, 0\.8\): EDMEulerScheduler has timesteps"):
        draw(1, 4.0, num_inference_steps=5, guidance_interval=(0.2, 0.8))


def test_eta_is_the_schedulers_own_unless_given(model: Any) -> None:
    draw = pipeline_of(model, diffusers.schedulers.TCDScheduler())
    images = [draw(1, 1.0, torch.Generator().manual_seed(0), 5, "latent", eta=eta).images for eta in (None, 0.3, 0.0)]
    assert torch.equal(images[0], images[1]) and not torch.equal(images[0], images[2])


def test_properties_tell_of_the_call_in_progress(model: Any) -> None:
    draw: SpeeDDiTPipeline = pipeline_of(model, DDIMScheduler())
    assert draw.interrupt is False
    seen = []

    def look(pipeline: Any, index: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append((pipeline.guidance_scale, pipeline.do_classifier_free_guidance, pipeline.interrupt))
        pipeline._guidance_scale, pipeline._interrupt = 1.0, index == 1
        return {}

    draw(1, 3.0, num_inference_steps=4, callback_on_step_end=look)
    assert seen == [(3.0, True, False), (1.0, False, False)] and draw.interrupt is True
