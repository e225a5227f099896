"""The folder of a run: what it may be, whether a run may be resumed in it, and what is put there first."""

import json
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from filelock import FileLock

from ..config.load import config_dict, load_config, save_config
from ..config.schema import default_of
from ..errors import InputError
from ..files import check_writable, remove, remove_unfinished, write_text
from ..locks import lock_output_dir
from .checkpoint_folders import (
    STATE,
    find_checkpoint,
    list_checkpoints,
    prune_checkpoints,
    remove_leftovers,
    set_aside,
    set_aside_later_checkpoints,
)
from .checkpoints import read_state
from .config import TrainConfig
from .ema_tracks import SNAPSHOTS_FOLDER, remove_later_snapshots

CONFIG_FILE = "config.yaml"
LABEL_NAMES_FILE = "label_names.json"
METRICS_FILE = "metrics.jsonl"
BAD_IMAGES_FILE = "bad_images.jsonl"
SAMPLES_FILE = "samples.png"
ERRORS_FILE = "error_by_timestep.png"
PIPELINE_FOLDER = "pipeline"
RELEASE_FOLDER = "release"
VALIDATION_FOLDER = "validation"
LOSS_FILE = "loss.jsonl"
LOGGING_FOLDER = "logs"
SCORES_FOLDER = "scores"


def is_run(folder: Path) -> bool:
    """Whether a folder holds a run, finished or not."""
    return (folder / CONFIG_FILE).is_file()


def load_run_config(folder: Path) -> TrainConfig:
    """The options of the run in a folder.

    Raises:
        InputError: There is none, or its configuration cannot be read.
    """
    if not is_run(folder):
        raise InputError(f"{folder} is no run: there is no {CONFIG_FILE} in it.")
    return load_config(TrainConfig, [f"config={(folder / CONFIG_FILE).resolve()}"], folder)


def load_label_names(folder: Path) -> list[str] | None:
    """Name of each class id of the run in a folder; None for a run without classes.

    Raises:
        FileNotFoundError: The folder does not tell; version 0.1 did not write them.
        InputError: The file is damaged.
    """
    path = folder / LABEL_NAMES_FILE
    text = path.read_bytes()
    try:
        names: list[str] | None = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read as JSON ({error}); without it the data tells the names.") from error
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise InputError(f"{path} must hold a list of the classes' names, or null; without it the data tells them.")
    return names


def check_output_dir(config: TrainConfig) -> Path | None:
    """Checks that the folder can be written and that no earlier run is overwritten by accident.

    Returns:
        The checkpoint to resume from, or None to begin at step 0.

    Raises:
        InputError: The folder is a file, cannot be written, holds a run already, or the checkpoint is no good.
    """
    folder = Path(config.output_dir)
    check_writable("output_dir", folder)
    checkpoint, goes_on = None, config.resume_from_checkpoint == "latest"
    if config.resume_from_checkpoint is not None:
        checkpoint = find_checkpoint(folder, config.resume_from_checkpoint)
        goes_on = goes_on or (checkpoint is not None and checkpoint.resolve().parent == folder.resolve())
    if is_run(folder) and not (goes_on or config.overwrite_output_dir or config.dry_run):
        raise InputError(
            f"output_dir={folder} holds a run already: resume it with resume_from_checkpoint=latest, take another "
            "output_dir, or delete that run with overwrite_output_dir=true."
        )
    if checkpoint is not None:
        state = read_state(checkpoint)
        if missing := {"config", "global_batch"} - state.keys():
            raise InputError(
                f"{checkpoint / STATE} lacks {', '.join(sorted(missing))}: no checkpoint of this trainer."
            )
    return checkpoint


def check_steps_left(config: TrainConfig, checkpoint: Path) -> None:
    """Checks that a run is to have no fewer steps than the checkpoint it is resumed from has taken.

    Raises:
        InputError: It is.
    """
    taken = read_state(checkpoint)["step"]
    if taken > config.max_train_steps:
        raise InputError(
            f"max_train_steps={config.max_train_steps}: {checkpoint} has taken {taken} steps already; "
            f"allowed: at least {taken}, or an earlier checkpoint as resume_from_checkpoint."
        )


def check_resumed_config(config: TrainConfig, checkpoint: Path, current: dict[str, Any]) -> None:
    """Checks that a resumed run computes what the interrupted one would have.

    Args:
        config: Options of the resumed run.
        checkpoint: What it resumes from.
        current: What else must be as it was, by the names under which the checkpoint's state has it.

    Raises:
        InputError: Options that matter, or the data, differ; the message lists old and new values.
    """
    state = read_state(checkpoint)
    # An option that the checkpoint does not know yet was not there to differ: it had what is its default now.
    before = {field.name: default_of(field) for field in fields(TrainConfig)} | state["config"]
    free = {field.name for field in fields(TrainConfig) if field.metadata["free"]}
    changes = [
        f"{name}: {before[name]} -> {value}"
        for name, value in config_dict(config).items()
        if name not in free and before[name] != value
    ]
    changes += [name.replace("_", " ") for name, value in current.items() if state.get(name) != value]
    if changes and not config.allow_config_changes:
        raise InputError(
            f"{checkpoint} was made with other options ({'; '.join(changes)}); set them back, or resume all the same "
            "with allow_config_changes=true."
        )


def repeatable(config: TrainConfig, accumulation: int) -> TrainConfig:
    """The configuration that makes the same run again: without what was meant for one start only."""
    return replace(
        config,
        gradient_accumulation_steps=accumulation,
        resume_from_checkpoint=None,
        overwrite_output_dir=False,
        allow_config_changes=False,
    )


def open_output_dir(
    config: TrainConfig, accumulation: int, checkpoint: Path | None, label_names: Sequence[str] | None
) -> FileLock | None:
    """Makes the folder, locks it for this run, and saves the resolved configuration in it; main process only.

    Args:
        config: Options of the run.
        accumulation: Batches per optimizer step, which a resumed run may have had to change.
        checkpoint: What the run resumes from, if it does.
        label_names: Name of each class id, kept in the folder, so that whoever samples needs no data; None for a run
            without classes.

    Returns:
        The lock; None, with a warning, where the file system grants none.

    Raises:
        InputError: Another process writes to the folder.
    """
    folder = Path(config.output_dir)
    lock = lock_output_dir(folder)
    remove_leftovers(folder)
    remove_unfinished(
        folder, PIPELINE_FOLDER, RELEASE_FOLDER, SAMPLES_FILE, ERRORS_FILE, METRICS_FILE, LABEL_NAMES_FILE, CONFIG_FILE
    )
    remove_unfinished(folder / VALIDATION_FOLDER, "*.png", LOSS_FILE)
    remove_unfinished(folder / SCORES_FOLDER, "*.json")
    remove_unfinished(folder / SNAPSHOTS_FOLDER, "*.safetensors")
    goes_on = checkpoint is not None and checkpoint.resolve().parent == folder.resolve()
    if config.overwrite_output_dir and not goes_on:
        _delete_run(folder)
    if checkpoint is not None:
        step = read_state(checkpoint)["step"]
        set_aside_later_checkpoints(folder, step)
        remove_later_snapshots(folder, step)
        if step < config.max_train_steps:
            set_aside(folder, step, PIPELINE_FOLDER, SAMPLES_FILE, ERRORS_FILE)
        # A run that was killed between its last save and this would keep one too many for good.
        prune_checkpoints(folder, config.checkpoints_total_limit, keep=step)
    # Before the configuration, which makes the folder a run.
    write_text(folder / LABEL_NAMES_FILE, json.dumps(label_names, ensure_ascii=False, indent=1))
    save_config(repeatable(config, accumulation), folder / CONFIG_FILE)
    return lock


def _delete_run(folder: Path) -> None:
    """Deletes what a run writes, and nothing else that may lie in its folder."""
    for name in (PIPELINE_FOLDER, VALIDATION_FOLDER, LOGGING_FOLDER, SCORES_FOLDER, SNAPSHOTS_FOLDER):
        remove(folder / name)
    for checkpoint in list_checkpoints(folder):
        remove(checkpoint)
    for name in (METRICS_FILE, BAD_IMAGES_FILE, SAMPLES_FILE, ERRORS_FILE, LABEL_NAMES_FILE, CONFIG_FILE):
        (folder / name).unlink(missing_ok=True)
