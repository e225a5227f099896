"""Checkpoints of DiT's own code and of SpeeD's official code as folders of diffusers, and back."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import diffusers
import torch
from diffusers import AutoencoderKL, DDPMScheduler, DiTPipeline, DiTTransformer2DModel, SchedulerMixin
from torch import Tensor

from ..config.schema import Interval
from ..errors import InputError
from ..files import give_usual_mode, written_whole
from ..json_files import arguments_of, check_values
from .export import inference_scheduler, save_pipeline
from .original_dit import ORIGINAL_CONSTANTS, constants_of, original_state, rows_of_classes, transformer_of
from .pretrained import label_rows_of, load_transformer, scheduler_config_of
from .torch_files import read_torch_file

WEIGHTS = ("ema", "model")
"""Keys of a training checkpoint's two sets of weights; released checkpoints hold one, without a key."""

DIFFUSERS_KEY = "diffusers"
"""Key under which a converted file keeps what DiT's own code has no place for; that code reads "ema" alone."""


@dataclass(frozen=True)
class DiTCheckpoint:
    """A transformer with what stands around it in a folder of diffusers."""

    transformer: DiTTransformer2DModel
    scheduler: SchedulerMixin | None
    """None: nothing is known of the noise schedule."""
    id2label: Mapping[int, str] = field(default_factory=dict)
    """Rows of the label table to names of classes."""
    null_row: int | None = None
    """Row of the label table for "no class", where the folder names one."""


def read_original(path: Path, *, weights: str = "ema", num_attention_heads: int | None = None) -> DiTCheckpoint:
    """A checkpoint of DiT's or SpeeD's own code, or one that `write_original` wrote.

    The first say nothing of the noise schedule: they get DiT's, 1000 linear betas, with which both codes train.

    Args:
        path: A file of torch.save: a state dict, or one under each of "ema" and "model".
        weights: Which of the two, one of `WEIGHTS`.
        num_attention_heads: None: as the known DiT of this size has it.

    Raises:
        InputError: The file is damaged, holds code or something else than a DiT, or does not tell the heads.
    """
    held = read_torch_file(path)
    state = _chosen_weights(path, held, weights)
    own = _plain(held.get(DIFFUSERS_KEY, {}))
    _check_own(path, own)
    constants = dict(own.get("constants", ORIGINAL_CONSTANTS))
    if num_attention_heads is None:
        num_attention_heads = own.get("num_attention_heads")
    try:
        transformer = transformer_of(state, num_attention_heads=num_attention_heads, constants=constants)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    scheduler = _scheduler_of(str(path), own["scheduler"]) if own.get("scheduler") else _dit_scheduler()
    names = {int(row): str(name) for row, name in (own.get("id2label") or {}).items()}
    return DiTCheckpoint(transformer, scheduler, names)


def write_original(checkpoint: DiTCheckpoint, path: Path) -> None:
    """Writes a file that DiT's own code (`find_model`) and SpeeD's (`load_checkpoint`) read, whole or not at all.

    Args:
        checkpoint: The transformer and what is known around it.
        path: The file.

    Raises:
        InputError: DiT's own network cannot have these weights.
        OSError: The disk is full or not writable.
    """
    transformer = checkpoint.transformer
    scheduler: Any = checkpoint.scheduler
    state = original_state(transformer, null_row=checkpoint.null_row)
    # The way back puts "no class" where nobody has chosen another row for it, and the classes around it.
    num_classes = transformer.config["num_embeds_ada_norm"]
    rows = (rows_of_classes(num_classes, null_row).tolist() for null_row in (checkpoint.null_row, None))
    row_there = dict(zip(*rows, strict=True))
    own = {
        "num_attention_heads": transformer.config["num_attention_heads"],
        "constants": constants_of(transformer),
        "scheduler": None if scheduler is None else _plain({**scheduler.config, "_class_name": _name(scheduler)}),
        "id2label": {str(row_there.get(row, row)): name for row, name in checkpoint.id2label.items()},
    }
    with written_whole(path, sum(value.nbytes for value in state.values())) as temporary:
        torch.save({"ema": state, DIFFUSERS_KEY: own}, temporary)


def read_folder(name: str) -> DiTCheckpoint:
    """The transformer of a run, a pipeline or a folder of its own, with the schedule and classes beside it.

    Args:
        name: "embedded", a folder, or a Hub id.

    Raises:
        InputError: Nothing of this name can be loaded.
    """
    transformer = load_transformer(name)
    config = scheduler_config_of(name)
    names, null_row = label_rows_of(name)
    scheduler = None if config is None else _scheduler_of(name, config)
    return DiTCheckpoint(transformer.eval(), scheduler, names, null_row)


def write_folder(checkpoint: DiTCheckpoint, folder: Path, *, vae: AutoencoderKL | None, source: str) -> None:
    """Writes a pipeline, or without an autoencoder its transformer and scheduler; whole or not at all.

    Args:
        checkpoint: With a scheduler.
        folder: Where to.
        vae: The autoencoder whose latents the transformer was trained on; None: unknown.
        source: Name of the file that was converted, for the sidecar file.

    Raises:
        InputError: The autoencoder has other latents.
        OSError: The disk is full or not writable.
    """
    transformer = checkpoint.transformer
    if vae is not None:
        if vae.config["latent_channels"] != transformer.config["in_channels"]:
            raise InputError(
                f"The vae has {vae.config['latent_channels']} latent channels, the transformer "
                f"{transformer.config['in_channels']}."
            )
        labels = {str(row): name for row, name in checkpoint.id2label.items()} or None
        pipeline = DiTPipeline(
            transformer=transformer, vae=vae, scheduler=cast(Any, checkpoint.scheduler), id2label=cast(Any, labels)
        )
        if labels:
            pipeline.register_to_config(id2label=labels)
        save_pipeline(pipeline, folder, {"converted_from": source})
        return
    with written_whole(folder, sum(value.nbytes for value in transformer.state_dict().values())) as temporary:
        transformer.save_pretrained(temporary / "transformer")
        cast(Any, checkpoint.scheduler).save_pretrained(temporary / "scheduler")
        give_usual_mode(temporary)


def _chosen_weights(path: Path, held: Any, weights: str) -> Mapping[str, Tensor]:
    """The state dict in what a file holds.

    Raises:
        InputError: There is none, or it is none of tensors.
    """
    if not isinstance(held, dict):
        raise InputError(f"{path} holds {type(held).__name__}, but must hold a state dict.")
    found = [key for key in WEIGHTS if isinstance(held.get(key), dict)]
    if found and weights not in found:
        raise InputError(f"weights={weights}: {path} holds {found[0]} alone.")
    if not found and weights != WEIGHTS[0]:
        raise InputError(f"weights={weights}: {path} holds one set of weights; leave weights out.")
    state = held[weights] if found else held
    for name, value in state.items():
        if not isinstance(value, Tensor) or not value.is_floating_point():
            what = f"of type {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
            raise InputError(f"{path} is not a DiT: {name} is {what}, but must be a floating-point tensor.")
    return cast(Mapping[str, Tensor], state)


def _check_own(path: Path, own: Any) -> None:
    """Checks what `write_original` would have written: the file may be by anybody.

    Raises:
        InputError: It is something else.
    """
    types = {
        "num_attention_heads": int,
        "constants": dict[str, float],
        "scheduler": dict | None,
        "id2label": dict[str, str] | None,
    }
    check_values(path, {DIFFUSERS_KEY: own}, {DIFFUSERS_KEY: dict})
    check_values(path, own, types)
    if "num_attention_heads" in own:
        Interval("[1, inf)").require(f"{path}: num_attention_heads", own["num_attention_heads"])
    if set(own.get("constants", ORIGINAL_CONSTANTS)) != set(ORIGINAL_CONSTANTS):
        raise InputError(f"{path}: {DIFFUSERS_KEY}.constants must have {', '.join(ORIGINAL_CONSTANTS)}.")
    Interval("(0, 1)").require(f"{path}: norm_eps", own.get("constants", ORIGINAL_CONSTANTS)["norm_eps"])
    if not all(row.isdecimal() for row in own.get("id2label") or {}):
        raise InputError(f"{path}: {DIFFUSERS_KEY}.id2label must have rows of the label table as keys.")


def _scheduler_of(place: str, config: Mapping[str, Any]) -> SchedulerMixin:
    """A scheduler from its config, which may be by anybody.

    Raises:
        InputError: It is none of diffusers, or its values do not fit.
    """
    name = config.get("_class_name")
    kind = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not (isinstance(kind, type) and issubclass(kind, SchedulerMixin)):
        raise InputError(f"{place}: its scheduler is {name!r}, which is none of diffusers.")
    check_values(Path(place), config, arguments_of(kind), null=True)
    try:
        return cast(SchedulerMixin, cast(Any, kind).from_config(dict(config)))
    except Exception as error:  # whatever a scheduler makes of values that do not fit one another
        raise InputError(f"{place}: no {name} has this config: {error}") from error


def _dit_scheduler() -> SchedulerMixin:
    """What DiT's checkpoints are sampled with: DDIM on 1000 betas, 0.0001 to 0.02 (Ho et al., arXiv 2006.11239)."""
    process = DDPMScheduler(num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
    return cast(SchedulerMixin, inference_scheduler(process))


def _name(scheduler: SchedulerMixin) -> str:
    return type(scheduler).__name__


def _plain(value: Any) -> Any:
    """A config as lists, dictionaries and numbers, all that a file that is read without running code may hold."""
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value if isinstance(value, str | int | float | None) else str(value)
