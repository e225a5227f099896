"""The one exception for input a user can mend, and the wording of "did you mean"."""

from collections.abc import Iterable
from difflib import get_close_matches

MOST_LISTED = 20
"""Longer lists of allowed names are cut, or left out of a message that has found the nearest one."""


class InputError(ValueError):
    """Bad input from a user: one line that gives the value, what is allowed and, for names, the nearest match.

    Scripts print it without a traceback and exit with code 2; library callers see an ordinary `ValueError`.
    """


def unknown_name(kind: str, name: object, allowed: Iterable[str]) -> InputError:
    """The error for a name that is not among `allowed`, with the nearest allowed name first.

    Args:
        kind: What the name names, singular, for the message ("weighting", "config key").
        name: The name as the user gave it.
        allowed: All names that would have been accepted.
    """
    choices = sorted(allowed)
    nearest = get_close_matches(str(name), choices, n=1, cutoff=0.5)
    hint = f" Did you mean '{nearest[0]}'?" if nearest else ""
    # A hundred names are no help beside the right one, and a thousand none at all.
    listed = f" Allowed: {', '.join(choices)}."
    if len(choices) > MOST_LISTED:
        listed = "" if nearest else f" Allowed: {', '.join(choices[:MOST_LISTED])}, ... ({len(choices)} in all)."
    return InputError(f"Unknown {kind} '{name}'.{hint}{listed}")
