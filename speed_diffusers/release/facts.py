"""What a model card tells of a model: read from its pipeline, the file beside it and, of a run, from its folder."""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from diffusers import DiTPipeline

from ..assets import EMBEDDED
from ..data.moments import vae_factor
from ..errors import InputError
from ..files import tensors_sha256
from ..generation.export import TrainingRecord
from ..generation.generate import row_names_of
from ..generation.pretrained import sidecar_of
from ..metrics.protocol import Protocol
from ..metrics.score_record import Environment, Score, ScoreRecord, load_scores
from ..models import NULL_CLASS
from ..process import is_rectified_flow
from ..training.checkpoints import read_state
from ..training.config import TrainConfig
from ..training.record import public_dataset, public_name, published_config
from ..training.run_folder import (
    LOSS_FILE,
    METRICS_FILE,
    SCORES_FOLDER,
    VALIDATION_FOLDER,
    is_run,
    load_run_config,
)
from ..training.snapshots import Place
from ..training.tracking import read_metrics
from ..version import __version__

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Facts:
    """All that a card may tell.

    Attributes:
        run: Folder of its run; None for a pipeline alone.
        sidecar: What the file beside its pipeline tells, whole.
        pipeline: The model.
        class_names: Rows of the label table to names; empty for a model without classes, or without names.
        step: Optimizer steps behind the weights; None: not known.
        config: Options of the training by name; empty: not known.
        record: How the training went.
        scores: Of exactly these weights, each with its protocol.
        metrics: Lines of the run's log.
        validation: Lines of its validation loss.
        course: Scores over the training, under one protocol, with their steps: number's name to points.
    """

    run: Path | None
    sidecar: Mapping[str, Any]
    pipeline: DiTPipeline
    class_names: Mapping[int, str]
    step: int | None
    config: Mapping[str, Any]
    record: TrainingRecord
    scores: Sequence[Score] = ()
    metrics: Sequence[Mapping[str, Any]] = ()
    validation: Sequence[Mapping[str, Any]] = ()
    course: Mapping[str, Sequence[tuple[float, float]]] = field(default_factory=dict)

    @property
    def is_flow(self) -> bool:
        """Whether it was trained for flow matching, which the stock pipeline cannot sample from."""
        return is_rectified_flow(self.pipeline.scheduler)

    @property
    def predicts_variance(self) -> bool:
        """Whether the network predicts the variance of the steps too."""
        shape = self.pipeline.transformer.config
        return bool(shape.out_channels == 2 * shape.in_channels)

    @property
    def is_guided_by_stock(self) -> bool:
        """Whether the stock pipeline finds the row of "no class" where it looks for it."""
        chosen = self.pipeline.config.get("null_class_id")
        return self.pipeline.transformer.config.num_embeds_ada_norm >= NULL_CLASS and chosen in (None, NULL_CLASS)

    @property
    def resolution(self) -> int:
        """Side of the images in pixels."""
        return int(self.pipeline.transformer.config.sample_size * vae_factor(self.pipeline.vae))

    @property
    def max_train_steps(self) -> int | None:
        """Optimizer steps that the training was to take."""
        steps: int | None = self.config.get("max_train_steps")
        return steps

    @property
    def is_finished(self) -> bool:
        """Whether the weights are those at the end of the training, as far as is known."""
        return self.step is None or self.max_train_steps is None or self.step >= self.max_train_steps

    def train_config(self) -> TrainConfig | None:
        """The options as this version of the trainer has them; None where it does not know them all."""
        known = {each.name for each in fields(TrainConfig)}
        try:
            return TrainConfig(**{name: value for name, value in self.config.items() if name in known})
        except (InputError, TypeError) as error:
            logger.warning("The card leaves out the recipe, which is of another version: %s", error)
            return None


def facts_of(
    name: str,
    pipeline: DiTPipeline,
    place: Place,
    *,
    revision: str | None = None,
    scores_dir: Path | None = None,
) -> Facts:
    """What is known of a model.

    Args:
        name: "embedded", the folder of a run or of a pipeline, or a Hub id.
        pipeline: What `training.snapshots.load_latest_place` loads by that name.
        place: Where in its run it stands.
        revision: Of a model on the Hub: branch, tag or commit.
        scores_dir: Folder of more scores than the run's own, or of such folders; those of other weights are left out.

    Raises:
        InputError: A file that tells something is damaged.
    """
    run = Path(name) if name != EMBEDDED and is_run(Path(name)) else None
    if run is None or place.checkpoint is None:
        sidecar = sidecar_of(name, revision=revision)
    else:
        sidecar = _sidecar_of_checkpoint(run, place.checkpoint)
    folders = [folder for folder in (run and run / SCORES_FOLDER, scores_dir) if folder is not None]
    recorded = [record for folder in folders for record in load_scores(folder)]
    # Where evaluate.py is given an output_dir, it makes a folder of each model or set of images in it.
    below = [record for folder in folders for own in _folders_in(folder) for record in load_scores(own)]
    weights = tensors_sha256(pipeline.transformer.state_dict())
    scores: dict[str, Score] = {}
    # Those of files first: more numbers than a run's own may have come to the same protocol.
    for score in [*(record.score for record in (*recorded, *below)), *_score_in(sidecar)]:
        if score.weights_sha256 == weights:
            scores.setdefault(score.protocol.short_hash(), score)
    validation = run and run / VALIDATION_FOLDER / LOSS_FILE
    return Facts(
        run=run,
        sidecar=sidecar,
        pipeline=pipeline,
        class_names=row_names_of(pipeline),
        step=place.step,
        config=sidecar.get("training_config", {}),
        record=_record_in(sidecar),
        scores=list(scores.values()),
        metrics=read_metrics(run / METRICS_FILE) if run and (run / METRICS_FILE).is_file() else [],
        validation=read_metrics(validation) if validation and validation.is_file() else [],
        course=_course(load_scores(run / SCORES_FOLDER) if run else []),
    )


def _folders_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*") if path.is_dir())


def _sidecar_of_checkpoint(run: Path, checkpoint: Path) -> dict[str, Any]:
    """What the sidecar file of a pipeline would say, of a run that has left none yet."""
    config, state = load_run_config(run), read_state(checkpoint)
    record = TrainingRecord(
        global_batch=state["global_batch"],
        images_seen=state["step"] * state["global_batch"],
        seconds=state.get("seconds"),
        mixed_precision=state.get("mixed_precision"),
        dataset=public_dataset(config),
        vae=public_name(config.pretrained_vae_model_name_or_path),
        base_model=public_name(config.pretrained_model_name_or_path),
    )
    return {
        "speed_diffusers": __version__,
        "training_config": published_config(config),
        "training": dataclasses.asdict(record),
    }


def _record_in(sidecar: Mapping[str, Any]) -> TrainingRecord:
    """What a sidecar file tells of its run: of a newer version's as much as this one knows, of an older one's less."""
    known = {each.name for each in fields(TrainingRecord)}
    if "training" in sidecar:
        return TrainingRecord(**{name: value for name, value in sidecar["training"].items() if name in known})
    config = sidecar.get("training_config", {})
    # Other names may have been folders of the machine.
    names = {"dataset": config.get("dataset_name"), "vae": config.get("pretrained_vae_model_name_or_path")}
    return TrainingRecord(**{part: name for part, name in names.items() if name == EMBEDDED})


def _score_in(sidecar: Mapping[str, Any]) -> list[Score]:
    """The score that a run has put into the file beside its pipeline; none if another version did."""
    values = dict(sidecar.get("score", {}))
    try:
        protocol = Protocol.from_dict(values.pop("protocol"))
        environment = Environment(**values.pop("environment"))
        weights = values.pop("weights_sha256")
        return [Score(values=values, weights_sha256=weights, protocol=protocol, environment=environment)]
    except (InputError, KeyError, TypeError) as error:
        if values:
            logger.warning("The card leaves out a score of another version: %s", error)
        return []


def _course(records: Sequence[ScoreRecord]) -> dict[str, list[tuple[float, float]]]:
    """The first number of the protocol under which most steps of the EMA weights were scored, over steps.

    Empty for fewer than two. Scores from elsewhere may be of another run: only its last weights can be recognised.
    """
    by_protocol: dict[str, list[ScoreRecord]] = {}
    for record in records:
        if record.step is not None:
            by_protocol.setdefault(record.score.protocol.short_hash(), []).append(record)
    longest = max(by_protocol.values(), key=lambda own: (own[0].score.protocol.weights == "ema", len(own)), default=[])
    if len(longest) < 2:
        return {}
    name = next((name for name in longest[0].score.values if "frechet" in name), next(iter(longest[0].score.values)))
    points = [(float(each.step or 0), each.score.values.get(name)) for each in longest]
    known = [(step, value) for step, value in points if value is not None]
    return {name: known} if len(known) > 1 else {}
