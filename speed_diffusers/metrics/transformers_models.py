"""Models of transformers as feature extractors, from a folder or a Hub id, whole or not at all."""

from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from ..errors import InputError


def load_transformers_model(kind: str, option: str, name: str, device: torch.device) -> Any:
    """A model in float32, in evaluation mode.

    Args:
        kind: transformers' class, such as "Dinov2Model".
        option: The option that named it, for messages.
        name: Folder or Hub id.
        device: Where it goes.

    Raises:
        InputError: transformers is not installed, or there is no such model, or its files are damaged or of another
            class, which transformers would fill up with random weights.
    """
    transformers = _transformers(option)
    model_class = getattr(transformers, kind)
    wanted = model_class.config_class.model_type
    try:
        found = transformers.AutoConfig.from_pretrained(name).model_type
        if found != wanted:
            raise InputError(f"{option}={name}: is of type {found}, expected {wanted}.")
        model, info = model_class.from_pretrained(name, dtype=torch.float32, output_loading_info=True)
    except InputError:
        raise
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise InputError(f"{option}={name}: cannot be loaded ({_first_line(error)}).") from error
    if missing := sorted(info["missing_keys"]) + sorted(str(each) for each in info.get("mismatched_keys", ())):
        raise InputError(f"{option}={name}: lacks {len(missing)} of {kind}'s weights, such as {missing[0]}.")
    assert isinstance(model, nn.Module)
    return model.eval().requires_grad_(False).to(device)


def load_tokenizer(option: str, name: str) -> Any:
    """The tokenizer beside a model.

    Raises:
        InputError: There is none, or it is damaged.
    """
    try:
        return _transformers(option).AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise InputError(f"{option}={name}: its tokenizer cannot be loaded ({_first_line(error)}).") from error


def _transformers(option: str) -> Any:
    try:
        import transformers
    except ModuleNotFoundError as error:
        message = f"{option}: transformers is not installed; run: pip install 'speed-diffusers[eval]'"
        raise InputError(message) from error
    return transformers


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
