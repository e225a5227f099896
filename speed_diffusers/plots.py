"""Pictures of results."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

matplotlib.use("Agg")


def mosaic(images: npt.NDArray[np.float32], columns: int, gap: int = 2) -> npt.NDArray[np.uint8]:
    """Images side by side, row by row, with white gaps.

    Args:
        images: (N, H, W, 3) in [0, 1].
        columns: Images a row; N is a multiple of it.
        gap: Pixels between images.

    Returns:
        uint8 (height, width, 3).
    """
    count, height, width, _ = images.shape
    rows = count // columns
    sheet = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, dtype=np.uint8)
    pixels = (images.clip(0, 1) * 255).round().astype(np.uint8)
    for index, image in enumerate(pixels):
        top, left = (index // columns) * (height + gap), (index % columns) * (width + gap)
        sheet[top : top + height, left : left + width] = image
    return sheet


def save_class_grid(
    images: npt.NDArray[np.float32], row_names: Sequence[str], title: str, path: Path, gap: int = 2
) -> None:
    """Saves a PNG with one row of images a class, the class's name at the left and a title above.

    Args:
        images: (rows x columns, H, W, 3) in [0, 1], row by row.
        row_names: Name of each row.
        title: What the picture shows.
        path: PNG file to write.
        gap: Pixels between images.
    """
    columns = len(images) // len(row_names)
    height = images.shape[1]
    sheet = mosaic(images, columns, gap)
    # A pixel of a small image becomes a whole number of pixels on the page, so that nothing is blurred.
    scale = max(1, round(64 / height))
    dpi = 100
    label_inches = 0.09 * max(len(name) for name in row_names) + 0.3
    size = (sheet.shape[1] * scale / dpi + label_inches, sheet.shape[0] * scale / dpi + 0.5)
    figure = Figure(figsize=size, dpi=dpi)
    axes = figure.add_axes(
        (
            label_inches / size[0],
            0.0,
            sheet.shape[1] * scale / dpi / size[0],
            sheet.shape[0] * scale / dpi / size[1],
        )
    )
    axes.imshow(sheet, interpolation="nearest")
    axes.set_yticks([row * (height + gap) + height / 2 for row in range(len(row_names))], list(row_names))
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    figure.text(0.5, 1 - 0.25 / size[1], title, ha="center", va="center", fontsize=10)
    figure.savefig(path, dpi=dpi)
