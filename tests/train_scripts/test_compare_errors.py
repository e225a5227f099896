"""The command that compares errors by timestep, and what a run logs for it."""

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from speed_diffusers.error_bins import ERRORS_KEY, SAMPLES_KEY
from speed_diffusers.errors import InputError
from speed_diffusers.train_scripts import compare_errors
from speed_diffusers.training.tracking import read_metrics


def test_runs_with_different_weights_compare_and_others_do_not(
    train: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    speed = train(tmp_path / "speed")
    uniform = train(tmp_path / "uniform", "speed_sampling=uniform", "speed_weighting=none")
    other = train(tmp_path / "other", "prediction_type=epsilon")
    picture = tmp_path / "pictures" / "errors.png"
    compare_errors.main([f"runs={speed},{uniform}", f"output={picture}"])
    assert Image.open(picture).width > 500
    printed = capsys.readouterr().out
    assert "950-999" in printed and str(uniform) in printed
    with pytest.raises(InputError, match="prediction_type=v_prediction, .*other epsilon: their errors do not compare"):
        compare_errors.main([f"runs={speed},{other}", f"output={tmp_path / 'no.png'}"])
    for wrong, message in (
        ([], "runs is empty"),
        ([f"runs={tmp_path}"], "is no run"),
        ([f"runs={speed},{uniform},{speed}"], "one is given twice"),
        ([f"runs={speed}", "output=errors.jpg"], "must be a file that ends in .png"),
    ):
        with pytest.raises(InputError, match=message):
            compare_errors.main(wrong)
    assert not (tmp_path / "no.png").exists()


def test_logged_errors_are_the_losses_of_a_run_without_weights(train: Callable[..., Path], tmp_path: Path) -> None:
    folder = train(tmp_path / "run", "speed_sampling=uniform", "speed_weighting=none")
    for line in read_metrics(folder / "metrics.jsonl"):
        counts, errors = line[SAMPLES_KEY], line[ERRORS_KEY]
        assert sum(counts) == 4
        total = sum(count * error for count, error in zip(counts, errors, strict=True) if count)
        assert total / 4 == pytest.approx(line["squared_error"], rel=1e-5) == pytest.approx(line["loss"], rel=1e-5)
