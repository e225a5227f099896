"""What an option is: a dataclass field with its help, its range and its choices, and the text of `--help`."""

import dataclasses
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, ClassVar, Union, get_args, get_origin, get_type_hints

from ..errors import InputError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

TYPES = (int, float, str, bool)
"""What an option, or an item of a list, may be."""

_PLAIN_WORDS: dict[type, str] = {int: "a whole number", float: "a finite number", str: "text", bool: "true or false"}


@dataclass(frozen=True)
class Interval:
    """A range of numbers, as mathematics writes it: "[1, inf)", "(0, 1]", "[0, 2^63)"; "(0, inf]" holds infinity."""

    text: str

    @property
    def ends(self) -> tuple[float, float]:
        """The lower and the upper end."""
        low, high = (self._number(end) for end in self.text[1:-1].split(","))
        return low, high

    def __contains__(self, value: float) -> bool:
        low, high = self.ends
        above = value >= low if self.text[0] == "[" else value > low
        below = value <= high if self.text[-1] == "]" else value < high
        return above and below

    def __str__(self) -> str:
        return self.text

    def require(self, name: str, value: object) -> None:
        """Checks a number.

        Args:
            name: What the user knows the number by, for the message.
            value: The number.

        Raises:
            InputError: It is none, or lies outside the interval.
        """
        if require_number(name, value) not in self:
            raise InputError(f"{name}={value}: {self.rule}.")

    @property
    def rule(self) -> str:
        """What a value must do, for a message: "must be at least 1", "must lie in [0, 1)"."""
        low, high = self.text[1:-1].split(",")
        if high.strip() == "inf":
            return f"must be {'at least' if self.text[0] == '[' else 'above'} {low.strip()}"
        return f"must lie in {self.text}"

    @staticmethod
    def _number(text: str) -> float:
        base, power, exponent = text.partition("^")
        return float(base) ** float(exponent) if power else float(base)


def require_number(name: str, value: object) -> float:
    """Checks that a value is a number; True and False are none here.

    Args:
        name: What the user knows the value by, for the message.
        value: The value.

    Returns:
        The value.

    Raises:
        InputError: It is of another type.
    """
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise InputError(f"{name}={value!r}: must be a number.")
    return value


def option(
    default: Any,
    help: str,
    *,
    interval: str | None = None,
    choices: Iterable[object] | Callable[[], Iterable[object]] = (),
    free: bool = False,
    path: bool = False,
    share: bool = False,
    instead_of: str | None = None,
    only_with: tuple[str, object] | None = None,
) -> Any:
    """A dataclass field with its help text and its range.

    Args:
        default: Default value; lists are copied.
        help: One line for `--help`.
        interval: Range of a number, or of each number of a list, as in `Interval`; None values are always allowed
            where the type has None.
        choices: Allowed values, if there are only a few; a callable is asked when they are needed.
        free: The value may differ when a run is resumed, because it does not touch what is computed.
        path: The value, or each of a list, is or may be a path: a leading `~` is the home folder.
        share: A float in [0, 1] that may also be written as true (all) or false (none).
        instead_of: Another option that says the same in other words: whoever gives one of the two takes back the
            other that a file below gave, and nobody gives both at once. The default is None.
        only_with: Another option and its value without which this one means nothing: whoever gives that option another
            value takes back what a file below gave for this one, and nobody gives both at once.
    """
    metadata = {
        "help": help,
        "interval": Interval(interval) if interval else None,
        "choices": choices if callable(choices) else tuple(choices),
        "free": free,
        "path": path,
        "share": share,
        "instead_of": instead_of,
        "only_with": only_with,
    }
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Setting:
    """What one field of a schema accepts."""

    key: str
    item: type
    is_list: bool = False
    optional: bool = False
    default: object = None
    help: str = ""
    interval: Interval | None = None
    choices: tuple[object, ...] = ()
    is_path: bool = False
    is_share: bool = False
    instead_of: str | None = None
    only_with: tuple[str, object] | None = None

    @property
    def item_words(self) -> str:
        """The accepted type of one value, in plain words."""
        return _PLAIN_WORDS[self.item] + ", true or false" * self.is_share

    @property
    def words(self) -> str:
        """The accepted type in plain words."""
        words = f"a list of {self.item_words.removeprefix('a ')}s" if self.is_list else self.item_words
        return words + " or None" * self.optional


def settings_of(schema: "type[DataclassInstance]") -> dict[str, Setting]:
    """The fields of a schema by name.

    Raises:
        TypeError: A field has a type or name that settings cannot have: a mistake in the program, not in its input.
    """
    hints = get_type_hints(schema)
    settings = {}
    for field in dataclasses.fields(schema):
        hint, optional = hints[field.name], False
        if get_origin(hint) in (Union, UnionType):
            optional = NoneType in get_args(hint)
            hint = next(member for member in get_args(hint) if member is not NoneType)
        is_list = get_origin(hint) is list
        item = get_args(hint)[0] if is_list else hint
        if item not in TYPES or (is_list and item is bool) or field.name == "config":
            raise TypeError(f"{schema.__name__}.{field.name}: {hints[field.name]} cannot be a setting")
        about = field.metadata
        choices = about.get("choices", ())
        settings[field.name] = Setting(
            field.name,
            item,
            is_list,
            optional,
            default_of(field),
            about.get("help", ""),
            about.get("interval"),
            tuple(choices() if callable(choices) else choices),
            about.get("path", False),
            about.get("share", False),
            about.get("instead_of"),
            about.get("only_with"),
        )
    return settings


def default_of(field: "dataclasses.Field[Any]") -> Any:
    """The default of a field, also of one whose default is made."""
    return field.default_factory() if callable(field.default_factory) else field.default


class Options:
    """Base of dataclasses of options: values are checked against the ranges and other options that stand beside them.

    A subclass with checks of its own calls `super().__post_init__()` first.
    """

    PREFIX: ClassVar[str] = ""
    """What users write before a field's name, for messages."""

    def __post_init__(self) -> None:
        """Checks every field that has a range, or means nothing without another.

        Raises:
            InputError: A number lies outside its range, or is none; an option is given whose `only_with` is not.
        """
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            interval = field.metadata.get("interval")
            value = getattr(self, field.name)
            if interval is None or (value is None and NoneType in get_args(field.type)):
                continue
            name = self.PREFIX + field.name.rstrip("_")
            for number in value if isinstance(value, list | tuple) else [value]:
                interval.require(name, number)
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            other, needed = field.metadata.get("only_with") or (None, None)
            value = getattr(self, field.name)
            if other is not None and getattr(self, other) != needed and value != default_of(field):
                needed = str(needed).lower() if isinstance(needed, bool) else needed
                raise InputError(f"{field.name}={value}: only {other}={needed} knows it.")


def help_text(schema: "type[DataclassInstance]", script_doc: str | None) -> str:
    """The text of `--help`: what the script says of itself, then every setting with type, range, default and meaning.

    Args:
        schema: As for `load_config`.
        script_doc: The script's docstring.
    """
    lines = [script_doc.strip(), ""] if script_doc else []
    lines.append("Settings: key=value, --key value or --key=value; a bare --key means true; lists are a,b or [a,b].")
    lines += ["  config: a YAML file of settings, by its name in configs/ or its path"]
    for setting in settings_of(schema).values():
        interval = f" in {setting.interval}" if setting.interval else ""
        lines.append(f"  {setting.key}: {setting.words}{interval}, default {setting.default}")
        choices = f" One of {', '.join(map(str, setting.choices))}." if setting.choices else ""
        about = (setting.help + choices).strip()
        lines += textwrap.wrap(about, 100, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)
