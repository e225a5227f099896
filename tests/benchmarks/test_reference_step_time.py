"""The comparison with the reference loops: whose turn it is, what is divided by what, and what it writes."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import reference_step_time
from reference_step_time import OURS, PARTS, ReferenceStepTimeConfig, measure, memory_slope, summary
from speed_diffusers.errors import InputError


def test_loops_take_turns_there_and_back_and_the_first_round_is_dropped() -> None:
    taken: list[str] = []

    def taker(name: str, passes: float, rest: float) -> Callable[[], tuple[float, float]]:
        def take() -> tuple[float, float]:
            taken.append(name)
            return passes * len(taken), rest * len(taken)

        return take

    takers = {OURS: taker(OURS, 1.0, 1.0), "DiT": taker("DiT", 2.0, 4.0)}
    blocks = measure(takers, ReferenceStepTimeConfig(block_steps=2, rounds=2))
    assert taken == ["DiT"] * 2 + [OURS] * 4 + ["DiT"] * 4 + [OURS] * 2
    # Steps 5, 6 and 11, 12 are ours, 7, 8 and 9, 10 theirs.
    assert blocks[OURS] == {PARTS[0]: [5.5, 11.5], PARTS[1]: [5.5, 11.5], PARTS[2]: [11.0, 23.0]}
    assert blocks["DiT"] == {PARTS[0]: [15.0, 19.0], PARTS[1]: [30.0, 38.0], PARTS[2]: [45.0, 57.0]}


def test_ratios_are_those_of_neighbouring_blocks() -> None:
    # The machine becomes slower; the ratio of the passes stays a half.
    slower = np.arange(1.0, 9.0)
    blocks = {
        OURS: {part: list(slower) for part in PARTS},
        "DiT": {part: list(slower * factor) for part, factor in zip(PARTS, (2.0, 4.0, 3.0), strict=True)},
    }
    ratios = summary(blocks, seed=0)["ratios"]["DiT"]
    assert [ratios[part]["ratio"] for part in PARTS] == pytest.approx([1 / 2, 1 / 4, 1 / 3])
    assert ratios[PARTS[0]]["interval_95"] == pytest.approx([0.5, 0.5])


def test_a_leak_shows_in_the_slope(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = iter(100e6 + 0.5e6 * step for step in range(40))

    class Process:
        def memory_info(self) -> Any:
            return type("Memory", (), {"rss": next(sizes)})

    monkeypatch.setattr(reference_step_time.psutil, "Process", Process)
    assert memory_slope(iter(range(40)), 40) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "dit_dir=None fast_dit_dir=None: name the folder of one checkout at least"),
        (["fast_dit_dir=nowhere", "allow_load=true", "work_dir={}"], "nowhere: is no checkout of github.com"),
        (["rounds=1"], "rounds=1: must be at least 2"),
    ],
)
@pytest.mark.usefixtures("fresh_accelerate")
def test_wrong_options_are_one_line(options: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        reference_step_time.main(
            [option.format(tmp_path) for option in options] + [f"results_dir={tmp_path / 'results'}"]
        )
    assert not (tmp_path / "results").exists()


def test_a_busy_machine_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference_step_time, "load_average", lambda: 1.7)
    with pytest.raises(InputError, match=r"load average is 1.70, above 0.5.*allow_load=true"):
        reference_step_time.main([f"fast_dit_dir={tmp_path}"])


@pytest.fixture
def _own_accelerate(fresh_accelerate: Callable[[], None]) -> Iterator[None]:
    yield
    fresh_accelerate()


@pytest.mark.usefixtures("_own_accelerate")
def test_it_writes_times_ratios_and_slope(
    checkout: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "results"
    reference_step_time.main(
        [
            f"fast_dit_dir={checkout('fast-DiT')}",
            "model=DiT-tiny/8",
            "train_batch_size=4",
            "block_steps=1",
            "rounds=2",
            "memory_steps=4",
            "allow_load=true",
            f"work_dir={tmp_path / 'work'}",
            f"results_dir={folder}",
        ]
    )
    result = json.loads((folder / "result.json").read_text())
    assert result["milliseconds"].keys() == {OURS, "fast-DiT"}
    for name, parts in result["blocks"].items():
        whole = np.array(parts[PARTS[0]]) + np.array(parts[PARTS[1]])
        assert np.allclose(whole, parts[PARTS[2]]) and (whole > 0).all(), name
    found = result["ratios"]["fast-DiT"][PARTS[2]]
    assert found["interval_95"][0] <= found["ratio"] <= found["interval_95"][1]
    assert (folder / "table.md").read_text() in capsys.readouterr().out
    assert Image.open(folder / "ratios.png").width > 500
