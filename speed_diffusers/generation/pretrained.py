"""Pretrained parts by name: embedded, in a folder (of a run, a pipeline or one model), or on the Hub."""

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, cast, get_type_hints

import diffusers
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from huggingface_hub import hf_hub_download

from ..assets import EMBEDDED, EMBEDDED_PIPELINE
from ..errors import InputError
from ..hub import Problem, find_problem
from ..json_files import arguments_of, check_values, read_object
from ..models import FREQ_SHIFT, apply_freq_shift
from ..pipelines import SpeeDDiTPipeline
from ..predictions import FLOW_PREDICTION
from .export import SIDECAR, TrainingRecord

GUIDANCE_UNTRAINED = (
    "%s: with class_dropout_prob=0 the model is never trained without its classes, so guidance_scale=%g takes what it "
    "predicts without one from untrained weights. Take guidance_scale=1, or train with class_dropout_prob=0.1."
)
"""The warning for guidance that nothing has been trained for; takes the model's name and the scale."""

INDEX, SCHEDULER_CONFIG = "model_index.json", "scheduler/scheduler_config.json"

WEIGHTS_STEM = "diffusion_pytorch_model"
"""Name of diffusers' files of weights, without variant and suffix."""

NO_WEIGHTS = re.compile(rf"file named {WEIGHTS_STEM}(\.fp16)?\.(bin|safetensors)\b")
"""What diffusers says where the file itself is missing, and not a shard of it, without which weights are damaged."""

CLASS_NAMES = {"vae": ("AutoencoderKL",), "transformer": ("DiTTransformer2DModel", "Transformer2DModel")}
"""Classes that a component's config.json may name; Transformer2DModel is what DiT's was in diffusers before 0.29."""

M = TypeVar("M", AutoencoderKL, DiTTransformer2DModel)

logger = logging.getLogger(__name__)


def load_pipeline(name: str, *, revision: str | None = None) -> SpeeDDiTPipeline:
    """A pipeline by name, in float32: the stock one with a learned variance and more ways to guide.

    Args:
        name: "embedded", the folder of a run (its `pipeline/` is taken) or of a pipeline, or a Hub id.
        revision: Branch, tag or commit on the Hub.

    Raises:
        InputError: Nothing of this name can be loaded, or its weights are not all there.
    """
    folder = _pipeline_folder(name)
    if folder.is_dir() and not (folder / INDEX).is_file():
        raise InputError(f"model={name}: the folder holds no pipeline (no model_index.json, no pipeline/ in it).")
    place = str(folder) if folder.exists() else name
    if folder.is_dir():
        _check_index(folder / INDEX)
    problem = _problem_on_hub("pipeline", name, revision)
    options: dict[str, Any] = {"revision": revision, "local_files_only": problem is not None}
    try:
        DiTPipeline.load_config(place, **options)
        return SpeeDDiTPipeline.from_pretrained(
            place,
            # Loaded here, because a pipeline would fill weights that its files lack with random numbers.
            transformer=_load_model(DiTTransformer2DModel, "transformer", name, revision, problem),
            vae=_load_model(AutoencoderKL, "vae", name, revision, problem),
            **options,
        )
    except InputError:
        raise
    except Exception as error:  # whatever diffusers makes of files that do not fit one another
        raise _not_loaded("pipeline", name, error, problem) from error


def load_vae(name: str, *, revision: str | None = None) -> AutoencoderKL:
    """An autoencoder by name, in float32: "embedded", a folder of its own, a run or pipeline folder, or a Hub id.

    Raises:
        InputError: Nothing of this name can be loaded, or its weights are not all there.
    """
    problem = _problem_on_hub("vae", name, revision)
    return cast(AutoencoderKL, _load_model(AutoencoderKL, "vae", name, revision, problem))


def load_transformer(name: str, *, revision: str | None = None) -> DiTTransformer2DModel:
    """A transformer by name, in float32: "embedded", a folder of its own, a run or pipeline folder, or a Hub id.

    Raises:
        InputError: Nothing of this name can be loaded, or its weights are not all there.
    """
    problem = _problem_on_hub("transformer", name, revision)
    return cast(DiTTransformer2DModel, _load_model(DiTTransformer2DModel, "transformer", name, revision, problem))


def transformer_config_of(name: str) -> dict[str, Any] | None:
    """Config of the transformer of a model on this disk, as it is saved; None where there is none.

    Args:
        name: "embedded", a folder of its own, or a run or pipeline folder.

    Raises:
        InputError: The file is damaged, or that of another class.
    """
    found = _folder_of("transformer", name)
    return None if found is None else _checked_config(DiTTransformer2DModel, "transformer", found)


def sidecar_of(name: str, *, revision: str | None = None) -> dict[str, Any]:
    """What the file beside a pipeline tells of its training; empty where it has none, or cannot be had from the Hub.

    Args:
        name: "embedded", the folder of a run or of a pipeline, or a Hub id.
        revision: Branch, tag or commit on the Hub.

    Raises:
        InputError: The file is damaged.
    """
    folder = _pipeline_folder(name)
    path = folder / SIDECAR
    if not folder.exists():
        try:
            offline = find_problem(name, revision=revision) is not None
            path = Path(hf_hub_download(name, SIDECAR, revision=revision, local_files_only=offline))
        except Exception as error:  # a model of somebody else has none, and the name may be no id at all
            logger.debug("%s tells nothing of its training: %s", name, error)
            return {}
    if not path.is_file():
        return {}
    sidecar = read_object(path)
    check_values(path, sidecar, {"training_config": dict, "training": dict, "score": dict})
    check_values(path, sidecar.get("training_config", {}), {"max_train_steps": int, "class_dropout_prob": float})
    check_values(path, sidecar.get("training", {}), get_type_hints(TrainingRecord), null=True)
    return sidecar


def training_config_of(name: str, *, revision: str | None = None) -> dict[str, Any]:
    """Options that a pipeline was trained with, from the file beside it; empty where it has none.

    Raises:
        InputError: The file is damaged.
    """
    config: dict[str, Any] = sidecar_of(name, revision=revision).get("training_config", {})
    return config


def scheduler_config_of(name: str, *, revision: str | None = None) -> dict[str, Any] | None:
    """The config of a pipeline's scheduler, or None if `name` is a model without a scheduler.

    Raises:
        InputError: It is damaged.
    """
    folder = _pipeline_folder(name)
    if folder.exists():
        path = folder / SCHEDULER_CONFIG
        return read_scheduler_config(path) if path.is_file() else None
    try:
        # With what is in the cache where the Hub does not answer.
        offline = find_problem(name, revision=revision) is not None
        found = DDIMScheduler.load_config(name, subfolder="scheduler", revision=revision, local_files_only=offline)
        return cast(dict[str, Any], found)
    except OSError:
        return None


def prediction_type_of(name: str, *, revision: str | None = None) -> str | None:
    """What the network of a pipeline predicts, or None if `name` is a model without a scheduler.

    Raises:
        InputError: The scheduler's config is damaged.
    """
    config = scheduler_config_of(name, revision=revision)
    if config is None:
        return None
    if "beta_schedule" not in config and "shift" in config:
        return FLOW_PREDICTION
    return str(config.get("prediction_type", "epsilon"))


def label_rows_of(name: str, *, revision: str | None = None) -> tuple[dict[int, str], int | None]:
    """What the rows of a pipeline's label table mean; nothing is known of a model without a pipeline.

    Args:
        name: "embedded", the folder of a run, of a pipeline or of a model, or a Hub id.
        revision: Branch, tag or commit on the Hub.

    Returns:
        Rows to whole names of classes, empty if it names none; and the row that means "no class", None if it does not
        say so (`SpeeDDiTPipeline` then takes row 1000, or the last one if there are fewer).

    Raises:
        InputError: The pipeline's index is damaged.
    """
    folder = _pipeline_folder(name)
    if folder.exists():
        if not (folder / INDEX).is_file():
            return {}, None
        _check_index(folder / INDEX)
        index = read_object(folder / INDEX)
    else:
        try:
            index = cast(dict[str, Any], DiTPipeline.load_config(name, revision=revision))
        except OSError:
            return {}, None
    rows = {int(row): str(label) for row, label in (index.get("id2label") or {}).items() if row.isdecimal()}
    return dict(sorted(rows.items())), index.get("null_class_id")


def read_scheduler_config(path: Path) -> dict[str, Any]:
    """The config of a scheduler of diffusers, its values of the types that its class takes.

    Raises:
        InputError: It is damaged, or a value is of another type.
    """
    config = read_object(path)
    check_values(path, config, {"_class_name": str})
    kind = getattr(diffusers, config.get("_class_name", ""), None)
    types = arguments_of(kind) if isinstance(kind, type) else {}
    check_values(path, config, {"prediction_type": str} | types, null=True)
    return config


def _check_index(path: Path) -> None:
    """Checks the index of a pipeline, and the config of its scheduler.

    Raises:
        InputError: They are damaged.
    """
    index = read_object(path)
    check_values(path, index, {"id2label": dict[str, str] | None, "null_class_id": int | None})
    for row in index.get("id2label") or {}:
        if not row.isdecimal():
            raise InputError(f"{path}: id2label has '{row}', but its keys must be rows of the label table.")
    for component in ("transformer", "vae", "scheduler"):
        check_values(path, {component: index.get(component)}, {component: list[str]})
    if (path.parent / SCHEDULER_CONFIG).is_file():
        read_scheduler_config(path.parent / SCHEDULER_CONFIG)


def _pipeline_folder(name: str) -> Path:
    if name == EMBEDDED:
        return EMBEDDED_PIPELINE
    folder = Path(name)
    return folder / "pipeline" if (folder / "pipeline" / INDEX).is_file() else folder


def _problem_on_hub(what: str, name: str, revision: str | None) -> Problem | None:
    """What keeps a model from being read from the Hub now, so that only a copy in the cache is left; None: nothing.

    Raises:
        InputError: The Hub says that it cannot be read.
    """
    if _pipeline_folder(name).exists():
        return None
    problem = find_problem(name, revision=revision)
    if problem is not None and problem.is_final:
        raise InputError(f"Could not load the {what} '{name}', neither as a folder nor from the Hub: {problem.line}.")
    return problem


def _folder_of(component: str, name: str) -> Path | None:
    """The folder on this disk that holds a component's config, alone or in a pipeline; None: there is none."""
    folder = _pipeline_folder(name)
    return next((place for place in (folder / component, folder) if (place / "config.json").is_file()), None)


def _types_of(model_class: type) -> dict[str, Any]:
    return arguments_of(model_class) | {FREQ_SHIFT: float}


def _checked_config(model_class: type, component: str, folder: Path) -> dict[str, Any]:
    config = read_object(folder / "config.json")
    _check_class(model_class, component, str(folder), config)
    check_values(folder / "config.json", config, _types_of(model_class), null=True)
    return config


def _load_model(model_class: type[M], component: str, name: str, revision: str | None, problem: Problem | None) -> Any:
    local = _folder_of(component, name)
    if local is None and _pipeline_folder(name).exists():
        raise InputError(f"The folder {name} holds no {component} (no config.json in it or in {component}/).")
    config = {} if local is None else _checked_config(model_class, component, local)
    options: dict[str, Any] = {"output_loading_info": True, "torch_dtype": torch.float32, "low_cpu_mem_usage": False}
    try:
        if local is not None:
            model, info = _load_weights(model_class, component, str(local), options)
        else:
            options |= {"revision": revision, "local_files_only": problem is not None}
            model, info = _load_from_hub(model_class, component, name, options)
    except InputError:
        raise
    except Exception as error:  # whatever diffusers makes of a config or of weights that do not fit
        if local is not None:
            check_values(local / "config.json", config, _types_of(model_class))
        raise _not_loaded(component, name, error, problem) from error
    if info["missing_keys"]:
        raise InputError(
            f"The {component} '{name}' lacks {len(info['missing_keys'])} of its weights, such as "
            f"{info['missing_keys'][0]}: its files do not fit its config.json."
        )
    if isinstance(model, DiTTransformer2DModel) and model.config["out_channels"] is None:
        # To diffusers the same as in_channels; written down once, for all who read the config.
        model.register_to_config(out_channels=model.config["in_channels"])
    if isinstance(model, DiTTransformer2DModel):
        apply_freq_shift(model)
    return model


def _load_from_hub(model_class: type[M], component: str, name: str, options: dict[str, Any]) -> tuple[Any, Any]:
    """A repository holds either one model or a pipeline with the model in a sub-folder."""
    subfolder = None
    where = {key: options[key] for key in ("revision", "local_files_only")}
    try:
        config = model_class.load_config(name, **where)
    except OSError:
        subfolder = component
        config = model_class.load_config(name, subfolder=subfolder, **where)
    _check_class(model_class, component, name, cast(dict[str, Any], config))
    return _load_weights(model_class, component, name, options | {"subfolder": subfolder})


def _check_class(model_class: type[M], component: str, place: str, config: Mapping[str, Any]) -> None:
    """Checks that a model's configuration is of the right class: weights of another would not fit, one by one.

    Raises:
        InputError: It is of another.
    """
    found = config.get("_class_name", model_class.__name__)
    if found not in CLASS_NAMES[component]:
        raise InputError(
            f"The {component} '{place}' is of class {found}; allowed: {model_class.__name__}"
            + (", whose latents have the mean and variance that training samples from." if component == "vae" else ".")
        )


def _load_weights(model_class: type[M], component: str, place: str, options: dict[str, Any]) -> tuple[Any, Any]:
    """A model from the usual file of weights or, where there is none, its fp16 variant.

    Raises:
        InputError: Its folder has neither file.
    """
    try:
        return _from_pretrained(model_class, place, options)
    except OSError as error:
        if not NO_WEIGHTS.search(str(error)):
            raise
        missing = error
    try:
        loaded = _from_pretrained(model_class, place, options | {"variant": "fp16"})
    except OSError as error:
        if not NO_WEIGHTS.search(str(error)):
            raise
        if not Path(place).is_dir():
            raise missing from None
        files = ", ".join(sorted(file.name for file in Path(place).iterdir()))
        raise InputError(
            f"The {component} '{place}' has neither {WEIGHTS_STEM}.safetensors nor {WEIGHTS_STEM}.fp16.safetensors; "
            f"its files: {files}."
        ) from missing
    logger.warning("The %s '%s' has its weights in half precision alone: taking them (fp16).", component, place)
    return loaded


def _from_pretrained(model_class: type[M], place: str, options: dict[str, Any]) -> tuple[Any, Any]:
    """Diffusers' own loading; without its warning that it does not know `FREQ_SHIFT`, of which we do take care."""
    configuration = logging.getLogger("diffusers.configuration_utils")

    def is_of_others(record: logging.LogRecord) -> bool:
        return re.search(rf"attributes {{'{FREQ_SHIFT}': [^,}}]*}} were passed", record.getMessage()) is None

    configuration.addFilter(is_of_others)
    try:
        return cast(tuple[Any, Any], model_class.from_pretrained(place, **options))
    finally:
        configuration.removeFilter(is_of_others)


def _not_loaded(what: str, name: str, error: Exception, problem: Problem | None) -> InputError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if problem is not None:
        reason = f"it is not in the cache, and {problem.line}."
    return InputError(f"Could not load the {what} '{name}', neither as a folder nor from the Hub: {reason}")
