"""Pictures: every pixel where it belongs."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from speed_diffusers.error_bins import ErrorBins, ErrorHistory
from speed_diffusers.process import Areas
from speed_diffusers.reports.plots import mosaic, save_class_grid, save_error_comparison, save_error_map


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


FORMULA = "$\\frac{$"  # what matplotlib would read as mathematics, and fail on


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that were saved."""
    figures: list[Figure] = []
    saved = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), saved(self, *a, **k)))
    return figures


def test_names_and_titles_are_shown_as_they_are(tmp_path: Path, drawn: list[Figure]) -> None:
    history = ErrorHistory(np.array([1.0]), ErrorBins(1000).edges, np.ones((1, 20)), np.ones((1, 20)))
    areas = Areas(range(219), range(219, 700), range(700, 1000))
    save_class_grid(np.zeros((3, 8, 8, 3), np.float32), ["$10_$20", FORMULA, "x" * 9000], FORMULA, tmp_path / "a.png")
    save_error_map(history, areas, FORMULA, tmp_path / "b.png")
    save_error_comparison({"runs/$1_$2": history, "_mine": history}, areas, FORMULA, tmp_path / "c.png")
    labels = [text.get_text() for text in drawn[0].axes[0].get_yticklabels()]
    assert labels[:2] == ["$10_$20", FORMULA] and len(labels[2]) == 200
    assert [text.get_text().strip() for text in drawn[2].axes[0].get_legend().get_texts()] == ["runs/$1_$2", "_mine"]
    assert not any(text.get_parse_math() for text in drawn[2].axes[0].get_legend().get_texts())


def test_a_map_of_errors_is_drawn_from_one_record_and_from_holes(tmp_path: Path) -> None:
    edges = ErrorBins(1000).edges
    for count in (1, 3, 500):
        errors = np.geomspace(1, 0.01, count)[:, None] * np.ones(20)
        errors[0, 5] = np.nan
        history = ErrorHistory(np.arange(1.0, count + 1), edges, errors, np.isfinite(errors).astype(float))
        for areas in (
            Areas(range(219), range(219, 700), range(700, 1000)),
            Areas(range(219), range(219, 1000), range(1000, 1000)),
        ):
            save_error_map(history, areas, "errors", tmp_path / "map.png")
            assert Image.open(tmp_path / "map.png").width > 800


def test_no_label_of_the_map_stands_beside_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[Figure] = []
    savefig = Figure.savefig

    def kept(figure: Figure, path: Path, **options: Any) -> None:
        saved.append(figure)
        savefig(figure, path, **options)

    monkeypatch.setattr(Figure, "savefig", kept)
    errors = np.geomspace(1, 0.01, 40)[:, None] * np.ones(20)
    history = ErrorHistory(np.arange(1.0, 41), ErrorBins(1000).edges, errors, np.ones_like(errors))
    areas = Areas(range(219), range(219, 700), range(700, 1000))
    save_error_map(history, areas, "errors", tmp_path / "map.png")
    labels = [text for text in saved[0].findobj(Text) if text.get_visible() and text.get_text() == "unweighted MSE"]
    assert len(labels) == 2, "one a panel"
    first, second = (label.get_window_extent() for label in labels)
    assert not first.padded(40).overlaps(second)
