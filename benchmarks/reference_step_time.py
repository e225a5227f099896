"""The time of the trainer's step against those of facebookresearch/DiT and fast-DiT, on an idle machine.

    OMP_NUM_THREADS=1 python benchmarks/reference_step_time.py dit_dir=DiT fast_dit_dir=fast-DiT

One process, one architecture, batches of one size, cached latents of 4x32x32 for all: the trainer's own steps and the
loops of the two checkouts as they are written (gpu/reference_loops.py) take turns, block_steps steps at a time, in the
order A B C C B A after a first round that is dropped. A step is split in two: forward and backward pass, from the
call of the network to the end of `backward`, and everything else. Each is compared by the ratios of neighbouring
blocks' medians, with a bootstrap interval of 95 %. At the end the trainer goes on alone for the slope of its memory.

fast-DiT recomputes all activations, which the two others do not. The figures are those of one CPU thread: on a GPU the
work of the host weighs more. Refuses to start on a machine that is busy, unless allow_load=true. Results: result.json,
table.md and ratios.png in reference_step_time/ beside this file.
"""

import json
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from matplotlib.figure import Figure

from measurement import SCRIPT_DIR, environment, load_average

sys.path.insert(1, str(Path(__file__).resolve().parent / "gpu"))

from latent_runs import latent_run_config, with_model  # noqa: E402
from reference_loops import DIT, FAST_DIT, ReferenceLoop, backward_noted  # noqa: E402
from speed_diffusers.config.command_line import run_script  # noqa: E402
from speed_diffusers.config.load import load_config  # noqa: E402
from speed_diffusers.config.schema import Options, option  # noqa: E402
from speed_diffusers.errors import InputError  # noqa: E402
from speed_diffusers.models import MODEL_NAMES  # noqa: E402
from speed_diffusers.training.run import TrainingRun  # noqa: E402
from speed_diffusers.training.setup import temporary_run  # noqa: E402
from speed_diffusers.training.step import training_steps  # noqa: E402
from speed_diffusers.training.step_log import StepLog  # noqa: E402
from step_time import MAX_LOAD, bootstrap_interval  # noqa: E402

OURS = "this package"
PARTS = ("forward and backward", "everything else", "whole step")
LIMITS = {"forward and backward": 1.05, "everything else": 0.5, "whole step": None}
"""What the upper ends of the intervals are held against; None: nothing was promised."""
MEMORY_LIMIT = 0.02
"""Megabytes that the process may grow by in a step."""


@dataclass
class ReferenceStepTimeConfig(Options):
    """Options of this benchmark."""

    dit_dir: str | None = option(None, "Checkout of github.com/facebookresearch/DiT.", path=True)
    fast_dit_dir: str | None = option(None, "Checkout of github.com/chuanyangjin/fast-DiT.", path=True)
    model: str = option("DiT-S/4", "Size and patch; S is 384 wide and has 12 layers.", choices=MODEL_NAMES)
    train_batch_size: int = option(32, "Images of a step.", interval="[1, 10^6]")
    block_steps: int = option(3, "Steps of a block.", interval="[1, inf)")
    rounds: int = option(12, "Blocks of each loop.", interval="[2, inf)")
    memory_steps: int = option(100, "Steps over which the slope of the memory is fitted.", interval="[2, inf)")
    seed: int = option(0, "Of the training and the bootstrap.", interval="[0, 2^63)")
    allow_load: bool = option(False, f"Measure although the load average is above {MAX_LOAD}.")
    work_dir: str = option("runs/reference_step_time", "For autoencoder and cached latents.", path=True)
    results_dir: str = option(
        str(Path(__file__).resolve().parent / "reference_step_time"), "Where the results go.", path=True
    )


def main(argv: list[str]) -> None:
    """Measures, writes the results and prints them.

    Raises:
        InputError: Wrong options, no checkout, or a busy machine; nothing has been written.
    """
    config = load_config(ReferenceStepTimeConfig, argv, SCRIPT_DIR)
    given = ((DIT, config.dit_dir), (FAST_DIT, config.fast_dit_dir))
    checkouts = {loop: Path(path) for loop, path in given if path is not None}
    if not checkouts:
        raise InputError("dit_dir=None fast_dit_dir=None: name the folder of one checkout at least.")
    load_before = load_average()
    if load_before > MAX_LOAD and not config.allow_load:
        raise InputError(
            f"The load average is {load_before:.2f}, above {MAX_LOAD}: step times would be those of other processes "
            "too. Wait, or measure all the same with allow_load=true."
        )
    work_dir = Path(config.work_dir).resolve()
    work_dir.mkdir(parents=True, exist_ok=True)
    steps = (1 + config.rounds) * config.block_steps + 1 + config.memory_steps
    options = latent_run_config(
        work_dir,
        train_batch_size=config.train_batch_size,
        max_train_samples=max(256, config.train_batch_size),
        mixed_precision="no",
        seed=config.seed,
    )
    with (
        backward_noted() as ended,
        temporary_run(options, steps=steps, change=with_model(config.model)) as run,
        tempfile.TemporaryDirectory(prefix="speed-diffusers-") as folder,
        ExitStack() as loops,
    ):
        ours = own_steps(run, ended)
        next(ours)  # as the others, whose first step is behind them
        takers = {OURS: lambda: next(ours)}
        for loop, checkout in checkouts.items():
            taken = loops.enter_context(
                ReferenceLoop(
                    loop,
                    checkout,
                    model=config.model,
                    batch_size=config.train_batch_size,
                    device=torch.device("cpu"),
                    results_dir=Path(folder),
                    backward_ended=ended,
                )
            )
            takers[loop] = lambda taken=taken: (taken.step(), taken.milliseconds[-1])[1]
        blocks = measure(takers, config)
        slope = memory_slope(ours, config.memory_steps)
    result: dict[str, Any] = summary(blocks, config.seed)
    result["memory_megabytes_a_step"] = slope
    result["protocol"] = {
        "model": config.model,
        "batch": config.train_batch_size,
        "block_steps": config.block_steps,
        "rounds": config.rounds,
        "seed": config.seed,
    }
    result["environment"] = environment() | {"load_before": load_before, "load_after": load_average()}
    place = Path(config.results_dir)
    place.mkdir(parents=True, exist_ok=True)
    (place / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    (place / "table.md").write_text(table(result) + "\n")
    save_picture(result, place / "ratios.png")
    print(table(result))


def own_steps(run: TrainingRun, ended: dict[int, float]) -> Iterator[tuple[float, float]]:
    """The trainer's steps: milliseconds of the two passes, and of everything else."""
    began = [0.0]
    run.model.register_forward_pre_hook(lambda *_: began.__setitem__(0, time.perf_counter()))
    log, steps = StepLog(run), training_steps(run)
    try:
        while True:
            start = time.perf_counter()
            step = next(steps, None)
            if step is None:
                return
            log.add(step)
            whole = time.perf_counter() - start
            passes = ended[threading.get_ident()] - began[0]
            yield 1e3 * passes, 1e3 * (whole - passes)
    finally:
        log.close()


def measure(takers: dict[str, Any], config: ReferenceStepTimeConfig) -> dict[str, dict[str, list[float]]]:
    """Medians of the blocks of each loop, by its parts; the loops take turns, there and back."""
    blocks: dict[str, dict[str, list[float]]] = {name: {part: [] for part in PARTS} for name in takers}
    for index in range(1 + config.rounds):
        for name in list(takers) if index % 2 else reversed(takers):
            times = [takers[name]() for _ in range(config.block_steps)]
            if index:
                passes, rest = zip(*times, strict=True)
                whole = [sum(each) for each in times]
                for part, values in zip(PARTS, (passes, rest, whole), strict=True):
                    blocks[name][part].append(statistics.median(values))
    return blocks


def summary(blocks: dict[str, dict[str, list[float]]], seed: int) -> dict[str, Any]:
    """Milliseconds of each loop and part, and our ratio to the others with its interval of 95 %."""
    ratios: dict[str, dict[str, Any]] = {}
    for name in (name for name in blocks if name != OURS):
        ratios[name] = {}
        for part in PARTS:
            values = np.array(blocks[OURS][part]) / np.array(blocks[name][part])
            ratios[name][part] = {
                "ratio": float(np.median(values)),
                "interval_95": list(bootstrap_interval(values, seed=seed)),
                "ratios": values.tolist(),
            }
    milliseconds = {
        name: {part: statistics.median(values) for part, values in parts.items()} for name, parts in blocks.items()
    }
    return {"milliseconds": milliseconds, "ratios": ratios, "blocks": blocks}


def memory_slope(steps: Iterator[object], count: int) -> float:
    """Megabytes of resident memory that a step adds, fitted over the second half of so many steps."""
    process, taken = psutil.Process(), []
    for _ in range(count):
        next(steps)
        taken.append(process.memory_info().rss / 1e6)
    half = taken[count // 2 :]
    return float(np.polyfit(np.arange(len(half)), half, 1)[0]) if len(half) > 1 else 0.0


def table(result: dict[str, Any]) -> str:
    """Times and ratios in Markdown."""
    protocol = result["protocol"]
    lines = [
        f"{protocol['model']}, {protocol['batch']} images a step, float32, {result['environment']['threads']} "
        f"thread(s), {result['environment']['processor']}; milliseconds are medians.",
        "",
        "| loop | " + " | ".join(f"{part}, ms" for part in PARTS) + " |",
        "|---|" + "---|" * len(PARTS),
    ]
    for name, parts in result["milliseconds"].items():
        lines.append(f"| {name} | " + " | ".join(f"{parts[part]:,.2f}" for part in PARTS) + " |")
    lines += ["", "| this package over | part | ratio | 95 % interval | at most |", "|---|---|---|---|---|"]
    for name, parts in result["ratios"].items():
        for part, found in parts.items():
            low, high = found["interval_95"]
            lines.append(
                f"| {name} | {part} | {found['ratio']:.3f} | {low:.3f} to {high:.3f} | {LIMITS[part] or ''} |"
            )
    slope = result["memory_megabytes_a_step"]
    return "\n".join([*lines, "", f"Memory: {slope:.4f} MB a step, at most {MEMORY_LIMIT}."])


def save_picture(result: dict[str, Any], path: Path) -> None:
    """Our ratios to each loop, by part: all blocks, and the median with its interval."""
    figure = Figure(figsize=(8, 3.2), dpi=120, layout="constrained")
    panels = figure.subplots(1, len(PARTS), squeeze=False)[0]
    for axes, part in zip(panels, PARTS, strict=True):
        for place, (_, parts) in enumerate(result["ratios"].items()):
            found = parts[part]
            low, high = found["interval_95"]
            values, middle = found["ratios"], found["ratio"]
            axes.plot(np.full(len(values), place - 0.15), values, ".", color="0.6")
            axes.errorbar([place + 0.1], [middle], yerr=[[middle - low], [high - middle]], fmt="o", capsize=4)
        if LIMITS[part] is not None:
            axes.axhline(LIMITS[part], color="tab:red", lw=1, ls="--")
        axes.set_xticks(range(len(result["ratios"])), list(result["ratios"]))
        axes.set_xlim(-0.5, len(result["ratios"]) - 0.5)
        axes.set_ylim(bottom=0)
        axes.set_title(part, fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("this package over the other")
    figure.suptitle("Time of a training step", fontsize=10)
    figure.savefig(path)


if __name__ == "__main__":
    run_script(main, __doc__, ReferenceStepTimeConfig)
