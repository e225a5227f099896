"""Images from a pipeline: one seed an image, in lazy batches."""

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
from diffusers import DiTPipeline

from .randomness import keyed_generator


def generate(
    pipeline: DiTPipeline,
    class_rows: Sequence[int],
    *,
    seed: int = 0,
    first_image: int = 0,
    batch_size: int = 64,
    guidance_scale: float = 1.0,
    num_inference_steps: int = 50,
) -> Iterator[npt.NDArray[np.float32]]:
    """Generates images in batches, in the order of their classes.

    The noise of image i comes from (seed, first_image + i) alone, so an image does not depend on the batch it is in.

    Args:
        pipeline: A DiT pipeline with a deterministic scheduler such as DDIM.
        class_rows: Class of each image, as the pipeline takes it (rows of its label table).
        seed: Seed of the whole set.
        first_image: Number of the first image, so that processes can share a set.
        batch_size: Images generated at once.
        guidance_scale: Classifier-free guidance; 1 is none.
        num_inference_steps: Steps of the solver.

    Yields:
        float32 (b, H, W, 3) in [0, 1].
    """
    for start in range(0, len(class_rows), batch_size):
        rows = list(class_rows[start : start + batch_size])
        generators = [keyed_generator(seed, "image", first_image + start + index) for index in range(len(rows))]
        yield pipeline(
            class_labels=rows,
            generator=generators,
            guidance_scale=guidance_scale,
            num_inference_steps=num_inference_steps,
            output_type="np",
        ).images
