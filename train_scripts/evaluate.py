r"""Scores pipelines and runs: distance to real images, precision and recall, class agreement, and their protocol.

The pipeline of a run, and every checkpoint it has kept, with a curve:

    python train_scripts/evaluate.py models=runs/quickstart checkpoints=true

Two runs side by side, or the embedded checkpoint:

    python train_scripts/evaluate.py models=runs/speed,runs/uniform checkpoints=true output_dir=comparison
    python train_scripts/evaluate.py models=embedded num_images=200

The field's scores, each in the features that it is defined in; the images are generated once for all of them:

    python train_scripts/evaluate.py models=runs/b2 num_images=50000 reference=VIRTUAL_imagenet256_labeled.npz \
        metrics=fid,sfid,inception_score,precision_recall

Each score is one JSON file with its whole protocol, one for each extractor, in `scores/` of its run or in output_dir.
Scores that are there already are not measured again, so the same command resumes an interrupted evaluation.
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
from speed_diffusers.metrics import METRICS, ExtractorFiles, general_metrics
from speed_diffusers.metrics.curves import ScoreCurve, save_score_curves
from speed_diffusers.metrics.protocol import Protocol, require_equal_protocols
from speed_diffusers.metrics.score import ScoreSettings, make_protocol, score_in_each
from speed_diffusers.metrics.score_record import ScoreRecord, load_score, load_scores, save_score, score_path
from speed_diffusers.metrics.ways import Wanted, ways_of
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
class EvaluateConfig(ExtractorFiles, GenerationSettings):
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
    reference: list[str] = option(
        [EMBEDDED],
        "'embedded', files of make_reference_statistics.py, or npz files of ADM or others; one for each extractor.",
        path=True,
    )
    feature_extractor: str | None = option(
        None,
        "Of metrics that any features will do for: a name, package.module:attribute, path/to/file.py:attribute, or a "
        ".safetensors file; None: inception beside fid, kid or inception_score, else fashion_mnist.",
        path=True,
    )
    metrics: list[str] = option(general_metrics(), "What to measure.", choices=METRICS)
    num_bootstrap: int = option(0, "Draws for 95 % intervals of all numbers; 0: none.", interval="[0, 10^5]")
    kid_subset_size: int = option(1000, "Images in each of KID's 100 subsets.", interval="[2, 10^6]")
    num_images: int = option(2000, "Generated images per score.", interval="[2, 10^7]")
    class_labels: list[str] = option([], "Classes, names or rows of the label table; empty: all in turn.")
    output_dir: str | None = option(
        None, "Folder for all scores; None: scores/ of each run, and ./scores for what is no run.", path=True
    )


@dataclass(frozen=True)
class Subject:
    """What is scored, loaded once: its places, the pipeline that takes their weights, and the ways to score it."""

    model: ModelToScore
    pipeline: DiTPipeline
    ways: Sequence[tuple[ScoreSettings, Protocol]]


def main(argv: list[str]) -> None:
    """Scores what the options say, prints the table and plots the curves.

    Raises:
        InputError: Wrong options; nothing has been generated.
    """
    config = load_config(EvaluateConfig, argv, Path(__file__).resolve().parent)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    output_dir = Path(config.output_dir) if config.output_dir is not None else None
    models = find_models(
        config.models,
        checkpoints=config.checkpoints,
        stop_checkpoints=config.stop_checkpoints,
        weights=check_weights(config.weights),
        output_dir=output_dir,
    )
    ways = read_settings(config, device or torch.device("cpu"))
    subjects = [open_subject(model, ways, config.class_labels) for model in models]
    for number in range(len(ways)):
        require_equal_protocols({subject.model.name: subject.ways[number][1] for subject in subjects})
    records = {
        subject.model.name: [score_place(subject, place) for place in subject.model.places] for subject in subjects
    }
    print(table(records))
    for _, protocol in subjects[0].ways:
        print(f"Protocol: {protocol.in_words()}.")
    plot_curves(subjects, output_dir or (models[0].scores_dir if len(models) == 1 else Path(SCORES_FOLDER)))


def read_settings(config: EvaluateConfig, device: torch.device) -> list[ScoreSettings]:
    """How to score, in the features of each extractor, without the classes, which are the pipelines'.

    Raises:
        InputError: No such extractor or reference, or too few images.
    """
    shared = ScoreSettings(
        **{field.name: getattr(config, field.name) for field in fields(GenerationSettings)},
        num_images=config.num_images,
        weights=config.weights,
        num_bootstrap=config.num_bootstrap,
        kid_subset_size=config.kid_subset_size,
    )
    return ways_of(Wanted(config.metrics, config.reference, config.feature_extractor, config), shared, device)


def open_subject(model: ModelToScore, ways: Sequence[ScoreSettings], class_labels: list[str]) -> Subject:
    """Loads a model's pipeline and checks that it can be scored.

    Raises:
        InputError: It cannot, or its scores cannot be written.
    """
    check_writable("output_dir", model.scores_dir)
    pipeline = model.base()
    warn_of_untrained_guidance(model.name, ways[0].guidance_scale)
    own = [with_classes(settings, class_labels, pipeline) for settings in ways]
    return Subject(model, pipeline, [(settings, make_protocol(pipeline, settings)) for settings in own])


def with_classes(settings: ScoreSettings, class_labels: list[str], pipeline: DiTPipeline) -> ScoreSettings:
    """The settings with the rows of the classes that were asked for; empty: all."""
    if not class_labels:
        return settings
    last_row = pipeline.transformer.config.num_embeds_ada_norm
    return replace(settings, class_rows=tuple(choose_classes(class_labels, row_names_of(pipeline), last_row=last_row)))


def score_place(subject: Subject, place: Place) -> list[ScoreRecord]:
    """Scores a point of a run in each way that has no score there yet, of the same weights and with all numbers."""
    model, pipeline = subject.model, subject.pipeline
    shared = subject.ways[0][0]
    if place.checkpoint is not None:
        put_weights(pipeline, place.checkpoint, shared.weights)
    pipeline.to(shared.extractor.device)
    files = [score_path(model.scores_dir, protocol, place.step) for _, protocol in subject.ways]
    known = [known_score(file, pipeline) for file in files]
    missing = [number for number, (settings, _) in enumerate(subject.ways) if not holds_all(known[number], settings)]
    if missing:
        at = "" if place.step is None else f", step {place.step:,}"
        ways = [subject.ways[number] for number in missing]
        for number, score in zip(missing, score_in_each(pipeline, ways, description=f"{model.name}{at}"), strict=True):
            if (older := known[number]) is not None:
                values = {**older.score.values, **score.values}
                score = replace(score, values=values, intervals={**older.score.intervals, **score.intervals})
            save_score(score, model.scores_dir, step=place.step, images_seen=place.images_seen, seconds=place.seconds)
    return [load_score(file) for file in files]


def holds_all(record: ScoreRecord | None, settings: ScoreSettings) -> bool:
    """Whether a score has all numbers that are asked for, and their intervals."""
    if record is None:
        return False
    numbers = {number for name in settings.metrics for number in METRICS[name].function.numbers}
    values, intervals = record.score.values, record.score.intervals
    return all(
        number in values and (not settings.num_bootstrap or number in intervals or values[number] is None)
        for number in numbers
    )


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


def table(records: dict[str, list[list[ScoreRecord]]]) -> str:
    """One line per point of a run, a column per number, with its interval where there is one."""
    numbers = [number for entry in METRICS.values() for number in entry.function.numbers]
    found = {number for own in records.values() for ways in own for each in ways for number in each.score.values}
    numbers = [number for number in numbers if number in found]
    rows = [["model", "step", *(number.replace("_", " ") for number in numbers)]]
    for name, own in records.items():
        for ways in own:
            values = {number: value for each in ways for number, value in each.score.values.items()}
            intervals = {number: ends for each in ways for number, ends in each.score.intervals.items()}
            step = "-" if ways[0].step is None else f"{ways[0].step:,}"
            rows.append([name, step, *(cell(values.get(number), intervals.get(number)) for number in numbers)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            [row[0].ljust(widths[0]), *(text.rjust(width) for text, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    )


def cell(value: float | None, interval: tuple[float, float] | None) -> str:
    """A number with its interval, such as "3.21 [3.1, 3.32]"; "-" where there is none."""
    if value is None:
        return "-"
    return f"{value:.4g}" if interval is None else f"{value:.4g} [{interval[0]:.4g}, {interval[1]:.4g}]"


def plot_curves(subjects: Sequence[Subject], folder: Path) -> None:
    """Plots the scores of each model over its training, with those of earlier evaluations under the same protocol.

    Of the first way to score, and there of the Fréchet distance or else of the first metric.
    """
    first = subjects[0].ways[0][0].metrics
    metric = next((name for name in ("frechet_distance", "fid") if name in first), first[0])
    curves = []
    for subject in subjects:
        protocol = subject.ways[0][1]
        records = [each for each in load_scores(subject.model.scores_dir) if each.score.protocol == protocol]
        curves.append(ScoreCurve(subject.model.name, [each for each in records if each.step is not None]))
    if max(len(curve.records) for curve in curves) < 2:
        return
    path = folder / CURVES_FILE
    left_out = save_score_curves(curves, path, metric=METRICS[metric].function.numbers[0])
    print(f"Saved {path}." + "".join(f" No panel by {label}: not every score knows it." for label in left_out))


if __name__ == "__main__":
    run_script(main, __doc__, EvaluateConfig)
