"""Checkpoints from which a run resumes exactly: safetensors and JSON in one folder, written whole or not at all.

A checkpoint holds full tensors, whatever the run was sharded over, so it resumes on any number of processes. There is
no generator or loader state in it: draws and data order are functions of the step. Nothing is ever unpickled.
"""

import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from ..errors import InputError
from ..files import save_tensors
from .checkpoint_folders import (
    EMA,
    LEARNED,
    MANIFEST,
    MODEL,
    OPTIMIZER,
    STATE,
    TEMPORARY,
    digest,
    put_back_replaced,
    replace_folder,
    sync,
)
from .ema import ExponentialMovingAverage

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
_FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)


def full_tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors whole and on the CPU, gathered where they are sharded; every process must call it."""
    return {
        name: (value.full_tensor() if hasattr(value, "full_tensor") else value).detach().cpu()
        for name, value in state.items()
    }


def save_checkpoint(
    output_dir: Path,
    *,
    step: int,
    model: nn.Module,
    ema: ExponentialMovingAverage,
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Any],
    is_main_process: bool,
    learned: Mapping[str, Tensor] | None = None,
) -> Path:
    """Writes `checkpoint-<step>`: to a temporary folder, hashed, synced to disk, then renamed.

    Every process must call it, since gathering sharded tensors takes all of them; the main process writes.

    Args:
        output_dir: Folder of the run.
        step: Optimizer steps done.
        model: The model without its data-parallel wrapper.
        ema: Its EMA weights.
        optimizer: The optimizer itself, not accelerate's wrapper.
        state: Anything else to keep, as JSON values.
        is_main_process: Whether this process writes.
        learned: What the density over timesteps has learned, if it does; whole tensors.

    Returns:
        The folder of the checkpoint.

    Raises:
        OSError: The disk is full or not writable; checkpoints that were there are untouched.
    """
    weights = cast(dict[str, Tensor], get_model_state_dict(model, options=_FULL))
    moments: dict[str, Any] = {"state": {}, "param_groups": []}
    if optimizer.state:
        # Asked before the first step, torch would take one to make moments.
        moments = cast(dict[str, Any], get_optimizer_state_dict(model, optimizer, options=_FULL))
    averages = full_tensors(ema.state_dict())
    target = output_dir / f"checkpoint-{step}"
    if not is_main_process:
        return target
    put_back_replaced(output_dir)
    for leftover in output_dir.glob(f"{TEMPORARY}*"):
        shutil.rmtree(leftover)
    temporary = output_dir / f"{TEMPORARY}{step}"
    temporary.mkdir(parents=True)
    try:
        save_tensors(weights, temporary / MODEL)
        save_tensors(averages, temporary / EMA)
        save_tensors(_flat_moments(moments["state"]), temporary / OPTIMIZER)
        document = {
            "format_version": FORMAT_VERSION,
            "step": step,
            "param_groups": moments["param_groups"],
            **state,
        }
        (temporary / STATE).write_text(json.dumps(document, indent=1))
        names = [MODEL, EMA, OPTIMIZER, STATE]
        if learned is not None:
            save_tensors(learned, temporary / LEARNED)
            names.append(LEARNED)
        manifest = {name: digest(temporary / name) for name in names}
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1))
        for name in (*names, MANIFEST):
            sync(temporary / name)
        sync(temporary)
        replace_folder(temporary, target)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, SafetensorError):
            raise OSError(f"Could not write {target}: {error}") from error
        raise
    return target


def load_checkpoint(
    folder: Path,
    *,
    model: nn.Module,
    ema: ExponentialMovingAverage,
    optimizer: torch.optim.Optimizer,
) -> None:
    """Puts the tensors of a verified checkpoint back into model, average and optimizer.

    The optimizer's betas, epsilon and weight decay stay as they are: whether they may have changed is for the caller.

    Args:
        folder: From `find_checkpoint`.
        model: The model without its data-parallel wrapper.
        ema: Its EMA weights.
        optimizer: The optimizer itself, not accelerate's wrapper.

    Raises:
        InputError: The checkpoint is of another model.
    """
    document = read_state(folder)
    groups = [{key: group[key] for key in ("betas", "eps", "weight_decay")} for group in optimizer.param_groups]
    try:
        weights = cast(dict[str, Any], load_file(folder / MODEL))
        set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True))
        ema.load_state_dict(load_file(folder / EMA))
    except (RuntimeError, KeyError) as error:
        raise InputError(f"{folder} is a checkpoint of another model: {str(error).splitlines()[0]}") from error
    moments: dict[str, Any] = {}
    for name, value in load_file(folder / OPTIMIZER).items():
        key, parameter = name.split("/", maxsplit=1)
        moments.setdefault(parameter, {})[key] = value
    if not moments:
        # Saved before the first step; torch would take one to make moments.
        optimizer.state.clear()
        return
    set_optimizer_state_dict(
        model,
        optimizer,
        optim_state_dict={"state": moments, "param_groups": document["param_groups"]},
        options=StateDictOptions(full_state_dict=True),
    )
    for group, values in zip(optimizer.param_groups, groups, strict=True):
        group.update(values)


def load_learned(folder: Path) -> dict[str, Tensor]:
    """What the density over timesteps had learned; empty where the checkpoint holds nothing of it."""
    return load_file(folder / LEARNED) if (folder / LEARNED).is_file() else {}


def read_state(folder: Path) -> dict[str, Any]:
    """The JSON part of a checkpoint.

    Raises:
        InputError: Its format is newer than this code.
    """
    document: dict[str, Any] = json.loads((folder / STATE).read_text())
    if document["format_version"] > FORMAT_VERSION:
        raise InputError(f"{folder} has checkpoint format {document['format_version']}; this version reads up to 1.")
    return document


def _flat_moments(state: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {f"{key}/{name}": value for name, values in state.items() for key, value in values.items()}
