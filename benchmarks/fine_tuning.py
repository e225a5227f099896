"""Does SpeeD help fine-tuning? The embedded checkpoint on Fashion-MNIST turned upside down, with and without it.

    OMP_NUM_THREADS=1 python benchmarks/fine_tuning.py work_dir=...           # all runs, one after the other
    OMP_NUM_THREADS=1 python benchmarks/fine_tuning.py work_dir=... seeds=1   # a part, to run side by side
    python benchmarks/fine_tuning.py report_only=true

Both arms begin with the same weights and see the same images in the same order with the same noise; they differ in
timesteps and loss weights alone. Scored are the EMA weights of three checkpoints: 500 generated images, turned back,
in the embedded classifier's features against the embedded reference, which is of upright held-out images. Stopped and
started again, it goes on where it was. Results: fine_tuning/*.json, a table and a picture beside this file.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter
from PIL import ImageOps

from measurement import environment
from speed_diffusers.assets import EMBEDDED, EMBEDDED_IMAGES
from speed_diffusers.config.command_line import run_script
from speed_diffusers.config.load import load_config
from speed_diffusers.config.schema import Options, option
from speed_diffusers.errors import InputError
from speed_diffusers.generation import load_pipeline
from speed_diffusers.metrics import FeatureExtractor, load_extractor
from speed_diffusers.metrics.score import ScoreSettings, score_pipeline
from speed_diffusers.presets import PRESETS
from speed_diffusers.training.snapshots import pipeline_of_config, put_weights
from training_runs import is_measured, trained_run

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "fine_tuning"
ARMS = ("paper", "uniform")
START = "start"
METRICS = ("frechet_distance", "class_agreement", "precision_recall")
SHARES = ("class_agreement", "precision", "recall")


@dataclass
class BenchmarkConfig(Options):
    """Options of this benchmark."""

    work_dir: str | None = option(None, "Where the turned images and the runs go.", path=True)
    results_dir: str = option(str(RESULTS), "Where the results go.", path=True)
    seeds: list[int] = option([0, 1, 2], "Seeds to run.", interval="[0, 2^63)")
    arms: list[str] = option(list(ARMS), "Arms to run.", choices=ARMS)
    max_train_steps: int = option(
        400, "Optimizer steps of each run; scored at a quarter, half and all.", interval="[4, inf)"
    )
    learning_rate: float = option(5e-4, "Of both arms, constant after 20 steps.", interval="(0, 1)")
    num_images: int = option(500, "Generated images per score.", interval="[2, 10^6]")
    report_only: bool = option(False, "Only make table and picture from the results that are there.")


def turned_images(work_dir: Path) -> Path:
    """A parquet file of the embedded images, upside down."""
    target = work_dir / "upside_down.parquet"
    if not target.exists():
        upright = datasets.load_dataset("parquet", data_files=str(EMBEDDED_IMAGES), split="train")
        turned = upright.map(lambda row: {"image": ImageOps.flip(row["image"])}, load_from_cache_file=False)
        work_dir.mkdir(parents=True, exist_ok=True)
        turned.to_parquet(target)
    return target


def extractor_of_turned_images() -> FeatureExtractor:
    """The embedded classifier, which is told upside-down images as upright ones."""
    upright = load_extractor()
    return replace(
        upright, name=f"{upright.name} of images turned back", function=lambda images: upright.function(images.flip(2))
    )


def scored(pipeline: Any, config: BenchmarkConfig) -> dict[str, Any]:
    """Score and protocol of a pipeline of upside-down images."""
    settings = ScoreSettings(
        num_images=config.num_images,
        num_inference_steps=25,
        metrics=METRICS,
        extractor=extractor_of_turned_images(),
    )
    result: dict[str, Any] = score_pipeline(pipeline, settings).to_dict()
    return result


def fine_tune(arm: str, seed: int, config: BenchmarkConfig, work_dir: Path) -> Path:
    """Fine-tunes one arm, or resumes it, unless it is done; returns its folder."""
    strategy = {key: value for key, value in PRESETS[arm].items() if value is not None}
    return trained_run(
        work_dir / f"{arm}-{seed}",
        **strategy,
        pretrained_model_name_or_path=EMBEDDED,
        dataset_name=None,
        train_data_dir=turned_images(work_dir),
        cache_dir=work_dir / "cache",
        seed=seed,
        max_train_steps=config.max_train_steps,
        checkpointing_steps=max(config.max_train_steps // 4, 1),
        learning_rate=config.learning_rate,
        lr_scheduler="constant_with_warmup",
        lr_warmup_steps=min(20, config.max_train_steps // 4),
        num_score_images=None,
        num_validation_images=1,
    )


def measure(arm: str, seed: int, config: BenchmarkConfig, work_dir: Path) -> None:
    """Fine-tunes and scores one arm, unless its result is there."""
    target = Path(config.results_dir) / f"{arm}-{seed}.json"
    if is_measured(
        target,
        max_train_steps=config.max_train_steps,
        learning_rate=config.learning_rate,
        num_images=config.num_images,
    ):
        return
    about = environment()
    scores = {}
    if arm == START:
        scores["0"] = scored(load_pipeline(EMBEDDED), config)
    else:
        folder = fine_tune(arm, seed, config, work_dir)
        pipeline = pipeline_of_config(folder)
        pipeline.set_progress_bar_config(disable=True)
        for quarters in (1, 2, 4):
            step = config.max_train_steps // 4 * quarters
            put_weights(pipeline, folder / f"checkpoint-{step}", "ema")
            scores[str(step)] = scored(pipeline, config)
    settings = {"learning_rate": config.learning_rate, "max_train_steps": config.max_train_steps}
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps({"arm": arm, "seed": seed, **settings, "scores": scores, **about}, indent=1) + "\n")


def distances(results: Mapping[tuple[str, int], Mapping[str, Any]], arm: str, seed: int) -> dict[int, float]:
    """Fréchet distance by step of one run."""
    return {int(step): score["frechet_distance"] for step, score in results[arm, seed]["scores"].items()}


def report(config: BenchmarkConfig) -> str:
    """The table, also written beside the results with a picture."""
    folder = Path(config.results_dir)
    files = [folder / f"{START}-0.json", *(folder / f"{arm}-{seed}.json" for arm in ARMS for seed in config.seeds)]
    found = [json.loads(path.read_text()) for path in files]
    results = {(result["arm"], result["seed"]): result for result in found}
    protocols = {json.dumps(score["protocol"]) for result in found for score in result["scores"].values()}
    if len(protocols) != 1:
        raise InputError(f"{folder}: the scores were measured under {len(protocols)} protocols.")
    steps = list(distances(results, "paper", config.seeds[0]))
    start = distances(results, START, 0)[0]
    lines = [
        f"Fréchet distance (lower is better); before fine-tuning {start:.1f}.",
        "",
        "| steps | "
        + " | ".join(f"seed {seed}: SpeeD, uniform" for seed in config.seeds)
        + " | uniform / SpeeD, each seed | mean (geometric) |",
        "|---|" + "---|" * (len(config.seeds) + 2),
    ]
    for step in steps:
        pairs = [[distances(results, arm, seed)[step] for arm in ARMS] for seed in config.seeds]
        ratios = [uniform / speed for speed, uniform in pairs]
        cells = [f"{speed:.2f}, {uniform:.2f}" for speed, uniform in pairs]
        mean = float(np.exp(np.mean(np.log(ratios))))
        lines.append(
            f"| {step} | {' | '.join(cells)} | {', '.join(f'{ratio:.3f}' for ratio in ratios)} | {mean:.3f} |"
        )
    last = str(steps[-1])
    lines += [
        "",
        f"After {last} steps, mean over the seeds:",
        "",
        "| | " + " | ".join(name.replace("_", " ") for name in SHARES) + " |",
        "|---|---|---|---|",
    ]
    for arm, name in zip(ARMS, ("SpeeD", "uniform"), strict=True):
        means = [np.mean([results[arm, seed]["scores"][last][metric] for seed in config.seeds]) for metric in SHARES]
        lines.append(f"| {name} | {' | '.join(f'{mean:.1%}' for mean in means)} |")
    table = "\n".join(lines)
    (folder / "table.md").write_text(table + "\n")
    _plot(results, config.seeds, start, folder / "distances.png")
    return table


def _plot(results: Mapping[tuple[str, int], Mapping[str, Any]], seeds: list[int], start: float, path: Path) -> None:
    figure = Figure(figsize=(5.5, 3.4), dpi=120, layout="constrained")
    axes = figure.subplots()
    for arm, name, colour in zip(ARMS, ("SpeeD", "uniform"), ("C0", "C1"), strict=True):
        for seed in seeds:
            points = {0: start, **distances(results, arm, seed)}
            label = name if seed == seeds[0] else None
            axes.plot(
                list(points), list(points.values()), color=colour, marker="o", markersize=3, linewidth=1, label=label
            )
    axes.set_yscale("log")
    for set_formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        set_formatter(StrMethodFormatter("{x:.0f}"))
    axes.set_xlabel("steps of fine-tuning")
    axes.set_ylabel("Fréchet distance (lower is better)")
    axes.set_title("The embedded checkpoint on upside-down images, three seeds", fontsize=10)
    axes.legend(frameon=False)
    figure.savefig(path)


def main(argv: list[str]) -> None:
    """Runs what is missing and prints the table.

    Raises:
        InputError: Wrong options, or results that were measured with others.
    """
    config = load_config(BenchmarkConfig, argv, HERE)
    if not config.report_only:
        if config.work_dir is None:
            raise InputError("Give a folder for the turned images and the runs: work_dir=...")
        work_dir = Path(config.work_dir)
        measure(START, 0, config, work_dir)
        for seed in config.seeds:
            for arm in config.arms:
                measure(arm, seed, config, work_dir)
    if all((Path(config.results_dir) / f"{arm}-{seed}.json").exists() for arm in ARMS for seed in config.seeds):
        print(report(config))


if __name__ == "__main__":
    run_script(main, __doc__, BenchmarkConfig)
