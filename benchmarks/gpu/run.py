"""Tests, speed and memory of the trainer on a GPU, beside the training loops that it is held against.

    python benchmarks/gpu/run.py dit_dir=DiT fast_dit_dir=fast-DiT
    python benchmarks/gpu/run.py device=cpu results_dir=/tmp/gpu_suite
    python benchmarks/gpu/run.py action=report

Runs the tests marked gpu, the trainer's own steps for DiT-S/2 to XL/2 on cached latents of 4x32x32 in TF32, bf16 and
compiled bf16 with peak memory, a profile of XL/2, and the loops of checkouts that the caller names; apart, steps of
XL/2 that encode JPEG files with an autoencoder of Stable Diffusion's size, ours and DiT's. Nothing is downloaded. Each
unit of work is one entry in the results, which are written after it: what fails is noted and the rest goes on, what is
done is not done again, and none is begun that would outlast max_seconds. device=cpu does all of it at tiny size, which
shows that it runs and nothing else.

Results: NAME_OF_THE_DEVICE.json in results_dir, and from it a table and a picture, which action=report makes again.
"""

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

BEGAN = time.perf_counter()
sys.path.insert(1, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402

from gpu_report import save_report  # noqa: E402
from gpu_units import ON_CPU, ON_CUDA, Unit, all_units  # noqa: E402
from latent_runs import forget_the_last_run  # noqa: E402
from measurement import SCRIPT_DIR, environment, load_average  # noqa: E402
from reference_loops import DIT, FAST_DIT  # noqa: E402
from speed_diffusers.config.command_line import run_script  # noqa: E402
from speed_diffusers.config.load import load_config  # noqa: E402
from speed_diffusers.config.schema import Options, option  # noqa: E402
from speed_diffusers.errors import InputError  # noqa: E402
from speed_diffusers.files import write_text  # noqa: E402

DONE, FAILED, NO_MEMORY = "done", "failed", "out of memory"
ACTIONS = ("measure", "report")


@dataclass
class GPUSuiteConfig(Options):
    """Options of the GPU suite."""

    action: str = option("measure", "measure, or only make table and picture of what is there.", choices=ACTIONS)
    device: str = option("cuda", "cpu runs all of it at tiny size.", choices=("cuda", "cpu"))
    results_dir: str = option(str(Path(__file__).resolve().parent / "results"), "Where the results go.", path=True)
    work_dir: str = option("runs/gpu_suite", "For autoencoders, images and cached latents.", path=True)
    dit_dir: str | None = option(None, "Checkout of github.com/facebookresearch/DiT.", path=True)
    fast_dit_dir: str | None = option(None, "Checkout of github.com/chuanyangjin/fast-DiT.", path=True)
    units: list[str] = option(["*"], "Patterns of the units to do, such as 'step DiT-XL*'.")
    commit: str | None = option(None, "That is measured, where the copy has no history.")
    max_seconds: float = option(540.0, "From the start; no unit is begun that would outlast it.", interval="(0, inf)")


def main(argv: list[str]) -> None:
    """Measures what is not measured yet, and writes results, table and picture.

    Raises:
        InputError: Wrong options, or no such device.
    """
    config = load_config(GPUSuiteConfig, argv, SCRIPT_DIR)
    folder = Path(config.results_dir)
    if config.action == "report":
        files = sorted(folder.glob("*.json"))
        if not files:
            raise InputError(f"results_dir={folder}: holds no results; measure first.")
        for file in files:
            save_report(json.loads(file.read_text("utf-8")), file)
        print(f"{len(files)} report(s) in {folder}")
        return
    if config.device == "cuda" and not torch.cuda.is_available():
        raise InputError("device=cuda: torch sees no GPU here; device=cpu runs the suite at tiny size.")
    device = torch.device(config.device)
    checkouts = {
        loop: Path(path) for loop, path in ((FAST_DIT, config.fast_dit_dir), (DIT, config.dit_dir)) if path is not None
    }
    for loop, path in checkouts.items():
        if not (path / "train.py").is_file():
            raise InputError(f"{path}: is no checkout of {loop}.")
    work_dir = Path(config.work_dir).resolve()
    work_dir.mkdir(parents=True, exist_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    name = device_name(device)
    file = folder / f"{name.lower().replace(' ', '-').replace('/', '-')}.json"
    results = json.loads(file.read_text("utf-8")) if file.exists() else {"units": {}}
    results["device"] = device_facts(device)
    results["environment"] = environment() | {"load_before": load_average()}
    if config.commit is not None:
        results["environment"]["commit"] = config.commit
    scale = ON_CUDA if device.type == "cuda" else ON_CPU
    with on_device(device):
        for unit in all_units(device, scale, checkouts, work_dir):
            before = results["units"].get(unit.name, {}).get("status")
            if before in (DONE, NO_MEMORY) or not any(fnmatch(unit.name, pattern) for pattern in config.units):
                continue
            left = config.max_seconds - (time.perf_counter() - BEGAN)
            if left < unit.seconds:
                print(f"{unit.name}: not begun, {left:.0f} s are left and it may take {unit.seconds:.0f}", flush=True)
                continue
            results["units"][unit.name] = done = outcome(unit, limit=left)
            write_text(file, json.dumps(results, indent=1) + "\n")
            print(f"{unit.name}: {done['status']} in {done['seconds']:.1f} s {brief(done)}", flush=True)
    write_text(file, json.dumps(results, indent=1) + "\n")
    save_report(results, file)
    print(file.with_suffix(".md").read_text("utf-8"))


def outcome(unit: Unit, *, limit: float) -> dict[str, Any]:
    """Measures a unit; whatever goes wrong there is an outcome too.

    Args:
        unit: What to measure.
        limit: Seconds after which it is given up.
    """
    began = time.perf_counter()
    found: dict[str, Any]
    try:
        with interrupted_after(min(limit, 3 * unit.seconds)):
            forget_the_last_run()
            found = {"status": DONE, "result": unit.measure()}
    except torch.OutOfMemoryError as error:
        found = {"status": NO_MEMORY, "error": str(error)[:500]}
    except (Exception, SystemExit) as error:  # noqa: BLE001  # the other units are worth having
        trace = "".join(traceback.format_exception(error))
        found = {"status": FAILED, "error": f"{type(error).__name__}: {error}"[:1000], "traceback": trace[-6000:]}
    try:
        forget_the_last_run()
    except Exception as error:  # noqa: BLE001
        found["cleaning"] = f"{type(error).__name__}: {error}"
    return found | {"seconds": time.perf_counter() - began}


def brief(done: dict[str, Any]) -> str:
    """The figure of a unit that matters most, or its error, for the screen."""
    if done["status"] != DONE:
        return done["error"][:300]
    result = done["result"]
    if "tests" in result:
        return str({key: value for key, value in result.items() if key != "tests"})
    mfu = f", MFU {result['mfu']:.1%}" if result["mfu"] is not None else ""
    memory = f", {result['peak_memory_gib']:.1f} GiB" if result["peak_memory_gib"] is not None else ""
    return f"({result['milliseconds']:.1f} ms/step, {result['images_per_second']:,.0f} images/s{mfu}{memory})"


@contextmanager
def interrupted_after(seconds: float) -> Iterator[None]:
    """Raises TimeoutError in the main thread once so many seconds are over, where the system has alarms."""
    if not hasattr(signal, "setitimer"):
        yield
        return

    def ring(*_: object) -> None:
        raise TimeoutError(f"took more than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def on_device(device: torch.device) -> Iterator[None]:
    """Makes accelerate take the CPU although there is a GPU, if that is what is measured."""
    before = os.environ.get("ACCELERATE_USE_CPU")
    if device.type == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
    try:
        yield
    finally:
        os.environ.pop("ACCELERATE_USE_CPU", None)
        if before is not None:
            os.environ["ACCELERATE_USE_CPU"] = before


def device_name(device: torch.device) -> str:
    """The name that the driver gives a GPU; "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def device_facts(device: torch.device) -> dict[str, Any]:
    """What a reader must know of the device beside its name."""
    facts: dict[str, Any] = {"name": device_name(device), "type": device.type}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "memory_gib": properties.total_memory / 2**30,
            "multiprocessors": properties.multi_processor_count,
            "capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    return facts


if __name__ == "__main__":
    run_script(main, __doc__, GPUSuiteConfig)
