"""Scores pipelines and runs: distance to real images, precision and recall, class agreement, and their protocol.

The pipeline of a run, and every checkpoint it has kept, with a curve:

    python train_scripts/evaluate.py models=runs/quickstart checkpoints=true

Two runs side by side, or the embedded checkpoint:

    python train_scripts/evaluate.py models=runs/speed,runs/uniform checkpoints=true output_dir=comparison
    python train_scripts/evaluate.py models=embedded num_images=200

Each score is one JSON file with its whole protocol, in `scores/` of its run or in output_dir. Scores that are there
already are not measured again, so the same command resumes an interrupted evaluation.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from diffusers import DiTPipeline

from speed_diffusers.assets import EMBEDDED
from speed_diffusers.config.command_line import run_script
from speed_diffusers.config.load import load_config
from speed_diffusers.config.schema import option
from speed_diffusers.errors import InputError
from speed_diffusers.files import check_writable, tensors_sha256
from speed_diffusers.generation.generate import GenerationSettings, choose_classes, row_names_of
from speed_diffusers.metrics import METRICS, load_extractor, load_reference
from speed_diffusers.metrics.curves import ScoreCurve, save_score_curves
from speed_diffusers.metrics.extractors import FASHION_MNIST
from speed_diffusers.metrics.protocol import Protocol, require_equal_protocols
from speed_diffusers.metrics.score import ScoreSettings, make_protocol, score_pipeline
from speed_diffusers.metrics.score_record import ScoreRecord, load_score, load_scores, save_score, score_path
from speed_diffusers.training.run_folder import SCORES_FOLDER
from speed_diffusers.training.snapshots import (
    ModelToScore,
    Place,
    check_weights,
    find_models,
    put_weights,
    warn_of_untrained_guidance,
)

logger = logging.getLogger(__name__)

CURVES_FILE = "score_over_steps.png"


@dataclass(frozen=True)
class EvaluateConfig(GenerationSettings):
    """Options of `evaluate.py`."""

    batch_size: int = option(100, "Images generated at once.", interval="[1, 10^6]")
    models: list[str] = option([EMBEDDED], "Run folders, pipeline folders, Hub ids, or 'embedded'.", path=True)
    checkpoints: bool = option(False, "Score every checkpoint of each run too.")
    stop_checkpoints: bool = option(
        False, "Those too that a stop (Ctrl-C, SIGTERM) left between the steps of checkpointing_steps."
    )
    weights: str = option(
        "ema", "Of the checkpoints: ema, model (as trained), or ema:0.05, an EMA of any length of a run's ema_tracks."
    )
    reference: str = option(EMBEDDED, "'embedded', or a file of make_reference_statistics.py.", path=True)
    feature_extractor: str = option(
        FASHION_MNIST,
        "fashion_mnist, package.module:attribute, path/to/file.py:attribute, or a .safetensors file.",
        path=True,
    )
    metrics: list[str] = option(list(METRICS), "What to measure.", choices=METRICS)
    num_images: int = option(2000, "Generated images per score.", interval="[2, 10^7]")
    class_labels: list[str] = option([], "Classes, names or rows of the label table; empty: all in turn.")
    output_dir: str | None = option(
        None, "Folder for all scores; None: scores/ of each run, and ./scores for what is no run.", path=True
    )


@dataclass(frozen=True)
class Subject:
    """What is scored, loaded once: its places, the pipeline that takes their weights, and how it is scored."""

    model: ModelToScore
    pipeline: DiTPipeline
    settings: ScoreSettings
    protocol: Protocol


def main(argv: list[str]) -> None:
    """Scores what the options say, prints the table and plots the curves.

    Raises:
        InputError: Wrong options; nothing has been generated.
    """
    config = load_config(EvaluateConfig, argv, Path(__file__).resolve().parent)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    settings = read_settings(config, device or torch.device("cpu"))
    output_dir = Path(config.output_dir) if config.output_dir is not None else None
    models = find_models(
        config.models,
        checkpoints=config.checkpoints,
        stop_checkpoints=config.stop_checkpoints,
        weights=settings.weights,
        output_dir=output_dir,
    )
    subjects = [open_subject(model, settings, config.class_labels) for model in models]
    require_equal_protocols({subject.model.name: subject.protocol for subject in subjects})
    records = {
        subject.model.name: [score_place(subject, place) for place in subject.model.places] for subject in subjects
    }
    print(table(records))
    print(f"Protocol: {subjects[0].protocol.in_words()}.")
    pictures_dir = output_dir or (models[0].scores_dir if len(models) == 1 else Path(SCORES_FOLDER))
    plot_curves(subjects, settings.metrics, pictures_dir)


def read_settings(config: EvaluateConfig, device: torch.device) -> ScoreSettings:
    """How to score, without the classes, which are the pipelines'.

    Raises:
        InputError: No such extractor or reference.
    """
    return ScoreSettings(
        **{field.name: getattr(config, field.name) for field in fields(GenerationSettings)},
        num_images=config.num_images,
        weights=check_weights(config.weights),
        metrics=tuple(config.metrics),
        extractor=load_extractor(config.feature_extractor, device=device),
        reference=load_reference(config.reference),
    )


def open_subject(model: ModelToScore, settings: ScoreSettings, class_labels: list[str]) -> Subject:
    """Loads a model's pipeline and checks that it can be scored.

    Raises:
        InputError: It cannot, or its scores cannot be written.
    """
    check_writable("output_dir", model.scores_dir)
    pipeline = model.base()
    warn_of_untrained_guidance(model.name, settings.guidance_scale)
    settings = with_classes(settings, class_labels, pipeline)
    return Subject(model, pipeline, settings, make_protocol(pipeline, settings))


def with_classes(settings: ScoreSettings, class_labels: list[str], pipeline: DiTPipeline) -> ScoreSettings:
    """The settings with the rows of the classes that were asked for; empty: all."""
    if not class_labels:
        return settings
    last_row = pipeline.transformer.config.num_embeds_ada_norm
    return replace(settings, class_rows=tuple(choose_classes(class_labels, row_names_of(pipeline), last_row=last_row)))


def score_place(subject: Subject, place: Place) -> ScoreRecord:
    """Scores a point of a run, unless its score is there, of the same weights and with all metrics."""
    model, pipeline, settings = subject.model, subject.pipeline, subject.settings
    if place.checkpoint is not None:
        put_weights(pipeline, place.checkpoint, settings.weights)
    pipeline.to(settings.extractor.device)
    file = score_path(model.scores_dir, subject.protocol, place.step)
    known = known_score(file, pipeline)
    wanted = {number for name in settings.metrics for number in METRICS[name].function.numbers}
    if known is not None and wanted <= set(known.score.values):
        return known
    at = "" if place.step is None else f", step {place.step:,}"
    score = score_pipeline(pipeline, settings, protocol=subject.protocol, description=f"{model.name}{at}")
    if known is not None:
        score = replace(score, values={**known.score.values, **score.values})
    save_score(score, model.scores_dir, step=place.step, images_seen=place.images_seen, seconds=place.seconds)
    return load_score(file)


def known_score(file: Path, pipeline: DiTPipeline) -> ScoreRecord | None:
    """The score in a file if it is there, readable and of these weights."""
    if not file.is_file():
        return None
    try:
        record = load_score(file)
    except InputError as error:
        logger.warning("Measuring anew: %s", error)
        return None
    # A run may have been overwritten by another one since.
    return record if record.score.weights_sha256 == tensors_sha256(pipeline.transformer.state_dict()) else None


def table(records: dict[str, list[ScoreRecord]]) -> str:
    """One line per score, a column per number."""
    numbers = [number for entry in METRICS.values() for number in entry.function.numbers]
    numbers = [
        number for number in numbers if any(number in each.score.values for own in records.values() for each in own)
    ]
    rows = [["model", "step", *(number.replace("_", " ") for number in numbers)]]
    for name, own in records.items():
        for record in own:
            values = [record.score.values.get(number) for number in numbers]
            step = "-" if record.step is None else f"{record.step:,}"
            rows.append([name, step, *("-" if value is None else f"{value:.4g}" for value in values)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    )


def plot_curves(subjects: Sequence[Subject], metrics: Sequence[str], folder: Path) -> None:
    """Plots the scores of each model over its training, with those of earlier evaluations under the same protocol."""
    number = METRICS["frechet_distance" if "frechet_distance" in metrics else metrics[0]].function.numbers[0]
    curves = []
    for subject in subjects:
        records = [each for each in load_scores(subject.model.scores_dir) if each.score.protocol == subject.protocol]
        curves.append(ScoreCurve(subject.model.name, [each for each in records if each.step is not None]))
    if max(len(curve.records) for curve in curves) < 2:
        return
    path = folder / CURVES_FILE
    left_out = save_score_curves(curves, path, metric=number)
    print(f"Saved {path}." + "".join(f" No panel by {label}: not every score knows it." for label in left_out))


if __name__ == "__main__":
    run_script(main, __doc__, EvaluateConfig)
