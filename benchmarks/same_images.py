"""One picture of several pipelines: the same classes and the same noise, side by side.

    python benchmarks/same_images.py models=runs/a,runs/b "titles=[DiT's recipe,fast]" output=side_by_side.png

No image is picked: they are the first ones of the seed.
"""

from dataclasses import dataclass

from matplotlib.figure import Figure

from measurement import SCRIPT_DIR
from speed_diffusers.config.command_line import run_script
from speed_diffusers.config.load import load_config
from speed_diffusers.config.schema import option
from speed_diffusers.errors import InputError
from speed_diffusers.files import check_output_file
from speed_diffusers.generation.generate import GenerationSettings, choose_classes, class_samples, row_names_of
from speed_diffusers.generation.pretrained import load_pipeline
from speed_diffusers.reports.plots import mosaic, save_png


@dataclass(frozen=True)
class PictureConfig(GenerationSettings):
    """Options of this picture."""

    models: list[str] = option([], "Runs or pipeline folders, from left to right.")
    titles: list[str] = option([], "What stands above each.")
    class_labels: list[str] = option([], "Classes, one row each; empty: the first 10.")
    num_images_per_class: int = option(5, "Images per class and model.", interval="[1, 100]")
    guidance_scale: float = option(1.5, "Classifier-free guidance; 1: none.", interval="[1, 1000]")
    output: str = option("same_images.png", "PNG file to write.", path=True)


def main(argv: list[str]) -> None:
    """Generates the images and saves the picture.

    Raises:
        InputError: Wrong options, or pipelines that do not compare.
    """
    config = load_config(PictureConfig, argv, SCRIPT_DIR)
    output = check_output_file("output", config.output, ".png")
    if not config.models or len(config.titles) != len(config.models):
        raise InputError(f"models: {len(config.models)} given with {len(config.titles)} titles; each needs one.")
    sheets, names = [], list[str]()
    for model in config.models:
        pipeline = load_pipeline(model)
        config.check_fits(pipeline)
        pipeline.set_progress_bar_config(desc=model)
        last_row = pipeline.transformer.config.num_embeds_ada_norm
        classes = choose_classes(config.class_labels, row_names_of(pipeline), last_row=last_row)
        names = list(classes.values())
        images = class_samples(pipeline, list(classes), config.num_images_per_class, config)
        sheets.append(mosaic(images, config.num_images_per_class))
    # A pixel of an image becomes two of the picture, so that nothing is blurred.
    height, width = (2 * side / 100 for side in sheets[0].shape[:2])
    left, gap, top = 0.09 * max(map(len, names)) + 0.2, 0.25, 0.35
    size = (left + len(sheets) * width + (len(sheets) - 1) * gap, height + top)
    figure = Figure(figsize=size, dpi=100)
    for index, (sheet, title) in enumerate(zip(sheets, config.titles, strict=True)):
        begin = left + index * (width + gap)
        axes = figure.add_axes((begin / size[0], 0.0, width / size[0], height / size[1]))
        axes.imshow(sheet, interpolation="nearest")
        axes.set_xticks([])
        row = sheet.shape[0] / len(names)
        axes.set_yticks([(number + 0.5) * row for number in range(len(names))], names, parse_math=False)
        if index:
            axes.set_yticks([])
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_title(title, fontsize=10, parse_math=False)
    output.parent.mkdir(parents=True, exist_ok=True)
    save_png(figure, output)
    print(f"Saved {output}.")


if __name__ == "__main__":
    run_script(main, __doc__, PictureConfig)
