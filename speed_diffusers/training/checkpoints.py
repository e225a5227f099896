"""Checkpoints from which a run resumes exactly: safetensors and JSON in one folder, written whole or not at all.

A checkpoint holds full tensors, whatever the run was sharded over, so it resumes on any number of processes. There is
no generator or loader state in it: draws and data order are functions of the step. Nothing is ever unpickled.
"""

import json
import logging
from collections.abc import Mapping
from contextlib import suppress
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
from ..files import naming_disk_errors, remove, save_tensors, sync
from .checkpoint_folders import (
    EMA,
    LEARNED,
    MANIFEST,
    MODEL,
    OPTIMIZER,
    STATE,
    TEMPORARY,
    TRACKS,
    check_state,
    digest,
    remove_leftovers,
    replace_folder,
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
    tracks: Mapping[str, Tensor] | None = None,
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
        learned: What density and weighting over timesteps have learned, if they do; whole tensors.
        tracks: Power-function averages, if the run keeps some; whole tensors.

    Returns:
        The folder of the checkpoint.

    Raises:
        OSError: The disk is full or not writable, with the path and the bytes; checkpoints that were there are
            untouched.
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
    files = {MODEL: weights, EMA: averages, OPTIMIZER: _flat_moments(moments["state"])}
    if learned is not None:
        files[LEARNED] = dict(learned)
    if tracks is not None:
        files[TRACKS] = dict(tracks)
    document = {"format_version": FORMAT_VERSION, "step": step, "param_groups": moments["param_groups"], **state}
    output_dir.mkdir(parents=True, exist_ok=True)
    remove_leftovers(output_dir)
    temporary = output_dir / f"{TEMPORARY}{step}"
    num_bytes = sum(tensor.nbytes for tensors in files.values() for tensor in tensors.values())
    try:
        with naming_disk_errors(target, num_bytes):
            temporary.mkdir()
            for name, tensors in files.items():
                save_tensors(tensors, temporary / name)
            (temporary / STATE).write_text(json.dumps(document, indent=1))
            manifest = {name: digest(temporary / name) for name in (*files, STATE)}
            (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1))
            for name in (*manifest, MANIFEST):
                sync(temporary / name)
            sync(temporary)
            replace_folder(temporary, target)
    except BaseException:
        with suppress(OSError):
            remove(temporary)
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
        InputError: The checkpoint is of another model, or lacks a tensor; nothing of it has been loaded.
    """
    document = read_state(folder)
    # All but the learning rate, which is a function of the step.
    kept = [{key: group[key] for key in group if key not in ("params", "lr")} for group in optimizer.param_groups]
    weights, averages, flat = (_load_tensors(folder / name) for name in (MODEL, EMA, OPTIMIZER))
    current = cast(dict[str, Tensor], get_model_state_dict(model))
    # torch leaves as it is what a file lacks, and initial values would pass for trained ones.
    _check_tensors(folder / MODEL, weights, current)
    _check_tensors(folder / EMA, averages, ema.state_dict())
    if document["step"] > 0 or flat:
        fresh = cast(dict[str, Any], get_optimizer_state_dict(model, optimizer))
        _check_tensors(folder / OPTIMIZER, flat, _flat_moments(fresh["state"]))
    set_model_state_dict(model, cast(dict[str, Any], weights), options=StateDictOptions(full_state_dict=True))
    ema.load_state_dict(averages)
    moments: dict[str, Any] = {}
    for name, value in flat.items():
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
    for group, values in zip(optimizer.param_groups, kept, strict=True):
        group.update(values)


def _load_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise InputError(f"{path} is damaged: {error}") from error


def _check_tensors(path: Path, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Checks that a file holds the tensors of a model, no more and no less, of their shapes and dtypes."""
    for name in {**expected, **found}:
        if name not in found:
            problem = f"it lacks {name}"
        elif name not in expected:
            problem = f"it has {name}, which the model has not"
        elif (is_it := _kind(found[name])) != (needed := _kind(expected[name])):
            problem = f"{name} is {is_it}, the model's {needed}"
        else:
            continue
        raise InputError(f"{path} is damaged, or of another model: {problem}.")


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def load_learned(folder: Path) -> dict[str, Tensor]:
    """What density and weighting over timesteps had learned; empty where the checkpoint holds nothing of it.

    Raises:
        InputError: The file is no safetensors file.
    """
    return _load_tensors(folder / LEARNED) if (folder / LEARNED).is_file() else {}


def load_tracks(folder: Path) -> dict[str, Tensor]:
    """The power-function averages of a checkpoint; empty where it holds none.

    Raises:
        InputError: The file is no safetensors file.
    """
    return _load_tensors(folder / TRACKS) if (folder / TRACKS).is_file() else {}


def read_state(folder: Path) -> dict[str, Any]:
    """The JSON part of a checkpoint.

    Raises:
        InputError: It is damaged, or its format is newer than this code.
    """
    try:
        document: dict[str, Any] = json.loads((folder / STATE).read_text())
        check_state(document)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{folder / STATE} is damaged: {error}.") from error
    if document["format_version"] > FORMAT_VERSION:
        raise InputError(f"{folder} has checkpoint format {document['format_version']}; this version reads up to 1.")
    return document


def _flat_moments(state: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {f"{key}/{name}": value for name, values in state.items() for key, value in values.items()}
