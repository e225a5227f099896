"""The folders `checkpoint-<step>` of a run: finding a whole one, replacing, keeping and deleting them.

Whatever moment a process dies at, each folder under such a name is complete, and the newest one is never lost.
"""

import json
import logging
import os
import re
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..files import file_sha256

logger = logging.getLogger(__name__)

MODEL, EMA, OPTIMIZER = "model.safetensors", "ema.safetensors", "optimizer.safetensors"
STATE, MANIFEST = "state.json", "manifest.json"
LEARNED = "speed.safetensors"
"""What a density has learned; only where one does."""
TEMPORARY = ".tmp-checkpoint-"
_REPLACED = f"{TEMPORARY}replaced-"


def list_checkpoints(output_dir: Path) -> list[Path]:
    """The folders `checkpoint-<step>` of a run, newest first; not yet verified."""
    found = [path for path in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted((path for path in found if path.is_dir()), key=_step_of, reverse=True)


def find_checkpoint(output_dir: Path, resume_from_checkpoint: str) -> Path | None:
    """The checkpoint to resume from, its files checked against their hashes.

    Args:
        output_dir: Folder of the run.
        resume_from_checkpoint: "latest" (the newest whole one, passing over damaged ones with a warning) or a folder,
            by its path or by its name in `output_dir`.

    Returns:
        The folder, or None if "latest" finds no whole checkpoint.

    Raises:
        InputError: The named folder is missing or damaged.
    """
    if resume_from_checkpoint != "latest":
        folder = Path(resume_from_checkpoint)
        if not folder.exists() and (output_dir / folder).exists():
            folder = output_dir / folder
        problem = _problem_of(folder)
        if problem:
            raise InputError(f"resume_from_checkpoint={resume_from_checkpoint}: {problem}")
        return folder
    put_back_replaced(output_dir)
    for folder in list_checkpoints(output_dir):
        problem = _problem_of(folder)
        if problem is None:
            return folder
        logger.warning("Passing over a damaged checkpoint: %s", problem)
    return None


def set_aside_later_checkpoints(output_dir: Path, step: int) -> None:
    """Renames the checkpoints of later steps to `<name>.abandoned`: a run that resumes from `step` makes others.

    Left where they are, "latest" would return to them, and pruning would spare them for the new ones.
    """
    for folder in list_checkpoints(output_dir):
        if _step_of(folder) > step:
            target = folder.with_name(f"{folder.name}.abandoned")
            shutil.rmtree(target, ignore_errors=True)
            folder.rename(target)
            logger.warning("Resuming from step %d: %s is now %s", step, folder.name, target.name)


def prune_checkpoints(output_dir: Path, total_limit: int | None, keep: int) -> None:
    """Deletes the oldest checkpoints beyond `total_limit`; that of step `keep`, just saved, always stays."""
    if total_limit is None:
        return
    for folder in list_checkpoints(output_dir)[max(total_limit, 1) :]:
        if _step_of(folder) == keep:
            continue
        try:
            # Out of the way first: a deletion that is cut short must not leave half a checkpoint under a good name.
            doomed = folder.with_name(f"{TEMPORARY}old-{_step_of(folder)}")
            folder.rename(doomed)
            shutil.rmtree(doomed)
        except OSError as error:
            logger.warning("Could not delete the old checkpoint %s: %s", folder, error)


def digest(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file, as the manifest holds them."""
    return {"bytes": path.stat().st_size, "sha256": file_sha256(path)}


def sync(path: Path) -> None:
    """Waits until a file or the entries of a folder are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_folder(source: Path, target: Path) -> None:
    """Renames a folder over another one and makes the rename durable."""
    if target.exists():
        # A folder cannot be renamed over a full one; the old one goes only when the new one is complete on disk.
        aside = target.with_name(f"{_REPLACED}{target.name}")
        target.rename(aside)
        source.rename(target)
        shutil.rmtree(aside)
    else:
        source.rename(target)
    sync(target.parent)


def put_back_replaced(output_dir: Path) -> None:
    """Undoes a replacement that was killed between its two renames."""
    for aside in output_dir.glob(f"{_REPLACED}*"):
        target = aside.with_name(aside.name.removeprefix(_REPLACED))
        if not target.exists():
            with suppress(FileNotFoundError):  # another process of this run was first
                aside.rename(target)


def _problem_of(folder: Path) -> str | None:
    """What is wrong with a checkpoint folder, in words, or None."""
    if not folder.is_dir():
        return f"{folder} is not a folder."
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        for name in (MODEL, EMA, OPTIMIZER, STATE, *([LEARNED] if LEARNED in manifest else [])):
            path = folder / name
            if not path.is_file():
                return f"{path} is missing."
            if digest(path) != manifest[name]:
                return f"{path} is damaged: it does not match the hash it was saved with."
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{folder / MANIFEST} is missing or damaged ({type(error).__name__})."
    return None


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("checkpoint-"))
