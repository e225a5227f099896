"""What is sampled and scored: pipelines, and the checkpoints of runs put back into pipelines."""

import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from diffusers import DiTPipeline
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..assets import EMBEDDED
from ..errors import InputError, unknown_name
from ..generation.export import inference_pipeline
from ..generation.generate import speed_pipeline
from ..generation.pretrained import GUIDANCE_UNTRAINED, load_pipeline, load_vae, sidecar_of, training_config_of
from ..models import export_transformer
from .checkpoint_folders import EMA, MANIFEST, MODEL, digest, list_checkpoints
from .checkpoints import read_state
from .ema_tracks import (
    LARGEST_ERROR,
    ema_of_length,
    error_of_length,
    list_snapshots,
    power_of,
    step_of_snapshot,
    too_few_snapshots,
)
from .parts import make_model, make_scheduler, open_data
from .run_folder import (
    METRICS_FILE,
    PIPELINE_FOLDER,
    SCORES_FOLDER,
    is_run,
    load_label_names,
    load_run_config,
)
from .tracking import read_metrics

logger = logging.getLogger(__name__)

WEIGHTS = {"ema": EMA, "model": MODEL}
"""What a checkpoint holds, by the names under which protocols have it."""

OF_LENGTH = "ema:"
"""What stands before the relative length of EMA weights that are made of a run's snapshots, "ema:0.05"."""


def check_weights(weights: str) -> str:
    """Checks which weights are asked for: one of `WEIGHTS`, or "ema:" and a relative length.

    Raises:
        InputError: It is neither, or the length lies outside (0, 0.28].
    """
    if weights in WEIGHTS:
        return weights
    before, _, text = weights.partition(OF_LENGTH)
    try:
        length = None if before else float(text)
    except ValueError:
        length = None
    if length is None:
        raise unknown_name("weights", weights, [*WEIGHTS, f"{OF_LENGTH}0.05"])
    power_of(length)
    return weights


def ema_length(weights: str) -> float | None:
    """The relative length of "ema:0.05"; None of other weights."""
    return float(weights.removeprefix(OF_LENGTH)) if weights.startswith(OF_LENGTH) else None


@dataclass(frozen=True)
class Place:
    """A point of a run; all None for a pipeline that says nothing of its past."""

    checkpoint: Path | None
    """A checkpoint, or a snapshot of its averages; None: the pipeline at its end."""
    step: int | None
    images_seen: int | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class ModelToScore:
    """A pipeline or a run, with what of it is to be scored."""

    name: str
    """As the user gave it."""
    scores_dir: Path
    places: list[Place]

    def base(self) -> DiTPipeline:
        """A pipeline whose transformer may have to be replaced: the run's, or one made from its configuration."""
        if is_half_trained(self.name):
            return pipeline_of_config(Path(self.name))
        pipeline: DiTPipeline = load_pipeline(self.name)
        return pipeline


def is_half_trained(name: str) -> bool:
    """Whether a name is the folder of a run that has left no pipeline yet."""
    folder = Path(name)
    return name != EMBEDDED and is_run(folder) and not _has_pipeline(folder)


def load_latest(name: str, *, revision: str | None = None) -> DiTPipeline:
    """A pipeline as `load_pipeline` loads it; of a run without one, its newest whole checkpoint's EMA weights.

    Args:
        name: "embedded", the folder of a run or of a pipeline, or a Hub id.
        revision: Branch, tag or commit on the Hub.

    Raises:
        InputError: Nothing of this name can be loaded, or the run has no whole checkpoint yet.
    """
    return load_latest_place(name, revision=revision)[0]


def load_latest_place(name: str, *, revision: str | None = None) -> tuple[DiTPipeline, Place]:
    """What `load_latest` loads, with the checkpoint and the step behind it.

    Raises:
        InputError: Nothing of this name can be loaded, or the run has no whole checkpoint yet.
    """
    if not is_half_trained(name):
        return load_pipeline(name, revision=revision), pipeline_place(name, revision=revision)
    folder = Path(name)
    for checkpoint in list_checkpoints(folder):
        if problem := _problem_of(checkpoint, EMA):
            logger.warning("Passing over a damaged checkpoint: %s", problem)
            continue
        pipeline = pipeline_of_config(folder)
        put_weights(pipeline, checkpoint, "ema")
        logger.warning("%s has no pipeline yet: taking the EMA weights of %s.", name, checkpoint.name)
        return speed_pipeline(pipeline), Place(checkpoint, int(checkpoint.name.removeprefix("checkpoint-")))
    raise InputError(f"model={name}: the run has no pipeline and no whole checkpoint yet.")


def warn_of_untrained_guidance(name: str, guidance_scale: float, *, revision: str | None = None) -> None:
    """Warns if a model is to be guided that was always told the class (`class_dropout_prob=0`), as far as is known."""
    if guidance_scale <= 1:
        return
    if is_half_trained(name):
        dropout: Any = load_run_config(Path(name)).class_dropout_prob
    else:
        dropout = training_config_of(name, revision=revision).get("class_dropout_prob")
    if dropout == 0:
        logger.warning(GUIDANCE_UNTRAINED, name, guidance_scale)


def find_models(
    names: list[str],
    *,
    checkpoints: bool,
    stop_checkpoints: bool,
    weights: str,
    output_dir: Path | None,
    steps: Sequence[int] = (),
) -> list[ModelToScore]:
    """Finds what is to be scored, and where its scores go.

    Args:
        names: Run folders, pipeline folders, Hub ids or "embedded".
        checkpoints: Score every checkpoint of each run too.
        stop_checkpoints: As in `run_places`.
        weights: Which weights of the checkpoints.
        output_dir: Where a folder of scores is made for each model; None: in the run's own, or in `./scores`.
        steps: As in `run_places`.

    Raises:
        InputError: A name is given twice, or a run has nothing to score.
    """
    if not names:
        raise InputError("models is empty: give run folders, pipeline folders, Hub ids or 'embedded'.")
    models: dict[Path, ModelToScore] = {}
    for name in names:
        folder = Path(name)
        has_run = name != EMBEDDED and is_run(folder)
        scores_dir = scores_dir_of(name, output_dir)
        if scores_dir in models:
            raise shared_scores(name, models[scores_dir].name, scores_dir)
        if has_run:
            places = run_places(
                folder, checkpoints=checkpoints, stop_checkpoints=stop_checkpoints, weights=weights, steps=steps
            )
        elif steps:
            raise InputError(f"steps={','.join(map(str, steps))}: {name} is a pipeline, which has no checkpoints.")
        else:
            places = [pipeline_place(name)]
        if weights != "ema" and not has_run:
            raise InputError(f"weights={weights}: {name} is a pipeline, which holds EMA weights (weights=ema).")
        models[scores_dir] = ModelToScore(name, scores_dir, places)
    return list(models.values())


def shared_scores(name: str, other: str, scores_dir: Path) -> InputError:
    """The error that two would keep their scores in one folder."""
    return InputError(f"models={name} and {other} would share the scores in {scores_dir}.")


def scores_dir_of(name: str, output_dir: Path | None) -> Path:
    """Where the scores of a run, a pipeline or a set of images go.

    Args:
        name: As the user gave it.
        output_dir: Where a folder is made for each; None: in a run's own, or in `./scores`.
    """
    if name != EMBEDDED and is_run(Path(name)) and output_dir is None:
        return Path(name) / SCORES_FOLDER
    return (output_dir or Path(SCORES_FOLDER)) / re.sub(r"[^\w.-]+", "_", name.strip("/."))


def run_places(
    folder: Path, *, checkpoints: bool, stop_checkpoints: bool, weights: str, steps: Sequence[int] = ()
) -> list[Place]:
    """What of a run is to be scored, by step; damaged checkpoints are passed over with a warning.

    Args:
        folder: Of the run.
        checkpoints: Its checkpoints too.
        stop_checkpoints: Those too that a stopped run left between the steps at which it saves anyway: another run has
            none there, and a curve that is compared should not depend on when somebody pressed Ctrl-C.
        weights: Which weights of the checkpoints.
        steps: These alone, whoever saved them; empty: as `checkpoints` says.

    Raises:
        InputError: Nothing is, or one of `steps` is not there.
    """
    if steps:
        every = run_places(folder, checkpoints=True, stop_checkpoints=True, weights=weights)
        known = {place.step: place for place in every}
        missing = [step for step in steps if step not in known]
        if missing:
            there = ", ".join(str(step) for step in known if step is not None)
            raise InputError(f"steps={missing[0]}: {folder} has none with weights={weights}; it has {there}.")
        return [known[step] for step in sorted(set(steps))]
    found = list_checkpoints(folder)
    logged = read_metrics(folder / METRICS_FILE) if (folder / METRICS_FILE).is_file() else []
    timed = [line for line in logged if "seconds" in line]
    global_batch = global_batch_of(found)

    def place(checkpoint: Path | None, step: int) -> Place:
        # Not every step is logged.
        steps, times = ([0.0, *(line[key] for line in timed)] for key in ("step", "seconds"))
        seconds = float(np.interp(float(step), steps, times)) if timed else None
        return Place(checkpoint, step, None if global_batch is None else step * global_batch, seconds)

    if (length := ema_length(weights)) is not None:
        snapshots = sorted(list_snapshots(folder).items())
        if not snapshots:
            raise InputError(f"models={folder}: weights={weights} needs the snapshots of a run with ema_tracks; none.")
        asked = snapshots if checkpoints else snapshots[-1:]
        errors = {step: error_of_length(folder, length, step) for step, _ in asked}
        far = [step for step, error in errors.items() if error > LARGEST_ERROR]
        if len(far) == len(errors):
            raise InputError(f"weights={weights}: {too_few_snapshots(folder, min(errors.values()))}")
        if far:
            told = ", ".join(f"{step:,}" for step in far)
            logger.warning(
                "%s: weights=%s: leaving out the steps %s, whose snapshots make another length", folder, weights, told
            )
        return [place(path, step) for step, path in asked if step not in far]
    places: dict[int, Place] = {}
    if _has_pipeline(folder) and weights == "ema":
        end = pipeline_place(str(folder))
        places[-1 if end.step is None else end.step] = end if end.step is None else place(None, end.step)
    passed_over: list[str] = []
    for path in found if checkpoints else []:
        if problem := _problem_of(path, WEIGHTS[weights]):
            logger.warning("Passing over a damaged checkpoint: %s", problem)
        elif not stop_checkpoints and left_by_a_stop(path):
            passed_over.append(path.name)
        else:
            # The pipeline at the end holds the same weights as the last checkpoint.
            step = int(path.name.removeprefix("checkpoint-"))
            places[step] = place(path, step)
    if passed_over:
        names = ", ".join(reversed(passed_over))
        logger.warning("%s: leaving out what a stop left (stop_checkpoints=true scores it): %s", folder, names)
    if not places:
        what = "whole checkpoint" if checkpoints else "pipeline"
        hint = "" if checkpoints or not found else "; checkpoints=true scores its checkpoints"
        raise InputError(f"models={folder}: the run has no {what} with weights={weights}{hint}.")
    return [places[step] for step in sorted(places)]


def left_by_a_stop(checkpoint: Path) -> bool:
    """Whether a checkpoint is of a step at which its run would not have saved, had nothing stopped it."""
    try:
        state = read_state(checkpoint)
        step, every, last = state["step"], state["config"]["checkpointing_steps"], state["config"]["max_train_steps"]
    except (OSError, ValueError, KeyError, TypeError):
        return False  # of a damaged state nothing is known
    return bool(step != last and not (every and step % every == 0))


def global_batch_of(checkpoints: list[Path]) -> int | None:
    """Images per optimizer step, which a run keeps; None if no checkpoint tells."""
    for checkpoint in checkpoints:
        try:
            return int(read_state(checkpoint)["global_batch"])
        except (OSError, ValueError, KeyError):
            logger.warning("Passing over a damaged checkpoint: %s", checkpoint)
    return None


def pipeline_place(name: str, *, revision: str | None = None) -> Place:
    """The step that a pipeline's sidecar file tells; None where it has none, or is by another hand."""
    sidecar = sidecar_of(name, revision=revision)
    record = sidecar.get("training", {})
    seen, batch = record.get("images_seen"), record.get("global_batch")
    # A run that was released before its end has done fewer than it was to do.
    return Place(None, seen // batch if seen and batch else sidecar.get("training_config", {}).get("max_train_steps"))


def pipeline_of_config(folder: Path) -> DiTPipeline:
    """The pipeline that a run will leave, with untrained weights, from its saved configuration and class names.

    Raises:
        InputError: The configuration, the autoencoder or, of a run of version 0.1, the data cannot be read.
    """
    config = load_run_config(folder)
    try:
        names = load_label_names(folder)
    except FileNotFoundError:
        names = open_data(config).label_names
    vae = load_vae(config.pretrained_vae_model_name_or_path).eval()
    core = make_model(config, len(names or ()), vae, names)
    transformer = export_transformer(core.transformer.config, core.state_dict())
    return inference_pipeline(transformer, vae, make_scheduler(config), names)


def put_weights(pipeline: DiTPipeline, checkpoint: Path, weights: str) -> None:
    """Replaces a pipeline's transformer by that of a checkpoint.

    Args:
        pipeline: The pipeline.
        checkpoint: As `Place` has it.
        weights: As `check_weights` allows.

    Raises:
        InputError: The checkpoint is damaged, or of another model.
    """
    length = ema_length(weights)
    path = checkpoint if length is not None else checkpoint / WEIGHTS[weights]
    try:
        if length is not None:
            state = ema_of_length(checkpoint.parent.parent, length, step_of_snapshot(checkpoint))
        else:
            state = load_file(path)
        transformer = export_transformer(pipeline.transformer.config, state)
    except (RuntimeError, KeyError, SafetensorError) as error:
        raise InputError(f"{path} is damaged, or of another model than its run's.") from error
    cast(Any, pipeline).register_modules(transformer=transformer)


def _has_pipeline(folder: Path) -> bool:
    return (folder / PIPELINE_FOLDER / "model_index.json").is_file()


def _problem_of(checkpoint: Path, name: str) -> str | None:
    """What is wrong with one file of a checkpoint, in words, or None."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
        return None if digest(checkpoint / name) == manifest[name] else f"{checkpoint / name} does not match its hash."
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        return f"{checkpoint}: {type(error).__name__}: {error}"
