"""The last numbers inside a range, for tests that every value of it is a sensible one."""

import math
import sys

from speed_diffusers.config.schema import Interval


def range_ends(interval: str, kind: type) -> list[float]:
    """The smallest and the largest number of a type in an interval; the largest float where it has no end."""
    low, high = Interval(interval).ends
    if kind is int:
        first, last = int(low) + (interval[0] == "("), None if math.isinf(high) else int(high) - (interval[-1] == ")")
        return [first] if last is None else [first, last]
    first = low if interval[0] == "[" else math.nextafter(low, math.inf)
    if math.isinf(high):
        return [first, high if interval[-1] == "]" else sys.float_info.max]
    return [first, high if interval[-1] == "]" else math.nextafter(high, -math.inf)]
