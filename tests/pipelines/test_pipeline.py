"""The pipeline's images: the stock ones, guided where asked, each from noise of its own, opened by anybody."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DiffusionPipeline, DiTPipeline
from torch import Tensor

from pipeline_parts import SCHEDULE, GaussianDiT, generators, noise_of, pipeline_of, transformer
from speed_diffusers.pipelines import SpeeDDiTPipeline

ROOT = Path(__file__).resolve().parents[2]
LABELS = [3, 10, 0, 7, 7]
NAMES = {0: "tench, Tinca tinca", 3: "goldfish", 7: "crane", 9: "T-shirt/top"}


def ddim(**options: Any) -> DDIMScheduler:
    return DDIMScheduler(**SCHEDULE, clip_sample=False, **options)


def sampler(name: str) -> Any:
    spaced = {"timestep_spacing": "linspace", "clip_sample": False}
    return ddim() if name == "ddim" else DDPMScheduler(**SCHEDULE, **spaced, variance_type="learned_range")


class Watched(GaussianDiT):
    """Notes the timestep and the rows of the label table of every evaluation."""

    def forward(self, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor, return_dict: bool = True) -> Any:
        self.seen.append((float(timestep[0]), class_labels.tolist()))
        return super().forward(hidden_states, timestep, class_labels, return_dict)


def watched(**values: Any) -> Any:
    return transformer(Watched, ripple=0.3, seen=[], **values)


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
@pytest.mark.parametrize("out_channels", [4, 8])
def test_stock_calls_give_the_stock_images_bit_for_bit(guidance_scale: float, out_channels: int) -> None:
    model = transformer(rows=1000, out_channels=out_channels)
    ours = pipeline_of(model, ddim())
    stock = DiTPipeline(transformer=model, vae=ours.vae, scheduler=ddim())
    stock.set_progress_bar_config(disable=True)
    for output_type in ("np", "pt"):
        for sources in (lambda: torch.Generator().manual_seed(3), lambda: generators(3)):
            arguments = ([5, 999, 1000], guidance_scale)
            expected, found = (draw(*arguments, sources(), 5, output_type).images for draw in (stock, ours))
            assert np.array_equal(np.asarray(expected), np.asarray(found))
    (images,) = ours([5, 999], guidance_scale, generators(2), 3, return_dict=False)
    expected = stock([5, 999], guidance_scale, generators(2), 3).images
    assert [image.tobytes() for image in images] == [image.tobytes() for image in expected]


def by_hand(
    model: Any, scale: float, channels: int, interval: tuple[float, float], num_steps: int, sources: Any
) -> Tensor:
    """DDIM with guidance, written out; every prediction is made alone."""
    scheduler = ddim()
    scheduler.set_timesteps(num_steps)
    sample = noise_of(sources)
    for timestep in scheduler.timesteps:
        steps = timestep.expand(len(LABELS))
        with torch.no_grad():
            conditional = model(sample, steps, torch.tensor(LABELS))[0][:, :4]
            free = model(sample, steps, torch.full((len(LABELS),), 10))[0][:, :4]
        epsilon = conditional.clone()
        if interval[0] <= timestep / 1000 <= interval[1]:
            epsilon[:, :channels] = (1 - scale) * free[:, :channels] + scale * conditional[:, :channels]
        sample = scheduler.step(epsilon, timestep, sample).prev_sample
    return sample


@pytest.mark.parametrize("channels", [1, 3, None])
@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.2, 0.6), (0.9, 1.0)])
def test_guidance_acts_on_its_channels_and_in_its_interval(
    channels: int | None, interval: tuple[float, float]
) -> None:
    model = watched(out_channels=8)
    options = {"guidance_channels": channels, "guidance_interval": interval, "num_inference_steps": 10}
    draw = pipeline_of(model, ddim())
    images = draw(LABELS, 3.0, generators(5), output_type="latent", **options).images
    # Outside the interval nothing is computed without a class; the timesteps are 900, 800, ..., 0.
    inside = [interval[0] <= timestep / 1000 <= interval[1] for timestep, _ in model.seen]
    assert [rows for _, rows in model.seen] == [LABELS + [10] * 5 if guided else LABELS for guided in inside]
    assert sum(inside) == {(0.0, 1.0): 10, (0.2, 0.6): 5, (0.9, 1.0): 1}[interval]
    expected = by_hand(model, 3.0, channels or 4, interval, 10, generators(5))
    torch.testing.assert_close(images, expected, atol=1e-5, rtol=0)
    plain = by_hand(model, 1.0, 4, (0.0, 1.0), 10, generators(5))
    assert float((images - plain).abs().max()) > 1e-3


@pytest.mark.parametrize("labels", [None, [10, 10]])
def test_no_work_is_doubled_where_there_is_nothing_to_guide(labels: list[int] | None) -> None:
    model = watched()
    pipeline_of(model, ddim())(labels, 4.0, num_images=2, num_inference_steps=3, output_type="latent")
    pipeline_of(model, ddim())([1, 2], 1.0, num_inference_steps=3, output_type="latent")
    assert [len(rows) for _, rows in model.seen] == [2] * 6


@pytest.mark.parametrize("name", ["ddim", "ddpm"])
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_an_image_depends_on_its_label_and_generator_alone(name: str, guidance_scale: float) -> None:
    draw = pipeline_of(transformer(GaussianDiT, out_channels=8, ripple=0.3), sampler(name))
    labels = [index % 11 for index in range(32)]
    options = {"guidance_scale": guidance_scale, "num_inference_steps": 10, "output_type": "latent"}
    together = draw(labels, generator=generators(32), **options).images
    parts = [draw(labels[i : i + 7], generator=generators(32)[i : i + 7], **options).images for i in range(0, 32, 7)]
    # Matrix products of other sizes may round otherwise.
    torch.testing.assert_close(torch.cat(parts), together, atol=1e-5, rtol=0)
    order = torch.randperm(32, generator=torch.Generator().manual_seed(0)).tolist()
    sources = generators(32)
    shuffled = draw([labels[i] for i in order], generator=[sources[i] for i in order], **options).images
    torch.testing.assert_close(shuffled, together[order], atol=1e-5, rtol=0)
    torch.manual_seed(1)
    assert torch.equal(draw(labels, generator=generators(32), **options).images, together)
    assert float((together[0] - together[11]).abs().max()) > 0.1, "the same class, other noise"


def test_noise_is_taken_and_latents_are_given_back() -> None:
    draw = pipeline_of(transformer(GaussianDiT, ripple=0.3), ddim())
    drawn = draw(LABELS, 2.0, generators(5), 4, "latent").images
    given = draw(LABELS, 2.0, None, 4, "latent", latents=noise_of(generators(5))).images
    assert torch.equal(given, drawn)
    pixels = draw(LABELS, 2.0, generators(5), 4, "pt").images
    with torch.no_grad():
        decoded = draw.vae.decode(drawn / draw.vae.config.scaling_factor).sample
    torch.testing.assert_close(pixels, (decoded / 2 + 0.5).clamp(0, 1))
    arrays = draw(LABELS, 2.0, generators(5), 4, "np").images
    assert arrays.shape == (5, 4, 4, 3) and arrays.dtype == np.float32
    assert np.array_equal(arrays, pixels.permute(0, 2, 3, 1).numpy())
    pictures = draw(LABELS, 2.0, generators(5), 4).images
    assert np.array_equal(np.stack([np.asarray(one) for one in pictures]), (arrays * 255).round().astype(np.uint8))


def test_a_callback_sees_every_step_and_may_change_the_latents() -> None:
    draw = pipeline_of(transformer(GaussianDiT, ripple=0.3), ddim())
    seen = []

    def shift(pipeline: Any, index: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append((index, int(timestep), pipeline.num_timesteps))
        return {"latents": tensors["latents"] + 1} if index == 3 else {}

    plain = draw(LABELS, 2.0, generators(5), 4, "latent").images
    shifted = draw(LABELS, 2.0, generators(5), 4, "latent", callback_on_step_end=shift).images
    assert seen == [(0, 750, 4), (1, 500, 4), (2, 250, 4), (3, 0, 4)]
    assert torch.equal(shifted, plain + 1)


def test_a_callback_may_stop_and_end_the_guidance() -> None:
    model = watched()
    draw = pipeline_of(model, ddim())

    def control(pipeline: Any, index: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        assert tensors == {}
        pipeline._guidance_scale = 1.0
        pipeline._interrupt = index == 1
        return {}

    options: dict[str, Any] = {"callback_on_step_end": control, "callback_on_step_end_tensor_inputs": []}
    draw(LABELS, 2.0, None, 10, "latent", **options)
    assert [len(rows) for _, rows in model.seen] == [10, 5]
    model.seen.clear()
    draw(LABELS, 2.0, None, 3, "latent")
    assert [len(rows) for _, rows in model.seen] == [10, 10, 10], "the next call starts afresh"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("output_type", ["latent", "np", "pt", "pil"])
def test_what_is_not_finite_is_an_error_of_the_model(value: float, output_type: str) -> None:
    draw = pipeline_of(transformer(GaussianDiT), ddim())

    def spoil(pipeline: Any, index: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors["latents"][1:3, 0, 0, 0] = value
        return {}

    message = "^The model generated NaN or infinite values in 2 of 5 images.$"
    with pytest.raises(FloatingPointError, match=message):
        draw(LABELS, 2.0, None, 3, output_type, callback_on_step_end=spoil)


def test_an_autoencoder_that_overflows_is_named() -> None:
    draw = pipeline_of(transformer(GaussianDiT), ddim())
    with torch.no_grad():
        draw.vae.decoder.conv_out.bias.fill_(float("inf"))
    with pytest.raises(FloatingPointError, match="autoencoder, in torch.float32, made NaN or inf.* in 1 of 1 images"):
        draw(1, 2.0, None, 3, "pt")


@pytest.mark.parametrize(("name", "spread"), [("ddim", 0.02), ("ddpm", 0.05)])
def test_half_precision_is_for_the_network_alone(name: str, spread: float) -> None:
    model = transformer(GaussianDiT, out_channels=8, ripple=0.3)
    noise = noise_of(generators(5))
    options: dict[str, Any] = {"latents": noise, "num_inference_steps": 10, "output_type": "latent"}
    exact = pipeline_of(model, sampler(name))(LABELS, 2.0, generators(5), **options).images
    draw = pipeline_of(model.to(torch.bfloat16), sampler(name))
    rounded = draw(LABELS, 2.0, generators(5), **options).images
    assert rounded.dtype == torch.float32
    assert float((rounded - exact).abs().mean()) < spread
    draw.vae.to(torch.bfloat16)
    pixels = draw(LABELS, 2.0, generators(5), 3, "pt").images
    assert pixels.dtype == torch.bfloat16 and torch.isfinite(pixels).all()
    assert draw(LABELS, 2.0, generators(5), 3, "np").images.dtype == np.float32


def test_names_and_null_row_survive_any_number_of_savings(tmp_path: Path) -> None:
    pipeline = pipeline_of(transformer(), ddim(), id2label=NAMES, null_class_id=4)
    pipeline.save_pretrained(tmp_path / "1")
    SpeeDDiTPipeline.from_pretrained(tmp_path / "1").save_pretrained(tmp_path / "2")
    loaded = SpeeDDiTPipeline.from_pretrained(tmp_path / "2")
    loaded.set_progress_bar_config(disable=True)
    assert loaded.get_label_ids(["Tinca tinca", "crane", "tench, Tinca tinca"]) == [0, 7, 0]
    assert loaded.null_class_id == 4
    images = [draw("T-shirt/top", 2.0, generators(1), 3, "np").images for draw in (pipeline, loaded)]
    assert np.array_equal(*images)
    # Anybody's diffusers opens it as the stock pipeline, names and all.
    stock = DiffusionPipeline.from_pretrained(tmp_path / "2")
    assert type(stock) is DiTPipeline and stock.labels["Tinca tinca"] == 0


STRANGER = """
import sys
import numpy as np
import torch
from diffusers import DiffusionPipeline, DiTPipeline

folder, file, output = sys.argv[1:]
pipeline = DiffusionPipeline.from_pretrained(folder, custom_pipeline=file, trust_remote_code=True)
pipeline.set_progress_bar_config(disable=True)
assert isinstance(pipeline, DiTPipeline) and type(pipeline).__name__ == "SpeeDDiTPipeline"
generators = [torch.Generator().manual_seed(100 + index) for index in range(2)]
options = dict(guidance_channels=3, guidance_interval=(0.2, 0.8), num_inference_steps=4, output_type="np")
np.save(output, pipeline(["crane", "tench"], 2.0, generators, **options).images)
pipeline.save_pretrained(folder)
assert not [name for name in sys.modules if name.startswith("speed_diffusers")]
"""


def test_the_file_serves_as_custom_pipeline_where_this_package_is_not(tmp_path: Path) -> None:
    scheduler = sampler("ddpm")
    pipeline = pipeline_of(transformer(out_channels=8), scheduler, id2label=NAMES)
    pipeline.save_pretrained(tmp_path / "folder")
    file = ROOT / "pipelines" / "pipeline_dit_speed.py"
    (tmp_path / "pipeline_dit_speed.py").write_bytes(file.read_bytes())
    paths = [str(tmp_path / name) for name in ("folder", "pipeline_dit_speed.py", "images.npy")]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "home"), "HF_MODULES_CACHE": str(tmp_path / "m")}
    command = [sys.executable, "-c", STRANGER, *paths]
    run = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    options: dict[str, Any] = {"guidance_channels": 3, "guidance_interval": (0.2, 0.8), "num_inference_steps": 4}
    expected = pipeline(["crane", "tench"], 2.0, generators(2), output_type="np", **options).images
    np.testing.assert_allclose(np.load(tmp_path / "images.npy"), expected, atol=1e-6)
    assert SpeeDDiTPipeline.from_pretrained(tmp_path / "folder").get_label_ids("tench") == [0]
