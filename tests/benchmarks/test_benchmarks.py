"""The benchmarks at tiny size: what they write, and what must hold whatever the clock says."""

import csv
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import host_work
import kills
import measurement
import step_time
import streaming
from speed_diffusers.errors import InputError

ROOT = Path(__file__).resolve().parents[2]

MACHINE = {"commit", "python", *measurement.PACKAGES, "processor", "cores", "threads"}


pytestmark = pytest.mark.usefixtures("fresh_accelerate")


def test_host_work_waits_for_nothing_and_keeps_its_budgets(
    tiny_options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    host_work.main([*tiny_options, "counted_steps=3", f"results_dir={tmp_path / 'results'}"])
    result = json.loads((tmp_path / "results" / "result.json").read_text())
    assert result["host_waits"] == {"steps": 3, "scalar_reads": 0, "others": 0, "by_operation": {}}
    tensors = result["protocol"]["parameter_tensors"]
    # 14 tensors a block (adaLN 2, attention 8, feed-forward 4), 6 around them, and one embedder of 5.
    assert tensors == 28 * 14 + 6 + 5
    comparison = result["comparison"]
    budgets = {part: budget for part, budget in host_work.BUDGETS.items() if budget is not None}
    assert budgets == {"draws, noise and loss": 60, "optimizer": 30, "ema": 10}
    for part, budget in budgets.items():
        assert 0 < comparison[part][host_work.OURS] <= budget, part
    assert comparison["ema"] | {host_work.OURS: 1} == {
        host_work.OURS: 1,
        "EMAModel(foreach=True)": 2,
        "EMAModel(foreach=False)": 3 * tensors,
        "loop of mul_ and add_": 2 * tensors,
    }
    assert min(comparison["optimizer"][f"AdamW(foreach={foreach})"] for foreach in (True, False)) > 2 * tensors
    per_step = result["operations_a_step"]
    assert per_step["network"] > 28 * 20 and per_step["backward"] > per_step["network"]
    assert all(count == int(count) for count in per_step.values()), "every step does the same"
    assert result["environment"].keys() == MACHINE
    table = (tmp_path / "results" / "table.md").read_text()
    assert (
        "3 steps between two logging steps: 0 reads of a number, 0 others" in table
        and table in capsys.readouterr().out
    )
    assert Image.open(tmp_path / "results" / "host_work.png").width > 500


def test_step_time_writes_blocks_ratio_and_machine(
    tiny_options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = ["block_steps=2", "pairs=3", "calls=5", "allow_load=true", f"results_dir={tmp_path / 'results'}"]
    step_time.main([*tiny_options, *own])
    result = json.loads((tmp_path / "results" / "result.json").read_text())
    with (tmp_path / "results" / "blocks.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["arm"][0] for row in rows] == list("p" + "puup" + "pu")
    assert [row["dropped"] for row in rows] == ["true"] + ["false"] * 6
    assert all(float(row[f"step_{index}_ms"]) > 0 for row in rows for index in range(2))
    medians = [float(row["median_ms"]) for row in rows]
    ratios = [medians[1] / medians[2], medians[4] / medians[3], medians[5] / medians[6]]
    assert result["ratios"] == pytest.approx(ratios, rel=1e-3)
    assert result["ratio"] == pytest.approx(np.median(ratios), rel=1e-3)
    low, high = result["ratio_interval_95"]
    assert min(result["ratios"]) <= low <= result["ratio"] <= high <= max(result["ratios"])
    assert list(result["calls"]) == ["batch 4", "batch 256"]
    ours = result["calls"]["batch 4"]["paper"]
    assert result["calls_over_step"] == pytest.approx(
        (ours["sample_timesteps_us"] + ours["loss_weights_us"]) / result["milliseconds_a_step"]["paper"] / 1e3
    )
    assert result["environment"].keys() == MACHINE | {"load_before", "load_after"}
    assert result["protocol"]["seed"] == 0
    assert "criterion: the interval within 0.5% of 1" in capsys.readouterr().out
    assert Image.open(tmp_path / "results" / "step_time.png").width > 500
    assert not (tmp_path / "run").exists()


def test_a_busy_machine_is_refused(tiny_options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_time, "load_average", lambda: 1.7)
    with pytest.raises(InputError, match=r"load average is 1.70, above 0.5.*allow_load=true"):
        step_time.main([*tiny_options, f"results_dir={tmp_path / 'results'}"])
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("benchmark", "wrong"), [(step_time, "block_steps=0"), (step_time, "pairs=1"), (host_work, "counted_steps=0")]
)
def test_wrong_options_are_one_line(benchmark: object, wrong: str) -> None:
    with pytest.raises(InputError, match=f"{wrong}: must be at least"):
        benchmark.main([wrong])  # type: ignore[attr-defined]


def test_only_the_scheduler_changes_with_the_arm() -> None:
    run = SimpleNamespace(scheduler=None)
    config = SimpleNamespace(pairs=4, block_steps=2)
    taken: list[str] = []
    # Steps that note what they were taken with, exactly as many as the blocks need.
    calls = (taken.append(run.scheduler) for _ in range(18))
    found = step_time.measure(run, calls, {arm: arm for arm in step_time.ARMS}, config)  # type: ignore[arg-type]
    expected = "paper " + "paper uniform uniform paper " * 2
    assert taken == [arm for arm in expected.split() for _ in range(2)]
    assert [block.arm for block in found] == expected.split()
    assert [len(block.milliseconds) for block in found] == [2] * 9
    assert next(calls, "no more") == "no more" and vars(run).keys() == {"scheduler"}


def blocks(medians: dict[str, list[float]]) -> list[step_time.Block]:
    """Blocks in the benchmark's order behind a slow first one; the medians of each arm in turn."""
    order = [step_time.ORDER[index % 4] for index in range(2 * len(medians["paper"]))]
    values = {arm: iter(medians[arm]) for arm in step_time.ARMS}
    kept = [step_time.Block(arm, [value := next(values[arm]), value, 10 * value]) for arm in order]
    return [step_time.Block("paper", [1e3] * 3), *kept]


def test_the_ratio_is_that_of_neighbouring_blocks() -> None:
    # The machine becomes slower and slower; the ratio stays 1.1, 1.2, 1.3, 1.4.
    uniform = [1.0, 2.0, 4.0, 8.0]
    found = blocks({"paper": [1.1, 2.4, 5.2, 11.2], "uniform": uniform})
    assert step_time.paired_ratios(found) == pytest.approx([1.1, 1.2, 1.3, 1.4])
    result = step_time.summary(found, seed=0)
    assert result["ratio"] == pytest.approx(1.25)
    assert result["milliseconds_a_step"] == pytest.approx({"paper": 3.8, "uniform": 3.0})


@pytest.mark.parametrize(("true_ratio", "lies"), [(1.001, True), (1.02, False)])
def test_the_interval_finds_the_ratio(true_ratio: float, lies: bool) -> None:
    random = np.random.default_rng(0)
    noise = {arm: random.lognormal(0, 0.005, 60) for arm in step_time.ARMS}
    found = blocks({"paper": list(true_ratio * noise["paper"]), "uniform": list(noise["uniform"])})
    result = step_time.summary(found, seed=0)
    low, high = result["ratio_interval_95"]
    assert low < true_ratio < high and high - low < 0.006
    text = step_time.describe(result | {"calls": {}, "calls_over_step": 0.0004})
    assert f"it {'lies' if lies else 'does not lie'} there" in text and "(met)" in text
    assert step_time.summary(found, seed=0) == result


def test_the_two_calls_leave_the_global_randomness_alone() -> None:
    from speed_diffusers import SpeeDDDPMScheduler

    before = torch.get_rng_state()
    times = step_time.call_times(SpeeDDDPMScheduler(), 8, 20, seed=0)
    assert all(value > 0 for value in times.values())
    assert torch.equal(before, torch.get_rng_state())


def flip_last_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def change(path: Path, old: str, new: str) -> None:
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


def test_a_killed_run_is_held_against_the_other_bit_by_bit(train: Callable[..., Path], tmp_path: Path) -> None:
    first = train(tmp_path / "first", "report_to=tensorboard", "max_train_steps=5", "logging_steps=2")
    second = shutil.copytree(first, tmp_path / "second")
    checkpoint = second / "checkpoint-5"
    for path, old, new in (
        (second / "metrics.jsonl", '"seconds": ', '"seconds": 1'),
        (checkpoint / "state.json", str(first), str(second)),
        (second / "config.yaml", str(first), str(second)),
        (second / "pipeline" / "speed_training.json", '"seconds": ', '"seconds": 1'),
    ):
        change(path, old, new)
    assert kills.differences(first, second) == [], "times and folders may differ"
    assert len(kills.tensorboard_curves(first)["loss"]) == 3
    flip_last_byte(checkpoint / "ema.safetensors")
    flip_last_byte(second / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors")
    flip_last_byte(second / "samples.png")
    change(second / "metrics.jsonl", '"step": 2', '"step": 3')
    change(checkpoint / "state.json", '"steps": 0', '"steps": 1')
    (second / ".tmp-pipeline-1").touch()
    shutil.rmtree(second / "logs")
    found = kills.differences(first, second)
    assert found[:6] == [
        ".tmp-pipeline-1: only one run has it",
        "checkpoint-5/ema.safetensors: not the same",
        "checkpoint-5/state.json: not the same",
        "metrics.jsonl: not the same",
        "pipeline/transformer/diffusion_pytorch_model.safetensors: not the same",
        "samples.png: not the same",
    ]
    assert "TensorBoard: loss" in found[6:]


def test_the_committed_kills_lost_nothing() -> None:
    result = json.loads((ROOT / "benchmarks" / "kills" / "result.json").read_text())
    assert result["bit_equal"] == result["kills"] == len(result["each"]) >= 20
    assert result["inside_a_save"] >= result["kills"] / 4
    assert not any(kill["differences"] for kill in result["each"])


def test_a_stream_is_measured_and_the_committed_one_met_its_goals(tmp_path: Path) -> None:
    small = ["num_images=2000", "num_files=4", "batch_size=8", "num_batches=5", f"work_dir={tmp_path}"]
    streaming.main([*small, f"results_dir={tmp_path / 'results'}"])
    result = json.loads((tmp_path / "results" / "result.json").read_text())
    assert result["environment"].keys() == MACHINE and "work_dir" not in result["settings"]
    assert all(cost["seconds"] > 0 for cost in result["costs"].values()) and result["images_per_second"] > 0
    assert [path.name for path in tmp_path.iterdir()] == ["results"], "what was made is removed"
    committed = json.loads((ROOT / "benchmarks" / "streaming" / "result.json").read_text())
    assert committed["goals"] == streaming.GOALS and all(committed["goals_met"].values())
    assert committed["settings"]["num_images"] == 1_281_167


def test_every_benchmark_has_its_row() -> None:
    text = (ROOT / "benchmarks" / "README.md").read_text("utf-8")
    commands = set(re.findall(r"python (benchmarks/\w+\.py)", text))
    # What has no main is a part of others.
    scripts = {path for path in (ROOT / "benchmarks").glob("*.py") if "__main__" in path.read_text("utf-8")}
    assert {ROOT / command for command in commands} == scripts
    links = re.findall(r"\]\((?!http)([^)#]+)\)", text)
    assert links and all((ROOT / "benchmarks" / link).exists() for link in links)


def test_the_committed_counts_are_within_the_budgets() -> None:
    result = json.loads((ROOT / "benchmarks" / "host_work" / "result.json").read_text())
    assert result["host_waits"]["scalar_reads"] == result["host_waits"]["others"] == 0
    for part, budget in host_work.BUDGETS.items():
        assert budget is None or result["comparison"][part][host_work.OURS] <= budget


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").rglob("*.py")), ids=lambda path: path.stem)
def test_every_command_takes_its_options_as_the_scripts_do(path: Path) -> None:
    """So that --help is help, and a wrong option is one line and exit code 2."""
    _, runs, command = path.read_text().partition('\nif __name__ == "__main__":\n')
    assert not runs or command.startswith("    run_script(main, __doc__, ")
