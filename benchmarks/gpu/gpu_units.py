"""What the GPU suite measures, unit by unit: each makes what it needs and gives back what it found, as JSON values."""

import os
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, schedule

from latent_runs import CHANNELS, CLASSES, SIDE, image_run_options, latent_run_config, with_model
from measurement import ROOT
from reference_loops import DIT, FAST_DIT, README_PRECISION, Encoding, ReferenceLoop
from speed_diffusers.models import dit_config
from speed_diffusers.reports.training_cost import gpu_of_device, model_flops_utilization, training_flops
from speed_diffusers.training.profiling import PARTS, part_times
from speed_diffusers.training.run import TrainingRun
from speed_diffusers.training.setup import temporary_run
from speed_diffusers.training.step import TrainedStep, training_steps
from speed_diffusers.training.step_log import StepLog

IN_LOOP = " with VAE"
"""Stands behind the name of a unit whose steps encode their images."""
BF16_COMPILE, BF16, TF32 = PRECISIONS = ("bf16+compile", "bf16", "tf32")
TESTS_DEVICE = "SPEED_DIFFUSERS_GPU_TESTS_DEVICE"
"""The environment variable by which the tests marked `gpu` are told another device than CUDA's."""

KERNELS = {
    "attention": "flash|fmha|sdpa|attention",
    "matrix products": "gemm|nvjet|cutlass|cublas|xmma|splitk|gemv",
    "compiled, elementwise and reductions": "^triton_",
    "optimizer, EMA and gradient norm": "adam|multi_tensor|lerp|foreach",
    "copies": "memcpy|memset|copy",
}
"""Kinds of kernels by what their names hold, in the order in which they are looked for; the rest is other."""


@dataclass(frozen=True)
class Unit:
    """One unit of work: its name, about how many seconds it takes on an H100-class card, and what measures it."""

    name: str
    seconds: float
    measure: Callable[[], dict[str, Any]]


@dataclass(frozen=True)
class Scale:
    """How much is measured: the models and batch sizes of a device, and the steps of each.

    Attributes:
        batch_sizes: Images of a step by model and precision.
        steps: Measured steps, after the warm-up.
        warmup_steps: Steps before them; the first one compiles.
        profiled_steps: Steps under the profiler, of the models in `profiled`.
        profiled: Models that are profiled.
        num_images: Images of the data.
        compile_backend: Of `torch.compile`.
        in_loop: Model, batch size and precisions of the steps that encode their images, ours and DiT's.
        autoencoder: Widths of the autoencoder in the loop.
        num_files: JPEG files that it encodes.
        loading_workers: Processes that decode them.
    """

    batch_sizes: dict[str, dict[str, tuple[int, ...]]]
    references: dict[str, dict[str, int]]
    steps: int
    warmup_steps: int
    profiled_steps: int
    profiled: str
    num_images: int
    compile_backend: str
    in_loop: tuple[str, int, tuple[str, ...]]
    autoencoder: tuple[int, ...]
    num_files: int
    loading_workers: int


ON_CUDA = Scale(
    batch_sizes={
        "DiT-XL/2": {BF16_COMPILE: (256, 512, 128), BF16: (128, 256), TF32: (64,)},
        "DiT-L/2": {BF16_COMPILE: (256,), BF16: (128,), TF32: (64,)},
        "DiT-B/2": {BF16_COMPILE: (512,), BF16: (512,), TF32: (256,)},
        "DiT-S/2": {BF16_COMPILE: (1024,), BF16: (1024,), TF32: (512,)},
    },
    references={FAST_DIT: {"DiT-XL/2": 256}, DIT: {"DiT-XL/2": 64}},
    steps=8,
    warmup_steps=3,
    profiled_steps=2,
    profiled="DiT-XL/2",
    num_images=2048,
    compile_backend="inductor",
    in_loop=("DiT-XL/2", 64, (TF32, BF16_COMPILE)),
    autoencoder=(128, 256, 512, 512),
    num_files=512,
    loading_workers=8,
)
ON_CPU = Scale(
    batch_sizes={"DiT-tiny/8": {BF16_COMPILE: (4, 2), BF16: (2,), TF32: (4,)}, "DiT-tiny/4": {TF32: (2,)}},
    references={FAST_DIT: {"DiT-tiny/8": 4}, DIT: {"DiT-tiny/8": 4}},
    steps=2,
    warmup_steps=1,
    profiled_steps=1,
    profiled="DiT-tiny/8",
    num_images=16,
    compile_backend="aot_eager",
    in_loop=("DiT-tiny/8", 2, (TF32,)),
    autoencoder=(4, 4, 4, 4),
    num_files=8,
    loading_workers=0,
)
"""All of the suite in small; its figures say nothing."""


def all_units(device: torch.device, scale: Scale, checkouts: dict[str, Path], work_dir: Path) -> Iterator[Unit]:
    """The units in the order of their value.

    Args:
        device: What is measured.
        scale: How much of it.
        checkouts: Folders of the reference loops, of those that the caller has.
        work_dir: For autoencoders, images and cached latents, which the units share.
    """

    images = partial(image_run_options, work_dir, widths=scale.autoencoder, num_images=scale.num_files)

    def ours(model: str, precision: str, batch: int, seconds: float, *, in_loop: bool = False) -> Unit:
        measure = partial(measure_step, device, scale, work_dir, model=model, precision=precision, batch_size=batch)
        return Unit(
            f"step {model} {precision} {batch}{IN_LOOP * in_loop}",
            seconds,
            lambda: measure(images=images() if in_loop else None),
        )

    def theirs(loop: str, model: str, batch: int, seconds: float, *, in_loop: bool = False) -> Unit:
        measure = partial(measure_reference, device, scale, loop, checkouts[loop], model=model, batch_size=batch)
        return Unit(
            f"reference {loop} {model} {batch}{IN_LOOP * in_loop}",
            seconds,
            lambda: measure(images=images() if in_loop else None),
        )

    largest, *others = scale.batch_sizes
    first, *more = scale.batch_sizes[largest][BF16_COMPILE]
    yield ours(largest, BF16_COMPILE, first, 45)
    for loop, models in scale.references.items():
        if loop in checkouts and loop == FAST_DIT:
            yield from (theirs(loop, model, batch, 20) for model, batch in models.items())
    yield Unit("tests", 60, lambda: run_tests(device))
    yield from (ours(largest, BF16, batch, 12) for batch in scale.batch_sizes[largest][BF16])
    for model in reversed(others):
        yield from (ours(model, BF16_COMPILE, batch, 25) for batch in scale.batch_sizes[model].get(BF16_COMPILE, ()))
    yield from (ours(largest, TF32, batch, 12) for batch in scale.batch_sizes[largest][TF32])
    for loop, models in scale.references.items():
        if loop in checkouts and loop != FAST_DIT:
            yield from (theirs(loop, model, batch, 20) for model, batch in models.items())
    for model in others:
        for precision in (BF16, TF32):
            yield from (ours(model, precision, batch, 10) for batch in scale.batch_sizes[model].get(precision, ()))
    model, batch, precisions = scale.in_loop
    # The first of them makes the images. fast-DiT's loop has no autoencoder.
    yield from (ours(model, precision, batch, 45, in_loop=True) for precision in precisions)
    if DIT in checkouts:
        yield theirs(DIT, model, batch, 30, in_loop=True)
    yield from (ours(largest, BF16_COMPILE, batch, 40) for batch in more)


def measure_step(
    device: torch.device,
    scale: Scale,
    work_dir: Path,
    *,
    model: str,
    precision: str,
    batch_size: int,
    images: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Takes steps of the trainer and times them together, the device waited for at both ends.

    Args:
        device: What is measured.
        scale: How much of it.
        work_dir: For autoencoder and cached latents.
        model: Such as "DiT-XL/2".
        precision: One of `PRECISIONS`.
        batch_size: Images of a step.
        images: Options of a run that encodes its images in the step, from `image_run_options`; None: cached latents.
    """
    data = images and images | {"dataloader_num_workers": scale.loading_workers}
    config = latent_run_config(
        work_dir,
        **(data or {"max_train_samples": scale.num_images}),
        train_batch_size=batch_size,
        mixed_precision="no" if precision == TF32 else "bf16",
        allow_tf32=True,
        compile=precision == BF16_COMPILE,
        compile_backend=scale.compile_backend if precision == BF16_COMPILE else "inductor",
    )
    began = time.perf_counter()
    taken = 1 + scale.warmup_steps + scale.steps + 1 + scale.profiled_steps
    with temporary_run(config, steps=taken, change=with_model(model)) as run:
        steps = logged(run)
        made = time.perf_counter()
        next(steps)
        first = _finished_at(device)
        for _ in range(scale.warmup_steps):
            next(steps)
        _reset_peak(device)
        start = _finished_at(device)
        for _ in range(scale.steps):
            step = next(steps)
        launched = time.perf_counter()
        seconds = (_finished_at(device) - start) / scale.steps
        result = figures(model, precision, batch_size, seconds, device) | {
            "in_loop": images is not None,
            "host_milliseconds": (launched - start) / scale.steps * 1e3,
            "setup_seconds": made - began,
            "first_step_seconds": first - made,
            "peak_memory_gib": _peak_gib(device),
            "steps": scale.steps,
            "loss": float(step.micro_steps[0].result.loss),
            "finite": bool(torch.isfinite(step.grad_norm)),
        }
        if model == scale.profiled and images is None:
            try:
                result["profile"] = profile_steps(steps, device, scale.profiled_steps)
            except Exception as error:  # noqa: BLE001  # the figures of the steps are worth keeping
                result["profile"] = {"error": f"{type(error).__name__}: {error}"}
        # Its generator holds the run.
        steps.close()
    return result


def logged(run: TrainingRun) -> Iterator[TrainedStep]:
    """The steps of a run, each taken in by its log as the training script does it between two lines."""
    log = StepLog(run)
    try:
        for step in training_steps(run):
            log.add(step)
            yield step
    finally:
        log.close()


def figures(model: str, precision: str, batch_size: int, seconds: float, device: torch.device) -> dict[str, Any]:
    """What follows from the time of a step: images per second, operations per second, and MFU where a peak is known.

    Args:
        model: Such as "DiT-XL/2", on latents of 4x32x32.
        precision: One of `PRECISIONS`, or that of a reference loop; whose peak counts.
        batch_size: Images of a step.
        seconds: Of a step.
        device: What it was measured on.
    """
    config = dit_config(model, sample_size=SIDE, in_channels=CHANNELS, out_channels=2 * CHANNELS, num_classes=CLASSES)
    gpu = gpu_of_device(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    peak = "tf32" if precision == TF32 else "bf16"
    rate = batch_size / seconds
    return {
        "model": model,
        "precision": precision,
        "batch_size": batch_size,
        "milliseconds": seconds * 1e3,
        "images_per_second": rate,
        "model_tflops_per_second": training_flops(config) * rate / 1e12,
        "mfu": None if gpu is None else model_flops_utilization(config, rate, gpu, precision=peak),
        "mfu_of": peak,
    }


def profile_steps(steps: Iterator[TrainedStep], device: torch.device, count: int) -> dict[str, Any]:
    """Where the time of some steps goes: by the parts of a step, and on a GPU by kinds of kernels too."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    activities = {ProfilerActivity.CPU} | ({ProfilerActivity.CUDA} if device.type == "cuda" else set())
    with profile(
        activities=activities, schedule=schedule(wait=0, warmup=1, active=count, repeat=1), acc_events=True
    ) as profiler:
        for _ in range(1 + count):
            next(steps)
            _finished_at(device)
            profiler.step()
    events = list(profiler.events() or [])
    host, on_device = part_times(events)
    kernels: Counter[str] = Counter()
    for event in events:
        # Labels are repeated on the device's side.
        is_label = event.name in PARTS or event.name.startswith(("ProfilerStep", "##", "Torch-Compiled"))
        if event.device_type != DeviceType.CPU and not is_label and not event.is_user_annotation:
            kernels[event.name] += event.time_range.elapsed_us() / 1e3 / count
    kinds: Counter[str] = Counter()
    for name, milliseconds in kernels.items():
        kinds[kind_of_kernel(name)] += milliseconds
    return {
        "steps": count,
        "host_milliseconds": {part: value for part, value in host.items() if value},
        "device_milliseconds": {part: value for part, value in on_device.items() if value},
        "kernel_milliseconds": dict(kinds.most_common()),
        "largest_kernels": {name[:120]: value for name, value in kernels.most_common(12)},
    }


def kind_of_kernel(name: str) -> str:
    """The kind of a kernel among `KERNELS`, by its name; "other" if it has none."""
    return next((kind for kind, pattern in KERNELS.items() if re.search(pattern, name, re.IGNORECASE)), "other")


def measure_reference(
    device: torch.device,
    scale: Scale,
    loop: str,
    checkout: Path,
    *,
    model: str,
    batch_size: int,
    images: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Takes steps of a reference loop as its README runs it, timed like ours; see `measure_step`."""
    precision = README_PRECISION[loop] if device.type == "cuda" else "no"
    with (
        tempfile.TemporaryDirectory(prefix="speed-diffusers-") as folder,
        ReferenceLoop(
            loop,
            checkout,
            model=model,
            batch_size=batch_size,
            device=device,
            results_dir=Path(folder),
            mixed_precision=precision,
            encoding=images
            and Encoding(
                images=Path(images["train_data_dir"]),
                autoencoder=Path(images["pretrained_vae_model_name_or_path"]),
                num_workers=scale.loading_workers,
            ),
        ) as reference,
    ):
        for _ in range(scale.warmup_steps):
            reference.step()
        _reset_peak(device)
        start = _finished_at(device)
        for _ in range(scale.steps):
            reference.step()
        seconds = (_finished_at(device) - start) / scale.steps
        # Both let float32 products round to TF32.
        named = TF32 if precision == "no" else precision
        return figures(model, named, batch_size, seconds, device) | {
            "in_loop": images is not None,
            "peak_memory_gib": _peak_gib(device),
            "steps": scale.steps,
        }


class _Outcomes:
    """Takes down what became of each test; a plugin of pytest."""

    def __init__(self) -> None:
        self.tests: dict[str, dict[str, Any]] = {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        name = report.nodeid.split("::", 1)[-1]
        if report.when == "call" or report.outcome != "passed":
            text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr or "")
            self.tests[name] = {"outcome": report.outcome, "seconds": round(report.duration, 2), "text": text[-3000:]}

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.tests[report.nodeid] = {
                "outcome": "not collected",
                "seconds": 0.0,
                "text": str(report.longrepr)[-3000:],
            }


def run_tests(device: torch.device) -> dict[str, Any]:
    """Runs the tests marked `gpu` in this process."""
    outcomes, threads = _Outcomes(), torch.get_num_threads()
    before = {
        name: os.environ.get(name) for name in (TESTS_DEVICE, "PYTEST_DISABLE_PLUGIN_AUTOLOAD", "PYTEST_ADDOPTS")
    }
    os.environ |= {TESTS_DEVICE: device.type, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_ADDOPTS": ""}
    try:
        code = pytest.main(
            ["-q", "-m", "gpu", "-p", "no:cacheprovider", f"--rootdir={ROOT}", f"-c={ROOT / 'pyproject.toml'}"]
            + [str(ROOT / "tests" / "gpu")],
            plugins=[outcomes],
        )
    finally:
        torch.set_num_threads(threads)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
    counts = Counter(test["outcome"] for test in outcomes.tests.values())
    return {"exit_code": int(code), **counts, "tests": outcomes.tests}


def _finished_at(device: torch.device) -> float:
    """The time when the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _peak_gib(device: torch.device) -> float | None:
    """Most memory that tensors held since the last reset, in GiB; None on a CPU."""
    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
