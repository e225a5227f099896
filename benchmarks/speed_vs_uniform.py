"""SpeeD against uniform sampling: same configuration, seeds and steps; the distance of what they generate.

    python benchmarks/speed_vs_uniform.py            # all runs, one after the other
    python benchmarks/speed_vs_uniform.py seeds=1    # a part of them, so that parts can run side by side
    python benchmarks/speed_vs_uniform.py report_only=true

Trains the quickstart's model with epsilon prediction, DiT's own target, once with SpeeD and once with uniform sampling
and no weights. Both see the same images in the same order with the same noise and the same initial weights; they
differ in timesteps and loss weights alone. Scores 2,000 images of each without guidance. Stopped and started again, it
resumes where it was. Results: speed_vs_uniform/*.json, a table and a picture beside this file.
"""

import json
import platform
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from measurement import commit
from speed_diffusers.config.command_line import run_script
from speed_diffusers.config.load import load_config
from speed_diffusers.config.schema import Options, option
from speed_diffusers.generation.pretrained import load_pipeline
from speed_diffusers.metrics.score import ScoreSettings, score_pipeline
from speed_diffusers.presets import PRESETS
from training_runs import is_measured, trained_run

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "speed_vs_uniform"
ARMS = ("paper", "uniform")


@dataclass
class BenchmarkConfig(Options):
    """Options of this benchmark."""

    seeds: list[int] = option([0, 1, 2], "Seeds to run.")
    arms: list[str] = option(list(ARMS), "Arms to run.", choices=ARMS)
    max_train_steps: int = option(2000, "Optimizer steps of each run.", interval="[1, inf)")
    num_images: int = option(2000, "Generated images per score.", interval="[2, inf)")
    runs_dir: str = option("runs/speed_vs_uniform", "Where the runs go.", path=True)
    results_dir: str = option(str(RESULTS), "Where the results go.", path=True)
    report_only: bool = option(False, "Only make table and picture from the results that are there.")


def train(arm: str, seed: int, config: BenchmarkConfig) -> Path:
    """Trains one arm, or resumes it, unless it is done; returns its folder."""
    strategy = {key: value for key, value in PRESETS[arm].items() if value is not None}
    return trained_run(
        Path(config.runs_dir) / f"{arm}-{seed}",
        **strategy,
        prediction_type="epsilon",
        seed=seed,
        max_train_steps=config.max_train_steps,
        checkpointing_steps=500,
        checkpoints_total_limit=1,
    )


def result_file(config: BenchmarkConfig, arm: str, seed: int) -> Path:
    """Where the result of an arm and a seed is kept."""
    return Path(config.results_dir) / f"{arm}-{seed}.json"


def measure(arm: str, seed: int, config: BenchmarkConfig) -> None:
    """Trains and scores one arm, unless its result is there."""
    target = result_file(config, arm, seed)
    if is_measured(target, max_train_steps=config.max_train_steps, num_images=config.num_images):
        return
    at_commit = commit()
    pipeline = load_pipeline(str(train(arm, seed, config)))
    score = score_pipeline(pipeline, ScoreSettings(num_images=config.num_images))
    result = {
        "arm": arm,
        "seed": seed,
        "max_train_steps": config.max_train_steps,
        **score.to_dict(),
        "commit": at_commit,
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} thread(s)",
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(result, indent=1) + "\n")


def report(config: BenchmarkConfig) -> str:
    """The table, also written beside the results with a picture."""
    lines = [
        "| seed | SpeeD: distance | uniform: distance | uniform / SpeeD | SpeeD: agreement | uniform: agreement |",
        "|---|---|---|---|---|---|",
    ]
    distances = []
    for seed in config.seeds:
        speed, uniform = (json.loads(result_file(config, arm, seed).read_text()) for arm in ARMS)
        if speed["protocol"] != uniform["protocol"]:
            raise ValueError(f"The scores of seed {seed} were measured under different protocols.")
        first, second = speed["frechet_distance"], uniform["frechet_distance"]
        distances.append((first, second))
        lines.append(
            f"| {seed} | {first:.3f} | {second:.3f} | {second / first:.3f} | {speed['class_agreement']:.1%} "
            f"| {uniform['class_agreement']:.1%} |"
        )
    means = np.mean(distances, axis=0)
    ratio = float(np.exp(np.mean([np.log(second / first) for first, second in distances])))
    lines.append(f"| mean | {means[0]:.3f} | {means[1]:.3f} | {ratio:.3f} (geometric) | | |")
    table = "\n".join(lines)
    folder = Path(config.results_dir)
    (folder / "table.md").write_text(table + "\n")
    _plot(config.seeds, np.array(distances), folder / "distances.png")
    return table


def _plot(seeds: list[int], distances: np.ndarray, path: Path) -> None:
    figure = Figure(figsize=(5, 3.2), dpi=120, layout="constrained")
    axes = figure.subplots()
    positions = np.arange(len(seeds))
    for offset, (name, values) in zip((-0.2, 0.2), zip(("SpeeD", "uniform"), distances.T, strict=True), strict=True):
        bars = axes.bar(positions + offset, values, width=0.38, label=name)
        axes.bar_label(bars, fmt="%.2f", fontsize=8)
    axes.set_xticks(positions, [f"seed {seed}" for seed in seeds])
    axes.set_ylabel("Fréchet distance (lower is better)")
    axes.set_title("SpeeD and uniform after the same number of steps", fontsize=10)
    axes.margins(y=0.2)
    axes.legend(loc="upper center", ncols=2, frameon=False)
    figure.savefig(path)


def main(argv: list[str]) -> None:
    """Runs what is missing and prints the table.

    Raises:
        InputError: Wrong options, or results that were measured with others.
    """
    config = load_config(BenchmarkConfig, argv, HERE)
    if not config.report_only:
        for seed in config.seeds:
            for arm in config.arms:
                measure(arm, seed, config)
    if all(result_file(config, arm, seed).exists() for arm in ARMS for seed in config.seeds):
        print(report(config))


if __name__ == "__main__":
    run_script(main, __doc__, BenchmarkConfig)
