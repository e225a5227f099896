"""A learned variance against none: what the samples of both are worth, ancestral and deterministic.

    python benchmarks/learned_variance.py            # all, one after the other
    python benchmarks/learned_variance.py seeds=1    # a part, so that parts can run side by side
    python benchmarks/learned_variance.py report_only=true

Trains the quickstart's model with epsilon prediction and SpeeD, once with a learned variance and once without, on the
same data, noise and timesteps. Scores each in 250 steps of the ancestral sampler (with the learned variance, or the
posterior's) and of DDIM, without guidance. Results: learned_variance/*.json, a table and a picture beside this file.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from measurement import environment
from speed_diffusers.config.command_line import run_script
from speed_diffusers.config.load import load_config
from speed_diffusers.config.schema import Options, option
from speed_diffusers.generation.pretrained import load_pipeline
from speed_diffusers.metrics.score import ScoreSettings, score_pipeline
from training_runs import is_measured, trained_run

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "learned_variance"

ARMS = {
    "learned, ddpm": ("learned_range", "ddpm"),
    "learned, ddim": ("learned_range", "ddim"),
    "fixed, ddpm": ("fixed_small", "ddpm"),
    "fixed, ddim": ("fixed_small", "ddim"),
}
"""Name to variance of the training and sampler of the score."""

METRICS = ("frechet_distance", "kernel_distance", "precision", "recall", "class_agreement")


@dataclass
class BenchmarkConfig(Options):
    """Options of this benchmark."""

    seeds: list[int] = option([0, 1, 2], "Seeds to run.")
    arms: list[str] = option([], "Arms to run, such as 'learned, ddpm'; empty: all.", choices=ARMS)
    max_train_steps: int = option(3000, "Optimizer steps of each run.", interval="[1, inf)")
    num_images: int = option(1000, "Generated images per score.", interval="[2, inf)")
    num_inference_steps: int = option(250, "Solver steps.", interval="[1, inf)")
    runs_dir: str = option("runs/learned_variance", "Where the runs go.", path=True)
    results_dir: str = option(str(RESULTS), "Where the results go.", path=True)
    report_only: bool = option(False, "Only make table and picture from the results that are there.")


def result_file(config: BenchmarkConfig, arm: str, seed: int) -> Path:
    """Where the result of an arm and a seed is kept."""
    return Path(config.results_dir) / f"{arm.replace(', ', '-')}-{seed}.json"


def measure(arm: str, seed: int, config: BenchmarkConfig) -> None:
    """Trains and scores, unless the result is there."""
    target = result_file(config, arm, seed)
    if is_measured(
        target,
        max_train_steps=config.max_train_steps,
        num_images=config.num_images,
        num_inference_steps=config.num_inference_steps,
    ):
        return
    measured_at = environment()
    variance, sampler = ARMS[arm]
    folder = trained_run(
        Path(config.runs_dir) / f"{variance}-{seed}",
        prediction_type="epsilon",
        variance_type=variance,
        seed=seed,
        max_train_steps=config.max_train_steps,
        checkpointing_steps=500,
        checkpoints_total_limit=1,
    )
    settings = ScoreSettings(
        num_images=config.num_images, sampler=sampler, num_inference_steps=config.num_inference_steps
    )
    score = score_pipeline(load_pipeline(str(folder)), settings, description=f"{arm}, seed {seed}")
    place = {"arm": arm, "seed": seed, "max_train_steps": config.max_train_steps}
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps({**place, **score.to_dict(), "measured": measured_at}, indent=1) + "\n")


def report(config: BenchmarkConfig) -> str:
    """The table, also written beside the results with a picture; one line per arm, a number per seed."""
    results = {arm: [json.loads(result_file(config, arm, seed).read_text()) for seed in config.seeds] for arm in ARMS}
    lines = [
        f"| arm | {' | '.join(metric.replace('_', ' ') for metric in METRICS)} |",
        "|---|" + "---|" * len(METRICS),
    ]
    for arm, own in results.items():
        cells = [" / ".join(f"{result[metric]:.4g}" for result in own) for metric in METRICS]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    table = "\n".join(lines)
    folder = Path(config.results_dir)
    (folder / "table.md").write_text(table + "\n")
    distances = {arm: [float(result["frechet_distance"]) for result in own] for arm, own in results.items()}
    (steps,) = {result["protocol"]["num_inference_steps"] for own in results.values() for result in own}
    _plot(config.seeds, distances, folder / "distances.png", f"{steps} steps, no guidance")
    return table


def _plot(seeds: list[int], distances: dict[str, list[float]], path: Path, title: str) -> None:
    figure = Figure(figsize=(6.5, 3.4), dpi=120, layout="constrained")
    axes = figure.subplots()
    positions, width = np.arange(len(seeds)), 0.8 / len(distances)
    for index, (arm, values) in enumerate(distances.items()):
        bars = axes.bar(positions + (index - (len(distances) - 1) / 2) * width, values, width=width * 0.94, label=arm)
        axes.bar_label(bars, fmt="%.2f", fontsize=7)
    axes.set_xticks(positions, [f"seed {seed}" for seed in seeds])
    axes.set_ylabel("Fréchet distance (lower is better)")
    axes.set_title(title, fontsize=10)
    axes.margins(y=0.25)
    axes.legend(loc="upper center", ncols=len(distances), frameon=False, fontsize=8)
    figure.savefig(path)


def main(argv: list[str]) -> None:
    """Runs what is missing and prints the table.

    Raises:
        InputError: Wrong options, or results that were measured with others.
    """
    config = load_config(BenchmarkConfig, argv, HERE)
    if not config.report_only:
        for seed in config.seeds:
            for arm in config.arms or ARMS:
                measure(arm, seed, config)
    if all(result_file(config, arm, seed).exists() for arm in ARMS for seed in config.seeds):
        print(report(config))


if __name__ == "__main__":
    run_script(main, __doc__, BenchmarkConfig)
