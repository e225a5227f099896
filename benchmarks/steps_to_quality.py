"""How many optimizer steps each way to train needs for the same quality: a queue of runs, and what they give.

    python benchmarks/steps_to_quality.py work_dir=~/quality                   # all runs that are missing
    python benchmarks/steps_to_quality.py action=report                        # tables and pictures of what is there
    python benchmarks/steps_to_quality.py work_dir=~/quality action=status
    python benchmarks/steps_to_quality.py work_dir=~/quality action=pause      # and action=resume, action=stop

Runs go on two at a time (`workers`), one thread each, at the lowest priority, and survive any stop: started again,
the queue resumes them through the trainer's own checkpoints and repeats nothing that is done. All are trained and
scored by one commit, exported to the work folder. Each leaves one JSON in steps_to_quality/SETTING/ARM-SEED.json.

On a GPU the same command trains there. Networks this small leave most of it idle, so many workers share it, best
through NVIDIA's multi-process service; `max_seconds` fits the queue into the time that there is. A work folder in
which the commit and the data lie needs neither git nor a network: `action=prepare` makes it where they are.

All arms of a seed begin with the same weights (of another size where their initialisation differs), and see the same
images, noise and label drops; their samples begin with the same noise. Which arms and settings there are:
quality_arms.py.
"""

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState
from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from measurement import ROOT
from quality_arms import ARMS, SETTINGS, Job, Setting, jobs
from quality_report import with_ladder, write_report
from speed_diffusers.config.command_line import run_script
from speed_diffusers.config.load import load_config
from speed_diffusers.config.schema import Options, option
from speed_diffusers.data.images import open_images
from speed_diffusers.errors import InputError
from speed_diffusers.files import file_sha256, write_text
from speed_diffusers.hardware import accelerator_or_cpu, processor
from speed_diffusers.metrics import FeatureExtractor, Reference, load_extractor, load_reference
from speed_diffusers.metrics.score import ScoreSettings, score_pipeline
from speed_diffusers.train_scripts import train_dit_speed
from speed_diffusers.training.optimizer import multiplies_bfloat16
from speed_diffusers.training.parts import make_scheduler
from speed_diffusers.training.run_folder import METRICS_FILE, SAMPLES_FILE, load_run_config
from speed_diffusers.training.snapshots import pipeline_of_config, put_weights
from speed_diffusers.training.tracking import read_metrics
from speed_diffusers.training.validation import ValidationSet, pipeline_validation_loss

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "steps_to_quality"
ACTIONS = ("run", "prepare", "report", "status", "pause", "resume", "stop", "work")
VALIDATION_IMAGES = 500
SOURCE, STATE_FILE = "source-", "state.json"
CLAIMS = "claims"
LISTS = ("settings", "arms", "seeds", "runs")
PASSED_ON = ("max_train_steps", "num_images", "max_seconds")
SCORES = ("frechet_distance", "kernel_distance", "precision", "recall", "class_agreement")


@dataclass
class QualityConfig(Options):
    """Options of this benchmark."""

    action: str = option(
        "run",
        "run; prepare: export the commit and make the data only; report: tables and pictures; status, pause, resume, "
        "stop: of a queue that runs; work: one worker, in this process.",
        choices=ACTIONS,
    )
    work_dir: str = option(
        "runs/steps_to_quality", "Where runs, their checkpoints and the exported commit lie.", path=True
    )
    results_dir: str = option(str(RESULTS), "Where the JSON of each run goes.", path=True)
    settings: list[str] = option(["quickstart"], "Settings to run.", choices=SETTINGS)
    package: str | None = option(None, "What a setting's data are made of, where they must be downloaded.", path=True)
    arms: list[str] = option([], "Arms to run; empty: all.", choices=ARMS)
    seeds: list[int] = option([], "Seeds to run; empty: those of each arm.")
    runs: list[str] = option([], "Runs to make, in this order, each SETTING/ARM-SEED; instead of the three before.")
    commit: str | None = option(None, "What to train with; None: that of the work folder, at first HEAD.")
    workers: int = option(2, "Runs at a time, one thread each.", interval="[1, inf)")
    max_seconds: float | None = option(
        None, "A worker begins no run that would end later than so long after the queue's start.", interval="(0, inf)"
    )
    max_train_steps: int | None = option(None, "Cuts every run to so many steps, for a look.", interval="[1, inf)")
    num_images: int | None = option(None, "Generated images per score, for a look.", interval="[2, inf)")


def main(argv: list[str]) -> None:
    """Does what `action` says.

    Raises:
        InputError: Wrong options, no queue to speak to, or runs that failed.
    """
    config = load_config(QualityConfig, argv, HERE)
    shortened = [name for name in ("max_train_steps", "num_images") if getattr(config, name) is not None]
    if shortened and Path(config.results_dir) == RESULTS:
        raise InputError(f"{shortened[0]}={getattr(config, shortened[0])}: cuts runs short; give a results_dir too.")
    work_dir = Path(config.work_dir).resolve()
    if config.action == "work":
        yield_to_others()
        work(config, work_dir)
    elif config.action == "prepare":
        work_dir.mkdir(parents=True, exist_ok=True)
        source = exported_commit(config.commit, work_dir)
        for name in dict.fromkeys(job.setting for job in wanted(config)):
            make_data(name, source, work_dir, config.package)
    elif config.action == "run":
        run_queue(config, work_dir)
    elif config.action == "report":
        for setting in config.settings:
            print(write_report(Path(config.results_dir) / setting))
        if Path(config.results_dir) == RESULTS:
            page = ROOT / "README.md"
            write_text(page, with_ladder(page.read_text("utf-8"), RESULTS))
    elif config.action == "status":
        print(status(config, work_dir))
    else:
        _signal(work_dir, config.action)


def _job(text: str) -> Job:
    setting, _, rest = text.partition("/")
    arm, _, seed = rest.rpartition("-")
    if setting not in SETTINGS or arm not in ARMS or not seed.isdigit():
        raise InputError(f"runs={text}: must be SETTING/ARM-SEED.")
    return Job(setting, arm, int(seed))


def result_path(job: Job, results_dir: Path) -> Path:
    """The file of a run's result."""
    return results_dir / job.setting / f"{job.arm}-{job.seed}.json"


def run_queue(config: QualityConfig, work_dir: Path) -> None:
    """Makes every run that is missing, `workers` at a time.

    Raises:
        InputError: Another queue works in the folder.
    """
    work_dir.mkdir(parents=True, exist_ok=True)
    lock = FileLock(work_dir / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise InputError(f"work_dir={work_dir}: a queue runs there already.") from None
    source = exported_commit(config.commit, work_dir)
    for name in dict.fromkeys(job.setting for job in wanted(config)):
        make_data(name, source, work_dir, config.package)
    results_dir = Path(config.results_dir).resolve()
    every = wanted(config)
    for failure in (work_dir / CLAIMS).rglob("*.failed"):
        failure.unlink()  # tried again
    workers: list[subprocess.Popen[bytes]] = []

    def stop(number: int, frame: object) -> None:
        sys.exit(128 + number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    try:
        for index in range(config.workers):
            workers.append(start(index, config, source, work_dir))
            children = [worker.pid for worker in workers]
            write_text(work_dir / STATE_FILE, json.dumps({"pid": os.getpid(), "children": children}, indent=1))
        with tqdm(total=len(every), unit="run") as progress:
            while True:
                # Asked first, so that what the last worker has left is counted.
                running = [worker for worker in workers if worker.poll() is None]
                progress.update(sum(result_path(job, results_dir).exists() for job in every) - progress.n)
                if not running:
                    break
                time.sleep(2)
    finally:
        # Whatever ends the queue: no run goes on that nobody could pause any more.
        for worker in workers:
            with suppress(ProcessLookupError):
                os.killpg(worker.pid, signal.SIGCONT)
                os.killpg(worker.pid, signal.SIGTERM)
        for worker in workers:
            worker.wait()
    if failed := sum(worker.returncode != 0 for worker in workers):
        raise InputError(f"{failed} worker(s) failed; their logs are in {work_dir / 'logs'}.")


def work(config: QualityConfig, work_dir: Path) -> None:
    """Makes runs that nobody has begun, one after the other, until none is left that fits into the time.

    Raises:
        InputError: Some runs failed; all others have been tried.
    """
    began, pace = time.monotonic(), None
    failed = []
    for job in wanted(config):
        if result_path(job, Path(config.results_dir)).exists():
            continue
        # Until the queue has been through a run it does not know how long one takes.
        needed = ARMS[job.arm].steps * pace if pace is not None else 0.0
        if config.max_seconds is not None and time.monotonic() - began + needed > config.max_seconds:
            continue
        claim = work_dir / CLAIMS / f"{job}.lock"
        failure = claim.with_suffix(".failed")
        claim.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(claim)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            continue
        try:
            if not result_path(job, Path(config.results_dir)).exists() and not failure.exists():
                started = time.monotonic()
                make(job, config, work_dir)
                pace = (time.monotonic() - started) / ARMS[job.arm].steps
                print(f"{job}: done in {time.monotonic() - started:.0f} s.", flush=True)
        except Exception:  # one run that fails must not keep the others from being made
            traceback.print_exc()
            failure.touch()
            failed.append(job)
        finally:
            lock.release()
    if failed:
        raise InputError(f"{len(failed)} run(s) failed: {', '.join(map(str, failed))}.")


def wanted(config: QualityConfig) -> list[Job]:
    """The runs that the options ask for, in their order."""
    return [_job(text) for text in config.runs] or list(jobs(config.settings, config.arms, config.seeds))


def exported_commit(commit: str | None, work_dir: Path) -> Path:
    """The code of one commit in the work folder; the one that is there already, unless another is asked for."""
    kept = work_dir / "commit"
    if commit is None and kept.exists():
        commit = kept.read_text().strip()
    if commit is not None and (source := work_dir / f"{SOURCE}{commit}").exists():
        write_text(kept, commit + "\n")
        return source
    found = subprocess.run(
        ["git", "rev-parse", "--short=12", commit or "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if found.returncode:
        raise InputError(f"commit={commit}: not in the history of {ROOT}.")
    name = found.stdout.strip()
    source = work_dir / f"{SOURCE}{name}"
    if not source.exists():
        temporary = source.with_suffix(".tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        archive = subprocess.run(["git", "archive", name], cwd=ROOT, capture_output=True, check=True).stdout
        subprocess.run(["tar", "-x", "-C", temporary], input=archive, check=True)
        # What an installation puts into the package, so that the folder needs none and no other commit is mixed in.
        for folder in ("pipelines", "train_scripts"):
            (temporary / "speed_diffusers" / folder).symlink_to(Path("..") / folder)
        temporary.rename(source)
    write_text(kept, name + "\n")
    return source


def filled(value: Any, **words: object) -> Any:
    """A text, or the texts in a list or dict, with words in braces replaced."""
    if isinstance(value, str):
        return value.format(**words)
    if isinstance(value, list):
        return [filled(item, **words) for item in value]
    return {key: filled(item, **words) for key, item in value.items()} if isinstance(value, dict) else value


def data_dir(setting: str, work_dir: Path) -> Path:
    """The folder of a setting's data."""
    return work_dir / "data" / setting


def make_data(setting: str, source: Path, work_dir: Path, package: str | None) -> None:
    """Makes what is missing of a setting's data.

    Raises:
        InputError: It is made of something that has not been downloaded.
    """
    folder = data_dir(setting, work_dir)
    for name, command in SETTINGS[setting].made_by.items():
        if (folder / name).exists():
            continue
        if package is None and any("{package}" in word for word in command):
            raise InputError(f"settings={setting}: first {SETTINGS[setting].package}")
        script, *words = filled(command, data=folder, package=package)
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(_paths(source))}
        subprocess.run([sys.executable, source / "train_scripts" / script, *words], check=True, env=environment)


def fingerprints(folder: Path) -> dict[str, str]:
    """SHA-256 of the images and networks of a setting: an autoencoder trained on another CPU is another one."""
    files = sorted(path for path in folder.rglob("*") if path.suffix in (".parquet", ".safetensors"))
    return {path.relative_to(folder).as_posix(): file_sha256(path) for path in files}


def start(index: int, config: QualityConfig, source: Path, work_dir: Path) -> subprocess.Popen[bytes]:
    """Starts a worker, in a process group of its own."""
    log = work_dir / "logs" / f"worker-{index}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    command = ["nice", "-n", "19", sys.executable, str(source / "benchmarks" / Path(__file__).name), "action=work"]
    command += [f"work_dir={work_dir}", f"results_dir={Path(config.results_dir).resolve()}"]
    command += [f"{name}={getattr(config, name)}" for name in PASSED_ON]
    command += [f"{name}=[{','.join(map(str, getattr(config, name)))}]" for name in LISTS]
    command += [f"commit={source.name.removeprefix(SOURCE)}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(_paths(source))}
    with log.open("ab") as file:
        return subprocess.Popen(
            command, stdout=file, stderr=file, stdin=subprocess.DEVNULL, env=environment, start_new_session=True
        )


def _paths(source: Path) -> list[str]:
    return [str(source), *filter(None, [os.environ.get("PYTHONPATH")])]


def _signal(work_dir: Path, action: str) -> None:
    state_file, lock = work_dir / STATE_FILE, FileLock(work_dir / "lock")
    with suppress(Timeout):
        if not state_file.exists() or lock.acquire(timeout=0):
            lock.release()
            raise InputError(f"action={action}: no queue runs in work_dir={work_dir}.")
    state = json.loads(state_file.read_text())
    if action == "stop":
        os.kill(state["pid"], signal.SIGTERM)
        return
    for pid in state["children"]:
        with suppress(ProcessLookupError):  # done since
            os.killpg(pid, signal.SIGSTOP if action == "pause" else signal.SIGCONT)


def yield_to_others() -> None:
    """Puts the session of this process behind all others: Linux weighs sessions, and niceness only within each."""
    if (group := Path("/proc/self/autogroup")).exists():
        group.write_text("19")


def status(config: QualityConfig, work_dir: Path) -> str:
    """What is done, what runs and what waits."""
    results_dir = Path(config.results_dir)
    every = wanted(config)
    done = [job for job in every if result_path(job, results_dir).exists()]
    lines = [f"{len(done)} of {len(every)} runs are done."]
    for job in every:
        metrics = run_dir(job, work_dir) / METRICS_FILE
        if job not in done and metrics.exists() and (records := read_metrics(metrics)):
            lines.append(f"{job}: step {records[-1]['step']} of {ARMS[job.arm].steps}")
    return "\n".join(lines)


def run_dir(job: Job, work_dir: Path) -> Path:
    """The folder of a run."""
    return work_dir / "runs" / str(job)


def make(job: Job, config: QualityConfig, work_dir: Path) -> None:
    """Trains one run, scores it at every step that its arm is measured at, and writes its result."""
    setting, arm = SETTINGS[job.setting], ARMS[job.arm]
    if config.num_images is not None:
        setting = replace(setting, num_images=config.num_images)
    if config.max_train_steps is not None:
        steps = min(arm.steps, config.max_train_steps)
        arm = replace(arm, steps=steps, measured_at=(*(step for step in arm.measured_at if step < steps), steps))
    folder = run_dir(job, work_dir)
    options = {**setting.options, **arm.options, "seed": job.seed, "max_train_steps": arm.steps}
    place = data_dir(job.setting, work_dir)
    if not (folder / "pipeline").is_dir():
        options_here = {**filled(options, data=place), "cache_dir": work_dir / "cache", "output_dir": folder}
        train(options_here | {"resume_from_checkpoint": "latest"})
    points = [measured(folder, step, setting, place) for step in arm.measured_at]
    result = {
        "setting": job.setting,
        "arm": job.arm,
        "seed": job.seed,
        "commit": config.commit,
        "options": options,
        "data": fingerprints(place),
        "protocol": {
            "num_images": setting.num_images,
            "num_inference_steps": setting.num_inference_steps,
            "feature_extractor": setting.extractor,
        },
        "curve": points,
        "environment": {
            "processor": processor(),
            "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "threads": torch.get_num_threads(),
            "multiplies_bfloat16": multiplies_bfloat16(accelerator_or_cpu()),
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "diffusers")},
        },
    }
    pictures = work_dir / "pictures" / job.setting
    pictures.mkdir(parents=True, exist_ok=True)
    shutil.copy(folder / SAMPLES_FILE, pictures / f"{job.arm}-{job.seed}.png")
    target = result_path(job, Path(config.results_dir))
    target.parent.mkdir(parents=True, exist_ok=True)
    write_text(target, json.dumps(result, indent=1) + "\n")
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)


def train(options: Mapping[str, object]) -> None:
    """Trains a run in this process: on a fast device its imports would cost as much as its steps."""
    AcceleratorState._reset_state()
    PartialState._reset_state()
    train_dit_speed.main([f"{key}={value}" for key, value in options.items()])


@cache
def extractor_of(name: str) -> FeatureExtractor:
    """A feature extractor, where the networks are."""
    return load_extractor(name, device=accelerator_or_cpu())


@cache
def reference_of(name: str) -> Reference:
    """A reference, loaded once a worker: what a metric keeps of it is kept with it."""
    return load_reference(name)


def measured(folder: Path, step: int, setting: Setting, data: Path) -> dict[str, Any]:
    """The scores and the validation loss of a run at one of its checkpoints; computed once."""
    kept = folder / "points" / f"{step}.json"
    if kept.exists():
        loaded: dict[str, Any] = json.loads(kept.read_text())
        return loaded
    config = load_run_config(folder)
    pipeline = pipeline_of_config(folder)
    put_weights(pipeline, folder / f"checkpoint-{step}", "ema")
    pipeline.to(accelerator_or_cpu())
    score = score_pipeline(
        pipeline,
        ScoreSettings(
            num_images=setting.num_images,
            num_inference_steps=setting.num_inference_steps,
            extractor=extractor_of(setting.extractor),
            reference=reference_of(filled(setting.reference, data=data)),
        ),
        description=f"Step {step}",
    )
    held_out = open_images(**filled(setting.held_out, data=data))
    images = ValidationSet.encode(
        held_out, pipeline.vae, resolution=config.resolution, center_crop=True, num_images=VALIDATION_IMAGES
    )
    loss = pipeline_validation_loss(pipeline, make_scheduler(config), images)
    times = {record["step"]: record["seconds"] for record in read_metrics(folder / METRICS_FILE)}
    point = {
        "step": step,
        "images": step * config.train_batch_size * config.gradient_accumulation_steps,
        "seconds": round(times[step], 1),
        **{name: score.values.get(name) for name in SCORES},
        "validation_loss": loss.mean,
        "error_by_log_snr": {f"{level:g}": error for level, error in loss.by_log_snr.items()},
    }
    kept.parent.mkdir(exist_ok=True)
    write_text(kept, json.dumps(point) + "\n")
    return point


if __name__ == "__main__":
    run_script(main, __doc__, QualityConfig)
