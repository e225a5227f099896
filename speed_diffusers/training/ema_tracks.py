"""EMA weights of any length, chosen after the training: power-function averages (EDM2, arXiv 2312.02696, section 3).

A run keeps two averages or more whose weight on step s is proportional to s^gamma, so that their length grows with the
training, and writes them down now and then. Afterwards an average of another length is the combination of these
snapshots that is nearest to it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from ..errors import InputError
from ..files import save_tensors, written_whole
from .ema import ExponentialMovingAverage

SNAPSHOTS_FOLDER = "ema_snapshots"
LONGEST = 0.28
"""Relative lengths must stay below: an average over all steps alike has 1 / sqrt(12)."""
LARGEST_ERROR = 0.1
"""Of an average that snapshots make, as `error_of_length` gives it; beyond, it is of another length than is asked."""


def power_of(length: float) -> float:
    """The power gamma of an average of a relative length, EDM2's sigma_rel.

    Args:
        length: Standard deviation of the steps that are averaged, over the steps of the training; in (0, 0.28].

    Raises:
        InputError: It lies outside.
    """
    if not 0 < length <= LONGEST:
        raise InputError(f"EMA length {length}: must lie in (0, {LONGEST}].")
    # sigma_rel^2 = (g + 1) / ((g + 2)^2 (g + 3)), equation 3, as a polynomial of g.
    inverse = length**-2
    return float(np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse]).real.max())


class EmaTracks:
    """Power-function averages of a model's parameters in float32.

    Args:
        model: The model to follow.
        lengths: Relative length of each track, such as 0.05 and 0.1.

    Raises:
        InputError: A length lies outside (0, 0.28].
    """

    def __init__(self, model: nn.Module, lengths: Sequence[float]) -> None:
        self._powers = {length: power_of(length) for length in lengths}
        self._averages = {length: ExponentialMovingAverage(model, 0.0) for length in lengths}

    def update(self, step: int) -> None:
        """Takes in the parameters after an optimizer step, counted from 1; the first replaces what was there."""
        for length, average in self._averages.items():
            average.decay = (1.0 - 1.0 / step) ** (self._powers[length] + 1.0)
            average.update()

    def state_dict(self) -> dict[str, Tensor]:
        """Averages by "LENGTH/NAME"; the live tensors, not copies."""
        return {
            f"{length:g}/{name}": value
            for length, average in self._averages.items()
            for name, value in average.state_dict().items()
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copies averages in.

        Raises:
            InputError: The state is of other lengths or of another model.
        """
        if state.keys() != self.state_dict().keys():
            lengths = sorted({name.partition("/")[0] for name in state})
            raise InputError(
                f"ema_tracks={','.join(f'{length:g}' for length in self._averages)}: saved are {lengths}."
            )
        for length, average in self._averages.items():
            average.load_state_dict(_track(state, length))


def _track(state: Mapping[str, Tensor], length: float) -> dict[str, Tensor]:
    """The averages of one length, by the parameters' names."""
    prefix = f"{length:g}/"
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def save_snapshot(folder: Path, step: int, tracks: Mapping[str, Tensor]) -> None:
    """Writes the averages after a step in half precision, as EDM2 does.

    Args:
        folder: Of the run.
        step: Optimizer steps done.
        tracks: From `EmaTracks.state_dict`, whole tensors.
    """
    place = folder / SNAPSHOTS_FOLDER
    place.mkdir(exist_ok=True)
    with written_whole(place / f"step-{step:07d}.safetensors") as temporary:
        save_tensors({name: value.half() for name, value in tracks.items()}, temporary)


def step_of_snapshot(path: Path) -> int:
    """The step after which a snapshot was written."""
    return int(path.stem.removeprefix("step-"))


def list_snapshots(folder: Path) -> dict[int, Path]:
    """The snapshots of a run by their steps."""
    return {step_of_snapshot(path): path for path in (folder / SNAPSHOTS_FOLDER).glob("step-*.safetensors")}


def remove_later_snapshots(folder: Path, step: int) -> None:
    """Removes the snapshots of steps after one that a run resumes from."""
    for at, path in list_snapshots(folder).items():
        if at > step:
            path.unlink()


def error_of_length(folder: Path, length: float, step: int) -> float:
    """How far the nearest combination of a run's snapshots is from the average of a length after a step.

    Args:
        folder: Of the run.
        length: Relative length, in (0, 0.28].
        step: Optimizer steps; earlier snapshots alone are used.

    Returns:
        Difference of the two averages' weights on the steps, relative to the one that is asked for (root of the sum of
        squares): 0 for a track, and below 0.06 between two tracks; outside them it takes many snapshots.

    Raises:
        InputError: There are no snapshots until then, or the length lies outside.
    """
    return _combination(folder, length, step)[1]


def ema_of_length(folder: Path, length: float, step: int | None = None) -> dict[str, Tensor]:
    """The EMA weights of any relative length after a step (equations 4 and 5 of EDM2's appendix C).

    Args:
        folder: Of the run.
        length: Relative length, in (0, 0.28].
        step: Optimizer steps; None: those of the last snapshot. Earlier snapshots alone are used.

    Returns:
        Parameter names to averages, float32.

    Raises:
        InputError: There are no snapshots until then or too few for this length, or the length lies outside.
    """
    last = step if step is not None else max(list_snapshots(folder), default=0)
    share_of, error = _combination(folder, length, last)
    if error > LARGEST_ERROR:
        raise InputError(f"weights=ema:{length:g}: after step {last:,} {too_few_snapshots(folder, error)}")
    total: dict[str, Tensor] = {}
    for path in dict.fromkeys(path for path, _ in share_of):
        state = load_file(path)
        for each in (each for where, each in share_of if where == path):
            for name, value in _track(state, each).items():
                total[name] = total.get(name, torch.zeros(())) + float(share_of[path, each]) * value.float()
    return total


def too_few_snapshots(folder: Path, error: float) -> str:
    """Says that a run's snapshots do not make a length: the end of a sentence."""
    return (
        f"the snapshots of {folder} make an EMA that differs by {error:.0%} from one of this length (at most "
        f"{LARGEST_ERROR:.0%}). Ask for a length between those of ema_tracks, or train with more checkpoints."
    )


def _combination(folder: Path, length: float, step: int) -> tuple[dict[tuple[Path, float], np.float64], float]:
    """The shares of snapshots and their tracks in the nearest average of a length, and `error_of_length`."""
    power = power_of(length)
    used = {at: path for at, path in sorted(list_snapshots(folder).items()) if at <= step}
    if not used:
        raise InputError(
            f"weights=ema:{length:g}: {folder} has no EMA snapshots until step {step} (ema_tracks=0.05,0.1)."
        )
    sources = []
    for at, path in used.items():
        with safe_open(path, "pt") as file:
            lengths = {float(name.partition("/")[0]) for name in file.keys()}  # noqa: SIM118
        sources += [(at, each, path) for each in sorted(lengths)]
    steps = np.array([at for at, _, _ in sources], dtype=float)
    powers = np.array([power_of(each) for _, each, _ in sources])
    products = inner_products(steps[:, None], powers[:, None], steps, powers)
    wanted = inner_products(steps, powers, np.float64(step), np.float64(power))
    shares = np.linalg.lstsq(products, wanted, rcond=None)[0]
    shares /= shares.sum()
    norm = float(inner_products(step, power, step, power))
    error = max(0.0, norm - float(2 * shares @ wanted - shares @ products @ shares)) / norm
    share_of = {(path, each): share for (_, each, path), share in zip(sources, shares, strict=True)}
    return share_of, error**0.5


def inner_products(
    first_steps: npt.ArrayLike, first_powers: npt.ArrayLike, steps: npt.ArrayLike, powers: npt.ArrayLike
) -> npt.NDArray[np.float64]:
    """Integral over the steps of the product of two averages' weights, each (g + 1) s^g / t^(g + 1) until its step t.

    Args:
        first_steps: t of the first, any shape.
        first_powers: gamma of the first.
        steps: t of the second.
        powers: gamma of the second.

    Returns:
        float64, of the shapes broadcast.
    """
    t1, g1, t2, g2 = (np.asarray(each, dtype=float) for each in (first_steps, first_powers, steps, powers))
    # The earlier one ends the integral; logarithms, because s^g overflows.
    exponent = np.where(t1 < t2, g2, -g1)
    log_ratio = np.log(t1) - np.log(t2)
    result: npt.NDArray[np.float64] = (
        (g1 + 1) * (g2 + 1) / (g1 + g2 + 1) / np.maximum(t1, t2) * np.exp(exponent * log_ratio)
    )
    return result
