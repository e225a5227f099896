"""Unweighted errors by timestep: the right bin and mean, merged by their samples; and the command that compares."""

from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from PIL import Image

from speed_diffusers.error_bins import ERRORS_KEY, SAMPLES_KEY, ErrorBins, ErrorHistory, means_by_bin
from speed_diffusers.errors import InputError
from speed_diffusers.train_scripts import compare_errors
from speed_diffusers.train_scripts.train_dit_speed import main
from speed_diffusers.training.tracking import MetricsFile, read_metrics


@pytest.mark.parametrize("count", [1, 7, 20, 50, 999, 1000, 10_000])
def test_every_timestep_falls_between_the_edges_of_its_bin(count: int) -> None:
    bins = ErrorBins(count)
    edges = bins.edges
    assert edges[0] == 0 and edges[-1] == count and len(edges) == min(20, count) + 1
    timesteps = torch.arange(count)
    bins.add(timesteps, timesteps.float())
    for index, (first, end) in enumerate(zip(edges[:-1], edges[1:], strict=True)):
        assert bins.totals[1, index] == end - first > 0
        assert bins.totals[0, index] == sum(range(first, end))


def test_floating_timesteps_fall_into_the_same_bins() -> None:
    whole, floating = ErrorBins(1000), ErrorBins(1000)
    timesteps = torch.arange(1000)
    whole.add(timesteps, torch.ones(1000))
    floating.add(timesteps + 0.5, torch.ones(1000))
    assert torch.equal(whole.totals, floating.totals)


def test_means_leave_empty_bins_out_and_reset_forgets() -> None:
    bins = ErrorBins(40)
    bins.add(torch.tensor([0, 1, 39]), torch.tensor([1.0, 3.0, 5.0]))
    means = means_by_bin(*bins.totals.tolist())
    assert means == [2.0, *[None] * 18, 5.0]
    bins.reset()
    assert means_by_bin(*bins.totals.tolist()) == [None] * 20


def history_of(steps: list[int], errors: list[list[float | None]], counts: list[list[int]]) -> ErrorHistory:
    records = [
        {"step": step, ERRORS_KEY: error, SAMPLES_KEY: count}
        for step, error, count in zip(steps, errors, counts, strict=True)
    ]
    return ErrorHistory.from_records([{"step": 0, "loss": 1.0}, *records], 2)


def test_merged_records_are_weighted_by_their_samples() -> None:
    history = history_of(
        [10, 20, 30, 40], [[1.0, None], [4.0, None], [2.0, 8.0], [2.0, None]], [[3, 0], [1, 0], [5, 2], [0, 0]]
    )
    assert history.edges == [0, 1, 2]
    merged = history.merged(2)
    assert merged.steps.tolist() == [20, 40]
    np.testing.assert_allclose(merged.errors, [[1.75, np.nan], [2.0, 8.0]])
    np.testing.assert_allclose(merged.counts, [[4, 0], [5, 2]])
    assert history.merged(100).steps.tolist() == [10, 20, 30, 40]


def test_metrics_without_errors_are_refused(tmp_path: Path) -> None:
    MetricsFile(tmp_path / "metrics.jsonl").write({"step": 1, "loss": 0.5})
    with pytest.raises(InputError, match="no line with squared_error_by_timestep"):
        ErrorHistory.from_records(read_metrics(tmp_path / "metrics.jsonl"), 1000)
    with pytest.raises(InputError, match="no such file"):
        read_metrics(tmp_path / "nothing.jsonl")


def run(options: list[str], folder: Path, *extra: str) -> Path:
    AcceleratorState._reset_state()
    PartialState._reset_state()
    main([*(option for option in options if not option.startswith("output_dir=")), f"output_dir={folder}", *extra])
    return folder


def test_runs_with_different_weights_compare_and_others_do_not(
    tiny_options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    speed = run(tiny_options, tmp_path / "speed")
    uniform = run(tiny_options, tmp_path / "uniform", "speed_sampling=uniform", "speed_weighting=none")
    other = run(tiny_options, tmp_path / "other", "prediction_type=epsilon")
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
        ([f"runs={speed}", "output=errors.jpg"], "must be a file that ends in .png"),
    ):
        with pytest.raises(InputError, match=message):
            compare_errors.main(wrong)
    assert not (tmp_path / "no.png").exists()


def test_logged_errors_are_the_losses_of_a_run_without_weights(tiny_options: list[str], tmp_path: Path) -> None:
    folder = run(tiny_options, tmp_path / "run", "speed_sampling=uniform", "speed_weighting=none")
    for line in read_metrics(folder / "metrics.jsonl"):
        counts, errors = line[SAMPLES_KEY], line[ERRORS_KEY]
        assert sum(counts) == 4
        total = sum(count * error for count, error in zip(counts, errors, strict=True) if count)
        assert total / 4 == pytest.approx(line["squared_error"], rel=1e-5) == pytest.approx(line["loss"], rel=1e-5)
