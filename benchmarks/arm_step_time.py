"""What a step of the arms of steps_to_quality.py costs by the clock, so that fewer steps can be weighed against it.

    OMP_NUM_THREADS=1 python benchmarks/arm_step_time.py
    OMP_NUM_THREADS=1 python benchmarks/arm_step_time.py models=[DiT-tiny/2,DiT-S/2] rounds=10

Every arm is a run of its own in one process; they take turns, block_steps steps each, there and back in every round.
An arm's ratio is that of its median step to the first arm's in the same round: the median over the rounds with a
bootstrap interval of 95 %. On a machine where other processes run the rounds still compare, less sharply.

Results: MODEL.json in arm_step_time/ beside this file, one a model.
"""

import json
import statistics
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from measurement import SCRIPT_DIR, environment, load_average
from quality_arms import ARMS, SETTINGS
from speed_diffusers.config.command_line import run_script
from speed_diffusers.config.load import load_config
from speed_diffusers.config.schema import Options, option
from speed_diffusers.training.config import TrainConfig
from speed_diffusers.training.setup import temporary_run
from speed_diffusers.training.step import training_steps
from step_time import bootstrap_interval

WARM_UP = 3


@dataclass
class ArmTimeConfig(Options):
    """Options of this benchmark."""

    arms: list[str] = option(
        ["uniform_epsilon", "paper_epsilon", "paper_v", "fast_adamw", "fast", "fast_ns_steps_3"],
        "Arms, the first of which the others are held against.",
        choices=ARMS,
    )
    models: list[str] = option(["DiT-tiny/2"], "Models to measure.")
    train_batch_size: int = option(64, "Images of a step.", interval="[1, inf)")
    block_steps: int = option(5, "Steps of a block.", interval="[1, inf)")
    rounds: int = option(20, "Rounds, in each of which every arm has two blocks.", interval="[2, inf)")
    results_dir: str = option(str(Path(__file__).with_suffix("")), "Where the results go.", path=True)


def main(argv: list[str]) -> None:
    """Measures, writes the results and prints them.

    Raises:
        InputError: Wrong options; nothing has been written.
    """
    config = load_config(ArmTimeConfig, argv, SCRIPT_DIR)
    for model in config.models:
        load_before = load_average()
        result = summary(measure(config, model))
        result["protocol"] = {
            "model": model,
            "batch": config.train_batch_size,
            "block_steps": config.block_steps,
            "rounds": config.rounds,
        }
        result["environment"] = environment() | {"load_before": load_before}
        path = Path(config.results_dir) / f"{model.replace('/', '-')}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")
        for arm, found in result["arms"].items():
            low, high = found["interval_95"]
            print(f"{model} {arm}: {found['milliseconds']:.1f} ms, {found['ratio']:.3f} [{low:.3f}, {high:.3f}]")


def measure(config: ArmTimeConfig, model: str) -> dict[str, list[float]]:
    """Each arm's median step in milliseconds, by round."""
    steps = WARM_UP + 2 * config.block_steps * config.rounds
    medians: dict[str, list[float]] = {arm: [] for arm in config.arms}
    with ExitStack() as stack:
        runs = {}
        for arm in config.arms:
            options = {**SETTINGS["quickstart"].options, **ARMS[arm].options}
            options |= {"model": model, "train_batch_size": config.train_batch_size, "output_dir": "unused"}
            chosen = load_config(TrainConfig, [f"{key}={value}" for key, value in options.items()], SCRIPT_DIR)
            runs[arm] = training_steps(stack.enter_context(temporary_run(chosen, steps=steps)))
            for _ in range(WARM_UP):
                next(runs[arm])
        for _ in tqdm(range(config.rounds), desc=model, unit="round"):
            found: dict[str, list[float]] = {arm: [] for arm in config.arms}
            for arm in (*config.arms, *reversed(config.arms)):
                for _ in range(config.block_steps):
                    began = time.perf_counter()
                    next(runs[arm])
                    found[arm].append((time.perf_counter() - began) * 1e3)
            for arm, milliseconds in found.items():
                medians[arm].append(statistics.median(milliseconds))
    return medians


def summary(medians: dict[str, list[float]]) -> dict[str, Any]:
    """Step times, and their ratios to the first arm's.

    Args:
        medians: Each arm's median step in milliseconds, by round.
    """
    first, *_ = medians
    arms = {}
    for arm, values in medians.items():
        ratios = np.array(values) / np.array(medians[first])
        arms[arm] = {
            "milliseconds": statistics.median(values),
            "ratio": float(np.median(ratios)),
            "interval_95": list(bootstrap_interval(ratios, seed=0)),
            "by_round": values,
        }
    return {"against": first, "arms": arms}


if __name__ == "__main__":
    run_script(main, __doc__, ArmTimeConfig)
