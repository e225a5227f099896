"""Shows where the time of a training step goes.

    python train_scripts/profile_training.py
    python train_scripts/profile_training.py train_batch_size=16 output=profile.png trace=profile.json

Takes every option of train_dit_speed.py and takes its steps in a temporary folder: profile_warmup_steps unwatched,
profile_steps by the clock, as many under torch.profiler (which slows small models down), one whose operations are
counted, and then one checkpoint and one grid of samples where the options ask for them. The folder of a run is not
touched; latents are cached as in training. The trace opens in chrome://tracing.
"""

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch.profiler import ProfilerActivity, profile, schedule, supported_activities

from speed_diffusers.config.command_line import run_script
from speed_diffusers.config.load import load_config
from speed_diffusers.config.schema import option
from speed_diffusers.files import check_output_file
from speed_diffusers.reports.training_cost import training_flops
from speed_diffusers.training.config import DEFAULT_CONFIG, TrainConfig, trainer_options
from speed_diffusers.training.profiling import OTHER, PARTS, OperationCounter, part_times
from speed_diffusers.training.results import describe_plan, save_state, validate
from speed_diffusers.training.run import TrainingRun
from speed_diffusers.training.setup import check_inputs, temporary_run
from speed_diffusers.training.step import TrainedStep, training_steps
from speed_diffusers.training.step_log import StepLog

SCRIPT_DIR = Path(__file__).resolve().parent


@dataclass
class ProfileConfig(TrainConfig):
    """Options of `profile_training.py`: the trainer's, and these."""

    profile_steps: int = option(20, "Steps to measure.", interval="[1, 10^6]")
    profile_warmup_steps: int = option(5, "Steps before that.", interval="[1, 10^6]")
    output: str | None = option(None, "PNG to write, the parts of a step as bars.", path=True)
    trace: str | None = option(None, "Chrome trace to write, .json or .json.gz.", path=True)


@dataclass(frozen=True)
class PartCost:
    """What a part of a step costs: host milliseconds, operations dispatched, and milliseconds of its kernels."""

    name: str
    milliseconds: float
    operations: int
    device_milliseconds: float


@dataclass(frozen=True)
class StepCost:
    """What a step costs.

    Attributes:
        parts: In the order of the step; their milliseconds, under the profiler, add up to a step.
        milliseconds: Of a step without the profiler.
        images: Of a step, on all processes.
        flops: Of the model for these images: forward and backward pass by formula.
        processes: That share them.
        device: Its name.
        peak_bytes: Most memory that tensors held on the device; None on a CPU.
        between_steps: What happens between some steps, once: its milliseconds, and the steps from one to the next.
    """

    parts: list[PartCost]
    milliseconds: float
    images: int
    flops: int
    processes: int
    device: str
    peak_bytes: int | None
    between_steps: dict[str, tuple[float, int]]

    @property
    def profiled_milliseconds(self) -> float:
        """Of a step under the profiler."""
        return sum(part.milliseconds for part in self.parts)


def main(argv: list[str]) -> None:
    """Measures, prints the table, and writes what was asked for.

    Raises:
        InputError: Wrong options or data; nothing has been written.
    """
    config = load_config(ProfileConfig, argv, SCRIPT_DIR, default=DEFAULT_CONFIG)
    for name, suffixes in (("output", (".png",)), ("trace", (".json", ".json.gz"))):
        if (path := getattr(config, name)) is not None:
            check_output_file(name, path, *suffixes)
    if config.dry_run:
        print(describe_plan(check_inputs(trainer_options(config))))
        return
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler's notes on itself would fill the screen
    # Warm-up, steps by the clock, the profiler's own warm-up and its steps, and one that is counted.
    steps = config.profile_warmup_steps + 2 * config.profile_steps + 2
    with temporary_run(trainer_options(config), steps=steps) as run:
        cost = measure(run, config)
        if run.accelerator.is_main_process:
            print(describe(cost, config))
            if config.output is not None:
                Path(config.output).parent.mkdir(parents=True, exist_ok=True)
                save_picture(cost, title(cost, config), Path(config.output))


def measure(run: TrainingRun, config: ProfileConfig) -> StepCost:
    """What a step of a run costs, and what a checkpoint and a grid of samples cost, where the options ask for them."""
    device = run.accelerator.device
    is_cuda = device.type == "cuda"
    steps = logged_steps(run)
    for _ in range(config.profile_warmup_steps):
        next(steps)
    if is_cuda:
        torch.cuda.reset_peak_memory_stats(device)
    began = _finished_at(device)
    for _ in range(config.profile_steps):
        next(steps)
    milliseconds = (_finished_at(device) - began) / config.profile_steps * 1e3
    peak_bytes = torch.cuda.max_memory_allocated(device) if is_cuda else None
    activities = {ProfilerActivity.CPU, ProfilerActivity.CUDA} if is_cuda else {ProfilerActivity.CPU}
    with profile(
        activities=activities & supported_activities(),
        schedule=schedule(wait=0, warmup=1, active=config.profile_steps, repeat=1),
        acc_events=True,  # there is one cycle; without this it warns of a second
    ) as profiler:
        for _ in range(1 + config.profile_steps):
            next(steps)
            profiler.step()
    with OperationCounter() as counter:
        step = next(steps)
    if config.trace is not None and run.accelerator.is_main_process:
        Path(config.trace).parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(config.trace)
    host, on_device = part_times(list(profiler.events() or []))
    counts = {name: operations.total() for name, operations in counter.by_part.items()}
    return StepCost(
        parts=[PartCost(name, host[name], counts[name], on_device[name]) for name in (*PARTS, OTHER) if host[name]],
        milliseconds=milliseconds,
        images=run.layout.global_batch,
        flops=run.layout.global_batch * training_flops(run.core.transformer.config),
        processes=run.layout.processes,
        device=torch.cuda.get_device_name(device) if is_cuda else f"{device}, {torch.get_num_threads()} thread(s)",
        peak_bytes=peak_bytes,
        between_steps=between_steps(run, step.done),
    )


def logged_steps(run: TrainingRun) -> Iterator[TrainedStep]:
    """The steps of a run, each logged as the training script does it."""
    log = StepLog(run)
    for step in training_steps(run):
        log.add(step)
        if step.done % run.config.logging_steps == 0:
            log.write(step)
        yield step
    log.close()


def between_steps(run: TrainingRun, done: int) -> dict[str, tuple[float, int]]:
    """Milliseconds of one checkpoint and of one grid of samples, each with the steps from one to the next."""
    due = {
        "checkpoint": (save_state, run.config.checkpointing_steps),
        "validation": (validate, run.config.validation_steps),
    }
    found = {}
    for name, (save, interval) in due.items():
        if interval is not None:
            began = _finished_at(run.accelerator.device)
            save(run, done)
            found[name] = ((_finished_at(run.accelerator.device) - began) * 1e3, interval)
    return found


def _finished_at(device: torch.device) -> float:
    """The time when the device has done all it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def title(cost: StepCost, config: ProfileConfig) -> str:
    """What was measured, in a line."""
    processes = f" on {cost.processes} processes" if cost.processes > 1 else ""
    return f"{config.model}, {cost.images} images per step{processes}, {cost.device}"


def describe(cost: StepCost, config: ProfileConfig) -> str:
    """The costs as a table and three lines."""
    with_device = cost.peak_bytes is not None
    whole = PartCost(
        "total",
        cost.profiled_milliseconds,
        sum(part.operations for part in cost.parts),
        sum(part.device_milliseconds for part in cost.parts),
    )
    lines = [
        f"{title(cost, config)}: mean of {config.profile_steps} steps",
        f"{'part':<18}{'ms/step':>10}{'share':>8}{'operations':>12}" + "  device ms" * with_device,
    ]
    for part in (*cost.parts, whole):
        share = part.milliseconds / whole.milliseconds
        line = f"{part.name:<18}{part.milliseconds:>10.3f}{share:>8.1%}{part.operations:>12,}"
        lines.append(line + f"{part.device_milliseconds:>11.3f}" * with_device)
    seconds = cost.milliseconds / 1e3
    gflops = cost.flops / cost.processes / seconds / 1e9
    lines.append(f"without the profiler: {cost.milliseconds:.3f} ms/step, {cost.images / seconds:,.1f} images/s")
    lines.append(f"model, by formula: {cost.flops / 1e9:,.2f} GFLOP per step, {gflops:,.1f} GFLOP/s per device")
    for name, (once, interval) in cost.between_steps.items():
        share = once / interval / (cost.milliseconds + once / interval)
        lines.append(f"one {name}: {once:,.0f} ms, every {interval:,} steps: {share:.1%} of the time")
    if cost.peak_bytes is not None:
        lines.append(f"peak memory of tensors: {cost.peak_bytes / 2**30:.2f} GiB")
    return "\n".join(lines)


def save_picture(cost: StepCost, title: str, path: Path) -> None:
    """The parts as horizontal bars, first above."""
    names = [part.name for part in cost.parts]
    values = [part.milliseconds for part in cost.parts]
    figure = Figure(figsize=(7, 0.6 + 0.32 * len(names)), dpi=120, layout="constrained")
    axes = figure.subplots()
    bars = axes.barh(names, values, color="tab:blue")
    shares = [f"{value:.2f} ms, {value / cost.profiled_milliseconds:.1%}" for value in values]
    axes.bar_label(bars, labels=shares, padding=3, fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.25)
    axes.set_xlabel("milliseconds per step, host, under the profiler")
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


if __name__ == "__main__":
    run_script(main, __doc__, ProfileConfig)
