"""What the training script needs before its loop: every check, then every part, then the folder of the run."""

import logging
import multiprocessing
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from torch import Tensor
from torch.utils.data import DataLoader

from ..data.bad_images import BadImages
from ..data.batch_sampler import BatchOrder
from ..data.images import ImageDataset, ImageSource, collate
from ..data.latents import LatentDataset, cache_latents, vae_fingerprint
from ..data.streaming import StreamSource
from ..data.streaming_order import StreamOrder
from ..data.streaming_reader import StreamDataset, StreamReader
from ..data.workers import end_with_parent
from ..generation.export import embedding_row_names
from ..generation.generate import choose_classes
from ..generation.original_dit import STOCK_CONSTANTS
from ..generation.pretrained import GUIDANCE_UNTRAINED, load_vae
from ..hub import Destination, check_destination
from ..models import FREQ_SHIFT
from .checkpoints import load_checkpoint, load_learned, load_tracks, read_state
from .config import TrainConfig, with_steps_of_epochs
from .ema import ExponentialMovingAverage, fitted_decay
from .ema_tracks import EmaTracks
from .feedback import ErrorFeedback
from .guard import NonFiniteGuard
from .learning_rate import make_lr_scheduler
from .optimizer import make_optimizer
from .parts import (
    check_same_step,
    make_accelerator,
    make_layout,
    make_learned_variance,
    make_model,
    make_scheduler,
    open_held_out,
    open_resumed_data,
    set_learning_rate,
)
from .ranks import Ranks
from .results import score_settings, start_trackers
from .run import Inputs, TrainingRun
from .run_folder import (
    BAD_IMAGES_FILE,
    LOGGING_FOLDER,
    check_output_dir,
    check_resumed_config,
    check_steps_left,
    open_output_dir,
)
from .trackers import Trackers
from .tracking import check_trackers, tracker_names
from .validation import ValidationSet

logger = logging.getLogger(__name__)

FREQUENCIES_OF_ITS_OWN = (
    "%s was trained with timestep frequencies of its own (freq_shift=%g in its config), and the run keeps them: "
    "sample from it with SpeeDDiTPipeline; the stock DiTPipeline computes others and predicts something else."
)
"""The warning for a start that DiT's own code has trained; takes its name and the shift."""

TrainingData = LatentDataset | ImageDataset | StreamDataset
"""What a loader reads batches from."""

LOCAL_TRACKERS = ("tensorboard",)
"""Trackers that write to the folder of the run and nowhere else."""


def check_inputs(config: TrainConfig) -> Inputs:
    """Opens and checks all that a run needs.

    Raises:
        InputError: Anything a user can mend; nothing has been written.
    """
    check_trackers(config.report_to, config.tracker_project_name)
    scheduler = make_scheduler(config)
    make_learned_variance(config, scheduler, torch.device("cpu"))
    checkpoint = check_output_dir(config)
    source = open_resumed_data(config, checkpoint)
    held_out = open_held_out(config, source)
    vae = load_vae(config.pretrained_vae_model_name_or_path).eval().requires_grad_(False)
    core = make_model(config, source.num_classes, vae, source.label_names)
    last_row = core.transformer.config["num_embeds_ada_norm"]
    choose_classes(config.validation_class_labels, embedding_row_names(source.label_names), last_row=last_row)
    if config.num_score_images is not None:
        score_settings(config, torch.device("cpu"))
    accelerator = make_accelerator(config)
    guided = config.guidance_scale > 1 and source.num_classes > 0
    if guided and config.class_dropout_prob == 0 and accelerator.is_main_process:
        logger.warning(GUIDANCE_UNTRAINED, config.output_dir, config.guidance_scale)
    shift = core.transformer.config.get(FREQ_SHIFT)
    if shift not in (None, STOCK_CONSTANTS[FREQ_SHIFT]) and accelerator.is_main_process:
        logger.warning(FREQUENCIES_OF_ITS_OWN, config.pretrained_model_name_or_path, shift)
    if config.push_to_hub and accelerator.is_main_process:
        check_push(config)
    layout = make_layout(config, accelerator, checkpoint)
    config = with_steps_of_epochs(config, len(source), layout.global_batch)
    if checkpoint is not None:
        check_steps_left(config, checkpoint)
    check_same_step(accelerator, checkpoint)
    identity = {
        "data_signature": source.signature(),
        "vae_fingerprint": vae_fingerprint(vae),
        "mixed_precision": accelerator.mixed_precision,
    }
    if checkpoint is not None:
        # Signatures of version 0.1 cover less: such a checkpoint is checked by its own rule.
        comparable = source.signature(read_state(checkpoint)["data_signature"])
        check_resumed_config(config, checkpoint, identity | {"data_signature": comparable})
    return Inputs(config, accelerator, scheduler, source, held_out, vae, core, layout, checkpoint, identity)


def check_push(config: TrainConfig) -> None:
    """Checks that the result can be released; that the Hub cannot be asked now is a warning, for it may be by then.

    Raises:
        InputError: Name or token are wrong.
    """
    try:
        check_destination(Destination(config.hub_model_id or "", config.hub_private_repo, config.hub_revision))
    except ConnectionError as error:
        logger.warning("push_to_hub=true: %s It is tried again at the end of the training.", error)


def start_run(inputs: Inputs) -> TrainingRun:
    """Builds every part of a run, restores its checkpoint, and, last of all, makes its folder."""
    config, accelerator, layout = inputs.config, inputs.accelerator, inputs.layout
    ranks = Ranks.of(accelerator, config.ddp_timeout)
    bad_images = BadImages(len(inputs.source), config.max_bad_images, Path(config.output_dir) / BAD_IMAGES_FILE)
    dataset = make_dataset(inputs, bad_images, ranks)
    # Machines with caches of their own take their own time.
    ranks.meet()
    optimizer = make_optimizer(config, inputs.core, accelerator.device)
    with warnings.catch_warnings():
        # torch has another name for it since 2.14, which accelerate does not pass on yet.
        warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
        model, optimizer = accelerator.prepare(inputs.core, optimizer)
    # The model itself, not what compiles it (ACCELERATE_DYNAMO_BACKEND): names of its parameters go into checkpoints.
    core = accelerator.unwrap_model(model, keep_torch_compile=False)
    lr_scheduler = make_lr_scheduler(config, optimizer.optimizer)
    decay = config.ema_decay if config.ema_decay is not None else fitted_decay(config.max_train_steps)
    ema = ExponentialMovingAverage(core, decay)
    ema_tracks = EmaTracks(core, config.ema_tracks) if config.ema_tracks else None
    first_step, seconds, log = 0, 0.0, None
    if inputs.checkpoint is not None:
        load_checkpoint(inputs.checkpoint, model=core, ema=ema, optimizer=optimizer.optimizer)
        state = read_state(inputs.checkpoint)
        first_step, seconds, log = state["step"], state.get("seconds", 0.0), state.get("log")
        set_learning_rate(lr_scheduler, first_step)
        if ema_tracks is not None:
            ema_tracks.load_state_dict(load_tracks(inputs.checkpoint))
    scheduler = inputs.scheduler
    feedback = ErrorFeedback(scheduler, accelerator.device) if scheduler.speed_is_loss_aware else None
    if feedback is not None and inputs.checkpoint is not None:
        feedback.load_state_dict(load_learned(inputs.checkpoint), is_main_process=accelerator.is_main_process)
    lock = None
    validation = None
    if accelerator.is_main_process:
        validation = encode_held_out(inputs)
        lock = open_output_dir(config, layout.accumulation, inputs.checkpoint, inputs.source.label_names)
        if inputs.checkpoint is not None:
            bad_images.load()
        bad_images.save()
    ranks.meet()
    return TrainingRun(
        config=config,
        accelerator=accelerator,
        ranks=ranks,
        trackers=Trackers(accelerator, Path(config.output_dir) / LOGGING_FOLDER),
        scheduler=scheduler,
        learned_variance=make_learned_variance(config, scheduler, accelerator.device),
        feedback=feedback,
        source=inputs.source,
        bad_images=bad_images,
        vae=inputs.vae,
        core=core,
        model=model,
        optimizer=optimizer,
        lr_scheduler=lr_scheduler,
        ema=ema,
        ema_tracks=ema_tracks,
        guard=NonFiniteGuard(optimizer.optimizer, accelerator.device),
        layout=layout,
        loader=make_loader(inputs, dataset, first_step),
        first_step=first_step,
        seconds=seconds,
        log=log,
        identity=inputs.identity,
        validation=validation,
        lock=lock,
    )


def encode_held_out(inputs: Inputs) -> ValidationSet | None:
    """The held-out images as the network sees them, or None where there are none."""
    if inputs.held_out is None:
        return None
    inputs.vae.to(inputs.accelerator.device)
    return ValidationSet.encode(
        inputs.held_out,
        inputs.vae,
        resolution=inputs.config.resolution,
        center_crop=inputs.config.center_crop,
        num_images=inputs.config.max_validation_samples,
        batch_size=inputs.config.vae_batch_size,
    )


def make_loader(inputs: Inputs, dataset: TrainingData, first_step: int) -> DataLoader[dict[str, Tensor]]:
    """Batches of this process from an optimizer step on; their order is a function of the step."""
    config = inputs.config
    return DataLoader(
        dataset,
        batch_sampler=make_order(inputs, first_step),
        collate_fn=collate,
        num_workers=config.dataloader_num_workers,
        worker_init_fn=end_with_parent,
        multiprocessing_context=worker_context() if config.dataloader_num_workers else None,
        prefetch_factor=config.dataloader_prefetch_factor if config.dataloader_num_workers else None,
        pin_memory=inputs.accelerator.device.type == "cuda",
        # Its own generator: an iterator would otherwise take its workers' seed from torch's global one.
        generator=torch.Generator(),
    )


def make_order(inputs: Inputs, first_step: int) -> BatchOrder | StreamReader:
    """Which images make which batch of this process, from an optimizer step on; of a stream, the images themselves."""
    config, source = inputs.config, inputs.source
    span = {"seed": config.seed, "first_step": first_step, "max_steps": config.max_train_steps}
    if not isinstance(source, StreamSource):
        return BatchOrder(len(source), inputs.layout, **span)
    rows = np.diff(source.starts)
    order = StreamOrder(rows, inputs.layout, shuffle_buffer_size=config.shuffle_buffer_size, **span)
    return StreamReader(source, order)


def worker_context() -> str:
    """How workers are started: a forked worker of a process with threads can deadlock; Windows only spawns."""
    return "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"


def make_dataset(inputs: Inputs, bad_images: BadImages, ranks: Ranks) -> TrainingData:
    """Cached latents, which all processes encode together, or images where the cache is off.

    Without a barrier between processes: encoding a large set takes longer than a process group waits.
    """
    config, accelerator, source = inputs.config, inputs.accelerator, inputs.source
    if not config.cache_latents:
        inputs.vae.to(accelerator.device)
    if isinstance(source, StreamSource):
        return StreamDataset(source, resolution=config.resolution, center_crop=config.center_crop)
    assert isinstance(source, ImageSource)
    if not config.cache_latents:
        return ImageDataset(source, resolution=config.resolution, center_crop=config.center_crop)
    return cached_latents(
        config,
        accelerator,
        source,
        inputs.vae,
        vae_fingerprint=inputs.identity["vae_fingerprint"],
        bad_images=bad_images,
        on_progress=ranks.gets_on,
    )


def cached_latents(
    config: TrainConfig,
    accelerator: Accelerator,
    source: ImageSource,
    vae: AutoencoderKL,
    *,
    vae_fingerprint: str,
    bad_images: BadImages,
    verify: bool = False,
    on_progress: Callable[[], object] | None = None,
) -> LatentDataset:
    """The latents that a run's options ask for; see `cache_latents`."""
    return cache_latents(
        source,
        vae,
        vae_fingerprint=vae_fingerprint,
        resolution=config.resolution,
        center_crop=config.center_crop,
        random_flip=config.random_flip,
        batch_size=config.vae_batch_size,
        device=accelerator.device,
        cache_dir=config.cache_dir,
        bad_images=bad_images,
        rank=accelerator.process_index,
        num_processes=accelerator.num_processes,
        verify=verify,
        on_progress=on_progress,
    )


@contextmanager
def temporary_run(
    config: TrainConfig, *, steps: int, change: Callable[[Inputs], Inputs] = lambda inputs: inputs
) -> Iterator[TrainingRun]:
    """A run that can take `steps` steps and leaves nothing behind but cached latents, for those who measure steps.

    Args:
        config: Options of the trainer. The folder of the run is a temporary one, its length is `steps`, and trackers
            that write elsewhere are left out.
        steps: Optimizer steps that `training_steps` can take.
        change: Replaces parts of the run before it starts.

    Raises:
        InputError: As `check_inputs`.
    """
    # What a step costs does not depend on the rate, whose warm-up and decay may be longer than the few steps.
    warmup = min(config.lr_warmup_steps, steps - 1)
    with tempfile.TemporaryDirectory(prefix="speed-diffusers-") as folder:
        config = replace(
            config,
            lr_warmup_steps=warmup,
            lr_decay_steps=min(config.lr_decay_steps, steps - warmup),
            output_dir=folder,
            max_train_steps=steps,
            num_train_epochs=None,
            report_to=[name for name in tracker_names(config.report_to) if name in LOCAL_TRACKERS],
            resume_from_checkpoint=None,
            overwrite_output_dir=False,
        )
        run = start_run(change(check_inputs(config)))
        start_trackers(run)
        try:
            yield run
        finally:
            run.close()
