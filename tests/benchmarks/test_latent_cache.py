"""The benchmark of the latent cache at tiny size: what it measures and writes; and what the committed run says."""

import json
from pathlib import Path

import pytest
from PIL import Image

import latent_cache
import measurement

COMMITTED = Path(latent_cache.__file__).with_suffix("") / "result.json"


def check(result: dict[str, object]) -> dict[str, float]:
    """The figures for which there are goals, after a look at what they are made of."""
    rate, memory, seek, start = (result[name] for name in ("rate", "memory", "seek", "start_up"))
    blocks = rate["blocks"]
    assert {len(values) for values in blocks.values()} == {result["protocol"]["pairs"]}
    for name in ("large", "spread"):
        low, high = rate[f"ratio_{name}_interval_95"]
        ratios = [value / small for value, small in zip(blocks[name], blocks["small"], strict=True)]
        assert 0 < min(ratios) <= low <= rate[f"ratio_{name}"] <= high <= max(ratios)
    for kind in ("parquet", "class folders"):
        parts = dict(start[kind])
        total = parts.pop("total")
        assert list(parts) == ["open, with fingerprint", "signature", "look at shards", "order"]
        assert min(parts.values()) > 0 and sum(parts.values()) == pytest.approx(total)
    assert result["verify"]["everything"] > 0
    return {
        "rate_ratio": rate["ratio_large"],
        "memory_rise_mb": max(memory["large"][name] - memory["small"][name] for name in ("alone", "with_workers")),
        "seek_seconds": max(seek.values()),
        "start_up_seconds": max(start[kind]["total"] for kind in ("parquet", "class folders")),
    }


def test_the_benchmark_in_small(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = [
        "side=4",
        "small_rows=600",
        "large_rows=2000",
        "start_up_rows=1100",
        "pairs=2",
        "block_batches=3",
        "batch_size=16",
    ]
    latent_cache.main(
        [*sizes, "memory_batches=5", "num_workers=1", f"work_dir={tmp_path}", f"results_dir={tmp_path / 'results'}"]
    )
    result = json.loads((tmp_path / "results" / "result.json").read_text())
    assert check(result).keys() == result["goals"].keys()
    assert result["protocol"]["bytes_per_row"] == 256 and result["protocol"]["large_rows"] == 2000
    assert {"commit", *measurement.PACKAGES} < result["environment"].keys()
    shown = capsys.readouterr().out
    assert "batches of 16: " in shown and "start-up of 1,100 images, class folders: " in shown
    assert Image.open(tmp_path / "results" / "latent_cache.png").width > 500
    assert [path.name for path in tmp_path.iterdir()] == ["results"], "the data is gone"


def test_the_committed_run_keeps_all_goals_but_the_rate() -> None:
    result = json.loads(COMMITTED.read_text())
    assert result["protocol"]["small_rows"] == 10_000 and result["protocol"]["large_rows"] == 1_000_000
    assert result["start_up"]["images"] == 1_281_167
    found, goals = check(result), result["goals"]
    assert goals == latent_cache.GOALS
    assert all(found[name] <= goals[name] for name in ("memory_rise_mb", "seek_seconds", "start_up_seconds"))
