"""The version of this package, and the newest versions of others that it was tried with."""

import re
import warnings
from importlib import metadata

__version__ = "0.2.0"

NEWEST_TRIED = {"diffusers": "0.42", "accelerate": "1.15", "datasets": "5.2"}
"""Package to the newest version that the tests were run with. setup.py has the lowest."""


def warn_of_untried(*packages: str) -> None:
    """Warns, once a process, of packages that are newer than any version that was tried.

    Not a cap in setup.py: other people's trainers pin versions of their own, and most newer ones work.

    Args:
        packages: Names in `NEWEST_TRIED`.
    """
    for package in packages:
        newest, found = NEWEST_TRIED[package], metadata.version(package)
        if _release(found) > _release(newest):
            warnings.warn(
                f"speed_diffusers {__version__} was tried with {package} up to {newest}, but {found} is installed.",
                UserWarning,
                stacklevel=3,
            )


def _release(version: str) -> tuple[int, ...]:
    """Major and minor number."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])
