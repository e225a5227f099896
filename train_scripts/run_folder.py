"""The folder of a run: what it may be, whether a run may go on in it, and what is put there first."""

import shutil
import tempfile
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from speed_diffusers.checkpoint_folders import find_checkpoint, list_checkpoints, set_aside_later_checkpoints
from speed_diffusers.checkpoints import read_state
from speed_diffusers.config import config_dict, save_config
from speed_diffusers.errors import InputError
from speed_diffusers.train_config import TrainConfig

CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.jsonl"
SAMPLES_FILE = "samples.png"
ERRORS_FILE = "error_by_timestep.png"
PIPELINE_FOLDER = "pipeline"
LOCK_FILE = ".lock"
VALIDATION_FOLDER = "validation"
LOGGING_FOLDER = "logs"
SCORES_FOLDER = "scores"
POLYNOMIAL_END = 1e-7
"""Where diffusers' polynomial schedule ends; it must begin above."""


def check_numbers(config: TrainConfig) -> None:
    """Checks the ranges of numbers that no other part checks.

    Raises:
        InputError: The first number outside its range, with the range.
    """
    at_least = {
        "train_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "max_train_steps": 1,
        "num_train_timesteps": 2,
        "resolution": 1,
        "vae_batch_size": 1,
        "dataloader_num_workers": 0,
        "num_classes": 0,
        "lr_warmup_steps": 0,
        "logging_steps": 1,
        "validation_steps": 1,
        "num_validation_images": 1,
        "num_inference_steps": 1,
        "guidance_scale": 1,
        "checkpointing_steps": 1,
        "checkpoints_total_limit": 1,
        "adam_weight_decay": 0,
        "max_train_samples": 1,
        "num_score_images": 2,
    }
    for name, lowest in at_least.items():
        value = getattr(config, name)
        if value is not None and value < lowest:
            raise InputError(f"{name}={value}: must be at least {lowest}.")
    for name in ("learning_rate", "adam_epsilon", "max_grad_norm", "beta_start", "beta_end"):
        value = getattr(config, name)
        if value is not None and value <= 0:
            raise InputError(f"{name}={value}: must be above 0.")
    for name in ("adam_beta1", "adam_beta2", "ema_decay", "class_dropout_prob"):
        value = getattr(config, name)
        if value is not None and not 0 <= value < 1:
            raise InputError(f"{name}={value}: must lie in [0, 1).")
    if not 0 <= config.seed < 2**63:
        raise InputError(f"seed={config.seed}: must lie in [0, 2^63).")
    if not config.beta_start <= config.beta_end < 1:
        raise InputError(
            f"beta_start={config.beta_start} beta_end={config.beta_end}: must be in order, and beta_end below 1."
        )
    if config.lr_scheduler == "constant" and config.lr_warmup_steps:
        raise InputError(
            f"lr_warmup_steps={config.lr_warmup_steps}: lr_scheduler=constant has none; take constant_with_warmup."
        )
    if config.lr_scheduler == "polynomial" and config.learning_rate <= POLYNOMIAL_END:
        raise InputError(f"learning_rate={config.learning_rate}: lr_scheduler=polynomial ends at {POLYNOMIAL_END}.")
    if config.num_inference_steps > config.num_train_timesteps:
        raise InputError(
            f"num_inference_steps={config.num_inference_steps}: at most "
            f"num_train_timesteps={config.num_train_timesteps}."
        )


def check_output_dir(config: TrainConfig) -> Path | None:
    """Makes sure that the folder can be written and that no earlier run is overwritten by accident.

    Returns:
        The checkpoint to go on from, or None to begin at step 0.

    Raises:
        InputError: The folder is a file, cannot be written, holds a run already, or the checkpoint is no good.
    """
    folder = Path(config.output_dir)
    check_writable("output_dir", folder)
    checkpoint, goes_on = None, config.resume_from_checkpoint == "latest"
    if config.resume_from_checkpoint is not None:
        checkpoint = find_checkpoint(folder, config.resume_from_checkpoint)
        goes_on = goes_on or (checkpoint is not None and checkpoint.resolve().parent == folder.resolve())
    if (folder / CONFIG_FILE).exists() and not (goes_on or config.overwrite_output_dir or config.dry_run):
        raise InputError(
            f"output_dir={folder} holds a run already: go on with resume_from_checkpoint=latest, take another "
            "output_dir, or delete that run with overwrite_output_dir=true."
        )
    return checkpoint


def check_writable(name: str, folder: Path) -> None:
    """Makes sure that a folder can be written to, or made.

    Args:
        name: The option that names it, for the message.
        folder: The folder; it need not exist yet, and is not made.

    Raises:
        InputError: It, or what it would be made in, is a file or cannot be written.
    """
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not existing.is_dir():
        raise InputError(f"{name}={folder}: {existing} is a file.")
    try:
        # Asked by doing: permission bits do not tell what root, a read-only mount or a full quota allow.
        with tempfile.TemporaryDirectory(prefix=".tmp-writable-", dir=existing):
            pass
    except OSError as error:
        raise InputError(f"{name}={folder}: {existing} is not writable ({error.strerror}).") from error


def check_resumed_config(config: TrainConfig, checkpoint: Path, current: dict[str, Any]) -> None:
    """Makes sure that a resumed run computes what the interrupted one would have.

    Args:
        config: Options of the resumed run.
        checkpoint: Where it goes on from.
        current: What else must be as it was, by the names under which the checkpoint's state has it.

    Raises:
        InputError: Options that matter, or the data, differ; the message lists old and new values.
    """
    state = read_state(checkpoint)
    # An option that the checkpoint does not know yet was not there to differ: it had what is its default now.
    before = {field.name: field.default for field in fields(TrainConfig)} | state["config"]
    free = {field.name for field in fields(TrainConfig) if field.metadata["free"]}
    changes = [
        f"{name}: {before[name]} -> {value}"
        for name, value in config_dict(config).items()
        if name not in free and before[name] != value
    ]
    changes += [name.replace("_", " ") for name, value in current.items() if state[name] != value]
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


def open_output_dir(config: TrainConfig, accumulation: int, checkpoint: Path | None) -> FileLock:
    """Makes the folder, locks it for this run, and saves the resolved configuration in it; main process only.

    Raises:
        InputError: Another process writes to the folder.
    """
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK_FILE, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise InputError(f"output_dir={folder} is being written by another process.") from error
    goes_on = checkpoint is not None and checkpoint.resolve().parent == folder.resolve()
    if config.overwrite_output_dir and not goes_on:
        _delete_run(folder)
    if checkpoint is not None:
        set_aside_later_checkpoints(folder, read_state(checkpoint)["step"])
    save_config(repeatable(config, accumulation), folder / CONFIG_FILE)
    return lock


def _delete_run(folder: Path) -> None:
    """Deletes what a run writes, and nothing else that may lie in its folder."""
    for name in (PIPELINE_FOLDER, VALIDATION_FOLDER, LOGGING_FOLDER, SCORES_FOLDER):
        shutil.rmtree(folder / name, ignore_errors=True)
    for checkpoint in list_checkpoints(folder):
        shutil.rmtree(checkpoint)
    for name in (METRICS_FILE, SAMPLES_FILE, ERRORS_FILE, CONFIG_FILE):
        (folder / name).unlink(missing_ok=True)
