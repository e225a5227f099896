"""Names to functions: the one place where a choice such as a density or a weighting exists.

Help texts, command-line choices, documentation tables and tests read the registries, so a name is written once. An
unknown name raises with the nearest known one; nothing falls through to a default.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from .errors import unknown_name

F = TypeVar("F", bound=Callable[..., object])


@dataclass(frozen=True)
class Entry(Generic[F]):
    """A registered function with what a reader needs to choose it.

    Attributes:
        function: The function itself.
        summary: One sentence for help texts and tables.
        reference: Paper and equation, or where the formula comes from.
    """

    function: F
    summary: str
    reference: str


class Registry(Mapping[str, Entry[F]]):
    """A read-only mapping from names to entries that grows by decoration.

    Args:
        kind: What the names name, singular, for error messages ("timestep density").
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, Entry[F]] = {}

    def register(self, name: str, *, summary: str, reference: str) -> Callable[[F], F]:
        """Decorator that adds a function under `name`.

        Raises:
            ValueError: The name is taken.
        """

        def add(function: F) -> F:
            if name in self._entries:
                raise ValueError(f"The {self.kind} '{name}' is registered already.")
            self._entries[name] = Entry(function, summary, reference)
            return function

        return add

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
