"""The folders `checkpoint-<step>` of a run: finding a whole one, replacing, keeping and deleting them.

Whatever moment a process dies at, each folder under such a name is complete, and the newest one is never lost.
"""

import json
import logging
import math
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..files import file_sha256, remove, sync

logger = logging.getLogger(__name__)

MODEL, EMA, OPTIMIZER = "model.safetensors", "ema.safetensors", "optimizer.safetensors"
STATE, MANIFEST = "state.json", "manifest.json"
LEARNED = "speed.safetensors"
"""What a density has learned; only where one does."""
TRACKS = "ema_tracks.safetensors"
"""Power-function averages; only where a run keeps some."""
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
        The folder, or None if "latest" finds no checkpoint at all.

    Raises:
        InputError: The named folder is missing or damaged, or every checkpoint that "latest" finds is damaged.
    """
    put_back_replaced(output_dir)
    if resume_from_checkpoint != "latest":
        folder = Path(resume_from_checkpoint)
        put_back_replaced(folder.parent)
        if not folder.exists() and (output_dir / folder).exists():
            folder = output_dir / folder
        problem = _problem_of(folder)
        if problem:
            raise InputError(f"resume_from_checkpoint={resume_from_checkpoint}: {problem}")
        return folder
    problems = []
    for folder in list_checkpoints(output_dir):
        problem = _problem_of(folder)
        if problem is None:
            return folder
        logger.warning("Passing over a damaged checkpoint: %s", problem)
        problems.append(problem)
    if problems:
        # Beginning at step 0 would overwrite the metrics of a run that may still be rescued.
        raise InputError(
            f"resume_from_checkpoint=latest: every checkpoint in {output_dir} is damaged, the newest in this way: "
            f"{problems[0]} Put a whole one back, or begin anew with overwrite_output_dir=true alone."
        )
    return None


def set_aside_later_checkpoints(output_dir: Path, step: int) -> None:
    """Renames the checkpoints of later steps to `<name>.abandoned`: a run that resumes from `step` makes others.

    Left where they are, "latest" would return to them, and pruning would spare them for the new ones.
    """
    for folder in list_checkpoints(output_dir):
        if _step_of(folder) > step:
            target = folder.with_name(f"{folder.name}.abandoned")
            remove(target)
            folder.rename(target)
            logger.warning("Resuming from step %d: %s is now %s", step, folder.name, target.name)


def set_aside(output_dir: Path, step: int, *names: str) -> None:
    """Renames what a run left at an end that it now trains past, or towards again: NAME.png to NAME.abandoned.png.

    Left where they are, the results of before would pass for those of the run as it goes on.
    """
    for path in (output_dir / name for name in names):
        if path.exists():
            target = path.with_name(f"{path.stem}.abandoned{path.suffix}")
            remove(target)
            path.rename(target)
            logger.warning("Resuming from step %d: %s is now %s", step, path.name, target.name)


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
            remove(doomed)
            folder.rename(doomed)
            remove(doomed)
        except OSError as error:
            logger.warning("Could not delete the old checkpoint %s: %s", folder, error)


def digest(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file, as the manifest holds them."""
    return {"bytes": path.stat().st_size, "sha256": file_sha256(path)}


def replace_folder(source: Path, target: Path) -> None:
    """Renames a folder over another one and makes the rename durable."""
    if target.exists():
        # A folder cannot be renamed over a full one; the old one goes only when the new one is complete on disk.
        aside = target.with_name(f"{_REPLACED}{target.name}")
        target.rename(aside)
        source.rename(target)
        remove(aside)
    else:
        source.rename(target)
    sync(target.parent)


def put_back_replaced(output_dir: Path) -> None:
    """Undoes a replacement that was killed between its two renames."""
    for aside in _entries(output_dir, _REPLACED):
        target = aside.with_name(aside.name.removeprefix(_REPLACED))
        if aside.is_dir() and not target.exists():
            with suppress(FileNotFoundError):  # another process of this run was first
                aside.rename(target)


def remove_leftovers(output_dir: Path) -> None:
    """Undoes a replacement that was cut short, and removes what else killed saves left, whatever it is by now."""
    put_back_replaced(output_dir)
    for leftover in _entries(output_dir, TEMPORARY):
        try:
            remove(leftover)
        except OSError as error:  # somebody else's
            logger.warning("Could not delete %s: %s", leftover, error)


def _entries(folder: Path, prefix: str) -> list[Path]:
    """What a folder holds under names that begin so; nothing if there is no such folder."""
    # Not by a pattern, which a link that points nowhere would not match in every version of Python.
    return sorted(path for path in folder.iterdir() if path.name.startswith(prefix)) if folder.is_dir() else []


def check_state(document: Any) -> None:
    """Checks the JSON part of a checkpoint, which a hash alone says nothing of.

    Raises:
        ValueError: With what is wrong in words.
    """
    if not isinstance(document, dict):
        raise ValueError("it is no object")
    checks: dict[str, Callable[[Any], bool]] = {
        "format_version": _is_count,
        "step": _is_count,
        "param_groups": lambda value: isinstance(value, list) and all(isinstance(group, dict) for group in value),
        # What only a run's checkpoints hold.
        "config": lambda value: isinstance(value, dict),
        "global_batch": lambda value: _is_count(value) and value > 0,
        "seconds": _is_number,
        "log": _is_log,
    }
    for name, is_good in checks.items():
        if name in document and not is_good(document[name]):
            raise ValueError(f"its {name} is {str(document[name])[:50]}")
    if missing := {"format_version", "step", "param_groups"} - document.keys():
        raise ValueError(f"it lacks {', '.join(sorted(missing))}")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0


def _is_log(value: Any) -> bool:
    """Whether it is what `StepLog.state_dict` gives."""
    return (
        isinstance(value, dict)
        and _is_count(value.get("steps"))
        and _is_count(value.get("micro_steps"))
        and _is_number(value.get("seconds"))
        and isinstance(value.get("totals"), list)
        and all(isinstance(row, list) and all(isinstance(one, float) for one in row) for row in value["totals"])
    )


def _problem_of(folder: Path) -> str | None:
    """What is wrong with a checkpoint folder, in words, or None."""
    if not folder.is_dir():
        return f"{folder} is not a folder."
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        for name in (MODEL, EMA, OPTIMIZER, STATE, *(name for name in (LEARNED, TRACKS) if name in manifest)):
            path = folder / name
            if not path.is_file():
                return f"{path} is missing."
            if digest(path) != manifest[name]:
                return f"{path} is damaged: it does not match the hash it was saved with."
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        return f"{folder / MANIFEST} is missing or damaged ({type(error).__name__})."
    try:
        check_state(json.loads((folder / STATE).read_text()))
    except (OSError, ValueError, RecursionError) as error:
        return f"{folder / STATE} is damaged: {error}."
    return None


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("checkpoint-"))
