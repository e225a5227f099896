"""A score, and the files that keep it beside the run it belongs to."""

import dataclasses
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_type_hints

from ..errors import InputError
from ..files import write_text
from ..json_files import check_values, read_object
from .protocol import Protocol

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Environment:
    """Where a score was measured; what should not change it and so is not part of the protocol.

    Attributes:
        torch: Version of torch.
        diffusers: Version of diffusers.
        speed_diffusers: Version of this package.
        device: Type of the device that generated, such as "cpu" or "cuda".
        seconds: Time of generation and measurement.
    """

    torch: str
    diffusers: str
    speed_diffusers: str
    device: str
    seconds: float


@dataclass(frozen=True)
class Score:
    """Quality of generated images.

    Attributes:
        values: Each metric's numbers by name, None where it has no meaning. Over features that are not Inception's
            they are neither FID nor KID.
        weights_sha256: Hash of the transformer's weights.
        protocol: How it was measured; scores under other protocols do not compare.
        environment: Where it was measured.
        intervals: Lower and upper end of 95 % intervals by the names of numbers; see intervals.py. Empty where nothing
            was resampled.
        interval_draws: Draws behind each interval; none of those that an earlier version wrote.
    """

    values: Mapping[str, float | None]
    weights_sha256: str
    protocol: Protocol
    environment: Environment = field(compare=False)
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    interval_draws: Mapping[str, int] = field(default_factory=dict)

    @property
    def frechet_distance(self) -> float | None:
        """Distance to the reference in squared feature units, lower is better; None if it was not measured."""
        return self.values.get("frechet_distance")

    @property
    def class_agreement(self) -> float | None:
        """Share of images that the extractor takes for the class they were asked to be; None where unknown."""
        return self.values.get("class_agreement")

    def added_to(self, older: "Score") -> "Score":
        """The numbers of both, of which this one's count where both have one; of the same weights and protocol."""
        return dataclasses.replace(
            self,
            values={**older.values, **self.values},
            intervals={**older.intervals, **self.intervals},
            interval_draws={**older.interval_draws, **self.interval_draws},
        )

    def to_dict(self) -> dict[str, object]:
        """The score as JSON values, the numbers first."""
        intervals = {"intervals": self.intervals, "interval_draws": self.interval_draws} if self.intervals else {}
        return {
            **self.values,
            **intervals,
            "weights_sha256": self.weights_sha256,
            "protocol": dataclasses.asdict(self.protocol),
            "environment": dataclasses.asdict(self.environment),
        }


@dataclass(frozen=True)
class ScoreRecord:
    """A score with its place in a run.

    Attributes:
        score: The score itself.
        step: Optimizer steps done; None for a pipeline that does not say.
        images_seen: Images trained on, step times global batch; None if not known.
        training_seconds: Time of training until then, without checkpoints and samples; None if not known.
    """

    score: Score
    step: int | None = None
    images_seen: int | None = None
    training_seconds: float | None = None


def score_path(folder: Path, protocol: Protocol, step: int | None) -> Path:
    """The file of a score: `step-0003000-1a2b3c4d.json`, or `score-1a2b3c4d.json` without a step."""
    prefix = "score" if step is None else f"step-{step:07d}"
    return folder / f"{prefix}-{protocol.short_hash()}.json"


def save_score(
    score: Score,
    folder: Path,
    *,
    step: int | None = None,
    images_seen: int | None = None,
    seconds: float | None = None,
) -> Path:
    """Writes a score, whole or not at all; a score of the same step and protocol is replaced.

    Args:
        score: From `score_pipeline`.
        folder: Made if it is not there; `scores/` of a run.
        step: Optimizer steps done.
        images_seen: Images trained on.
        seconds: Time of training until then.

    Returns:
        The file.
    """
    path = score_path(folder, score.protocol, step)
    place = {"step": step, "images_seen": images_seen, "training_seconds": seconds}
    document = {"format_version": FORMAT_VERSION, **place, **score.to_dict()}
    folder.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(document, indent=1) + "\n")
    return path


def load_score(path: Path) -> ScoreRecord:
    """The score in a file of `save_score`.

    Raises:
        InputError: The file is missing, damaged or of another version.
    """
    document = read_object(path)
    check_values(path, document, {"protocol": dict, "environment": dict} | get_type_hints(ScoreRecord))
    for part, types in (("protocol", Protocol), ("environment", Environment)):
        check_values(path, document.get(part, {}), get_type_hints(types))
    try:
        if document.pop("format_version") != FORMAT_VERSION:
            raise InputError("another format")
        place = {name: document.pop(name) for name in ("step", "images_seen", "training_seconds")}
        protocol = Protocol.from_dict(document.pop("protocol"))
        environment = Environment(**document.pop("environment"))
        weights_sha256 = document.pop("weights_sha256")
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} holds no score of this version ({type(error).__name__}: {error}).") from error
    check_values(path, {"weights_sha256": weights_sha256}, {"weights_sha256": str})
    intervals = document.pop("intervals", {})
    check_values(path, {"intervals": intervals}, {"intervals": dict[str, list[float]]})
    if odd := [name for name, ends in intervals.items() if len(ends) != 2]:
        raise InputError(f"{path}: intervals of {odd[0]} must be two numbers.")
    draws = document.pop("interval_draws", {})
    check_values(path, {"interval_draws": draws}, {"interval_draws": dict[str, int]})
    check_values(path, document, dict.fromkeys(document, float | None))
    ends_of = {name: (low, high) for name, (low, high) in intervals.items()}
    return ScoreRecord(Score(document, weights_sha256, protocol, environment, ends_of, draws), **place)


def load_scores(folder: Path) -> list[ScoreRecord]:
    """All scores of a folder, by step; files that hold none are passed over with a warning."""
    records = []
    for path in sorted(folder.glob("*.json")):
        try:
            records.append(load_score(path))
        except InputError as error:
            logger.warning("%s", error)
    return sorted(records, key=lambda record: -1 if record.step is None else record.step)
