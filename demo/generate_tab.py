"""The tab of images: from any checkpoint, with class, guidance, interval and sampler."""

import functools
import tempfile
import time
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from speed_diffusers.assets import EMBEDDED
from speed_diffusers.errors import InputError
from speed_diffusers.generation import SAMPLERS, GenerationSettings, make_sampler
from speed_diffusers.generation.generate import choose_classes, class_samples, row_names_of, speed_pipeline
from speed_diffusers.hardware import accelerator_or_cpu
from speed_diffusers.reports.plots import save_class_grid
from speed_diffusers.training.checkpoint_folders import list_checkpoints
from speed_diffusers.training.snapshots import WEIGHTS, load_latest, put_weights

NEWEST = "the newest"
OWN_SAMPLER = "the model's own"
GUIDANCE_INFO = "1: none; from and to in shares of the noising process, 0 is clean"
MOST_IMAGES = 100
"""Of one request: whoever shares a machine waits for the others."""


@functools.lru_cache(maxsize=2)
def load(name: str, checkpoint: str, weights: str) -> Any:
    """A pipeline on the fastest device that there is.

    Args:
        name: "embedded", the folder of a run or pipeline, or a Hub id.
        checkpoint: Folder of a checkpoint in that of a run, or `NEWEST`.
        weights: One of `WEIGHTS`; of the newest always the EMA weights.

    Raises:
        InputError: Nothing of this name can be loaded.
    """
    pipeline = speed_pipeline(load_latest(name))
    if checkpoint != NEWEST:
        put_weights(pipeline, Path(name) / checkpoint, weights)
    return pipeline.to(accelerator_or_cpu())


def generate_tab(app: gr.Blocks) -> None:
    """The tab's controls and the picture.

    Args:
        app: The app that it is in, which opens the embedded model when it opens itself.
    """
    with gr.Row():
        with gr.Column(scale=1, min_width=300):
            model = gr.Textbox(
                EMBEDDED,
                label="Model",
                info="embedded, a Hub id, or the folder of a run or pipeline",
                submit_btn="Open",
                elem_id="model",
            )
            about = gr.Markdown(elem_id="about")
            with gr.Row(visible=False) as of_run:
                checkpoint = gr.Dropdown(
                    [NEWEST], value=NEWEST, label="Checkpoint", min_width=120, elem_id="checkpoint"
                )
                weights = gr.Dropdown(list(WEIGHTS), value="ema", label="Its weights", min_width=120)
            classes = gr.Dropdown([], multiselect=True, label="Classes (none: the first ten)", elem_id="classes")
            images = gr.Slider(1, 16, value=4, step=1, label="Images per class", buttons=[], elem_id="images")
            guidance = gr.Slider(
                1, 10, value=1.5, step=0.1, label="Guidance", info=GUIDANCE_INFO, buttons=[], elem_id="guidance"
            )
            with gr.Row():
                lowest = gr.Slider(0, 1, value=0, step=0.05, label="from", buttons=[], min_width=130)
                highest = gr.Slider(0, 1, value=1, step=0.05, label="to", buttons=[], min_width=130)
            with gr.Row():
                sampler = gr.Dropdown([OWN_SAMPLER], value=OWN_SAMPLER, label="Sampler", min_width=130)
                steps = gr.Slider(1, 250, value=25, step=1, label="Steps", buttons=[], min_width=130, elem_id="steps")
            with gr.Row(equal_height=True):
                seed = gr.Number(0, label="Seed", precision=0, minimum=0, min_width=100)
                start = gr.Button("Generate", variant="primary", min_width=150, elem_id="generate")
        with gr.Column(scale=2, min_width=320):
            buttons = ["download", "fullscreen"]
            picture = gr.Image(label="Images", format="png", interactive=False, buttons=buttons, elem_id="picture")
            words = gr.Markdown(elem_id="words")
    found = [about, of_run, checkpoint, classes, sampler]
    model.submit(_open, model, found, api_name="open")
    app.load(_choices, model, found, show_progress="hidden", api_name=False)
    settings = [model, checkpoint, weights, classes, images, guidance, lowest, highest, sampler, steps, seed]
    start.click(_generate, settings, [picture, words], api_name="generate")


def _open(name: str) -> tuple[Any, ...]:
    """What can be chosen of a model, read anew."""
    load.cache_clear()
    try:
        return _choices(name)
    except InputError as error:
        raise _told(error) from error


def _choices(name: str) -> tuple[Any, ...]:
    """Updates for what the tab says of a model and lets one choose of it."""
    pipeline = load(name, NEWEST, "ema")
    config = pipeline.transformer.config
    parameters = sum(parameter.numel() for parameter in pipeline.transformer.parameters())
    side = config.sample_size * 2 ** (len(pipeline.vae.config.block_out_channels) - 1)
    about = f"{parameters / 1e6:.1f} M parameters, {side}x{side} pixels, {type(pipeline.scheduler).__name__}"
    saved = [path.name for path in list_checkpoints(Path(name))] if name != EMBEDDED else []
    names = list(row_names_of(pipeline).values())
    return (
        gr.update(value=about),
        gr.update(visible=bool(saved)),
        gr.update(choices=[NEWEST, *saved], value=NEWEST),
        gr.update(choices=names, value=[], visible=bool(names)),
        gr.update(choices=[OWN_SAMPLER, *(each for each in SAMPLERS if _fits(each, pipeline))], value=OWN_SAMPLER),
    )


def _fits(sampler: str, pipeline: Any) -> bool:
    """Whether a sampler can follow the schedule of a model."""
    try:
        make_sampler(sampler, pipeline)
    except InputError:
        return False
    return True


def _generate(
    name: str,
    checkpoint: str,
    weights: str,
    classes: list[str],
    num_images: int,
    guidance_scale: float,
    lowest: float,
    highest: float,
    sampler: str,
    num_inference_steps: int,
    seed: float | None,
    progress: gr.Progress = gr.Progress(track_tqdm=True),  # noqa: B008 - so Gradio knows that it is to be given
) -> tuple[Image.Image, str]:
    """A grid of images, one row per class, and how long it took.

    Raises:
        gr.Error: A setting that the model does not allow, or no such model; in one line.
    """
    try:
        settings = GenerationSettings(
            guidance_scale=guidance_scale,
            guidance_interval=[lowest, highest],
            sampler=None if sampler == OWN_SAMPLER else sampler,
            num_inference_steps=num_inference_steps,
            seed=int(seed or 0),
        )
        pipeline = load(name, checkpoint, weights)
        settings.check_fits(pipeline)
        names = row_names_of(pipeline)
        rows = choose_classes(classes, names) if names else {pipeline.null_class_id: "no class"}
        if len(rows) * num_images > MOST_IMAGES:
            raise InputError(f"{len(rows)} classes x {num_images} images: at most {MOST_IMAGES} images at once.")
        began = time.perf_counter()
        generated = class_samples(pipeline, list(rows), num_images, settings)
    except (InputError, FloatingPointError) as error:
        raise _told(error) from error
    seconds = time.perf_counter() - began
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "images.png"
        save_class_grid(generated, list(rows.values()), f"{name}, guidance {guidance_scale:g}", path)
        with Image.open(path) as opened:
            picture = opened.convert("RGB")
    return picture, f"{len(generated)} images in {seconds:.1f} s on {pipeline.device.type}."


def _told(error: Exception) -> gr.Error:
    """An error as the page shows it."""
    return gr.Error(str(error), title="This cannot be generated", print_exception=False)
