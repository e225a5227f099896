"""What a run leaves behind and says: its plan, its checkpoints, its grids of samples and its pipeline."""

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DiTPipeline
from torch import Tensor

from ..assets import EMBEDDED
from ..config.load import config_dict
from ..data.bad_images import BadImages
from ..data.images import find_bad_images
from ..data.listing import describe_ignored, describe_images
from ..error_bins import ErrorHistory
from ..errors import InputError
from ..generation.export import add_to_sidecar, embedding_row_names, inference_pipeline, save_pipeline
from ..generation.generate import GenerationSettings, choose_classes, class_samples
from ..generation.processes import Processes
from ..metrics import load_extractor, load_reference
from ..metrics.score import ScoreSettings, check_measurable, score_pipeline
from ..metrics.score_record import save_score, score_path
from ..models import export_transformer
from ..reports.plots import save_class_grid, save_error_map
from ..reports.strategy_plot import area_shares
from ..reports.strategy_report import describe_run, unused_options
from ..reports.training_cost import TrainingCost
from ..variance import LEARNED_RANGE
from ..version import __version__
from .checkpoint_folders import prune_checkpoints
from .checkpoints import full_tensors, save_checkpoint
from .config import TrainConfig
from .ema_tracks import save_snapshot
from .guard import not_finite
from .profiling import labelled
from .record import published_config, record_of
from .run import Inputs, TrainingRun
from .run_folder import (
    ERRORS_FILE,
    LOSS_FILE,
    METRICS_FILE,
    PIPELINE_FOLDER,
    SAMPLES_FILE,
    SCORES_FOLDER,
    VALIDATION_FOLDER,
)
from .trackers import History
from .tracking import MetricsFile, read_metrics, tracked_values
from .validation import pipeline_validation_loss


def describe_plan(inputs: Inputs) -> str:
    """The run in a few lines: model, data, steps, and where SpeeD draws its timesteps."""
    config, layout, core = inputs.config, inputs.layout, inputs.core
    areas = inputs.scheduler.speed_areas
    drawn = area_shares(inputs.scheduler.speed_tables, areas)
    parameters = sum(parameter.numel() for parameter in core.parameters())
    shape: Any = core.transformer.config
    epochs = config.max_train_steps * layout.global_batch / len(inputs.source)
    shares = ", ".join(f"{name} [{area.start}, {area.stop}) {drawn[name]:.1%}" for name, area in vars(areas).items())
    side = shape.sample_size
    lines = {
        "model": f"{parameters / 1e6:.2f} M parameters, latents {shape.in_channels}x{side}x{side}",
        "data": describe_images(inputs.source),
        "ignored": describe_ignored(inputs.source),
        "steps": f"{config.max_train_steps:,} of {layout.global_batch} images ({epochs:.1f} epochs): "
        f"{layout.per_device} per device x {layout.processes} process(es) x {layout.accumulation} accumulated",
        "speed": "{speed_sampling} sampling, {speed_weighting} weighting".format(**config.speed),
        "target": config.prediction_type + (", learned variance" if config.variance_type == LEARNED_RANGE else ""),
        "draws": shares,
        "unused": ", ".join(unused_options(inputs.scheduler.speed_strategy)),
        "output": config.output_dir,
    }
    return "\n".join(f"{name:>7}: {text}" for name, text in lines.items() if text)


def describe_costs(inputs: Inputs) -> str:
    """What the run's strategy draws and weighs, and what the run costs, as `plan.py` tells it."""
    config, core = inputs.config, inputs.core
    cost = TrainingCost(
        config=core.transformer.config,
        num_parameters=sum(parameter.numel() for parameter in core.parameters()),
        global_batch=inputs.layout.global_batch,
        max_train_steps=config.max_train_steps,
        num_images=len(inputs.source),
        **config.cost_options(),
    )
    return describe_run(inputs.scheduler, cost)


def check_images(inputs: Inputs) -> str:
    """Decodes every image of the data and says how many are bad, each of which is a warning.

    Raises:
        InputError: They are more than `max_bad_images` allows.
    """
    bad_images = BadImages(len(inputs.source), inputs.config.max_bad_images)
    bad_images.add(find_bad_images(inputs.source))
    return bad_images.summary() if bad_images else f"All {len(inputs.source):,} images can be read."


def tracker_config(config: TrainConfig) -> dict[str, Any]:
    """The configuration as trackers take it: no lists, no None."""
    return {
        name: value if isinstance(value, int | float | str | bool) else str(value)
        for name, value in config_dict(config).items()
    }


def start_trackers(run: TrainingRun) -> None:
    """Starts the trackers of a run, and tells them its options and where it begins."""
    config = run.config
    run.trackers.start(
        config.tracker_project_name,
        tracker_config(config),
        first_step=run.first_step,
        history=history_of(run),
        # Options that have changed compute something else.
        is_another_run=config.allow_config_changes and run.first_step > 0,
    )


def history_of(run: TrainingRun) -> History:
    """What trackers were to be told until the step that a run resumes from, as its folder has it."""
    if not run.first_step or not run.accelerator.is_main_process:
        return History()
    validation, timesteps = run.output_dir / VALIDATION_FOLDER, run.config.num_train_timesteps
    lines = _lines_until(run.first_step, run.output_dir / METRICS_FILE)
    losses = _lines_until(run.first_step, validation / LOSS_FILE)
    numbers = [(line["step"], tracked_values(line, timesteps)) for line in lines]
    numbers += [(line["step"], validation_values(line)) for line in losses]
    steps = {int(path.stem.removeprefix("step-")): path for path in sorted(validation.glob("step-*.png"))}
    return History(numbers, {step: path for step, path in steps.items() if step <= run.first_step})


def _lines_until(step: int, path: Path) -> list[dict[str, Any]]:
    return [line for line in read_metrics(path) if line["step"] <= step] if path.is_file() else []


@labelled("checkpoint")
def save_state(run: TrainingRun, step: int, log: Mapping[str, Any] | None = None) -> None:
    """Saves a checkpoint, then deletes those beyond the limit.

    Args:
        run: The run; every process must call this.
        step: Optimizer steps done.
        log: `StepLog.state_dict()`; without it the first line of a resumed run knows only the steps since.

    Raises:
        FloatingPointError: Parameters, EMA weights or moments are not finite; nothing has been written.
    """
    run.ranks.at(step, "checkpoint")
    moments = {
        f"moments {index}/{name}": value
        for index, values in enumerate(run.optimizer.optimizer.state.values())
        for name, value in values.items()
        if name != "step"
    }
    check_finite(run, step, {**dict(run.core.named_parameters()), **ema_tensors(run), **moments})
    tracks = None if run.ema_tracks is None else full_tensors(run.ema_tracks.state_dict())
    # Before the checkpoint: a run that goes on from it would not make the snapshot of its step again. A stop elsewhere
    # must not change what is made of the snapshots.
    if tracks is not None and run.config.saves_at(step) and run.accelerator.is_main_process:
        save_snapshot(run.output_dir, step, tracks)
    save_checkpoint(
        run.output_dir,
        step=step,
        model=run.core,
        ema=run.ema,
        optimizer=run.optimizer.optimizer,
        state={
            "config": config_dict(run.config),
            "global_batch": run.layout.global_batch,
            "seconds": run.seconds,
            **({} if log is None else {"log": dict(log)}),
            **run.identity,
            "version": __version__,
        },
        is_main_process=run.accelerator.is_main_process,
        learned=None if run.feedback is None else run.feedback.state_dict(run.summed),
        tracks=tracks,
    )
    if run.accelerator.is_main_process:
        prune_checkpoints(run.output_dir, run.config.checkpoints_total_limit, keep=step)
    run.ranks.meet()


def check_finite(run: TrainingRun, step: int, tensors: Mapping[str, Tensor]) -> None:
    """Checks that what is about to be saved is finite, on all processes; every one must call it.

    Raises:
        FloatingPointError: It is not; with the step and the first name.
    """
    names = not_finite(tensors)
    if int(run.summed(torch.tensor(len(names), device=run.accelerator.device))):
        where = f"{names[0]}, {len(names)} of {len(tensors)} tensors" if names else "on another rank"
        raise FloatingPointError(
            f"What was trained is not finite after step {step} ({where}); nothing of it was saved. Resume from the "
            "last checkpoint with a lower learning_rate or max_grad_norm=1."
        )


def ema_tensors(run: TrainingRun) -> dict[str, Tensor]:
    """The EMA weights by names that tell them from the parameters."""
    return {f"EMA of {name}": value for name, value in run.ema.state_dict().items()}


@labelled("validation")
def validate(run: TrainingRun, step: int) -> None:
    """The loss on held-out images, and a grid of images of the same noise and classes as ever, of the EMA weights."""
    run.ranks.at(step, "validation")
    pipeline = ema_pipeline(run)
    if run.accelerator.is_main_process:
        (run.output_dir / VALIDATION_FOLDER).mkdir(exist_ok=True)
        save_validation_loss(run, pipeline, step)
    run.ranks.meet()
    save_grid(run, pipeline, grid_file(run, step), f"step {step:,}", step)
    run.ranks.meet()


def grid_file(run: TrainingRun, step: int) -> Path:
    """The grid of a validation; where it is, the validation was done."""
    return run.output_dir / VALIDATION_FOLDER / f"step-{step:07d}.png"


def validate_missed(run: TrainingRun) -> None:
    """The validation of the step that a run resumes from, if it was stopped between saving and validating."""
    step, interval = run.first_step, run.config.validation_steps
    if not step or not interval or step % interval:
        return
    # Asked by one process: another could look when the grid is there already.
    is_missing = run.accelerator.is_main_process and not grid_file(run, step).exists()
    if run.summed(torch.tensor(float(is_missing), device=run.accelerator.device)) > 0:
        validate(run, step)


def save_validation_loss(run: TrainingRun, pipeline: DiTPipeline, step: int) -> None:
    """Measures a pipeline on the held-out images, if there are any: to `validation/loss.jsonl`, trackers, screen."""
    if run.validation is None:
        return
    loss = pipeline_validation_loss(pipeline, run.scheduler, run.validation, batch_size=run.config.vae_batch_size)
    levels = {f"{level:g}": error for level, error in loss.by_log_snr.items()}
    path = run.output_dir / VALIDATION_FOLDER / LOSS_FILE
    path.parent.mkdir(exist_ok=True)
    is_known = path.is_file() and step in {line["step"] for line in read_metrics(path)}
    line = {"step": step, "validation_loss": loss.mean, "error_by_log_snr": levels}
    MetricsFile(path, step - 1).write(line)
    run.trackers.log(validation_values(line), step, is_known=is_known)
    print(f"Validation loss at step {step:,}: {loss.mean:.4f}.")


def validation_values(line: Mapping[str, Any]) -> dict[str, float]:
    """What trackers are told of a line of `validation/loss.jsonl`."""
    by_level = {f"validation_error/log_snr_{level}": error for level, error in line["error_by_log_snr"].items()}
    return {"validation_loss": line["validation_loss"], **by_level}


def save_results(run: TrainingRun) -> None:
    """Exports the EMA weights as a plain pipeline and generates `samples.png` with it.

    Raises:
        FloatingPointError: The EMA weights are not finite; nothing has been written.
        OSError: The disk is full or not writable; with the path and the bytes.
    """
    began = time.perf_counter()
    run.ranks.at(run.config.max_train_steps, "results")
    check_finite(run, run.config.max_train_steps, ema_tensors(run))
    config, pipeline = run.config, ema_pipeline(run)
    if run.accelerator.is_main_process:
        sidecar = {
            "speed_diffusers": __version__,
            "training_config": published_config(run.config, run.layout.accumulation),
            "training": dataclasses.asdict(record_of(run)),
        }
        save_pipeline(pipeline, run.output_dir / PIPELINE_FOLDER, sidecar)
    run.ranks.meet()
    title = f"{config.model}, {config.max_train_steps:,} steps, guidance {config.guidance_scale:g}"
    save_grid(run, pipeline, run.output_dir / SAMPLES_FILE, title, config.max_train_steps)
    if run.accelerator.is_main_process:
        save_validation_loss(run, pipeline, config.max_train_steps)
        records = read_metrics(run.output_dir / METRICS_FILE)
        history = ErrorHistory.from_records(records, config.num_train_timesteps)
        title = f"{config.model}, {config.prediction_type}: error by timestep"
        save_error_map(history, run.scheduler.speed_areas, title, run.output_dir / ERRORS_FILE)
        print(
            f"Saved {run.output_dir / PIPELINE_FOLDER} and {run.output_dir / SAMPLES_FILE} "
            f"in {time.perf_counter() - began:.0f} s."
        )
    run.ranks.meet()
    if config.num_score_images is not None:
        save_final_score(run, pipeline)
    run.ranks.meet()


def score_settings(config: TrainConfig, device: torch.device) -> ScoreSettings:
    """How a run is scored at its end: without guidance, all classes in turn.

    Raises:
        InputError: No such extractor or reference, or they do not fit the images of the run.
    """
    if config.score_reference == EMBEDDED and config.dataset_name != EMBEDDED:
        raise InputError(
            f"num_score_images={config.num_score_images}: score_reference=embedded is of Fashion-MNIST, not of "
            "these images; give a file of make_reference_statistics.py, or num_score_images=None for no score."
        )
    settings = ScoreSettings(
        num_images=config.num_score_images or 2,
        batch_size=config.vae_batch_size,
        sampler=config.sampler,
        num_inference_steps=config.num_inference_steps,
        extractor=load_extractor(config.feature_extractor, device=device),
        reference=load_reference(config.score_reference),
    )
    check_measurable(settings, config.resolution)
    return settings


def save_final_score(run: TrainingRun, pipeline: DiTPipeline) -> None:
    """Scores the result: to `scores/`, into the pipeline's sidecar file, to the trackers and to the screen."""
    step = run.config.max_train_steps
    settings = score_settings(run.config, run.accelerator.device)
    score = score_pipeline(pipeline, settings, processes=Processes.of_process_group(run.accelerator.device))
    if not run.accelerator.is_main_process:
        return
    images_seen = step * run.layout.global_batch
    is_known = score_path(run.output_dir / SCORES_FOLDER, score.protocol, step).exists()
    save_score(score, run.output_dir / SCORES_FOLDER, step=step, images_seen=images_seen, seconds=run.seconds)
    add_to_sidecar(run.output_dir / PIPELINE_FOLDER, {"score": score.to_dict()})
    numbers = {name: value for name, value in score.values.items() if value is not None}
    run.trackers.log({f"score/{name}": value for name, value in numbers.items()}, step, is_known=is_known)
    words = ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in numbers.items())
    print(f"Score: {words} ({score.protocol.in_words()}).")


def ema_pipeline(run: TrainingRun) -> DiTPipeline:
    """A stock pipeline with the EMA weights; every process must call it."""
    transformer = export_transformer(run.core.transformer.config, full_tensors(run.ema.state_dict()))
    names = run.source.label_names
    pipeline = inference_pipeline(transformer, run.vae, run.scheduler, names)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(run.accelerator.device)


def save_grid(run: TrainingRun, pipeline: DiTPipeline, path: Path, title: str, step: int) -> None:
    """One row of samples per class, generated by all processes, each of which must call it."""
    config = run.config
    names = embedding_row_names(run.source.label_names)
    last_row = pipeline.transformer.config.num_embeds_ada_norm
    rows = choose_classes(config.validation_class_labels, names, last_row=last_row)
    images = class_samples(
        pipeline,
        list(rows),
        config.num_validation_images,
        GenerationSettings(
            guidance_scale=config.guidance_scale,
            sampler=config.sampler,
            num_inference_steps=config.num_inference_steps,
            seed=config.seed,
            batch_size=config.vae_batch_size,
        ),
        Processes.of_process_group(run.accelerator.device),
    )
    if run.accelerator.is_main_process:
        is_known = path.exists()
        save_class_grid(images, list(rows.values()), title, path)
        run.trackers.log_picture(path, step, is_known=is_known)
