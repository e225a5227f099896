"""Shows where the time of a training step goes.

    python train_scripts/profile_training.py
    python train_scripts/profile_training.py train_batch_size=16 output=profile.png trace=profile.json

Takes every option of train_dit_speed.py and runs its loop in a temporary folder: profile_warmup_steps steps unwatched,
profile_steps by the clock, as many under torch.profiler (which slows small models down), and one whose operations are
counted. The folder of a run is not touched; latents are cached as in training. The trace opens in chrome://tracing.
"""

import os
import time
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, schedule, supported_activities

from command_line import run_script
from measured_run import run_steps, temporary_run, trainer_options
from run_folder import check_writable
from run_results import describe_plan
from speed_diffusers.config import load_config
from speed_diffusers.errors import InputError
from speed_diffusers.flops import training_flops
from speed_diffusers.profiling import OTHER, PARTS, OperationCounter
from speed_diffusers.train_config import TrainConfig, option
from train_dit_speed import DEFAULT_CONFIG, SCRIPT_DIR
from training_setup import TrainingRun, check_inputs


@dataclass
class ProfileConfig(TrainConfig):
    """Options of `profile_training.py`: the trainer's, and these."""

    profile_steps: int = option(20, "Steps to measure.")
    profile_warmup_steps: int = option(5, "Steps before that.")
    output: str | None = option(None, "PNG to write, the parts of a step as bars.")
    trace: str | None = option(None, "Chrome trace to write, .json or .json.gz.")


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
    """

    parts: list[PartCost]
    milliseconds: float
    images: int
    flops: int
    processes: int
    device: str
    peak_bytes: int | None

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
    for name in ("profile_steps", "profile_warmup_steps"):
        if getattr(config, name) < 1:
            raise InputError(f"{name}={getattr(config, name)}: must be at least 1.")
    for name, suffixes in (("output", (".png",)), ("trace", (".json", ".json.gz"))):
        if (path := getattr(config, name)) is not None:
            if not path.endswith(suffixes) or Path(path).is_dir():
                raise InputError(f"{name}={path}: must be a file that ends in {' or '.join(suffixes)}.")
            check_writable(name, Path(path).parent)
    if config.dry_run:
        print(describe_plan(check_inputs(trainer_options(config))))
        return
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler's notes on itself would fill the screen
    # Warm-up, steps by the clock, the profiler's own warm-up and its steps, and one that is counted.
    steps = config.profile_warmup_steps + 2 * config.profile_steps + 2
    with temporary_run(trainer_options(config), steps=steps) as run:
        cost = run_steps(run, measure(run, config))
        if run.accelerator.is_main_process:
            print(describe(cost, config))
            if config.output is not None:
                Path(config.output).parent.mkdir(parents=True, exist_ok=True)
                save_picture(cost, title(cost, config), Path(config.output))


def measure(run: TrainingRun, config: ProfileConfig) -> Generator[None, None, StepCost]:
    """What a step of a run costs; each `yield` is one of its steps."""
    device = run.accelerator.device
    is_cuda = device.type == "cuda"
    for _ in range(config.profile_warmup_steps):
        yield
    if is_cuda:
        torch.cuda.reset_peak_memory_stats(device)
    began = _finished_at(device)
    for _ in range(config.profile_steps):
        yield
    milliseconds = (_finished_at(device) - began) / config.profile_steps * 1e3
    peak_bytes = torch.cuda.max_memory_allocated(device) if is_cuda else None
    activities = {ProfilerActivity.CPU, ProfilerActivity.CUDA} if is_cuda else {ProfilerActivity.CPU}
    with profile(
        activities=activities & supported_activities(),
        schedule=schedule(wait=0, warmup=1, active=config.profile_steps, repeat=1),
        acc_events=True,  # there is one cycle; without this it warns of a second
    ) as profiler:
        for _ in range(1 + config.profile_steps):
            yield
            profiler.step()
    with OperationCounter() as counter:
        yield
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
    )


def _finished_at(device: torch.device) -> float:
    """The time when the device has done all it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def part_times(events: list[FunctionEvent]) -> tuple[dict[str, float], dict[str, float]]:
    """Mean milliseconds a step of each part, on the host and in kernels on the device.

    A kernel belongs to the part during which the host launched it, on whatever thread: autograd has its own for a GPU.

    Args:
        events: What the profiler recorded, whole steps.
    """
    host_events = [event for event in events if event.device_type == DeviceType.CPU]
    steps = [event for event in host_events if event.name.startswith("ProfilerStep")]
    parts = [event for event in host_events if event.name in PARTS]
    host, on_device = dict.fromkeys((*PARTS, OTHER), 0.0), dict.fromkeys((*PARTS, OTHER), 0.0)
    for event in parts:
        host[event.name] += event.time_range.elapsed_us() / 1e3 / len(steps)
    total = sum(event.time_range.elapsed_us() for event in steps) / 1e3 / len(steps)
    host[OTHER] = total - sum(host.values())
    for event in host_events:
        if event.kernels and not event.is_user_annotation:
            start = event.time_range.start
            name = next((part.name for part in parts if part.time_range.start <= start <= part.time_range.end), OTHER)
            on_device[name] += sum(kernel.duration for kernel in event.kernels) / 1e3 / len(steps)
    return host, on_device


def title(cost: StepCost, config: ProfileConfig) -> str:
    """What was measured, in a line."""
    processes = f" on {cost.processes} processes" if cost.processes > 1 else ""
    return f"{config.model}, {cost.images} images a step{processes}, {cost.device}"


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
    lines.append(f"model, by formula: {cost.flops / 1e9:,.2f} GFLOP a step, {gflops:,.1f} GFLOP/s on each device")
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
    axes.set_xlabel("milliseconds a step, host, under the profiler")
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


if __name__ == "__main__":
    run_script(main, __doc__, ProfileConfig)
