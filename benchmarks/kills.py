"""Whether a run that is killed and resumed ends with the same bits as one that was never stopped.

    OMP_NUM_THREADS=1 python benchmarks/kills.py

Trains a small run of the training script once without a stop: latent cache, checkpoints, grids, TensorBoard, EMA
weights, exported pipeline. Then, for each kill, starts the same run in a new folder with an empty cache, kills it
(SIGKILL), resumes it with resume_from_checkpoint=latest and compares all that it leaves, bit by bit; times of day and
speeds alone may differ. Half of the places are drawn from the file operations of saves, of checkpoints and the
pipeline; the others are moments drawn over the whole run, from its first check to its last picture.

About four minutes for 20 kills on one core. Results: result.json in kills/ beside this file. Exit code 1 if any bit
differs.
"""

import json
import logging
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from measurement import SCRIPT_DIR, environment
from speed_diffusers.config.command_line import run_script
from speed_diffusers.config.load import load_config
from speed_diffusers.config.schema import Options, option
from speed_diffusers.files import check_writable, file_sha256, remove, write_text
from speed_diffusers.train_scripts import train_dit_speed
from speed_diffusers.training.tracking import read_metrics
from training_runs import SPEED_CONFIG

RUN = {
    "config": SPEED_CONFIG,
    "max_train_samples": 60,
    "random_flip": True,
    "model": "DiT-tiny/4",
    "train_batch_size": 8,
    "max_train_steps": 40,
    "lr_warmup_steps": 5,
    "logging_steps": 3,
    "checkpointing_steps": 7,
    "checkpoints_total_limit": 3,
    "validation_steps": 14,
    "num_validation_images": 2,
    "num_inference_steps": 2,
    "num_score_images": None,
    "report_to": "tensorboard",
}
"""Options of the run, on the embedded images. Lines of the log and epochs end where no checkpoint is saved; grids are
due where one is."""

SAVES = (".tmp-checkpoint-", ".tmp-pipeline-")
TIMES = ("images_per_second", "seconds")
LONGEST = 300.0
"""Seconds after which a start counts as hung."""


@dataclass
class KillsConfig(Options):
    """Options of this benchmark."""

    kills: int = option(20, "Kills, each of a run of its own.", interval="[2, inf)")
    seed: int = option(0, "Seed of the places.", interval="[0, 2^63)")
    results_dir: str = option(str(Path(__file__).resolve().parent / "kills"), "Where the results go.", path=True)


@dataclass(frozen=True)
class Kill:
    """One kill and what came of it.

    Attributes:
        place: The file operation before which, or the second after which, the run was killed.
        is_inside_a_save: Whether that was within the saving of a checkpoint or the pipeline.
        logged_step: Last step in `metrics.jsonl` by then; None before the first.
        checkpoints: Checkpoints by then, newest first.
        unfinished: What it left half-written.
        differences: What is not bit-equal in the end; empty: nothing.
    """

    place: str
    is_inside_a_save: bool
    logged_step: int | None
    checkpoints: list[str]
    unfinished: list[str]
    differences: list[str]


def start(folder: Path, options: list[str], kill_at: int | None, operations: Path | None) -> None:
    """One start of the run, in a process of its own.

    Args:
        folder: Holds the run, its cache and its output.
        options: Of the training script, besides `RUN`.
        kill_at: Number of the file operation within saves, from 1, before which the process kills itself.
        operations: Where to list those operations when the run is done.
    """
    output = os.open(folder / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    seen: list[str] = []

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event.startswith(("open", "os.", "shutil.")):
            paths = [os.fspath(value) for value in arguments if isinstance(value, str | os.PathLike)]
            if inside := [path for path in paths if any(save in str(path) for save in SAVES)]:
                seen.append(f"{event} {Path(str(inside[0])).relative_to(folder / 'run')}")
                if len(seen) == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    train_dit_speed.main(
        [
            *(f"{name}={value}" for name, value in RUN.items()),
            f"output_dir={folder / 'run'}",
            f"cache_dir={folder / 'cache'}",
            *options,
        ]
    )
    if operations is not None:
        write_text(operations, json.dumps(seen))


class Starter:
    """Starts runs in processes forked from one that has imported everything and done nothing."""

    def __init__(self) -> None:
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["__main__", "speed_diffusers.train_scripts.train_dit_speed"])

    def run(
        self,
        folder: Path,
        *options: str,
        kill_at: int | None = None,
        kill_after: float = LONGEST,
        operations: Path | None = None,
    ) -> int | None:
        """Starts a run and kills it after some seconds unless it has ended; returns the exit code, -9 for a kill."""
        process = self.context.Process(target=start, args=(folder, list(options), kill_at, operations))
        process.start()
        process.join(kill_after)
        if process.is_alive():
            process.kill()
            process.join()
        return process.exitcode


def finish(starter: Starter, folder: Path, *options: str, operations: Path | None = None) -> None:
    """A start that must come to its end.

    Raises:
        RuntimeError: It did not; with what it printed.
    """
    code = starter.run(folder, *options, operations=operations)
    if code != 0:
        raise RuntimeError(f"The run in {folder} ended with {code}:\n{(folder / 'output.txt').read_text()[-3000:]}")


def kill(starter: Starter, whole: Path, folder: Path, place: int | float, operations: list[str]) -> Kill | None:
    """Kills a new run at a place, resumes it and compares; None if it had ended by then.

    Args:
        starter: Of processes.
        whole: The run that was never stopped.
        folder: Of the new run.
        place: Number of a file operation, or seconds from the start.
        operations: Of all saves of `whole`.
    """
    folder.mkdir()
    at_operation = isinstance(place, int)
    code = starter.run(folder, kill_at=place) if at_operation else starter.run(folder, kill_after=place)
    if code == 0 and not at_operation:
        return None
    if code != -signal.SIGKILL:
        raise RuntimeError(f"The run in {folder} ended with {code}:\n{(folder / 'output.txt').read_text()[-3000:]}")
    run = folder / "run"
    metrics = run / "metrics.jsonl"
    logged = read_metrics(metrics) if metrics.is_file() else []
    unfinished = sorted(path.name for path in run.rglob(".tmp-*")) if run.is_dir() else []
    checkpoints = sorted((path.name for path in run.glob("checkpoint-*")), key=lambda name: -int(name[11:]))
    finish(starter, folder, "resume_from_checkpoint=latest")
    return Kill(
        place=operations[place - 1] if isinstance(place, int) else f"after {place:.2f} s",
        is_inside_a_save=at_operation or any(name.startswith(SAVES) for name in unfinished),
        logged_step=logged[-1]["step"] if logged else None,
        checkpoints=checkpoints,
        unfinished=unfinished,
        differences=differences(whole / "run", run),
    )


def differences(first: Path, second: Path) -> list[str]:
    """What two runs left that is not the same, by names; times and the names of their folders do not count."""
    found = []
    files = [
        {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file() and "logs" not in path.parts}
        for run in (first, second)
    ]
    found += [f"{name}: only one run has it" for name in sorted(files[0] ^ files[1])]
    for name in sorted(files[0] & files[1]):
        one, other = (_content(run / name) for run in (first, second))
        if one != other:
            found.append(f"{name}: not the same")
    curves = [tensorboard_curves(run) for run in (first, second)]
    found += [f"TensorBoard: {tag}" for tag in curves[0] | curves[1] if curves[0].get(tag) != curves[1].get(tag)]
    return found


def _content(path: Path) -> object:
    """What must be the same in a file: the hash of its bytes, or its values without times and folders."""
    if path.name == "metrics.jsonl":
        return [{key: value for key, value in line.items() if key not in TIMES} for line in read_metrics(path)]
    if path.name == "state.json":
        state = json.loads(path.read_text())
        config = {
            key: value
            for key, value in state["config"].items()
            if key not in ("output_dir", "cache_dir", "resume_from_checkpoint")
        }
        log = {key: value for key, value in state["log"].items() if key != "seconds"}
        return {**state, "config": config, "log": log, "seconds": None}
    if path.name == "speed_training.json":
        sidecar = json.loads(path.read_text())
        return {**sidecar, "training": {**sidecar["training"], "seconds": None}}
    if path.name == "manifest.json":
        return {key: value for key, value in json.loads(path.read_text()).items() if key != "state.json"}
    if path.name == "config.yaml":
        return [line for line in path.read_text().splitlines() if not line.startswith(("output_dir:", "cache_dir:"))]
    return file_sha256(path)


def tensorboard_curves(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Steps and values of every curve that TensorBoard shows of a run, without times."""
    found = {}
    for logs in (run / "logs").glob("*"):
        events = EventAccumulator(str(logs), size_guidance={"scalars": 0}).Reload()
        for tag in events.Tags()["scalars"]:
            if tag not in TIMES:
                found[tag] = [(event.step, event.value) for event in events.Scalars(tag)]
    return found


def main(argv: list[str]) -> None:
    """Kills, writes the results and prints the summary.

    Raises:
        InputError: Wrong options; nothing has been written.
        SystemExit: A killed run does not end as the other did.
    """
    config = load_config(KillsConfig, argv, SCRIPT_DIR)
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it tells of each purge, which is what is wanted
    results = Path(config.results_dir)
    check_writable("results_dir", results)
    random, starter = np.random.default_rng(config.seed), Starter()
    kills: list[Kill] = []
    with tempfile.TemporaryDirectory(prefix="speed-diffusers-kills-") as place:
        whole = Path(place) / "whole"
        whole.mkdir()
        starter.run(whole, "dry_run=true")  # the server's imports are not the run's time
        began = time.monotonic()
        finish(starter, whole, operations=Path(place) / "operations.json")
        seconds = time.monotonic() - began
        operations = json.loads((Path(place) / "operations.json").read_text())
        in_saves = random.choice(len(operations), config.kills // 2, replace=False) + 1
        places: list[int | float] = [int(number) for number in in_saves]
        while len(kills) < config.kills:
            at = places[len(kills)] if len(kills) < len(places) else float(random.uniform(0.0, seconds))
            folder = Path(place) / f"kill-{len(kills)}"
            done = kill(starter, whole, folder, at, operations)
            if done is not None:
                kills.append(done)
                same = "; ".join(done.differences) or "the same bits"
                print(f"{len(kills):3d}. {done.place}, after step {done.logged_step}: {same}", flush=True)
            remove(folder)
    equal = sum(not kill.differences for kill in kills)
    result = {
        "kills": len(kills),
        "inside_a_save": sum(kill.is_inside_a_save for kill in kills),
        "bit_equal": equal,
        "seconds_of_the_whole_run": seconds,
        "file_operations_of_its_saves": len(operations),
        "seed": config.seed,
        "run": RUN,
        "environment": environment(),
        "each": [asdict(kill) for kill in kills],
    }
    results.mkdir(parents=True, exist_ok=True)
    write_text(results / "result.json", json.dumps(result, indent=1) + "\n")
    print(f"{len(kills)} kills, {result['inside_a_save']} inside a save: {equal} resumed to the same bits.")
    if equal < len(kills):
        sys.exit(1)


if __name__ == "__main__":
    run_script(main, __doc__, KillsConfig)
