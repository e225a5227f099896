"""The time of a training step with SpeeD against uniform sampling, on an idle machine.

    OMP_NUM_THREADS=1 python benchmarks/step_time.py

One process, one model, the same data and batches, the training script's own steps: only the scheduler changes, every
block_steps steps, in the order A B B A after a first block that is dropped. Compared are the medians of neighbouring
blocks; the ratio is the median over such pairs with a bootstrap interval of 95 %. Beside it stand our two calls alone,
over the time of a step: on a shared machine the noise of the ratio is larger than they are.

Takes every option of train_dit_speed.py besides its own. Refuses to start on a machine that is busy, unless
allow_load=true. Minutes. Results: result.json, blocks.csv and step_time.png in step_time/ beside this file.
"""

import csv
import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from measurement import SCRIPT_DIR, environment, load_average
from speed_diffusers import SpeeDDDPMScheduler
from speed_diffusers.config.command_line import run_script
from speed_diffusers.config.load import load_config
from speed_diffusers.config.schema import option
from speed_diffusers.errors import InputError
from speed_diffusers.presets import PRESETS
from speed_diffusers.training.config import TrainConfig, trainer_options
from speed_diffusers.training.parts import make_scheduler
from speed_diffusers.training.run import TrainingRun
from speed_diffusers.training.setup import temporary_run
from speed_diffusers.training.step import training_steps
from training_runs import SPEED_CONFIG

SPEED, UNIFORM = ARMS = ("paper", "uniform")
NAMES = {SPEED: "SpeeD", UNIFORM: "uniform"}
ORDER = (SPEED, UNIFORM, UNIFORM, SPEED)
MAX_LOAD = 0.5
LIMIT = 0.005
"""How much a step may cost more."""
CALL_BATCH = 256


@dataclass
class StepTimeConfig(TrainConfig):
    """Options of this benchmark: the trainer's, and these."""

    block_steps: int = option(20, "Steps of a block.", interval="[1, inf)")
    pairs: int = option(40, "Pairs of neighbouring blocks, one of each arm.", interval="[2, inf)")
    calls: int = option(2000, "Repetitions of our two calls alone.", interval="[1, inf)")
    allow_load: bool = option(False, f"Measure although the load average is above {MAX_LOAD}.")
    results_dir: str = option(str(Path(__file__).resolve().parent / "step_time"), "Where the results go.", path=True)


@dataclass(frozen=True)
class Block:
    """Steps of one arm in a row: its arm and the milliseconds of each."""

    arm: str
    milliseconds: list[float]

    @property
    def median(self) -> float:
        """Milliseconds of its median step."""
        return statistics.median(self.milliseconds)


def main(argv: list[str]) -> None:
    """Measures, writes the results and prints them.

    Raises:
        InputError: Wrong options, or a busy machine; nothing has been written.
    """
    config = load_config(StepTimeConfig, argv, SCRIPT_DIR, default=SPEED_CONFIG)
    load_before = load_average()
    if load_before > MAX_LOAD and not config.allow_load:
        raise InputError(
            f"The load average is {load_before:.2f}, above {MAX_LOAD}: step times would be those of other processes "
            "too. Wait, or measure all the same with allow_load=true."
        )
    options = trainer_options(config)
    schedulers = {arm: make_scheduler(replace(options, **PRESETS[arm])) for arm in ARMS}
    with temporary_run(options, steps=(1 + 2 * config.pairs) * config.block_steps) as run:
        blocks = measure(run, training_steps(run), schedulers, config)
        batch = run.layout.global_batch
    result = summary(blocks, options.seed)
    result["calls"] = {
        f"batch {size}": {arm: call_times(schedulers[arm], size, config.calls, options.seed) for arm in ARMS}
        for size in sorted({CALL_BATCH, batch})
    }
    ours = result["calls"][f"batch {batch}"][SPEED]
    result["calls_over_step"] = sum(ours.values()) / (1e3 * result["milliseconds_a_step"][SPEED])
    result["protocol"] = {
        "model": config.model,
        "batch": batch,
        "block_steps": config.block_steps,
        "pairs": config.pairs,
        "calls": config.calls,
        "seed": options.seed,
    }
    result["environment"] = environment() | {"load_before": load_before, "load_after": load_average()}
    folder = Path(config.results_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    save_blocks(blocks, folder / "blocks.csv")
    save_picture(blocks, result, folder / "step_time.png")
    print(describe(result))


def measure(
    run: TrainingRun, steps: Iterator[object], schedulers: dict[str, SpeeDDDPMScheduler], config: StepTimeConfig
) -> list[Block]:
    """All blocks of a run, the first one, which is dropped, included."""
    blocks = []
    for arm in (ORDER[0], *(ORDER[index % 4] for index in range(2 * config.pairs))):
        run.scheduler = schedulers[arm]
        milliseconds = []
        for _ in range(config.block_steps):
            began = time.perf_counter()
            next(steps)
            milliseconds.append((time.perf_counter() - began) * 1e3)
        blocks.append(Block(arm, milliseconds))
    return blocks


def paired_ratios(blocks: list[Block]) -> np.ndarray:
    """SpeeD's median step over uniform's in each pair of neighbouring blocks, the first block dropped."""
    kept = blocks[1:]
    pairs = [{block.arm: block.median for block in kept[index : index + 2]} for index in range(0, len(kept), 2)]
    return np.array([pair[SPEED] / pair[UNIFORM] for pair in pairs])


def bootstrap_interval(values: np.ndarray, *, seed: int, resamples: int = 10_000) -> tuple[float, float]:
    """The middle 95 % of the medians of resampled values."""
    random = np.random.default_rng(seed)
    medians = np.median(random.choice(values, (resamples, len(values))), axis=1)
    low, high = np.quantile(medians, (0.025, 0.975))
    return float(low), float(high)


def summary(blocks: list[Block], seed: int) -> dict[str, Any]:
    """Step times, their ratio and its interval."""
    ratios = paired_ratios(blocks)
    low, high = bootstrap_interval(ratios, seed=seed)
    kept = blocks[1:]
    return {
        "milliseconds_a_step": {
            arm: statistics.median(block.median for block in kept if block.arm == arm) for arm in ARMS
        },
        "ratio": float(np.median(ratios)),
        "ratio_interval_95": [low, high],
        "ratios": ratios.tolist(),
    }


def call_times(scheduler: SpeeDDDPMScheduler, batch_size: int, calls: int, seed: int) -> dict[str, float]:
    """Median microseconds of `sample_timesteps` and of `loss_weights`."""
    generator = torch.Generator().manual_seed(seed)
    draws, weights = [], []
    for _ in range(calls):
        began = time.perf_counter()
        timesteps = scheduler.sample_timesteps(batch_size, generator=generator)
        drawn = time.perf_counter()
        scheduler.loss_weights(timesteps)
        draws.append((drawn - began) * 1e6)
        weights.append((time.perf_counter() - drawn) * 1e6)
    return {"sample_timesteps_us": statistics.median(draws), "loss_weights_us": statistics.median(weights)}


def describe(result: dict[str, Any]) -> str:
    """The result in a few lines, with what it is held against."""
    low, high = result["ratio_interval_95"]
    milliseconds = result["milliseconds_a_step"]
    within = "lies" if low >= 1 - LIMIT and high <= 1 + LIMIT else "does not lie"
    share = result["calls_over_step"]
    lines = [
        f"step: SpeeD {milliseconds[SPEED]:.3f} ms, uniform {milliseconds[UNIFORM]:.3f} ms (medians)",
        f"ratio of paired blocks: {result['ratio']:.5f}, 95 % interval [{low:.5f}, {high:.5f}]",
    ]
    for batch, arms in result["calls"].items():
        for arm, calls in arms.items():
            lines.append(
                f"{batch}, {NAMES[arm]}: sample_timesteps {calls['sample_timesteps_us']:.1f} us, "
                f"loss_weights {calls['loss_weights_us']:.1f} us"
            )
    lines.append(f"both calls of SpeeD over a step: {share:.4%}")
    lines.append(
        f"criterion: the interval within {LIMIT:.1%} of 1 (it {within} there), or, where the machine's noise is "
        f"larger, both calls at most {LIMIT:.1%} of a step ({'met' if share <= LIMIT else 'not met'})"
    )
    return "\n".join(lines)


def save_blocks(blocks: list[Block], path: Path) -> None:
    """One line per block: its place, arm, whether it is dropped, and the milliseconds of each of its steps."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        steps = [f"step_{index}_ms" for index in range(len(blocks[0].milliseconds))]
        writer.writerow(["block", "arm", "dropped", "median_ms", *steps])
        for index, block in enumerate(blocks):
            values = [f"{value:.4f}" for value in (block.median, *block.milliseconds)]
            writer.writerow([index, block.arm, str(index == 0).lower(), *values])


def save_picture(blocks: list[Block], result: dict[str, Any], path: Path) -> None:
    """Medians of all blocks over the run, and the ratios of the pairs with their interval."""
    figure = Figure(figsize=(8, 3.4), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(2, 1))
    for arm, marker in zip(ARMS, "o^", strict=True):
        places = [index for index, block in enumerate(blocks) if index and block.arm == arm]
        left.plot(places, [blocks[index].median for index in places], marker, ms=4, label=NAMES[arm])
    left.set_xlabel(f"block of {len(blocks[0].milliseconds)} steps")
    left.set_ylabel("median step, ms")
    left.set_title("Step time, arms in turn", fontsize=10)
    left.legend(frameon=False)
    low, high = (100 * (value - 1) for value in result["ratio_interval_95"])
    percent = 100 * (np.array(result["ratios"]) - 1)
    right.axhspan(-100 * LIMIT, 100 * LIMIT, color="0.9", label=f"within {LIMIT:.1%}")
    right.plot(np.linspace(-0.3, 0.3, len(percent)), np.sort(percent), ".", color="0.5", label="pairs")
    middle = 100 * (result["ratio"] - 1)
    right.errorbar([0.6], [middle], yerr=[[middle - low], [high - middle]], fmt="o", capsize=4, label="median, 95 %")
    right.set_xticks([])
    right.set_xlim(-0.5, 1)
    right.set_ylabel("SpeeD over uniform, %")
    right.set_title("Ratio of neighbouring blocks", fontsize=10)
    right.legend(loc="upper center", bbox_to_anchor=(0.5, -0.02), frameon=False, fontsize=7)
    figure.savefig(path)


if __name__ == "__main__":
    run_script(main, __doc__, StepTimeConfig)
