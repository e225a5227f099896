"""Names to functions: the one place where a choice such as a density or a weighting exists.

Help texts, command-line choices, documentation tables and tests read the registries, so a name is written once. An
unknown name raises with the nearest known one; nothing falls through to a default.

A choice with parameters is written as one string, `"name:parameter=value,parameter=value"`, which every scheduler's
config and JSON can hold. Parameters that are left out take their defaults, so a bare name is a choice too.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

from .config.schema import Interval
from .errors import InputError, unknown_name

F = TypeVar("F", bound=Callable[..., object])


@dataclass(frozen=True)
class Parameter:
    """One number that a registered function takes by keyword.

    Attributes:
        name: Its keyword.
        default: What it is where a choice does not give it.
        interval: Allowed values as an interval, such as "(0, inf)" or "[0, 1]".
        meaning: What it is, in one line.
        whole: Whether it must be a whole number.
    """

    name: str
    default: float
    interval: str
    meaning: str
    whole: bool = False

    def allows(self, value: float) -> bool:
        """Whether a value lies in the interval (and is whole, if it must be); nan never does."""
        return value in Interval(self.interval) and (not self.whole or value == int(value))

    def __str__(self) -> str:
        kind = "whole, " if self.whole else ""
        return f"{self.name}={self.default:g} in {kind}{self.interval}: {self.meaning}"


@dataclass(frozen=True)
class Part:
    """A choice of the same registry that a registered function takes by keyword, such as the density of a phase.

    Attributes:
        name: Its keyword.
        default: What it is where a choice does not give it, as text.
        meaning: What it is, in one line.
    """

    name: str
    default: str
    meaning: str


@dataclass(frozen=True)
class Entry(Generic[F]):
    """A registered function with what a reader needs to choose it.

    Attributes:
        function: The function itself.
        summary: One sentence for help texts and tables.
        reference: Paper and equation, or where the formula comes from; says so if it was not checked there.
        parameters: The numbers that it takes by keyword.
        needs_progress: Whether its values change in the course of a training.
        learns: Whether it makes an object that learns from the losses of a training.
        named: Names of published values of the parameters, written in place of them ("gaussian:edm2").
        part: The choice that it takes by keyword besides its numbers; None: none.
    """

    function: F
    summary: str
    reference: str
    parameters: tuple[Parameter, ...] = ()
    needs_progress: bool = False
    learns: bool = False
    named: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    part: Part | None = None


@dataclass(frozen=True)
class Choice(Generic[F]):
    """A name with the values of all its parameters; called, it calls the function with them.

    Attributes:
        name: Registered name, or that of a function which is not registered.
        arguments: Value of each parameter by name.
        entry: What is registered under the name.
        part: The choice that is a part of this one; None: none is.
    """

    name: str
    arguments: dict[str, float]
    entry: Entry[F]
    part: "Choice[F] | None" = None

    @property
    def needs_progress(self) -> bool:
        """Whether its values, or those of its part, change in the course of a training."""
        return self.entry.needs_progress or (self.part is not None and self.part.needs_progress)

    @property
    def learns(self) -> bool:
        """Whether it, or its part, learns from the losses of a training."""
        return self.entry.learns or (self.part is not None and self.part.learns)

    def __call__(self, *args: object) -> Any:
        """What the function makes of these arguments and of the parameters."""
        parts = {self.entry.part.name: self.part} if self.entry.part is not None else {}
        return self.entry.function(*args, **self.arguments, **parts)

    def __str__(self) -> str:
        """The shortest string that means this choice."""
        defaults = {parameter.name: parameter.default for parameter in self.entry.parameters}
        given = [f"{name}={value:.15g}" for name, value in self.arguments.items() if value != defaults[name]]
        if self.entry.part is not None and str(self.part) != self.entry.part.default:
            given.append(f"{self.entry.part.name}={self.part}")
        return ":".join([self.name, *filter(None, [",".join(given)])])


class Registry(Mapping[str, Entry[F]]):
    """A read-only mapping from names to entries that grows by decoration.

    Args:
        kind: What the names name, singular, for error messages ("timestep density").
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, Entry[F]] = {}

    def register(
        self,
        name: str,
        *,
        summary: str,
        reference: str,
        parameters: tuple[Parameter, ...] = (),
        needs_progress: bool = False,
        learns: bool = False,
        named: Mapping[str, Mapping[str, float]] | None = None,
        part: Part | None = None,
    ) -> Callable[[F], F]:
        """Decorator that adds a function under `name`.

        Args:
            name: What a user writes.
            summary: One sentence for help texts and tables.
            reference: Paper and equation, or where the formula comes from.
            parameters: The function's keyword-only arguments, which have no defaults of their own.
            needs_progress: Whether its values change in the course of a training.
            learns: Whether it makes an object that learns from the losses of a training.
            named: Names of published values of the parameters.
            part: The last of the keyword-only arguments, if it is a choice itself.

        Raises:
            ValueError: The name is taken, a value is outside its range, or the function takes other keywords.
        """

        def add(function: F) -> F:
            if name in self._entries:
                raise ValueError(f"The {self.kind} '{name}' is registered already.")
            keywords = [p.name for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
            taken = [parameter.name for parameter in parameters] + ([part.name] if part else [])
            if keywords != taken:
                raise ValueError(f"The {self.kind} '{name}' takes {keywords}, which are not its parameters.")
            for parameter in parameters:
                if not parameter.allows(parameter.default):
                    raise ValueError(f"The {self.kind} '{name}' has a default outside its range: {parameter}.")
            for values in (named or {}).values():
                if not all(parameter.allows(values[parameter.name]) for parameter in parameters):
                    raise ValueError(f"The {self.kind} '{name}' has named values outside its ranges: {values}.")
            self._entries[name] = Entry(
                function, summary, reference, parameters, needs_progress, learns, dict(named or {}), part
            )
            return function

        return add

    def parse(self, text: "str | F | Choice[F]") -> Choice[F]:
        """Reads a choice such as `"min_snr:gamma=5"` or `"gaussian:edm2"`; a bare name takes the defaults.

        Parameters of a part stand beside those of the whole: `"two_phase:first=laplace:scale=1,until=0.5"`.

        Args:
            text: The choice. A registered function means its name, another one is taken as it is, and a choice is
                returned.

        Raises:
            InputError: An unknown name or parameter (with the nearest), a value that is no number or outside its
                range (with the range), a parameter given twice, or text of another form.
        """
        if isinstance(text, Choice):
            return text
        if callable(text):
            registered = [name for name, entry in self.items() if entry.function is text]
            if registered:
                return self.parse(registered[0])
            return Choice(getattr(text, "__name__", type(text).__name__), {}, Entry(text, "", ""))
        name, colon, rest = text.partition(":") if isinstance(text, str) else (text, "", "")
        name = name.strip() if isinstance(name, str) else name
        entry = self[name]
        arguments = {parameter.name: float(parameter.default) for parameter in entry.parameters}
        seen: set[str] = set()
        pieces = [piece.strip() for piece in rest.split(",")] if colon else []
        if pieces and entry.named and "=" not in pieces[0] and pieces[0]:
            if pieces[0] not in entry.named:
                raise unknown_name(f"setting of the {self.kind} '{name}'", pieces[0], entry.named)
            arguments |= {key: float(value) for key, value in entry.named[pieces.pop(0)].items()}
        given, of_part = None, []
        for piece in pieces:
            key, equals, value = (word.strip() for word in piece.partition("="))
            if not (key and equals and value):
                form = f"{name}:{','.join(f'{p.name}={p.default:g}' for p in entry.parameters) or 'name=value'}"
                raise InputError(f"{self.kind} '{text}': cannot read '{piece}'; the form is '{form}'.")
            is_part = entry.part is not None and key == entry.part.name
            if key not in arguments and not is_part:
                if entry.part is not None:
                    of_part.append(piece)
                    continue
                if not entry.parameters:
                    raise InputError(f"{self.kind} '{text}': '{name}' has no parameters.")
                raise unknown_name(f"parameter of the {self.kind} '{name}'", key, arguments)
            if key in seen:
                raise InputError(f"{self.kind} '{text}': '{key}' is given twice.")
            seen.add(key)
            if is_part:
                given = value
            else:
                arguments[key] = self._value(text, entry, key, value)
        return Choice(name, arguments, entry, self._part(name, entry, given, of_part))

    def _part(self, name: str, entry: Entry[F], given: str | None, pieces: list[str]) -> "Choice[F] | None":
        """The choice that is a part of another, from its own text, if given, and from what is not the other's."""
        part = entry.part
        if part is None:
            return None
        choice = self.parse(part.default if given is None else given)
        if choice.entry.part is not None:
            raise InputError(f"{self.kind} '{name}': {part.name}={choice.name} has a part itself; take another.")
        keys = [piece.partition("=")[0].strip() for piece in pieces]
        for key in keys:
            if key not in choice.arguments:
                allowed = [part.name, *(parameter.name for parameter in entry.parameters), *choice.arguments]
                raise unknown_name(f"parameter of the {self.kind} '{name}' with {part.name}={choice}", key, allowed)
        if not keys:
            return choice
        if given is not None:
            return self.parse(f"{given}{',' if ':' in given else ':'}{','.join(pieces)}")
        changed = self.parse(f"{choice.name}:{','.join(pieces)}").arguments
        return replace(choice, arguments=choice.arguments | {key: changed[key] for key in keys})

    def _value(self, text: str, entry: Entry[F], key: str, value: str) -> float:
        (parameter,) = (parameter for parameter in entry.parameters if parameter.name == key)
        try:
            number = float(value)
        except ValueError:
            raise InputError(f"{self.kind} '{text}': {key}={value} is not a number.") from None
        if not parameter.allows(number):
            kind = "a whole number in" if parameter.whole else "in"
            raise InputError(
                f"{self.kind} '{text}': {key}={value} must be {kind} {parameter.interval} ({parameter.meaning})."
            )
        return number

    def __getitem__(self, name: str) -> Entry[F]:
        """The entry of `name`.

        Raises:
            InputError: No such name; the message gives the nearest one and all allowed.
        """
        if not isinstance(name, str) or name not in self._entries:
            raise unknown_name(self.kind, name, self._entries)
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def help_lines(registry: Registry[F]) -> str:
    """All entries of a registry in one paragraph for `--help`: name, parameters with ranges, what it does."""
    return " ".join(
        name
        + (
            ":"
            + ",".join(
                [f"{p.name}={p.default:g} in {_range(p)} ({p.meaning})" for p in entry.parameters]
                + ([f"{entry.part.name}={entry.part.default} ({entry.part.meaning})"] if entry.part else [])
            )
            if entry.parameters
            else ""
        )
        + (f" or {', '.join(f'{name}:{setting}' for setting in entry.named)}" if entry.named else "")
        + f": {entry.summary}"
        for name, entry in registry.items()
    )


def markdown_table(registry: Registry[F]) -> str:
    """All entries of a registry as a Markdown table, for documentation and help."""
    lines = ["| name | what it does | parameters | source |", "|---|---|---|---|"]
    for name, entry in registry.items():
        parameters = "<br>".join(f"`{p.name}={p.default:g}` in {_range(p)}: {p.meaning}" for p in entry.parameters)
        if entry.part is not None:
            parameters += f"<br>`{entry.part.name}={entry.part.default}`: {entry.part.meaning}"
        for setting, values in entry.named.items():
            parameters += f"<br>`{name}:{setting}`: {', '.join(f'{key} {value:g}' for key, value in values.items())}"
        cells = (f"`{name}`", entry.summary, parameters, entry.reference)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def _range(parameter: Parameter) -> str:
    return ("whole numbers of " if parameter.whole else "") + parameter.interval
