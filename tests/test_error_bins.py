"""Unweighted errors by timestep: the right bin and mean, merged by their samples."""

from pathlib import Path

import numpy as np
import pytest
import torch

from speed_diffusers.error_bins import ERRORS_KEY, SAMPLES_KEY, ErrorBins, ErrorHistory, means_by_bin
from speed_diffusers.errors import InputError
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
