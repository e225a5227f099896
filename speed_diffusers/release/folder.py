"""A release as a folder: the plain pipeline in two precisions, the file that tells its training, pictures and card."""

import logging
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from diffusers import DiTPipeline

from ..files import give_usual_mode, naming_disk_errors
from ..generation.export import forget_paths, save_pipeline, stock_scheduler
from ..generation.generate import GenerationSettings, choose_classes, class_samples
from ..hardware import accelerator_or_cpu
from ..hub.upload import CARD_FILE
from ..metrics.curves import METRIC_NAMES
from ..reports.plots import save_class_grid
from ..reports.training_curve import Points, save_training_curve
from ..training import run_folder
from ..training.snapshots import load_latest_place
from .facts import Facts, facts_of
from .licences import Licences
from .model_card import CURVE_FILE, ERRORS_FILE, SAMPLES_FILE, model_card

logger = logging.getLogger(__name__)

HALF = "fp16"
"""Name of the variant in half precision."""


@dataclass(frozen=True)
class Release:
    """A release on this machine.

    Attributes:
        folder: Its files.
        facts: What its card tells.
    """

    folder: Path
    facts: Facts

    def listing(self) -> str:
        """Its files with their sizes, a line each."""
        files = sorted(path for path in self.folder.rglob("*") if path.is_file())
        sizes = [path.stat().st_size for path in files]
        lines = [f"{size:15,}  {path.relative_to(self.folder)}" for path, size in zip(files, sizes, strict=True)]
        return "\n".join([*lines, f"{sum(sizes):15,}  bytes in {len(files)} files"])


def make_release(
    name: str,
    folder: Path,
    repo_id: str,
    licences: Licences | None = None,
    *,
    branch: str = "main",
    revision: str | None = None,
    scores_dir: Path | None = None,
    num_images_per_class: int = 4,
) -> Release:
    """Writes all that a release consists of.

    Args:
        name: "embedded", the folder of a run, finished or not, or of a pipeline, or a Hub id.
        folder: Where to; it is made.
        repo_id: Name of the release on the Hub, for its card.
        licences: What the one who releases says of them.
        branch: Where the release goes on the Hub, for its card.
        revision: Of a model on the Hub: branch, tag or commit.
        scores_dir: Folder of scores to tell, besides those of the run; those of other weights are left out.
        num_images_per_class: Of the grid that is generated where the run has left none; 0: no grid.

    Raises:
        InputError: Nothing of this name can be loaded, or a file of it is damaged.
        FloatingPointError: The model generates what is not finite.
        OSError: The disk is full or not writable.
    """
    pipeline, place = load_latest_place(name, revision=revision)
    pipeline.scheduler = stock_scheduler(pipeline.scheduler)
    facts = facts_of(name, pipeline, place, revision=revision, scores_dir=scores_dir)
    folder.parent.mkdir(parents=True, exist_ok=True)
    save_pipeline(pipeline, folder, facts.sidecar)
    with naming_disk_errors(folder):
        pictures = save_pictures(facts, folder, num_images_per_class)
        card = model_card(
            facts,
            repo_id,
            licences or Licences(),
            branch=branch,
            pictures=pictures,
            has_half=save_half(pipeline, folder),
        )
        (folder / CARD_FILE).write_text(str(card), encoding="utf-8")
    return Release(folder, facts)


def save_half(pipeline: DiTPipeline, folder: Path) -> bool:
    """Saves the weights in half precision beside the others, as the variant "fp16"; the pipeline's become so.

    Args:
        pipeline: As it was saved.
        folder: Where it was saved.

    Returns:
        Whether it was done: weights beyond the range of half precision are left out with a warning.
    """
    models = {name: getattr(pipeline, name) for name in ("transformer", "vae")}
    largest = max(float(value.abs().max()) for model in models.values() for value in model.state_dict().values())
    if largest > torch.finfo(torch.float16).max:
        logger.warning("Weights of up to %g do not fit into half precision: there is no variant %s.", largest, HALF)
        return False
    for name, model in models.items():
        model.half().save_pretrained(folder / name, variant=HALF)
    forget_paths(folder)
    give_usual_mode(folder)
    return True


def save_pictures(facts: Facts, folder: Path, num_images_per_class: int) -> dict[str, str]:
    """Saves the pictures of a release: the grid and the map of errors that a run has left, and the training's course.

    Args:
        facts: What is known of the model.
        folder: Where to.
        num_images_per_class: Of the grid, where there is none yet; 0: no grid.

    Returns:
        Their names with captions.
    """
    pictures = {}
    run = facts.run if facts.is_finished else None
    if run is not None and (run / run_folder.SAMPLES_FILE).is_file():
        shutil.copyfile(run / run_folder.SAMPLES_FILE, folder / SAMPLES_FILE)
        pictures[SAMPLES_FILE] = _grid_caption(facts, _grid_of_run(facts), facts.config.get("seed", 0))
    elif num_images_per_class:
        settings = _grid_of_run(facts)
        if facts.config.get("class_dropout_prob") == 0:  # guidance would take what was never trained
            settings = replace(settings, guidance_scale=1.0)
        save_grid(facts, settings, num_images_per_class, folder / SAMPLES_FILE)
        pictures[SAMPLES_FILE] = _grid_caption(facts, settings, settings.seed)
    panels = course_panels(facts)
    if panels:
        save_training_curve(panels, "The training, by optimizer steps", folder / CURVE_FILE)
        pictures[CURVE_FILE] = f"The course of the training: {', '.join(panels)}, by optimizer step"
    if run is not None and (run / run_folder.ERRORS_FILE).is_file():
        shutil.copyfile(run / run_folder.ERRORS_FILE, folder / ERRORS_FILE)
        pictures[ERRORS_FILE] = "Unweighted MSE over training and timesteps, with SpeeD's three areas"
    return pictures


def save_grid(facts: Facts, settings: GenerationSettings, num_images: int, path: Path) -> None:
    """Generates a row of images of each of the first ten classes, on the accelerator if there is one."""
    pipeline = facts.pipeline
    rows = choose_classes([], facts.class_names) if facts.class_names else {pipeline.null_class_id: "no class"}
    images = class_samples(pipeline.to(accelerator_or_cpu()), list(rows), num_images, settings)
    pipeline.to("cpu")
    title = f"guidance {settings.guidance_scale:g}, {settings.num_inference_steps} steps"
    save_class_grid(images, list(rows.values()), title, path)


def course_panels(facts: Facts) -> dict[str, dict[str, Points]]:
    """What can be plotted over the steps of a training, quantity by quantity; empty where nothing was logged."""
    panels: dict[str, dict[str, Points]] = {}
    for quantity, key, lines in (
        ("loss", "loss", facts.metrics),
        ("unweighted MSE", "squared_error", facts.metrics),
        ("validation loss", "validation_loss", facts.validation),
    ):
        points = [(float(line["step"]), float(line[key])) for line in lines if isinstance(line.get(key), int | float)]
        if len(points) > 1:
            panels[quantity] = {quantity: points}
    for name, scored in facts.course.items():
        panels[METRIC_NAMES.get(name, name.replace("_", " "))] = {name: scored}
    return panels


def _grid_of_run(facts: Facts) -> GenerationSettings:
    """How a run generates its grid, as far as its options are known."""
    config = facts.config
    return GenerationSettings(
        guidance_scale=float(config.get("guidance_scale", 1.5)) if facts.class_names else 1.0,
        num_inference_steps=int(config.get("num_inference_steps", 50)),
        sampler=config.get("sampler"),
        batch_size=32,
    )


def _grid_caption(facts: Facts, settings: GenerationSettings, seed: int) -> str:
    rows = "one row per class" if facts.class_names else "without classes"
    guidance = f"guidance {settings.guidance_scale:g}" if settings.guidance_scale > 1 else "no guidance"
    sampler = settings.sampler or type(facts.pipeline.scheduler).__name__.removesuffix("Scheduler")
    return (
        f"Generated images, {rows}: {settings.num_inference_steps} steps of {sampler}, {guidance}, seed {seed}, "
        "nothing picked"
    )
