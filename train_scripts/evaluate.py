r"""Scores pipelines and runs: distance to real images, precision and recall, class agreement, and their protocol.

The pipeline of a run, and every checkpoint it has kept, with a curve:

    python train_scripts/evaluate.py models=runs/quickstart checkpoints=true

Two runs side by side, or the embedded checkpoint:

    python train_scripts/evaluate.py models=runs/speed,runs/uniform checkpoints=true output_dir=comparison
    python train_scripts/evaluate.py models=embedded num_images=200

Some checkpoints, several strengths of guidance, EMA weights of several lengths; the images of generate_samples.py:

    python train_scripts/evaluate.py models=runs/quickstart steps=1000,2000
    python train_scripts/evaluate.py models=runs/quickstart guidance_scales=1,1.5,2,3
    python train_scripts/evaluate.py models=runs/quickstart weights=ema:0.05,ema:0.1,ema:0.2
    python train_scripts/evaluate.py models=samples

The field's scores, each in the features that it is defined in; the images are generated once for all of them:

    python train_scripts/evaluate.py models=runs/b2 num_images=50000 reference=VIRTUAL_imagenet256_labeled.npz \
        metrics=fid,sfid,inception_score,precision_recall

On eight GPUs, which share the generating:

    torchrun --nproc_per_node 8 train_scripts/evaluate.py models=runs/b2 num_images=50000

Each score is printed as it comes, and is one JSON file with its whole protocol, one for each extractor, in `scores/`
of its run or in output_dir. Scores that are there already are not measured again, so the same command resumes an
interrupted evaluation.
"""

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import DiTPipeline

from speed_diffusers.assets import EMBEDDED
from speed_diffusers.config.command_line import run_script
from speed_diffusers.config.load import load_config
from speed_diffusers.config.schema import option
from speed_diffusers.errors import InputError
from speed_diffusers.files import check_writable, tensors_sha256
from speed_diffusers.generation.generate import GenerationSettings, choose_classes, row_names_of
from speed_diffusers.generation.image_set import Manifest, is_image_set
from speed_diffusers.generation.processes import ALONE, Processes
from speed_diffusers.hardware import accelerator_or_cpu
from speed_diffusers.locks import LOCK_FILE, take_lock
from speed_diffusers.metrics import METRICS, ExtractorFiles, general_metrics
from speed_diffusers.metrics.curves import ScoreCurve, save_score_curves, save_sweep
from speed_diffusers.metrics.protocol import Protocol, require_equal_protocols
from speed_diffusers.metrics.score import (
    ScoreSettings,
    image_set_protocol,
    make_protocol,
    score_image_set,
    score_in_each,
)
from speed_diffusers.metrics.score_record import Score, ScoreRecord, load_score, load_scores, save_score, score_path
from speed_diffusers.metrics.ways import Wanted, ways_of
from speed_diffusers.training.parts import is_launched, start_process
from speed_diffusers.training.run_folder import SCORES_FOLDER
from speed_diffusers.training.snapshots import (
    ModelToScore,
    Place,
    check_weights,
    ema_length,
    find_models,
    put_weights,
    scores_dir_of,
    shared_scores,
    warn_of_untrained_guidance,
)

logger = logging.getLogger(__name__)

CURVES_FILE = "score_over_steps.png"
GUIDANCE_FILE = "score_over_guidance.png"
EMA_FILE = "score_over_ema.png"


@dataclass(frozen=True)
class EvaluateConfig(ExtractorFiles, GenerationSettings):
    """Options of `evaluate.py`."""

    batch_size: int = option(100, "Images generated at once.", interval="[1, 10^6]")
    models: list[str] = option(
        [EMBEDDED], "Runs, pipeline folders, Hub ids, 'embedded', or folders of generate_samples.py.", path=True
    )
    steps: list[int] = option(
        [], "Score the checkpoints of these steps of each run, and no others.", interval="[1, inf)"
    )
    checkpoints: bool = option(False, "Score every checkpoint of each run too.")
    stop_checkpoints: bool = option(
        False, "Those too that a stop (Ctrl-C, SIGTERM) left between the steps of checkpointing_steps."
    )
    weights: list[str] = option(
        ["ema"],
        "Of the checkpoints: ema, model (as trained), ema:0.05 (any length, of a run's ema_tracks); each scored.",
    )
    guidance_scales: list[float] = option(
        [], "Score with each of these; empty: with guidance_scale.", interval="[1, 1000]"
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


Ways = list[tuple[ScoreSettings, Protocol]]
"""How a model is scored, in the features of each extractor."""


@dataclass(frozen=True)
class Subject:
    """What is scored, loaded once: its places, the pipeline that takes their weights, and the ways to score it."""

    model: ModelToScore
    pipeline: DiTPipeline
    transformer: torch.nn.Module
    """The pipeline's own, which checkpoints take the place of."""
    ways: Ways


@dataclass(frozen=True)
class StoredImages:
    """A folder of generated images, which is scored as it is."""

    name: str
    scores_dir: Path
    ways: Ways


Scored = list[tuple[str, list[ScoreRecord]]]
"""A line of the table: the name of a model, and its scores in the features of each extractor."""


def main(argv: list[str]) -> None:
    """Scores what the options say, prints each score as it comes and the table of all, and plots the curves.

    Raises:
        InputError: Wrong options; nothing has been generated.
    """
    config = load_config(EvaluateConfig, argv, Path(__file__).resolve().parent)
    state = start_process() if is_launched(os.environ) else None
    device = accelerator_or_cpu() if state is None else state.device
    try:
        evaluate(config, device, Processes.of_process_group(device))
    finally:
        if state is not None:
            state.destroy_process_group()


def evaluate(config: EvaluateConfig, device: torch.device, processes: Processes) -> None:
    """Scores what the options say; the first process prints, saves and plots.

    Args:
        config: The options.
        device: Where to generate and measure.
        processes: Who generates.

    Raises:
        InputError: As `main`.
    """
    output_dir = Path(config.output_dir) if config.output_dir is not None else None
    found = find_all(config, output_dir)
    ways = read_settings(config, device)
    stored = [open_images_of(name, ways, output_dir) for name in config.models if is_image_set(Path(name))]
    check_apart(stored, [model for models in found.values() for model in models])
    variants = open_subjects(config, found, ways)
    for subjects in variants or [[]]:
        compared = {each.model.name: each.ways for each in subjects} | {each.name: each.ways for each in stored}
        for number in range(len(ways)):
            require_equal_protocols({name: own[number][1] for name, own in compared.items()})
    scored: Scored = []
    if processes.rank == 0:
        scored = [(images.name, announce(images.name, score_stored(images))) for images in stored]
    for subject in (each for subjects in variants for each in subjects):
        for place in subject.model.places:
            if records := score_place(subject, place, processes):
                scored.append((subject.model.name, announce(subject.model.name, records)))
    if processes.rank:
        return
    print(table(scored))
    for record in scored[0][1]:
        print(f"Protocol: {record.score.protocol.in_words(without=swept(scored))}.")
    folders = {each.scores_dir for each in stored} | {each.model.scores_dir for own in variants for each in own}
    pictures_dir = output_dir or (folders.pop() if len(folders) == 1 else Path(SCORES_FOLDER))
    for subjects in variants[:1]:
        plot_curves(subjects, pictures_dir)
    plot_sweeps(scored, leading_number(ways[0].metrics), pictures_dir)


def find_all(config: EvaluateConfig, output_dir: Path | None) -> dict[str, list[ModelToScore]]:
    """The models that are no folders of images, with what of them is scored, by the weights that it is scored with.

    Raises:
        InputError: A model is named twice, has nothing to score or not that, or there are no such weights.
    """
    if not config.weights:
        raise InputError("weights is empty: give ema, model, or ema: and a length.")
    names = [name for name in config.models if not is_image_set(Path(name))]
    if config.models and not names:
        return {}
    return {
        weights: find_models(
            names,
            checkpoints=config.checkpoints,
            stop_checkpoints=config.stop_checkpoints,
            weights=weights,
            output_dir=output_dir,
            steps=config.steps,
        )
        for weights in map(check_weights, config.weights)
    }


def check_apart(stored: Sequence[StoredImages], models: Sequence[ModelToScore]) -> None:
    """Checks that no two would keep their scores in one folder, where they might replace one another's.

    Raises:
        InputError: Two would.
    """
    taken = {model.scores_dir: model.name for model in models}
    for images in stored:
        if images.scores_dir in taken:
            raise shared_scores(images.name, taken[images.scores_dir], images.scores_dir)
        taken[images.scores_dir] = images.name


def read_settings(config: EvaluateConfig, device: torch.device) -> list[ScoreSettings]:
    """How to score, in the features of each extractor, without classes, weights and guidance, which may be several.

    Raises:
        InputError: No such extractor or reference, or too few images.
    """
    shared = ScoreSettings(
        **{field.name: getattr(config, field.name) for field in fields(GenerationSettings)},
        num_images=config.num_images,
        num_bootstrap=config.num_bootstrap,
        kid_subset_size=config.kid_subset_size,
    )
    generated = not all(is_image_set(Path(name)) for name in config.models)
    wanted = Wanted(config.metrics, config.reference, config.feature_extractor, config, generated)
    return ways_of(wanted, shared, device)


def open_images_of(name: str, ways: Sequence[ScoreSettings], output_dir: Path | None) -> StoredImages:
    """Looks at a folder of generated images, and checks that it can be scored.

    Raises:
        InputError: It cannot, or its score cannot be written.
    """
    scores_dir = scores_dir_of(name, output_dir)
    check_writable("output_dir", scores_dir)
    manifest = Manifest.load(Path(name))
    return StoredImages(name, scores_dir, [(settings, image_set_protocol(manifest, settings)) for settings in ways])


def open_subjects(
    config: EvaluateConfig, found: dict[str, list[ModelToScore]], ways: Sequence[ScoreSettings]
) -> list[list[Subject]]:
    """Loads each model once, and gives it once for each of the weights and strengths of guidance.

    Raises:
        InputError: One cannot be scored, or its scores cannot be written.
    """
    pipelines: dict[str, DiTPipeline] = {}
    variants = []
    for weights, models in found.items():
        for scale in config.guidance_scales or [config.guidance_scale]:
            own = [replace(settings, weights=weights, guidance_scale=scale) for settings in ways]
            variants.append([open_subject(model, own, config.class_labels, pipelines) for model in models])
    return variants


def open_subject(
    model: ModelToScore, ways: Sequence[ScoreSettings], class_labels: list[str], pipelines: dict[str, DiTPipeline]
) -> Subject:
    """Loads a model's pipeline, unless it is among `pipelines`, and checks that it can be scored.

    Raises:
        InputError: It cannot, or its scores cannot be written.
    """
    if model.name not in pipelines:
        check_writable("output_dir", model.scores_dir)
        pipelines[model.name] = model.base()
    pipeline = pipelines[model.name]
    warn_of_untrained_guidance(model.name, ways[0].guidance_scale)
    own = [with_classes(settings, class_labels, pipeline) for settings in ways]
    protocols = [(settings, make_protocol(pipeline, settings)) for settings in own]
    return Subject(model, pipeline, pipeline.transformer, protocols)


def with_classes(settings: ScoreSettings, class_labels: list[str], pipeline: DiTPipeline) -> ScoreSettings:
    """The settings with the rows of the classes that were asked for; empty: all."""
    if not class_labels:
        return settings
    last_row = pipeline.transformer.config.num_embeds_ada_norm
    return replace(settings, class_rows=tuple(choose_classes(class_labels, row_names_of(pipeline), last_row=last_row)))


def score_place(subject: Subject, place: Place, processes: Processes) -> list[ScoreRecord]:
    """Scores a point of a run in each way that has no score there yet, of the same weights and with all numbers.

    Returns:
        The scores on the first process, nothing on the others, which have helped to generate the images.
    """
    model, pipeline = subject.model, subject.pipeline
    shared = subject.ways[0][0]
    if place.checkpoint is not None:
        put_weights(pipeline, place.checkpoint, shared.weights)
    else:
        cast(Any, pipeline).register_modules(transformer=subject.transformer)
    pipeline.to(shared.extractor.device)
    at = "" if place.step is None else f", step {place.step:,}"

    def measure(ways: Ways) -> list[Score]:
        return score_in_each(pipeline, ways, description=f"{model.name}{at}", processes=processes)

    weights_sha256 = tensors_sha256(pipeline.transformer.state_dict())
    return scored_once(subject.ways, measure, model.scores_dir, place, weights_sha256, processes)


def score_stored(images: StoredImages) -> list[ScoreRecord]:
    """Scores a folder of images in each way that has no score yet, of the same weights and with all numbers."""
    folder = Path(images.name)

    def measure(ways: Ways) -> list[Score]:
        return score_image_set(folder, ways, description=images.name)

    weights_sha256 = Manifest.load(folder).image_set.weights_sha256
    return scored_once(images.ways, measure, images.scores_dir, Place(None, None), weights_sha256)


def scored_once(
    ways: Ways,
    measure: Callable[[Ways], list[Score]],
    folder: Path,
    place: Place,
    weights_sha256: str,
    processes: Processes = ALONE,
) -> list[ScoreRecord]:
    """The scores that are there of these weights, and those that are not, measured and saved.

    Args:
        ways: The ways to score.
        measure: Scores in some of them.
        folder: Of the scores.
        place: What is scored.
        weights_sha256: Hash of its weights.
        processes: Who measures; the first one looks for scores, saves and returns them.
    """
    files = [score_path(folder, protocol, place.step) for _, protocol in ways]
    known = [known_score(file, weights_sha256) for file in files]
    missing = [number for number, (settings, _) in enumerate(ways) if not holds_all(known[number], settings)]
    missing = processes.of_the_first(missing)
    scores = measure([ways[number] for number in missing]) if missing else []
    if processes.rank:
        return []
    for number, score in zip(missing, scores, strict=True):
        add_score(score, files[number], place)
    return [load_score(file) for file in files]


def add_score(score: Score, file: Path, place: Place) -> None:
    """Saves a score with the numbers of the same weights that its file has by now: others may measure too."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = take_lock(file.parent / LOCK_FILE, wait=True)
    try:
        if (older := known_score(file, score.weights_sha256)) is not None:
            score = score.added_to(older.score)
        save_score(score, file.parent, step=place.step, images_seen=place.images_seen, seconds=place.seconds)
    finally:
        if lock is not None:
            lock.release()


def announce(name: str, records: list[ScoreRecord]) -> list[ScoreRecord]:
    """Prints the scores of a place in a line, and returns them."""
    protocol, step = records[0].score.protocol, records[0].step
    place = [name] if step is None else [name, f"step {step:,}"]
    place += [] if protocol.guidance_scale == 1 else [f"guidance {protocol.guidance_scale:g}"]
    place += [] if protocol.weights == "ema" else [protocol.weights]
    numbers = [
        f"{number.replace('_', ' ')} {cell(value, record.score.intervals.get(number))}"
        for record in records
        for number, value in record.score.values.items()
    ]
    print(f"{', '.join(place)}: {', '.join(numbers)}", flush=True)
    return records


def holds_all(record: ScoreRecord | None, settings: ScoreSettings) -> bool:
    """Whether a score has all numbers that are asked for, and their intervals."""
    if record is None:
        return False
    numbers = {number for name in settings.metrics for number in METRICS[name].function.numbers}
    values, draws = record.score.values, record.score.interval_draws
    return all(
        number in values and (draws.get(number, 0) >= settings.num_bootstrap or values[number] is None)
        for number in numbers
    )


def known_score(file: Path, weights_sha256: str) -> ScoreRecord | None:
    """The score in a file if it is there, readable and of these weights."""
    if not file.is_file():
        return None
    try:
        record = load_score(file)
    except InputError as error:
        logger.warning("Measuring anew: %s", error)
        return None
    # A run may have been overwritten by another one since.
    return record if record.score.weights_sha256 == weights_sha256 else None


SWEPT: dict[str, Callable[[Protocol], str]] = {
    "weights": lambda protocol: protocol.weights,
    "guidance": lambda protocol: f"{protocol.guidance_scale:g}",
}
"""What may be swept, by the head of its column."""


def swept(scored: Scored) -> dict[str, Callable[[Protocol], str]]:
    """What differs between these scores, of `SWEPT`."""
    protocols = [records[0].score.protocol for _, records in scored]
    return {head: of for head, of in SWEPT.items() if len({of(protocol) for protocol in protocols}) > 1}


def table(scored: Scored) -> str:
    """One line per point of a run, a column per number, with its interval if it has one, and per swept option."""
    numbers = [number for entry in METRICS.values() for number in entry.function.numbers]
    found = {number for _, records in scored for each in records for number in each.score.values}
    numbers = [number for number in numbers if number in found]
    columns = swept(scored)
    rows = [["model", "step", *columns, *(number.replace("_", " ") for number in numbers)]]
    for name, records in scored:
        values = {number: value for each in records for number, value in each.score.values.items()}
        intervals = {number: ends for each in records for number, ends in each.score.intervals.items()}
        step = "-" if records[0].step is None else f"{records[0].step:,}"
        cells = [cell(values.get(number), intervals.get(number)) for number in numbers]
        rows.append([name, step, *(of(records[0].score.protocol) for of in columns.values()), *cells])
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

    Of the first way to score, and there of its leading number.
    """
    curves, number = [], leading_number(subjects[0].ways[0][0].metrics)
    for subject in subjects:
        protocol = subject.ways[0][1]
        records = [each for each in load_scores(subject.model.scores_dir) if each.score.protocol == protocol]
        known = [each for each in records if each.step is not None and each.score.values.get(number) is not None]
        curves.append(ScoreCurve(subject.model.name, known))
    if max(len(curve.records) for curve in curves) < 2:
        return
    path = folder / CURVES_FILE
    left_out = save_score_curves(curves, path, metric=number)
    print(f"Saved {path}." + "".join(f" No panel by {label}: not every score knows it." for label in left_out))


def leading_number(metrics: Sequence[str]) -> str:
    """What is plotted: a Fréchet distance, or else the first number."""
    metric = next((name for name in ("frechet_distance", "fid") if name in metrics), metrics[0])
    return METRICS[metric].function.numbers[0]


def plot_sweeps(scored: Scored, number: str, folder: Path) -> None:
    """Plots what was swept: a number over guidance, or over the length of the EMA, a line for each model and step.

    Args:
        scored: All scores.
        number: In the features of the first extractor.
        folder: For the pictures.
    """
    for file, label, place, other in (
        (GUIDANCE_FILE, "guidance scale", lambda protocol: protocol.guidance_scale, SWEPT["weights"]),
        (EMA_FILE, "relative length of the EMA", lambda protocol: ema_length(protocol.weights), SWEPT["guidance"]),
    ):
        lines: dict[str, list[tuple[float, float]]] = {}
        for name, (record, *_) in scored:
            x, value = place(record.score.protocol), record.score.values.get(number)
            if x is not None and value is not None:
                words = [name, *([] if record.step is None else [f"step {record.step:,}"])]
                words.append(("guidance " if file == EMA_FILE else "") + other(record.score.protocol))
                lines.setdefault(", ".join(words), []).append((x, value))
        lines = {name: sorted(points) for name, points in lines.items() if len({x for x, _ in points}) > 1}
        if lines:
            save_sweep(lines, folder / file, metric=number, label=label)
            print(f"Saved {folder / file}.")


if __name__ == "__main__":
    run_script(main, __doc__, EvaluateConfig)
