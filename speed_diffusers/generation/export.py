"""Export to a plain DiTPipeline: stock classes only, so that it opens where nobody has heard of this package."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    SchedulerMixin,
)

from ..files import give_usual_mode, write_text, written_whole
from ..models import label_to_embedding_row
from ..process import is_rectified_flow

SIDECAR = "speed_training.json"
"""File beside `model_index.json` with the run's configuration; stock diffusers does not read it."""


@dataclass(frozen=True)
class TrainingRecord:
    """How a run went, besides its options, as far as it is known; nothing of the machine but its kind.

    Attributes:
        images: Images, classes and images per class, in words.
        num_images: Images of the data.
        global_batch: Images per optimizer step, over all processes and accumulated batches.
        images_seen: Images trained on, repeated ones counted again.
        seconds: Spent in training steps over all starts, without checkpoints, grids and scores.
        hardware: Of the last start, in words.
        mixed_precision: "no" or "bf16".
        torch: Version of torch.
        dataset: Id on the Hub, or "embedded"; None for files of the machine.
        vae: Id of the autoencoder on the Hub, or "embedded"; None for a folder.
        base_model: Id of the model that was fine-tuned; None for a folder, and where the model was new.
    """

    images: str | None = None
    num_images: int | None = None
    global_batch: int | None = None
    images_seen: int | None = None
    seconds: float | None = None
    hardware: str | None = None
    mixed_precision: str | None = None
    torch: str | None = None
    dataset: str | None = None
    vae: str | None = None
    base_model: str | None = None


def inference_pipeline(
    transformer: DiTTransformer2DModel,
    vae: AutoencoderKL,
    scheduler: SchedulerMixin,
    label_names: Sequence[str] | None,
) -> DiTPipeline:
    """A stock pipeline around a trained transformer.

    Args:
        transformer: From `models.export_transformer`.
        vae: The autoencoder that made the latents.
        scheduler: That of the training; its schedule and prediction type go into a DDIM scheduler, a flow's shift into
            FlowMatchEulerDiscreteScheduler, with which `SpeeDDiTPipeline` samples but the stock
            pipeline does not.
        label_names: Name of each class id, or None for a model without classes.
    """
    id2label = embedding_row_names(label_names) or None
    sampler = inference_scheduler(scheduler)
    pipeline = DiTPipeline(transformer=transformer, vae=vae, scheduler=sampler, id2label=id2label)
    if id2label is not None:
        # DiTPipeline forgets its labels on saving unless they are part of its config.
        pipeline.register_to_config(id2label={str(row): name for row, name in id2label.items()})
    return pipeline


def stock_scheduler(scheduler: Any) -> Any:
    """A scheduler as it is if it is diffusers' own, else one of diffusers' on its schedule."""
    return scheduler if type(scheduler).__module__.startswith("diffusers.") else inference_scheduler(scheduler)


def inference_scheduler(scheduler: Any) -> Any:
    """DDIM on the schedule of the training, or Euler's method on its flow.

    Args:
        scheduler: A DDPMScheduler or FlowMatchEulerDiscreteScheduler, with SpeeD or without.
    """
    schedule = scheduler.config
    if is_rectified_flow(scheduler):
        return FlowMatchEulerDiscreteScheduler(
            num_train_timesteps=schedule["num_train_timesteps"], shift=schedule["shift"]
        )
    kept = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type")
    zero_snr = schedule["rescale_betas_zero_snr"]
    return DDIMScheduler(
        **{key: schedule[key] for key in kept},
        rescale_betas_zero_snr=zero_snr,
        # Latents are not bounded by 1, and a schedule that ends without signal must be sampled from its very end.
        clip_sample=False,
        timestep_spacing="trailing" if zero_snr else "leading",
    )


def embedding_row_names(label_names: Sequence[str] | None) -> dict[int, str]:
    """Rows of the label table to names: what `DiTPipeline` calls `id2label`; empty for a model without classes."""
    label_names = label_names or []
    rows = label_to_embedding_row(torch.arange(len(label_names))).tolist()
    return dict(zip(rows, label_names, strict=True))


def save_pipeline(pipeline: DiTPipeline, folder: Path, sidecar: Mapping[str, Any]) -> None:
    """Saves a pipeline whole or not at all, with a sidecar file that says how it was trained, if that is known.

    Raises:
        OSError: The disk is full or not writable; with the path and the bytes.
    """
    modules = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    num_bytes = sum(tensor.nbytes for module in modules for tensor in module.state_dict().values())
    with written_whole(folder, num_bytes) as temporary:
        pipeline.save_pretrained(temporary)
        if sidecar:
            (temporary / SIDECAR).write_text(json.dumps(sidecar, indent=1))
        forget_paths(temporary)
        give_usual_mode(temporary)


def add_to_sidecar(folder: Path, values: Mapping[str, Any]) -> None:
    """Adds to the sidecar file of a saved pipeline, or replaces there, whole or not at all.

    Args:
        folder: The pipeline's.
        values: JSON values.
    """
    write_text(folder / SIDECAR, json.dumps({**json.loads((folder / SIDECAR).read_text()), **values}, indent=1))


def forget_paths(folder: Path) -> None:
    """Takes out of a saved pipeline where its parts were loaded from: paths of the machine that trained it."""
    for config in (*folder.glob("model_index.json"), *folder.glob("*/*config.json")):
        values = json.loads(config.read_text())
        if values.pop("_name_or_path", None) is not None:
            config.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
