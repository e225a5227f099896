"""JSON files that others have had in hand: read as objects, with the types of their values checked."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from .errors import InputError

_WORDS: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    list: "a list",
    dict: "an object",
    NoneType: "null",
}
_LISTS, _OBJECTS = (list, tuple, Sequence), (dict, Mapping)


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        InputError: The file cannot be read, is cut short or no JSON, or holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read as JSON ({error}).") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} holds {_WORDS[type(value)]}, but must hold an object.")
    return value


def check_values(path: Path, values: Mapping[str, Any], types: Mapping[str, Any], *, null: bool = False) -> None:
    """Checks the types of an object's values.

    Args:
        path: The file that holds it, for the message.
        values: The object; keys that are not in `types` may have any value.
        types: Annotations by key. What they do not say in plain types (`int`, `float | None`, `list[str]`) may be
            anything; of a `Literal` only the type counts.
        null: Let null pass everywhere.

    Raises:
        InputError: A value is of another type; the message names file and key.
    """
    for key, value in values.items():
        if key in types and not (null and value is None) and not _fits(value, types[key]):
            shown = json.dumps(value)
            shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
            raise InputError(f"{path}: {key} is {shown}, but must be {_in_words(types[key])}.")


def arguments_of(kind: type) -> dict[str, Any]:
    """The annotations of what a class is made of, which its config holds; empty if they cannot be told."""
    try:
        return get_type_hints(kind.__init__)  # type: ignore[misc]
    except (NameError, TypeError):
        return {}


def _fits(value: object, hint: Any) -> bool:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, each) for each in arguments)
    if origin is Literal:
        return any(_fits(value, type(each)) for each in arguments)
    if origin in _LISTS or hint in _LISTS:
        items = [each for each in arguments if each is not Ellipsis]
        return isinstance(value, list | tuple) and all(
            not items or any(_fits(item, each) for each in items) for item in value
        )
    if origin in _OBJECTS or hint in _OBJECTS:
        return isinstance(value, dict) and all(_fits(each, arguments[1]) for each in value.values() if arguments)
    if hint in (int, float):
        return isinstance(value, int | float if hint is float else int) and not isinstance(value, bool)
    if hint in (None, NoneType):
        return value is None
    return hint is Any or not isinstance(hint, type) or isinstance(value, hint)


def _in_words(hint: Any) -> str:
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(
            dict.fromkeys(_in_words(each) for each in get_args(hint) if each in _WORDS or get_args(each))
        )
    if get_origin(hint) is Literal:
        return " or ".join(map(repr, get_args(hint)))
    kind = get_origin(hint) or hint
    return _WORDS.get(list if kind in _LISTS else dict if kind in _OBJECTS else kind, str(kind))
