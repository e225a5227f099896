"""Pretrained parts by name: embedded, in a folder (of a run, a pipeline or one model), or on the Hub."""

import json
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

from ..assets import EMBEDDED, EMBEDDED_PIPELINE
from ..errors import InputError
from ..pipelines import SpeeDDiTPipeline
from ..predictions import FLOW_PREDICTION
from .export import SIDECAR

GUIDANCE_UNTRAINED = (
    "%s: with class_dropout_prob=0 the model is never trained without its classes, so guidance_scale=%g takes what it "
    "predicts without one from untrained weights. Take guidance_scale=1, or train with class_dropout_prob=0.1."
)
"""The warning for guidance that nothing has been trained for; takes the model's name and the scale."""

M = TypeVar("M", AutoencoderKL, DiTTransformer2DModel)


def load_pipeline(name: str, *, revision: str | None = None) -> SpeeDDiTPipeline:
    """A pipeline by name, in float32: the stock one with a learned variance and more ways to guide.

    Args:
        name: "embedded", the folder of a run (its `pipeline/` is taken) or of a pipeline, or a Hub id.
        revision: Branch, tag or commit on the Hub.

    Raises:
        InputError: Nothing of this name can be loaded, or its weights are not all there.
    """
    folder = _pipeline_folder(name)
    if folder.is_dir() and not (folder / "model_index.json").is_file():
        raise InputError(f"model={name}: the folder holds no pipeline (no model_index.json, no pipeline/ in it).")
    place = str(folder) if folder.exists() else name
    try:
        DiTPipeline.load_config(place, revision=revision)
        return SpeeDDiTPipeline.from_pretrained(
            place,
            revision=revision,
            # Loaded here, because a pipeline would fill weights that its files lack with random numbers.
            transformer=load_transformer(name, revision=revision),
            vae=load_vae(name, revision=revision),
        )
    except InputError:
        raise
    except (OSError, ValueError) as error:
        raise _not_loaded("pipeline", name, error) from error


def load_vae(name: str, *, revision: str | None = None) -> AutoencoderKL:
    """An autoencoder by name, in float32: "embedded", a folder of its own, a run or pipeline folder, or a Hub id.

    Raises:
        InputError: Nothing of this name can be loaded, or its weights are not all there.
    """
    return cast(AutoencoderKL, _load_model(AutoencoderKL, "vae", name, revision))


def load_transformer(name: str, *, revision: str | None = None) -> DiTTransformer2DModel:
    """A transformer by name, in float32: "embedded", a folder of its own, a run or pipeline folder, or a Hub id.

    Raises:
        InputError: Nothing of this name can be loaded, or its weights are not all there.
    """
    return cast(DiTTransformer2DModel, _load_model(DiTTransformer2DModel, "transformer", name, revision))


def training_config_of(name: str) -> dict[str, Any]:
    """Options that a pipeline was trained with, from the file beside it; empty where it has none, and on the Hub."""
    try:
        sidecar = json.loads((_pipeline_folder(name) / SIDECAR).read_text(encoding="utf-8"))
        return dict(sidecar["training_config"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}  # none, or of another version, or by another hand


def prediction_type_of(name: str, *, revision: str | None = None) -> str | None:
    """What the network of a pipeline predicts, or None if `name` is a model without a scheduler."""
    folder = _pipeline_folder(name)
    try:
        config = DDIMScheduler.load_config(
            str(folder) if folder.exists() else name, subfolder="scheduler", revision=revision
        )
    except OSError:
        return None
    if "beta_schedule" not in config and "shift" in config:
        return FLOW_PREDICTION
    return str(config.get("prediction_type", "epsilon"))


def _pipeline_folder(name: str) -> Path:
    if name == EMBEDDED:
        return EMBEDDED_PIPELINE
    folder = Path(name)
    return folder / "pipeline" if (folder / "pipeline" / "model_index.json").is_file() else folder


def _load_model(model_class: type[M], component: str, name: str, revision: str | None) -> Any:
    folder = _pipeline_folder(name)
    places = [folder / component, folder]
    local = next((place for place in places if (place / "config.json").is_file()), None)
    if local is None and folder.exists():
        raise InputError(f"The folder {name} holds no {component} (no config.json in it or in {component}/).")
    options: dict[str, Any] = {"output_loading_info": True, "torch_dtype": torch.float32, "low_cpu_mem_usage": False}
    try:
        if local is not None:
            model, info = cast(tuple[Any, Any], model_class.from_pretrained(str(local), **options))
        else:
            model, info = _load_from_hub(model_class, component, name, options | {"revision": revision})
    except (OSError, ValueError, RuntimeError) as error:
        raise _not_loaded(component, name, error) from error
    if info["missing_keys"]:
        raise InputError(
            f"The {component} '{name}' lacks {len(info['missing_keys'])} of its weights, such as "
            f"{info['missing_keys'][0]}: its files do not fit its config.json."
        )
    return model


def _load_from_hub(model_class: type[M], component: str, name: str, options: dict[str, Any]) -> tuple[Any, Any]:
    """A repository holds either one model or a pipeline with the model in a sub-folder."""
    try:
        return cast(tuple[Any, Any], model_class.from_pretrained(name, **options))
    except OSError:
        return cast(tuple[Any, Any], model_class.from_pretrained(name, subfolder=component, **options))


def _not_loaded(what: str, name: str, error: Exception) -> InputError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return InputError(f"Could not load the {what} '{name}', neither as a folder nor from the Hub: {reason}")
