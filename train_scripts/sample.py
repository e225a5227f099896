"""Draws a grid of images, one row a class, from any DiT pipeline.

From the small checkpoint that the package ships:

    python train_scripts/sample.py class_labels=Sneaker,Dress guidance_scale=1.5

From a run of one's own, a pipeline folder or the Hub:

    python train_scripts/sample.py model=runs/quickstart num_images_per_class=16 output=runs/quickstart/more.png
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from command_line import run_script
from run_folder import check_writable
from speed_diffusers.config import load_config
from speed_diffusers.errors import InputError
from speed_diffusers.hub import load_pipeline
from speed_diffusers.plots import save_class_grid
from speed_diffusers.samplers import SAMPLERS
from speed_diffusers.sampling import choose_classes, class_samples, row_names_of, speed_pipeline
from speed_diffusers.train_config import option


@dataclass
class SampleConfig:
    """Options of `sample.py`."""

    model: str = option("embedded", "Run, pipeline folder, Hub id, or 'embedded' for the shipped checkpoint.")
    revision: str | None = option(None, "Branch, tag or commit on the Hub.")
    class_labels: list[str] = option([], "Classes, names or ids; empty: the first 10.")
    num_images_per_class: int = option(8, "Images a class.")
    guidance_scale: float = option(1.5, "Classifier-free guidance; 1: none.")
    guidance_channels: int | None = option(None, "Latent channels to guide, from the first; None: all. DiT: 3 of 4.")
    guidance_interval: list[float] = option([0.0, 1.0], "Where to guide: shares of the noising process, 1 is noise.")
    sampler: str | None = option(None, "Solver; None: the pipeline's own.", choices=SAMPLERS)
    num_inference_steps: int = option(50, "Solver steps.")
    seed: int = option(0, "Seed; image i depends on it and i alone.")
    batch_size: int = option(32, "Images generated at once.")
    output: str = option("samples.png", "PNG file to write.")


def main(argv: list[str]) -> None:
    """Draws the grid.

    Raises:
        InputError: Wrong options; nothing has been written.
    """
    config = load_config(SampleConfig, argv, Path(__file__).resolve().parent)
    for name, lowest in (("num_images_per_class", 1), ("num_inference_steps", 1), ("batch_size", 1), ("seed", 0)):
        if getattr(config, name) < lowest:
            raise InputError(f"{name}={getattr(config, name)}: must be at least {lowest}.")
    if config.guidance_scale < 1:
        raise InputError(f"guidance_scale={config.guidance_scale}: must be at least 1 (1: none).")
    interval = config.guidance_interval
    if len(interval) != 2 or not 0 <= interval[0] <= interval[1] <= 1:
        raise InputError(f"guidance_interval={interval}: must be two numbers in [0, 1], the lower one first.")
    output = Path(config.output)
    if output.suffix != ".png" or output.is_dir():
        raise InputError(f"output={output}: must be a file that ends in .png.")
    check_writable("output", output.parent)
    pipeline = speed_pipeline(load_pipeline(config.model, revision=config.revision), config.sampler)
    longest = pipeline.scheduler.config.num_train_timesteps
    if config.num_inference_steps > longest:
        raise InputError(f"num_inference_steps={config.num_inference_steps}: the model has {longest} timesteps.")
    shape = pipeline.transformer.config
    if config.guidance_channels is not None and not 1 <= config.guidance_channels <= shape.in_channels:
        raise InputError(f"guidance_channels={config.guidance_channels}: must lie in [1, {shape.in_channels}].")
    classes = {pipeline.null_class_id: "no class"}
    if config.class_labels or pipeline.labels:
        classes = choose_classes(config.class_labels, row_names_of(pipeline))
    if max(classes) > shape.num_embeds_ada_norm:
        raise InputError(f"class_labels={max(classes)}: the model has rows 0 to {shape.num_embeds_ada_norm}.")
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    images = class_samples(
        pipeline.to(device),
        list(classes),
        config.num_images_per_class,
        seed=config.seed,
        batch_size=config.batch_size,
        guidance_scale=config.guidance_scale,
        guidance_channels=config.guidance_channels,
        guidance_interval=(interval[0], interval[1]),
        num_inference_steps=config.num_inference_steps,
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    steps = f"{config.num_inference_steps} steps" + (f" of {config.sampler}" if config.sampler else "")
    title = f"{config.model}, guidance {config.guidance_scale:g}, {steps}"
    save_class_grid(images, list(classes.values()), title, output)
    print(f"Saved {output}: {len(images)} images.")


if __name__ == "__main__":
    run_script(main, __doc__, SampleConfig)
