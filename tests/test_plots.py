"""Grids of samples: every pixel where it belongs."""

from pathlib import Path

import numpy as np
from PIL import Image

from speed_diffusers.plots import mosaic, save_class_grid


def test_a_mosaic_holds_every_image_with_gaps_between() -> None:
    images = np.random.default_rng(0).random((6, 4, 5, 3), dtype=np.float32)
    sheet = mosaic(images, columns=3, gap=2)
    assert sheet.shape == (2 * 4 + 2, 3 * 5 + 2 * 2, 3)
    assert sheet.dtype == np.uint8
    for index, image in enumerate(images):
        top, left = (index // 3) * 6, (index % 3) * 7
        np.testing.assert_array_equal(sheet[top : top + 4, left : left + 5], (image * 255).round().astype(np.uint8))
    assert (sheet[4:6] == 255).all() and (sheet[:, 5:7] == 255).all()


def test_values_outside_the_range_are_clipped() -> None:
    sheet = mosaic(np.array([[[[-1.0, 0.5, 2.0]]]], dtype=np.float32), columns=1)
    assert sheet.tolist() == [[[0, 128, 255]]]


def test_a_class_grid_shows_the_images_unblurred_beside_their_names(tmp_path: Path) -> None:
    images = np.zeros((4, 32, 32, 3), dtype=np.float32)
    images[1] = [1.0, 0.0, 0.0]
    images[2] = [0.0, 0.0, 1.0]
    save_class_grid(images, ["first", "second"], "two classes", tmp_path / "grid.png")
    picture = np.asarray(Image.open(tmp_path / "grid.png").convert("RGB"))
    for colour in ([255, 0, 0], [0, 0, 255]):
        rows, columns = np.nonzero((picture == colour).all(axis=-1))
        assert np.ptp(rows) + 1 == np.ptp(columns) + 1 == 64 and len(rows) == 64 * 64
    red, blue = (np.nonzero((picture == colour).all(axis=-1)) for colour in ([255, 0, 0], [0, 0, 255]))
    assert red[0].min() < blue[0].min() and red[1].min() > blue[1].min()
