"""Pretrained parts by name: shipped, in a folder (of a run, a pipeline or one model), or on the Hub."""

from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from diffusers import AutoencoderKL, DiTPipeline, DiTTransformer2DModel

from .errors import InputError

EMBEDDED = "embedded"
"""The name of what the package ships."""

EMBEDDED_PIPELINE = Path(__file__).parent / "assets" / "fashion_mnist" / "pipeline"

M = TypeVar("M", AutoencoderKL, DiTTransformer2DModel)


def load_pipeline(name: str, *, revision: str | None = None) -> DiTPipeline:
    """A stock pipeline by name.

    Args:
        name: "embedded", the folder of a run (its `pipeline/` is taken) or of a pipeline, or a Hub id.
        revision: Branch, tag or commit on the Hub.

    Raises:
        InputError: Nothing of this name can be loaded.
    """
    folder = _pipeline_folder(name)
    if folder.is_dir() and not (folder / "model_index.json").is_file():
        raise InputError(f"model={name}: the folder holds no pipeline (no model_index.json, no pipeline/ in it).")
    try:
        return DiTPipeline.from_pretrained(str(folder) if folder.exists() else name, revision=revision)
    except (OSError, ValueError) as error:
        raise _not_loaded("pipeline", name, error) from error


def load_vae(name: str, *, revision: str | None = None) -> AutoencoderKL:
    """An autoencoder by name: "embedded", a folder of its own, a run or pipeline folder, or a Hub id.

    Raises:
        InputError: Nothing of this name can be loaded.
    """
    return cast(AutoencoderKL, _load_model(AutoencoderKL, "vae", name, revision))


def load_transformer(name: str, *, revision: str | None = None) -> DiTTransformer2DModel:
    """A transformer by name: "embedded", a folder of its own, a run or pipeline folder, or a Hub id of a pipeline.

    Raises:
        InputError: Nothing of this name can be loaded.
    """
    return cast(DiTTransformer2DModel, _load_model(DiTTransformer2DModel, "transformer", name, revision))


def _pipeline_folder(name: str) -> Path:
    if name == EMBEDDED:
        return EMBEDDED_PIPELINE
    folder = Path(name)
    return folder / "pipeline" if (folder / "pipeline" / "model_index.json").is_file() else folder


def _load_model(model_class: type[M], component: str, name: str, revision: str | None) -> M:
    folder = _pipeline_folder(name)
    places = [folder / component, folder]
    local = next((place for place in places if (place / "config.json").is_file()), None)
    try:
        if local is not None:
            model = model_class.from_pretrained(str(local), low_cpu_mem_usage=False)
        elif folder.exists():
            raise InputError(f"The folder {name} holds no {component} (no config.json in it or in {component}/).")
        else:
            model = _load_from_hub(model_class, component, name, revision)
    except InputError:
        raise
    except (OSError, ValueError) as error:
        raise _not_loaded(component, name, error) from error
    return cast(M, cast(Any, model).to(torch.float32))


def _load_from_hub(model_class: type[M], component: str, name: str, revision: str | None) -> M:
    """A repository holds either one model or a pipeline with the model in a sub-folder."""
    try:
        return model_class.from_pretrained(name, revision=revision)
    except OSError:
        return model_class.from_pretrained(name, subfolder=component, revision=revision)


def _not_loaded(what: str, name: str, error: Exception) -> InputError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return InputError(f"Could not load the {what} '{name}', neither as a folder nor from the Hub: {reason}")
