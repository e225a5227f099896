"""Images from a pipeline: one seed per image, in lazy batches; and classes as people name them."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from diffusers import DiTPipeline
from diffusers.utils.torch_utils import randn_tensor

from ..config.schema import Options, option
from ..errors import InputError, unknown_name
from ..json_files import check_values, read_object
from ..models import NULL_CLASS
from ..pipelines import SpeeDDiTPipeline
from ..pipelines.pipeline_dit_speed import ambiguous_name, find_rows
from ..randomness import keyed_generator
from .processes import ALONE, Processes
from .samplers import SAMPLERS, make_sampler

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class GenerationSettings(Options):
    """How images are generated. Scripts that generate inherit these options; the defaults are those of a score.

    Raises:
        InputError: A number lies outside its range.
    """

    guidance_scale: float = option(1.0, "Classifier-free guidance; 1: none.", interval="[1, 1000]")
    guidance_channels: int | None = option(
        None, "Latent channels to guide, from the first; None: all. DiT guided 3 of 4.", interval="[1, inf)"
    )
    guidance_interval: list[float] = option(
        [0.0, 1.0], "Where to guide: shares of the noising process, 0 is clean, 1 is noise.", interval="[0, 1]"
    )
    sampler: str | None = option(None, "Solver; None: the pipeline's own.", choices=SAMPLERS)
    num_inference_steps: int = option(50, "Solver steps.", interval="[1, inf)")
    seed: int = option(0, "Seed; the noise of image i depends on it and i alone.", interval="[0, 2^63)")
    batch_size: int = option(64, "Images generated at once.", interval="[1, 10^6]")

    def __post_init__(self) -> None:
        super().__post_init__()
        interval = self.guidance_interval
        if len(interval) != 2 or interval[0] > interval[1]:
            raise InputError(f"guidance_interval={interval}: must be two numbers in [0, 1], the lower one first.")

    def check_fits(self, pipeline: DiTPipeline) -> None:
        """Checks that a pipeline can generate so.

        Raises:
            InputError: It has fewer channels or timesteps, or the sampler cannot follow its schedule.
        """
        channels = pipeline.transformer.config.in_channels
        if self.guidance_channels is not None and self.guidance_channels > channels:
            raise InputError(f"guidance_channels={self.guidance_channels}: must lie in [1, {channels}].")
        longest = speed_pipeline(pipeline, self.sampler).scheduler.config.num_train_timesteps
        if self.num_inference_steps > longest:
            raise InputError(f"num_inference_steps={self.num_inference_steps}: the model has {longest} timesteps.")


def generate(
    pipeline: DiTPipeline,
    class_rows: Sequence[int],
    settings: GenerationSettings | None = None,
    *,
    first_image: int = 0,
) -> Iterator[npt.NDArray[np.float32]]:
    """Generates images in batches, in the order of their classes.

    The noise of image i comes from (seed, first_image + i) alone, so an image does not depend on the batch it is in.

    Args:
        pipeline: Any DiT pipeline; its scheduler is left as it is.
        class_rows: Class of each image, as the pipeline takes it (rows of its label table).
        settings: How; None: the defaults.
        first_image: Number of the first image, so that processes can share a set.

    Raises:
        InputError: Unknown sampler, or one that cannot follow the model's schedule.
        FloatingPointError: The model, or the autoencoder, made NaN or infinite values.

    Yields:
        float32 (b, H, W, 3) in [0, 1].
    """
    settings = settings or GenerationSettings()
    sampling = speed_pipeline(pipeline, settings.sampler)
    shape = pipeline.transformer.config
    size = (shape.in_channels, shape.sample_size, shape.sample_size)
    for start in range(0, len(class_rows), settings.batch_size):
        rows = list(class_rows[start : start + settings.batch_size])
        numbers = range(first_image + start, first_image + start + len(rows))
        generators = [keyed_generator(settings.seed, "image", number) for number in numbers]
        result = sampling(
            class_labels=rows,
            # In float32 whatever the network's arithmetic, so that it changes no more than it must.
            latents=randn_tensor((len(rows), *size), generators, dtype=torch.float32),
            generator=generators,
            guidance_scale=settings.guidance_scale,
            guidance_channels=settings.guidance_channels,
            guidance_interval=tuple(settings.guidance_interval),
            num_inference_steps=settings.num_inference_steps,
            output_type="np",
        )
        yield cast(Any, result).images


def generate_together(
    pipeline: DiTPipeline, class_rows: Sequence[int], settings: GenerationSettings, processes: Processes
) -> Iterator[npt.NDArray[np.float32]]:
    """What `generate` gives one process, for several: each generates some of its batches, and all get every one.

    Args:
        pipeline: As in `generate`; on every process the same.
        class_rows: As in `generate`.
        settings: How.
        processes: Who generates.

    Raises:
        InputError, FloatingPointError: As `generate`.

    Yields:
        As `generate`.
    """
    if processes.size == 1:
        yield from generate(pipeline, class_rows, settings)
        return
    starts = range(0, len(class_rows), settings.batch_size)
    own = (
        images
        for start in starts[processes.rank :: processes.size]
        for images in generate(pipeline, class_rows[start : start + settings.batch_size], settings, first_image=start)
    )
    yield from processes.in_turn(own, len(starts))


def speed_pipeline(pipeline: DiTPipeline, sampler: str | None = None) -> SpeeDDiTPipeline:
    """The pipeline that samples with a learned variance and guides in part, around another one's parts.

    Args:
        pipeline: Any DiT pipeline; it keeps its own scheduler and shares its models.
        sampler: One of `samplers.SAMPLERS`; None: the pipeline's own scheduler.

    Raises:
        InputError: Unknown sampler, or one that cannot follow the model's schedule.
    """
    parts = dict(pipeline.components)
    if sampler is not None:
        parts["scheduler"] = make_sampler(sampler, pipeline)
    elif isinstance(pipeline, SpeeDDiTPipeline):
        return pipeline
    names = row_names_of(pipeline) or None
    null = pipeline.config.get("null_class_id")
    wrapped = SpeeDDiTPipeline(**parts, id2label=names, null_class_id=null)
    wrapped.set_progress_bar_config(**getattr(pipeline, "_progress_bar_config", {}))
    return wrapped


def class_samples(
    pipeline: DiTPipeline,
    class_rows: Sequence[int],
    num_images: int,
    settings: GenerationSettings | None = None,
    processes: Processes = ALONE,
) -> npt.NDArray[np.float32]:
    """The same number of images of each class.

    Args:
        pipeline: As in `generate`.
        class_rows: Classes, as rows of the label table.
        num_images: Images per class.
        settings: As in `generate`.
        processes: Who generates them; each gets all.

    Returns:
        float32 (classes x num_images, H, W, 3), class by class, in [0, 1].
    """
    rows = [row for row in class_rows for _ in range(num_images)]
    return np.concatenate(list(generate_together(pipeline, rows, settings or GenerationSettings(), processes)))


def row_names_of(pipeline: DiTPipeline) -> dict[int, str]:
    """Rows of a pipeline's label table with their whole names, in the order of the rows; empty if it names none.

    A stock pipeline keeps the parts of the names, by name, and so loses a class whose name another one has too. What
    it was loaded from tells; where that is no folder here, a warning says that rows are missing.
    """
    if kept := _kept_names(pipeline):
        return kept
    if lost := lost_rows(pipeline):
        logger.warning(
            "The pipeline names classes, but not rows %s of its label table: diffusers has forgotten classes whose "
            "name another one has too. load_pipeline keeps all names.",
            ", ".join(map(str, lost[:10])) + (", ..." if len(lost) > 10 else ""),
        )
    return _rejoined_names(pipeline)


def lost_rows(pipeline: DiTPipeline) -> list[int]:
    """Rows that a stock pipeline has lost the names of: those without one below the last that has one."""
    if _kept_names(pipeline):
        return []
    names = _rejoined_names(pipeline)
    return [row for row in range(max(names, default=0)) if row not in names and row != NULL_CLASS]


def _rejoined_names(pipeline: DiTPipeline) -> dict[int, str]:
    """What a stock pipeline has left of its classes' names."""
    names: dict[int, str] = {}
    for name, row in sorted(pipeline.labels.items(), key=lambda item: item[1]):
        names[row] = f"{names[row]}, {name}" if row in names else name
    return names


def _kept_names(pipeline: DiTPipeline) -> dict[int, str]:
    """Whole names by row, of the pipeline's config or of the folder that a stock pipeline was loaded from."""
    kept = pipeline.config.get("id2label") or _id2label_of_folder(pipeline) or {}
    return dict(sorted((int(row), name) for row, name in kept.items()))


def _id2label_of_folder(pipeline: DiTPipeline) -> dict[str, str] | None:
    """The names in the folder that a stock pipeline was loaded from, if they are the ones that it took apart."""
    index = Path(str(pipeline.config.get("_name_or_path") or "")) / "model_index.json"
    if not pipeline.labels or not index.is_file():
        return None
    values = read_object(index)
    check_values(index, values, {"id2label": dict[str, str] | None})
    names: dict[str, str] = values.get("id2label") or {}
    parts = {part.strip() for name in names.values() for part in name.split(",")}
    return names if parts == set(pipeline.labels) else None


def choose_classes(
    wanted: Sequence[str], row_names: Mapping[int, str], *, last_row: int | None = None
) -> dict[int, str]:
    """Rows of the label table, with names, for classes given by a person.

    Args:
        wanted: Whole names, one of several names that commas separate, or rows, in this order: folders may be called
            "0", "1", "10", "2". Empty: the first ten classes, or "no class" where there are none.
        row_names: Name of each row; empty where the model names no classes.
        last_row: Last row of the label table; rows up to it are taken whether they have a name or not. None: rows
            that have a name, or any where none has.

    Raises:
        InputError: A name or row that is not among the classes, or a name that several of them have.
    """
    if not wanted:
        return dict(list(row_names.items())[:10]) or {NULL_CLASS: "no class"}
    rows = [_choose_row(label, row_names, last_row) for label in wanted]
    return {row: row_names.get(row, str(row)) for row in rows}


def _choose_row(label: str, row_names: Mapping[int, str], last_row: int | None) -> int:
    found = find_rows(label, row_names)
    row = int(label) if label.isascii() and label.isdecimal() else None
    if row is not None and not any(row_names[each].strip() == label for each in found):
        # No class is called so; that a number is a part of some name means nothing beside the row.
        if row in row_names or (last_row is None and not row_names) or (last_row is not None and row <= last_row):
            return row
        if last_row is not None:
            raise InputError(f"class_labels={label}: the model has rows 0 to {last_row}.")
    if not found:
        # A part of a name is as good to be told as the whole.
        parts = {part.strip() for name in row_names.values() for part in (name, *name.split(","))} - {""}
        raise unknown_name("class label", label, parts)
    if len(found) > 1:
        raise InputError(ambiguous_name(label, found, row_names))
    return int(found[0])
