"""In which classes the images of one training are better or worse than those of another.

    python benchmarks/class_distances.py models=runs/a,runs/b,runs/c "titles=[DiT's recipe,DiT's recipe,fast]"

The kernel distance of each class's generated images to held-out ones of that class: its mean does not depend on how
many images there are, so that few do. Models of one title are seeds of one training. Every model generates the same
classes from the same noise. Results: result.json, a table and a picture in results_dir.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.figure import Figure
from torch import Tensor

from measurement import SCRIPT_DIR, environment
from speed_diffusers.config.command_line import run_script
from speed_diffusers.config.load import load_config
from speed_diffusers.config.schema import option
from speed_diffusers.data.decode import load_image
from speed_diffusers.data.images import ImageSource, open_images
from speed_diffusers.errors import InputError
from speed_diffusers.files import write_text
from speed_diffusers.generation.generate import GenerationSettings, class_samples, row_names_of
from speed_diffusers.generation.pretrained import load_pipeline
from speed_diffusers.hardware import accelerator_or_cpu
from speed_diffusers.metrics import FeatureExtractor, load_extractor
from speed_diffusers.metrics.kernel import kernel_distance
from speed_diffusers.reports.plots import save_png

RESULTS = Path(__file__).resolve().parent / "class_distances"
BATCH = 100


@dataclass(frozen=True)
class ClassDistanceConfig(GenerationSettings):
    """Options of this benchmark."""

    models: list[str] = option([], "Runs or pipeline folders.")
    titles: list[str] = option([], "What each is called; seeds of one training have the same title.")
    dataset_name: str | None = option("embedded", "Held-out images: 'embedded' or a Hub id.")
    train_data_dir: str | None = option(None, "Held-out images in a folder or parquet file instead.", path=True)
    split: str = option("test", "Of the held-out images.")
    feature_extractor: str = option("fashion_mnist", "What the images are seen with.")
    num_images_per_class: int = option(200, "Generated images per class and model.", interval="[2, 10^6]")
    num_inference_steps: int = option(25, "DDIM steps.", interval="[1, 1000]")
    results_dir: str = option(str(RESULTS), "Where the results go.", path=True)


def main(argv: list[str]) -> None:
    """Measures every model, and writes result, table and picture.

    Raises:
        InputError: Wrong options, or a model that does not know the classes.
    """
    config = load_config(ClassDistanceConfig, argv, SCRIPT_DIR)
    if not config.models or len(config.titles) != len(config.models):
        raise InputError(f"models: {len(config.models)} given with {len(config.titles)} titles; each needs one.")
    held_out = open_images(
        dataset_name=None if config.train_data_dir else config.dataset_name,
        train_data_dir=config.train_data_dir,
        split=config.split,
    )
    if held_out.label_names is None:
        raise InputError("The held-out images have no names of classes.")
    extractor = load_extractor(config.feature_extractor, device=accelerator_or_cpu())
    real: dict[str, Tensor] = {}
    measured = []
    for model, title in zip(config.models, config.titles, strict=True):
        pipeline = load_pipeline(model).to(accelerator_or_cpu())
        config.check_fits(pipeline)
        rows = {name: row for row, name in row_names_of(pipeline).items()}
        if missing := sorted(set(held_out.label_names) - set(rows)):
            raise InputError(f"models={model}: knows no class '{missing[0]}'.")
        pipeline.set_progress_bar_config(desc=title)
        names = held_out.label_names
        images = class_samples(pipeline, [rows[name] for name in names], config.num_images_per_class, config)
        generated = dict(zip(names, features_of(images, extractor).chunk(len(names)), strict=True))
        real = real or real_features(held_out, images.shape[1], extractor)
        distances = {name: kernel_distance(generated[name], real[name]) for name in names}
        measured.append({"model": Path(model).name, "title": title, "kernel_distance": distances})
    result = {
        "environment": environment(),
        "held_out_images": {name: len(features) for name, features in real.items()},
        "num_images_per_class": config.num_images_per_class,
        "num_inference_steps": config.num_inference_steps,
        "guidance_scale": config.guidance_scale,
        "feature_extractor": extractor.name,
        "models": measured,
    }
    folder = Path(config.results_dir)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "result.json", json.dumps(result, indent=1) + "\n")
    write_text(folder / "table.md", table(result) + "\n")
    save_png(picture(result), folder / "class_distances.png")
    print(table(result))


def features_of(images: npt.NDArray[np.float32], extractor: FeatureExtractor) -> Tensor:
    """Features (N, D) of images (N, H, W, 3) in [0, 1]."""
    batches = torch.from_numpy(images).permute(0, 3, 1, 2).split(BATCH)
    return torch.cat([extractor(batch.contiguous().to(extractor.device))[0].cpu() for batch in batches])


def real_features(source: ImageSource, resolution: int, extractor: FeatureExtractor) -> dict[str, Tensor]:
    """Features of the images of each class, by its name."""
    found = {}
    for label, name in enumerate(source.label_names or []):
        images = [source.image(int(row)) for row in np.flatnonzero(source.labels == label)]
        pixels = np.stack([load_image(image, resolution) for image in images if image is not None])
        found[name] = features_of(pixels.astype(np.float32) / 255, extractor)
    return found


def by_title(result: dict[str, Any]) -> dict[str, npt.NDArray[np.float64]]:
    """Distances of each training, (seeds, classes)."""
    found: dict[str, list[list[float]]] = {}
    for model in result["models"]:
        found.setdefault(model["title"], []).append(list(model["kernel_distance"].values()))
    return {title: np.array(rows) for title, rows in found.items()}


def table(result: dict[str, Any]) -> str:
    """Mean over the seeds of each class and training, in Markdown, with the mean over the classes."""
    trainings = by_title(result)
    lines = [
        "**Kernel distance of each class to its held-out images** (lower is better), mean over the seeds.",
        "",
        f"| class | {' | '.join(trainings)} |",
        f"|---|{'---|' * len(trainings)}",
        f"| models | {' | '.join(str(len(rows)) for rows in trainings.values())} |",
    ]
    for index, name in enumerate(result["held_out_images"]):
        lines.append(f"| {name} | {_cells([rows[:, index] for rows in trainings.values()])} |")
    lines.append(f"| mean of all classes | {_cells(list(trainings.values()))} |")
    return "\n".join(lines)


def _cells(columns: Sequence[npt.NDArray[np.float64]]) -> str:
    return " | ".join(f"{column.mean():.3f}" for column in columns)


def picture(result: dict[str, Any]) -> Figure:
    """Bars by class, one colour a training, with a dot for each seed."""
    trainings, names = by_title(result), list(result["held_out_images"])
    figure = Figure(figsize=(9, 4), dpi=120, layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(trainings)
    for number, (title, rows) in enumerate(trainings.items()):
        places = np.arange(len(names)) + (number - (len(trainings) - 1) / 2) * width
        axes.bar(places, rows.mean(axis=0), width, label=title)
        if len(rows) > 1:
            axes.plot(np.tile(places, len(rows)), rows.ravel(), ".", color="black", markersize=3)
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right", parse_math=False)
    axes.set_ylabel("kernel distance")
    axes.set_title("By class, to held-out images; lower is better", fontsize=10)
    axes.legend(fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


if __name__ == "__main__":
    run_script(main, __doc__, ClassDistanceConfig)
