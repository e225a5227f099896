"""Checkpoints that torch.save made, by hands that are not known: tensors and plain values are read, no code is run.

torch reads such a file with a pickle machine of its own (`weights_only=True`), which calls nothing but what it takes
to make tensors. Training checkpoints hold their run's options too, as objects that this machine refuses: for the
classes that options are usually of, it is given stand-ins that forget what they are told, so that the weights beside
them can be had. A file that names anything else is refused.
"""

import zipfile
from pathlib import Path
from typing import Any

import torch

from ..errors import InputError

FORGOTTEN = {
    "argparse": ("Namespace",),
    "omegaconf.base": ("ContainerMetadata", "Metadata"),
    "omegaconf.dictconfig": ("DictConfig",),
    "omegaconf.listconfig": ("ListConfig",),
    "omegaconf.nodes": ("AnyNode", "BooleanNode", "FloatNode", "IntegerNode", "StringNode"),
    "builtins": ("bool", "dict", "float", "int", "list", "str", "tuple"),
    "collections": ("defaultdict",),
    "pathlib": ("Path", "PosixPath", "PurePosixPath", "WindowsPath"),
    "typing": ("Any",),
}
"""Modules and what options in a checkpoint may be made of; none of it is imported for that, or called."""


class _Forgetful:
    """Stands in for an object of a run's options: takes whatever it is made of and told, and keeps nothing."""

    def __new__(cls, *_: Any) -> "_Forgetful":
        return super().__new__(cls)

    def __init__(self, *_: Any) -> None:
        """Takes anything."""

    def __setstate__(self, state: Any) -> None:
        """Takes anything."""


class _Dictionary:
    """Stands in for a class of dictionaries: what it makes is a plain one, since items will be set on it."""

    def __new__(cls, *_: Any) -> Any:
        return {}


def read_torch_file(path: Path) -> Any:
    """What a file of torch.save holds, on the CPU; options of a run in it are read as empty.

    Args:
        path: The file, in torch's format since 1.6, a ZIP archive; its tensors are mapped, not copied.

    Raises:
        InputError: It cannot be read, is cut short or no such file, or holds more than tensors and plain values.
    """
    stand_ins: list[Any] = [
        type(name, (_Dictionary if "dict" in name else _Forgetful,), {"__module__": module})
        for module, names in FORGOTTEN.items()
        for name in names
    ]
    if not path.is_file():
        raise InputError(f"{path}: there is no such file.")
    if not zipfile.is_zipfile(path):
        raise InputError(
            f"{path} is cut short, or no checkpoint of torch.save: it is no ZIP archive, as those are since torch 1.6."
        )
    try:
        with torch.serialization.safe_globals(stand_ins):
            if names := torch.serialization.get_unsafe_globals_in_checkpoint(str(path)):
                raise InputError(
                    f"{path} holds more than weights: it names {', '.join(sorted(names)[:5])}, which reading it could "
                    "run; none of it was run, and the file is refused."
                )
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except InputError:
        raise
    except Exception as error:  # whatever torch makes of a file that is damaged or meant ill
        # Before its reason torch says how to read the file as code, which is no advice for a file by unknown hands.
        _, _, told = str(error).rpartition("WeightsUnpickler error:")
        reason = next(iter(told.strip().splitlines()), type(error).__name__)
        raise InputError(f"{path} cannot be read as a checkpoint of torch.save: {reason}") from error
