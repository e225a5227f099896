"""Microseconds that `sample_timesteps` and `loss_weights` take, on one core, for every density, weighting and draw.

    OMP_NUM_THREADS=1 python benchmarks/timestep_calls.py              # measures, prints and writes everything
    OMP_NUM_THREADS=1 python benchmarks/timestep_calls.py num_calls=50 # in a moment, roughly

Batches of 256 of 1,000 timesteps. Of densities that change in the course of a training the time with new tables is
given too, which are made a thousand times a training. Host synchronisations are counted by running the same calls on
the meta device, whose numbers nobody can wait for: every operation that would have to is one. Results:
timestep_calls/result.json, table.md and timestep_calls.png beside this file.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from measurement import commit
from speed_diffusers import PRESETS, SpeeDDDPMScheduler, SpeeDFlowMatchEulerDiscreteScheduler
from speed_diffusers.config.command_line import run_script
from speed_diffusers.config.load import load_config
from speed_diffusers.config.schema import Options, option
from speed_diffusers.hardware import processor
from speed_diffusers.timesteps import DENSITIES, DRAWS
from speed_diffusers.training.profiling import OperationCounter
from speed_diffusers.weightings import WEIGHTINGS

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "timestep_calls"
BATCH_SIZE = 256
BUDGET = 200.0  # microseconds a call


@dataclass
class BenchmarkConfig(Options):
    """Options of this benchmark."""

    num_calls: int = option(1000, "Timed calls of each kind; the median counts.", interval="[1, inf)")
    write: bool = option(True, "Write the results beside this file.")


def strategies() -> dict[str, dict[str, Any]]:
    """Label to the keywords of a scheduler: every density, weighting and draw, and what else there is."""
    found: dict[str, dict[str, Any]] = {}
    found |= {f"sampling {name}": {"speed_sampling": name, "speed_weighting": "none"} for name in DENSITIES}
    found |= {f"weighting {name}": {"speed_sampling": "uniform", "speed_weighting": name} for name in WEIGHTINGS}
    found |= {f"draw {name}": {"speed_draw": name} for name in DRAWS}
    found |= {f"preset {name}": settings for name, settings in PRESETS.items()}
    found["smooth edge"] = {"speed_sampling": "asymmetric:edge=1"}
    found["k falls"] = {"speed_anneal_start": 0.0}
    found["k falls, smooth edge, stratified, mean weight 1"] = {
        "speed_sampling": "asymmetric:edge=1",
        "speed_anneal_start": 0.0,
        "speed_draw": "stratified",
        "speed_normalize_weights": True,
    }
    found["flow matching"] = {"flow": True}
    found["flow matching, logit_normal, min_snr"] = {
        "flow": True,
        "speed_sampling": "logit_normal",
        "speed_weighting": "min_snr",
    }
    return found


def scheduler_of(settings: dict[str, Any]) -> Any:
    """The scheduler of one row."""
    cls = SpeeDFlowMatchEulerDiscreteScheduler if settings.get("flow") else SpeeDDDPMScheduler
    return cls(**{key: value for key, value in settings.items() if key != "flow"})


def host_syncs(scheduler: Any) -> int:
    """Waits in one draw and one look-up of weights on a device, tables made anew included."""
    with OperationCounter() as counter:
        for progress in (0.1, 0.9):
            timesteps = scheduler.sample_timesteps(BATCH_SIZE, device="meta", progress=progress)
            scheduler.loss_weights(timesteps, progress=progress)
    return counter.host_waits.total()


def microseconds(call: Callable[[int], object], num_calls: int) -> float:
    """Median time of a call that is told its number."""
    for index in range(20):
        call(index)
    times = []
    for index in range(num_calls):
        start = time.perf_counter_ns()
        call(index)
        times.append(time.perf_counter_ns() - start)
    return float(np.median(times)) / 1000


def measure(settings: dict[str, Any], num_calls: int) -> dict[str, float]:
    """One row: the two calls, the first one with new tables where they change, and host synchronisations."""
    scheduler = scheduler_of(settings)
    generator = torch.Generator().manual_seed(0)
    timesteps = scheduler.sample_timesteps(BATCH_SIZE, generator=generator, progress=0.5)

    def draw(progress: float) -> torch.Tensor:
        return scheduler.sample_timesteps(BATCH_SIZE, generator=generator, progress=progress)

    row = {
        "sample_timesteps_us": microseconds(lambda _: draw(0.5), num_calls),
        "loss_weights_us": microseconds(lambda _: scheduler.loss_weights(timesteps, progress=0.5), num_calls),
        "host_syncs": host_syncs(scheduler_of(settings)),
    }
    if scheduler.speed_strategy.needs_progress:
        row["with_new_tables_us"] = microseconds(lambda index: draw((index % 1000) / 1000), num_calls)
    return row


def table(rows: dict[str, dict[str, float]]) -> str:
    """The rows as Markdown."""
    lines = [
        "| | `sample_timesteps`, µs | with new tables, µs | `loss_weights`, µs | host synchronisations |",
        "|---|---|---|---|---|",
    ]
    for label, row in rows.items():
        renewed = f"{row['with_new_tables_us']:.0f}" if "with_new_tables_us" in row else ""
        lines.append(
            f"| {label} | {row['sample_timesteps_us']:.0f} | {renewed} | {row['loss_weights_us']:.0f} "
            f"| {row['host_syncs']} |"
        )
    return "\n".join(lines)


def plot(rows: dict[str, dict[str, float]], path: Path) -> None:
    """Both calls as bars, with the budget."""
    figure = Figure(figsize=(8, 0.24 * len(rows) + 1.2), dpi=110, layout="constrained")
    axes = figure.subplots()
    positions = np.arange(len(rows))
    longest = [max(row["sample_timesteps_us"], row.get("with_new_tables_us", 0.0)) for row in rows.values()]
    axes.barh(positions, longest, color="lightsteelblue", label="sample_timesteps with new tables")
    axes.barh(positions, [row["sample_timesteps_us"] for row in rows.values()], label="sample_timesteps")
    axes.barh(positions, [row["loss_weights_us"] for row in rows.values()], height=0.3, label="loss_weights")
    axes.axvline(BUDGET, color="firebrick", linewidth=1, label=f"budget, {BUDGET:.0f} µs")
    axes.set_yticks(positions, list(rows), fontsize=7)
    axes.invert_yaxis()
    axes.margins(y=0.01)
    axes.set_xlabel(f"microseconds a call, batch {BATCH_SIZE}, one core")
    axes.set_title("What drawing and weighing timesteps costs", fontsize=10)
    figure.legend(fontsize=7, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path)


def main(argv: list[str]) -> None:
    """Measures every row, prints the table and writes it."""
    config = load_config(BenchmarkConfig, argv, HERE)
    torch.set_num_threads(1)
    at_commit = commit()
    rows = {label: measure(settings, config.num_calls) for label, settings in tqdm(strategies().items())}
    print(table(rows))
    slowest = max(max(row.get("with_new_tables_us", 0.0), row["sample_timesteps_us"]) for row in rows.values())
    syncs = sum(row["host_syncs"] for row in rows.values())
    print(f"\nSlowest: {slowest:.0f} of {BUDGET:.0f} microseconds; host synchronisations: {syncs}")
    if config.write:
        RESULTS.mkdir(exist_ok=True)
        about = {
            "commit": at_commit,
            "torch": torch.__version__,
            "machine": f"{processor()}, 1 thread",
            "batch_size": BATCH_SIZE,
            "num_train_timesteps": 1000,
            "num_calls": config.num_calls,
            "rows": rows,
        }
        (RESULTS / "result.json").write_text(json.dumps(about, indent=1) + "\n")
        (RESULTS / "table.md").write_text(table(rows) + "\n")
        plot(rows, RESULTS / "timestep_calls.png")


if __name__ == "__main__":
    run_script(main, __doc__, BenchmarkConfig)
