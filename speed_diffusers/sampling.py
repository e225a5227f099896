"""Images from a pipeline: one seed an image, in lazy batches."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from diffusers import DiTPipeline

from .errors import unknown_name
from .models import NULL_CLASS
from .pipelines import SpeeDDiTPipeline
from .randomness import keyed_generator
from .samplers import make_sampler


def generate(
    pipeline: DiTPipeline,
    class_rows: Sequence[int],
    *,
    seed: int = 0,
    first_image: int = 0,
    batch_size: int = 64,
    guidance_scale: float = 1.0,
    guidance_channels: int | None = None,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    sampler: str | None = None,
    num_inference_steps: int = 50,
) -> Iterator[npt.NDArray[np.float32]]:
    """Generates images in batches, in the order of their classes.

    The noise of image i comes from (seed, first_image + i) alone, so an image does not depend on the batch it is in.

    Args:
        pipeline: Any DiT pipeline; its scheduler is left as it is.
        class_rows: Class of each image, as the pipeline takes it (rows of its label table).
        seed: Seed of the whole set.
        first_image: Number of the first image, so that processes can share a set.
        batch_size: Images generated at once.
        guidance_scale: Classifier-free guidance; 1 is none.
        guidance_channels: Latent channels that are guided, from the first; None: all. DiT guided 3 of 4.
        guidance_interval: Where the noising process is guided, in shares of it: 0 is clean, 1 is pure noise.
        sampler: One of `samplers.SAMPLERS`; None: the pipeline's own scheduler.
        num_inference_steps: Steps of the solver.

    Raises:
        InputError: Unknown sampler, or one that cannot follow the model's schedule.

    Yields:
        float32 (b, H, W, 3) in [0, 1].
    """
    sampling = speed_pipeline(pipeline, sampler)
    for start in range(0, len(class_rows), batch_size):
        rows = list(class_rows[start : start + batch_size])
        generators = [keyed_generator(seed, "image", first_image + start + index) for index in range(len(rows))]
        result = sampling(
            class_labels=rows,
            generator=generators,
            guidance_scale=guidance_scale,
            guidance_channels=guidance_channels,
            guidance_interval=guidance_interval,
            num_inference_steps=num_inference_steps,
            output_type="np",
        )
        yield cast(Any, result).images


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
    # What a stock pipeline was given as id2label it has kept with every name on its own.
    names = pipeline.config.get("id2label") or row_names_of(pipeline) or None
    null = pipeline.config.get("null_class_id")
    wrapped = SpeeDDiTPipeline(**parts, id2label=names, null_class_id=null)
    wrapped.set_progress_bar_config(**getattr(pipeline, "_progress_bar_config", {}))
    return wrapped


def class_samples(
    pipeline: DiTPipeline, class_rows: Sequence[int], num_images: int, **options: Any
) -> npt.NDArray[np.float32]:
    """The same number of images of each class.

    Args:
        pipeline: As in `generate`.
        class_rows: Classes, as rows of the label table.
        num_images: Images a class.
        options: The keywords of `generate`.

    Returns:
        float32 (classes x num_images, H, W, 3), class by class, in [0, 1].
    """
    rows = [row for row in class_rows for _ in range(num_images)]
    return np.concatenate(list(generate(pipeline, rows, **options)))


def row_names_of(pipeline: DiTPipeline) -> dict[int, str]:
    """Rows of a pipeline's label table with their names; empty if it names none."""
    names: dict[int, str] = {}
    for name, row in sorted(pipeline.labels.items(), key=lambda item: item[1]):
        # One class may have several names, which diffusers has taken apart at their commas.
        names[row] = f"{names[row]}, {name}" if row in names else name
    return names


def choose_classes(wanted: Sequence[str], row_names: Mapping[int, str]) -> dict[int, str]:
    """Rows of the label table, with names, for classes given by a person.

    Args:
        wanted: Names (whole, or one of several that commas separate) or rows; empty: the first ten classes, or "no
            class" where there are none.
        row_names: Name of each row; empty where the model names no classes: rows are taken as they are then.

    Raises:
        InputError: A name or row that is not among the classes.
    """
    if not wanted:
        return dict(list(row_names.items())[:10]) or {NULL_CLASS: "no class"}
    if not row_names and all(label.isdecimal() for label in wanted):
        return {int(label): label for label in wanted}
    # Whole names first, rows last: folders may be called "0", "1", "10", "2".
    rows: dict[str, int] = {}
    for row, name in row_names.items():
        rows.setdefault(name, row)
    for row, name in row_names.items():
        for part in name.split(","):
            rows.setdefault(part.strip(), row)
    names = list(rows)
    for row in row_names:
        rows.setdefault(str(row), row)
    for label in wanted:
        if label not in rows:
            raise unknown_name("class label", label, names)
    return {rows[label]: row_names[rows[label]] for label in wanted}
