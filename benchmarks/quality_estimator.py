"""From curves of quality over steps to how many times fewer steps an arm needs, with an interval."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from quality_arms import ARMS

SHARES = (0.25, 0.5, 0.75, 1.0)
"""Of the baseline's run: the qualities that an arm must reach."""

RESAMPLES = 10_000
FEWEST_FOR_AN_INTERVAL = 4
"""Of so few seeds a bootstrap says nothing; the values themselves are shown."""


@dataclass(frozen=True)
class Curve:
    """A run's quality over its steps.

    Attributes:
        arm: Its arm.
        seed: Its seed.
        points: What was measured, by step.
        document: All of the run's result.
    """

    arm: str
    seed: int
    points: dict[int, dict[str, Any]]
    document: dict[str, Any]

    def values(self, name: str) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Steps and a score."""
        steps = sorted(self.points)
        return np.array(steps, dtype=float), np.array([self.points[step][name] for step in steps], dtype=float)


def load_curves(folder: Path) -> list[Curve]:
    """All results of a setting; runs of several lengths that share a curve are one."""
    curves: dict[tuple[str, int], Curve] = {}
    for path in sorted(folder.glob("*-*.json")):
        document = json.loads(path.read_text())
        points = {int(point["step"]): point for point in document["curve"]}
        arm = ARMS[document["arm"]].curve or document["arm"]
        curve = curves.setdefault((arm, int(document["seed"])), Curve(arm, int(document["seed"]), {}, document))
        curve.points.update(points)
    return list(curves.values())


def steps_to(curve: Curve, quality: float, score: str = "frechet_distance") -> float:
    """Steps after which a run is as good, lower being better; infinite if it never is.

    The curve is made monotone (the best so far) and interpolated between two measured steps with logarithms on both
    axes. A run that is as good at its first measured step is given that step, which favours the baseline.

    Args:
        curve: The run.
        quality: What must be reached.
        score: Which score.
    """
    steps, values = curve.values(score)
    best = np.minimum.accumulate(values)
    reached = np.flatnonzero(best <= quality)
    if not len(reached):
        return math.inf
    index = int(reached[0])
    if index == 0:
        return float(steps[0])
    (x0, x1), (y0, y1) = np.log(steps[index - 1 : index + 1]), np.log(best[index - 1 : index + 1])
    return float(np.exp(x0 + (x1 - x0) * (math.log(quality) - y0) / (y1 - y0)))


def quality_at(curve: Curve, step: float, score: str = "frechet_distance") -> float:
    """The best quality of a run until a step, interpolated as by `steps_to`."""
    steps, values = curve.values(score)
    best = np.minimum.accumulate(values)
    return float(np.exp(np.interp(math.log(step), np.log(steps), np.log(best))))


@dataclass(frozen=True)
class Ratio:
    """How many times fewer steps.

    Attributes:
        per_seed: By seed; 0 where the quality was never reached.
        mean: Geometric mean; 0 if one seed never reached it.
        interval: Bootstrap over the seeds, 95 %; None of too few seeds.
        is_bound: Whether a seed was as good when it was first measured, so that it may have needed fewer steps.
    """

    per_seed: dict[int, float]
    mean: float
    interval: tuple[float, float] | None
    is_bound: bool = False

    def __str__(self) -> str:
        missed = sum(value == 0 for value in self.per_seed.values())
        if missed:
            return f"not reached by {missed} of {len(self.per_seed)}"
        mean = f"at least {self.mean:.2f}" if self.is_bound else f"{self.mean:.2f}"
        if self.interval is None:
            return f"{mean} ({', '.join(f'{value:.2f}' for value in self.per_seed.values())})"
        return f"{mean} [{self.interval[0]:.2f}, {self.interval[1]:.2f}]"


def step_ratio(
    curves: Sequence[Curve], arm: str, baseline: str, share: float, score: str = "frechet_distance"
) -> Ratio | None:
    """The baseline's steps over an arm's, at the quality that the baseline has after a share of its run.

    Paired: each seed of the arm is held against the same seed of the baseline. A seed is left out where the baseline
    was not measured at that step or on both sides of it, or where the arm does not get there and has not had its
    longest run yet.

    Args:
        curves: All runs of a setting.
        arm: Name of the arm.
        baseline: Name of the baseline.
        share: Of the baseline's longest run, one of `SHARES`.
        score: Which score.

    Returns:
        None if they have no such seed in common.
    """
    mine = {curve.seed: curve for curve in curves if curve.arm == arm}
    theirs = {curve.seed: curve for curve in curves if curve.arm == baseline}
    per_seed, is_bound = {}, False
    longest = max((max(curve.points) for curve in mine.values()), default=0)
    step = round(share * max((max(curve.points) for curve in theirs.values()), default=0), 6)
    for seed in sorted(mine.keys() & theirs.keys()):
        if not min(theirs[seed].points) <= step <= max(theirs[seed].points):
            continue
        quality = quality_at(theirs[seed], step, score)
        needed = steps_to(mine[seed], quality, score)
        if math.isinf(needed) and max(mine[seed].points) < longest:
            continue
        per_seed[seed] = step / needed
        is_bound = is_bound or needed == min(mine[seed].points)
    if not per_seed:
        return None
    values = np.array(list(per_seed.values()))
    if not values.all():
        return Ratio(per_seed, 0.0, None)
    return Ratio(per_seed, float(np.exp(np.log(values).mean())), bootstrap(values), is_bound)


def bootstrap(values: npt.NDArray[np.float64]) -> tuple[float, float] | None:
    """95 % interval of the geometric mean over resampled seeds; None of fewer than four."""
    if len(values) < FEWEST_FOR_AN_INTERVAL:
        return None
    random = np.random.default_rng(0)
    drawn = np.log(values)[random.integers(0, len(values), (RESAMPLES, len(values)))]
    low, high = np.exp(np.percentile(drawn.mean(1), [2.5, 97.5]))
    return float(low), float(high)
