"""What the training script needs before its loop: every check, then every part, then the folder of the run."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from diffusers.optimization import get_scheduler
from filelock import FileLock
from torch import Tensor
from torch.utils.data import DataLoader

from run_folder import check_numbers, check_output_dir, check_resumed_config, open_output_dir
from run_results import score_settings
from speed_diffusers.checkpoints import load_checkpoint, load_learned, read_state
from speed_diffusers.data.images import ImageDataset, ImageSource, collate
from speed_diffusers.data.latents import LatentDataset, cache_latents, sample_latents, vae_fingerprint
from speed_diffusers.data.order import BatchLayout, BatchOrder
from speed_diffusers.draws import StepDraws
from speed_diffusers.ema import ExponentialMovingAverage, fitted_decay
from speed_diffusers.errors import InputError
from speed_diffusers.export import embedding_row_names
from speed_diffusers.feedback import ErrorFeedback
from speed_diffusers.guard import NonFiniteGuard
from speed_diffusers.hub import load_vae
from speed_diffusers.models import TrainableDiT
from speed_diffusers.profiling import labelled
from speed_diffusers.sampling import choose_classes
from speed_diffusers.tracking import check_trackers
from speed_diffusers.train_config import TrainConfig
from speed_diffusers.variance import LearnedVariance
from training_parts import (
    TrainingScheduler,
    check_same_step,
    make_accelerator,
    make_layout,
    make_learned_variance,
    make_model,
    make_scheduler,
    open_data,
    set_learning_rate,
)


@dataclass
class TrainingRun:
    """Everything the loop works with; `model` is what accelerate prepared, `core` the module inside it."""

    config: TrainConfig
    accelerator: Accelerator
    scheduler: TrainingScheduler
    learned_variance: LearnedVariance | None
    feedback: ErrorFeedback | None
    """Of a density that learns from errors; None for all others."""
    source: ImageSource
    vae: AutoencoderKL
    core: TrainableDiT
    model: torch.nn.Module
    optimizer: Any
    lr_scheduler: Any
    ema: ExponentialMovingAverage
    guard: NonFiniteGuard
    layout: BatchLayout
    loader: DataLoader[dict[str, Tensor]]
    first_step: int
    seconds: float
    """Spent in training steps so far, over all starts of the run."""
    identity: dict[str, str]
    """What a checkpoint must find unchanged besides the options, and is saved with."""
    lock: FileLock | None
    """Held on the folder of the run; None where another process writes."""

    @property
    def output_dir(self) -> Path:
        """Folder of the run."""
        return Path(self.config.output_dir)

    def summed(self, tensor: Tensor) -> Tensor:
        """A tensor summed over all processes."""
        total: Tensor = self.accelerator.reduce(tensor, reduction="sum")
        return total

    def progress(self, step: int) -> float:
        """Share of the training that is done before an optimizer step, in [0, 1)."""
        return step / self.config.max_train_steps

    @labelled("draws")
    def draws(self, step: int) -> StepDraws:
        """All random draws of an optimizer step."""
        shape = self.core.transformer.config
        return StepDraws.at_step(
            self.scheduler,
            seed=self.config.seed,
            step=step,
            latent_shape=(self.layout.global_batch, shape.in_channels, shape.sample_size, shape.sample_size),
            class_dropout_prob=self.config.class_dropout_prob,
            random_flip=self.config.random_flip,
            device=self.accelerator.device,
            progress=self.progress(step),
        )

    def batches(self) -> Iterator[dict[str, Tensor]]:
        """Batches of this process, micro-step by micro-step.

        Raises:
            InputError: An image is damaged; the message names it.
        """
        try:
            yield from self.loader
        except InputError as error:
            # A loader's worker sends its whole traceback as the message; the line is its last.
            raise InputError(str(error).strip().splitlines()[-1].split("InputError: ")[-1]) from error

    @labelled("latents")
    @torch.no_grad()
    def latents(self, batch: dict[str, Tensor], draws: StepDraws) -> Tensor:
        """Latents of a batch, float32 (B, C, h, w), from cached moments or by encoding its images."""
        device = self.accelerator.device
        mirrored = draws.flipped[:, None, None, None]
        if "moments" in batch:
            moments = batch["moments"].to(device, non_blocking=True)
            if "moments_flipped" in batch:
                flipped = batch["moments_flipped"].to(device, non_blocking=True)
                moments = torch.where(mirrored, flipped, moments)
        else:
            pixels = batch["pixel_values"].to(device, non_blocking=True).float() / 127.5 - 1.0
            pixels = torch.where(mirrored, pixels.flip(-1), pixels)
            moments = self.vae.encode(pixels).latent_dist.parameters
        return sample_latents(moments, draws.encoder_noise, self.vae.config.scaling_factor)

    def labels(self, batch: dict[str, Tensor]) -> Tensor:
        """Class ids of a batch, int64 (B,); -1 where the data has no classes."""
        labels = batch["labels"].to(self.accelerator.device, non_blocking=True)
        return labels if self.source.num_classes else torch.full_like(labels, -1)


@dataclass(frozen=True)
class Inputs:
    """What a run is made from, every bit of it checked, before anything is written."""

    config: TrainConfig
    accelerator: Accelerator
    scheduler: TrainingScheduler
    source: ImageSource
    vae: AutoencoderKL
    core: TrainableDiT
    layout: BatchLayout
    checkpoint: Path | None
    identity: dict[str, str]


def check_inputs(config: TrainConfig) -> Inputs:
    """Opens and checks all that a run needs.

    Raises:
        InputError: Anything a user can mend; nothing has been written.
    """
    check_numbers(config)
    check_trackers(config.report_to)
    scheduler = make_scheduler(config)
    make_learned_variance(config, scheduler, torch.device("cpu"))
    checkpoint = check_output_dir(config)
    source = open_data(config)
    choose_classes(config.validation_class_labels, embedding_row_names(source.label_names))
    vae = load_vae(config.pretrained_vae_model_name_or_path).eval().requires_grad_(False)
    core = make_model(config, source, vae)
    if config.num_score_images is not None:
        score_settings(config, torch.device("cpu"))
    accelerator = make_accelerator(config)
    layout = make_layout(config, accelerator, checkpoint)
    check_same_step(accelerator, checkpoint)
    identity = {
        "data_signature": source.signature(),
        "vae_fingerprint": vae_fingerprint(vae),
        "mixed_precision": accelerator.mixed_precision,
    }
    if checkpoint is not None:
        check_resumed_config(config, checkpoint, identity)
    return Inputs(config, accelerator, scheduler, source, vae, core, layout, checkpoint, identity)


def start_run(inputs: Inputs) -> TrainingRun:
    """Builds every part of a run, restores its checkpoint, and, last of all, makes its folder."""
    config, accelerator, layout = inputs.config, inputs.accelerator, inputs.layout
    dataset = make_dataset(inputs)
    adamw = torch.optim.AdamW(
        inputs.core.parameters(),
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.adam_weight_decay,
        eps=config.adam_epsilon,
        fused=True,
    )
    model, optimizer = accelerator.prepare(inputs.core, adamw)
    core = accelerator.unwrap_model(model)
    lr_scheduler = get_scheduler(
        config.lr_scheduler,
        optimizer=optimizer.optimizer,
        num_warmup_steps=config.lr_warmup_steps,
        num_training_steps=config.max_train_steps,
    )
    decay = config.ema_decay if config.ema_decay is not None else fitted_decay(config.max_train_steps)
    ema = ExponentialMovingAverage(core, decay)
    first_step, seconds = 0, 0.0
    if inputs.checkpoint is not None:
        load_checkpoint(inputs.checkpoint, model=core, ema=ema, optimizer=optimizer.optimizer)
        state = read_state(inputs.checkpoint)
        first_step, seconds = state["step"], state.get("seconds", 0.0)
        set_learning_rate(lr_scheduler, first_step)
    scheduler = inputs.scheduler
    feedback = ErrorFeedback(scheduler, accelerator.device) if scheduler.speed_is_adaptive else None
    if feedback is not None and inputs.checkpoint is not None:
        feedback.load_state_dict(load_learned(inputs.checkpoint), is_main_process=accelerator.is_main_process)
    lock = open_output_dir(config, layout.accumulation, inputs.checkpoint) if accelerator.is_main_process else None
    accelerator.wait_for_everyone()
    return TrainingRun(
        config=config,
        accelerator=accelerator,
        scheduler=scheduler,
        learned_variance=make_learned_variance(config, scheduler, accelerator.device),
        feedback=feedback,
        source=inputs.source,
        vae=inputs.vae,
        core=core,
        model=model,
        optimizer=optimizer,
        lr_scheduler=lr_scheduler,
        ema=ema,
        guard=NonFiniteGuard(optimizer.optimizer, accelerator.device),
        layout=layout,
        loader=make_loader(inputs, dataset, first_step),
        first_step=first_step,
        seconds=seconds,
        identity=inputs.identity,
        lock=lock,
    )


def make_loader(
    inputs: Inputs, dataset: LatentDataset | ImageDataset, first_step: int
) -> DataLoader[dict[str, Tensor]]:
    """Batches of this process from an optimizer step on; their order is a function of the step."""
    config = inputs.config
    return DataLoader(
        dataset,
        batch_sampler=BatchOrder(
            len(inputs.source),
            inputs.layout,
            seed=config.seed,
            first_step=first_step,
            max_steps=config.max_train_steps,
        ),
        collate_fn=collate,
        num_workers=config.dataloader_num_workers,
        # A forked worker of a process with threads can deadlock.
        multiprocessing_context="forkserver" if config.dataloader_num_workers else None,
        pin_memory=inputs.accelerator.device.type == "cuda",
        # Its own generator: an iterator would otherwise draw its workers' seed from torch's global one.
        generator=torch.Generator(),
    )


def make_dataset(inputs: Inputs) -> LatentDataset | ImageDataset:
    """Cached latents, or images where the cache is off; a lock lets one process of each machine fill the cache.

    Not by a barrier between processes: encoding a large set takes longer than a process group waits.
    """
    config, accelerator = inputs.config, inputs.accelerator
    if not config.cache_latents:
        inputs.vae.to(accelerator.device)
        return ImageDataset(inputs.source, resolution=config.resolution, center_crop=config.center_crop)
    return cache_latents(
        inputs.source,
        inputs.vae,
        vae_fingerprint=inputs.identity["vae_fingerprint"],
        resolution=config.resolution,
        center_crop=config.center_crop,
        random_flip=config.random_flip,
        batch_size=config.vae_batch_size,
        device=accelerator.device,
        cache_dir=config.cache_dir,
    )
