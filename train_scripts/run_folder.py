"""The folder of a run: what it may be, whether a run may go on in it, and what is put there first."""

import shutil
import tempfile
from dataclasses import fields
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from speed_diffusers.checkpoints import find_checkpoint, list_checkpoints, read_state
from speed_diffusers.config import config_dict, save_config
from speed_diffusers.data.images import ImageSource
from speed_diffusers.errors import InputError
from speed_diffusers.train_config import TrainConfig

CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.jsonl"
SAMPLES_FILE = "samples.png"
PIPELINE_FOLDER = "pipeline"
VALIDATION_FOLDER = "validation"
LOGGING_FOLDER = "logs"


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
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not existing.is_dir():
        raise InputError(f"output_dir={folder}: {existing} is a file.")
    try:
        # Asked by doing: permission bits do not tell what root, a read-only mount or a full quota allow.
        with tempfile.TemporaryDirectory(prefix=".tmp-writable-", dir=existing):
            pass
    except OSError as error:
        raise InputError(f"output_dir={folder}: {existing} is not writable ({error.strerror}).") from error
    if config.resume_from_checkpoint is not None:
        return find_checkpoint(folder, config.resume_from_checkpoint)
    if (folder / CONFIG_FILE).exists() and not (config.overwrite_output_dir or config.dry_run):
        raise InputError(
            f"output_dir={folder} holds a run already: go on with resume_from_checkpoint=latest, take another "
            "output_dir, or delete that run with overwrite_output_dir=true."
        )
    return None


def check_resumed_config(config: TrainConfig, source: ImageSource, checkpoint: Path) -> None:
    """Makes sure that a resumed run computes what the interrupted one would have.

    Raises:
        InputError: Options that matter, or the data, differ; the message lists old and new values.
    """
    state = read_state(checkpoint)
    saved: dict[str, Any] = state["config"]
    current = config_dict(config)
    free = {field.name for field in fields(TrainConfig) if field.metadata["free"]}
    changes = [
        f"{name}: {saved.get(name)} -> {value}"
        for name, value in current.items()
        if name not in free and saved.get(name) != value
    ]
    if state["data_signature"] != source.signature():
        changes.append("the training data")
    if changes and not config.allow_config_changes:
        raise InputError(
            f"{checkpoint} was made with other options ({'; '.join(changes)}); set them back, or resume all the same "
            "with allow_config_changes=true."
        )


def open_output_dir(config: TrainConfig, accelerator: Accelerator, first_step: int) -> None:
    """Makes the folder and saves the resolved configuration in it."""
    folder = Path(config.output_dir)
    if accelerator.is_main_process:
        if config.overwrite_output_dir and first_step == 0:
            _delete_run(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_config(config, folder / CONFIG_FILE)
    accelerator.wait_for_everyone()


def _delete_run(folder: Path) -> None:
    """Deletes what a run writes, and nothing else that may lie in its folder."""
    for name in (PIPELINE_FOLDER, VALIDATION_FOLDER, LOGGING_FOLDER):
        shutil.rmtree(folder / name, ignore_errors=True)
    for checkpoint in list_checkpoints(folder):
        shutil.rmtree(checkpoint)
    for name in (METRICS_FILE, SAMPLES_FILE, CONFIG_FILE):
        (folder / name).unlink(missing_ok=True)
