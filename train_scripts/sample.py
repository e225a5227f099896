"""Generates a grid of images, one row per class, from any DiT pipeline.

From the small embedded checkpoint:

    python train_scripts/sample.py class_labels=Sneaker,Dress guidance_scale=1.5

From a run of one's own, finished or not, a pipeline folder or the Hub:

    python train_scripts/sample.py model=runs/quickstart num_images_per_class=16 output=runs/quickstart/more.png
"""

from dataclasses import dataclass
from pathlib import Path

from speed_diffusers.assets import EMBEDDED
from speed_diffusers.config.command_line import run_script
from speed_diffusers.config.load import load_config
from speed_diffusers.config.schema import option
from speed_diffusers.files import check_output_file
from speed_diffusers.generation.generate import (
    GenerationSettings,
    choose_classes,
    class_samples,
    row_names_of,
    speed_pipeline,
)
from speed_diffusers.hardware import accelerator_or_cpu
from speed_diffusers.reports.plots import save_class_grid
from speed_diffusers.training.snapshots import load_latest, warn_of_untrained_guidance


@dataclass(frozen=True)
class SampleConfig(GenerationSettings):
    """Options of `sample.py`."""

    model: str = option(
        EMBEDDED, "Run, pipeline folder, Hub id, or 'embedded' for the embedded checkpoint.", path=True
    )
    revision: str | None = option(None, "Branch, tag or commit on the Hub.")
    class_labels: list[str] = option([], "Classes, names or rows of the label table; empty: the first 10.")
    num_images_per_class: int = option(8, "Images per class.", interval="[1, 1000]")
    guidance_scale: float = option(1.5, "Classifier-free guidance; 1: none.", interval="[1, 1000]")
    batch_size: int = option(32, "Images generated at once.", interval="[1, 10^6]")
    output: str = option("samples.png", "PNG file to write.", path=True)


def main(argv: list[str]) -> None:
    """Generates the grid.

    Raises:
        InputError: Wrong options; nothing has been written.
        FloatingPointError: The model generated what is not finite.
    """
    config = load_config(SampleConfig, argv, Path(__file__).resolve().parent)
    output = check_output_file("output", config.output, ".png")
    pipeline = speed_pipeline(load_latest(config.model, revision=config.revision), config.sampler)
    config.check_fits(pipeline)
    classes = {pipeline.null_class_id: "no class"}
    names, last_row = row_names_of(pipeline), pipeline.transformer.config.num_embeds_ada_norm
    if config.class_labels or names:
        classes = choose_classes(config.class_labels, names, last_row=last_row)
    warn_of_untrained_guidance(config.model, config.guidance_scale, revision=config.revision)
    images = class_samples(pipeline.to(accelerator_or_cpu()), list(classes), config.num_images_per_class, config)
    output.parent.mkdir(parents=True, exist_ok=True)
    steps = f"{config.num_inference_steps} steps" + (f" of {config.sampler}" if config.sampler else "")
    title = f"{config.model}, guidance {config.guidance_scale:g}, {steps}"
    save_class_grid(images, list(classes.values()), title, output)
    print(f"Saved {output}: {len(images)} images.")


if __name__ == "__main__":
    run_script(main, __doc__, SampleConfig)
