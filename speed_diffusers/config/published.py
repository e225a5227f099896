"""Commands and options as result files keep them: without the folders of the machine, for such files get published."""

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def published_command(script: str, argv: Sequence[str]) -> str:
    """The command line of a script, to be repeated by others.

    Args:
        script: Its path in the repository.
        argv: What followed it.
    """
    return shlex.join(["python", script, *(re.sub(r"[^=,\[\]]+", _published_match, word) for word in argv)])


def published(value: Any) -> Any:
    """An option's value; an absolute path relative to the working folder or, outside of it, its last part alone."""
    if not isinstance(value, str) or not value.startswith("~") and not Path(value).is_absolute():
        return value
    path = Path(value)
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path.name)


def _published_match(part: re.Match[str]) -> str:
    return str(published(part[0]))
