"""Two processes over gloo: they train as one does, stop together, and say which of them is missing."""

import json
import re
import shutil
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import kills
from forked import Forker, run_options
from run_outputs import assert_same_checkpoint, metrics
from speed_diffusers.metrics.score_record import load_score

NUM_IMAGES = 26
"""Of the folder of images, in batches of 4: epochs end within a batch."""


def entries(folder: Path) -> list[dict[str, Any]]:
    """What every image of every step met, by step and image, whichever process took it."""
    lines = [json.loads(line) for path in folder.glob("ledger-*.jsonl") for line in path.read_text().splitlines()]
    return sorted(lines, key=lambda line: (line["step"], line["image"]))


def assert_close(first: Path, second: Path, step: int, limit: float) -> None:
    """Parameters in float64 that differ by no more than a share of the largest of their tensor."""
    one, other = (load_file(folder / f"checkpoint-{step}" / "model.safetensors") for folder in (first, second))
    assert one.keys() == other.keys() and all(value.dtype == torch.float64 for value in one.values())
    for name, value in one.items():
        # Attention does not depend on the keys' bias, so its gradient is rounding and no more.
        scale = 1.0 if name.endswith("to_k.bias") else value.abs().max()
        assert (value - other[name]).abs().max() <= limit * scale, name


def test_the_number_of_processes_changes_nothing(forker: Forker, tiny_options: list[str], tmp_path: Path) -> None:
    """One process; two; one, then two that accumulate, then one again: the same images, draws and parameters."""
    common = ["max_train_steps=12", "checkpointing_steps=4", "random_flip=true", "lr_scheduler=linear"]

    def run(name: str, *options: str, size: int = 1, batch: int = 4) -> Path:
        folder = tmp_path / name
        own = [*common, f"train_batch_size={batch}", *options]
        changes = ["float64", f"ledger:{folder}"]
        said = forker.run(folder, run_options(tiny_options, folder / "run", *own), size=size, changes=changes)
        assert "Warning" not in said
        return folder

    alone, pair = run("alone"), run("pair", size=2, batch=2)
    more = run("more", f"resume_from_checkpoint={alone / 'run' / 'checkpoint-4'}", size=2, batch=1)
    less = run("less", f"resume_from_checkpoint={more / 'run' / 'checkpoint-8'}")
    expected = entries(alone)
    assert len(expected) == 12 * 4
    # Rows, timesteps, noise, dropped labels, flips: hashes of their bytes.
    assert entries(pair) == expected
    assert entries(more) == [line for line in expected if line["step"] >= 4]
    assert entries(less) == [line for line in expected if line["step"] >= 8]
    in_order = [line["image"] for line in sorted(expected, key=lambda line: (line["step"], line["place"]))]
    assert set(Counter(in_order[:NUM_IMAGES]).values()) == {1}, "each image once in an epoch"
    for other in (pair, more, less):
        assert_close(alone / "run", other / "run", 12, 1e-10)
    for other, first in ((pair, 0), (more, 4), (less, 8)):
        rates = [line["learning_rate"] for line in metrics(other / "run")]
        assert rates == [line["learning_rate"] for line in metrics(alone / "run")][first:]


def test_processes_share_the_work_of_muon(forker: Forker, tiny_options: list[str], tmp_path: Path) -> None:
    """Of six layers with a matrix of a shape each: three for either of two processes, two for all but one of four."""
    common = ["optimizer=muon", "learning_rate=1e-2", "max_train_steps=4", "checkpointing_steps=4"]
    for size in (1, 2, 4):
        folder = tmp_path / str(size)
        options = run_options(tiny_options, folder / "run", *common, f"train_batch_size={4 // size}")
        assert "Warning" not in forker.run(folder, options, size=size, changes=["float64"])
    for size in (2, 4):
        # The products are of float32 whatever the parameters are.
        assert_close(tmp_path / "1" / "run", tmp_path / str(size) / "run", 4, 1e-5)


def test_a_run_that_is_killed_again_and_again_leaves_the_same_bits(
    forker: Forker, tiny_options: list[str], tmp_path: Path
) -> None:
    """Twenty kills, and one at every change to a file, are in tests/nightly."""
    options = ["report_to=tensorboard", "validation_steps=4", "num_validation_images=1", "random_flip=true"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    forker.run(whole, run_options(tiny_options, whole / "run", *options))
    command = run_options(tiny_options, killed / "run", *options, "resume_from_checkpoint=latest")
    for change in ("killed:4", "killed_within_save:10", "killed:9", "killed_within_save:12"):
        assert forker.start(killed, command, changes=[change]).wait() == -signal.SIGKILL
        assert [path.name for path in (killed / "run").glob(".tmp-checkpoint-*")] == (
            [] if change.startswith("killed:") else [f".tmp-checkpoint-{change.partition(':')[2]}"]
        )
    forker.run(killed, command)
    assert kills.differences(whole / "run", killed / "run") == []


def test_grids_and_scores_are_made_by_all_and_are_those_of_one(
    forker: Forker, tiny_options: list[str], tmp_path: Path
) -> None:
    few = ["train_data_dir=None", "dataset_name=embedded", "pretrained_vae_model_name_or_path=embedded"]
    few += ["max_train_samples=12", "max_train_steps=1", "vae_batch_size=3", "num_score_images=20"]
    few += ["lr_warmup_steps=0"]
    alone = tmp_path / "alone"
    forker.run(alone, run_options(tiny_options, alone / "run", *few), changes=[f"counted:{alone}"])
    # The same weights, of which only the results are made again.
    again = tmp_path / "again"
    without = shutil.ignore_patterns("samples.png", "scores", "pipeline")
    shutil.copytree(alone / "run", again / "run", ignore=without)
    options = run_options(tiny_options, again / "run", *few, "train_batch_size=2", "resume_from_checkpoint=latest")
    forker.run(again, options, size=2, changes=[f"counted:{again}"])
    assert (again / "run" / "samples.png").read_bytes() == (alone / "run" / "samples.png").read_bytes()
    one, other = (load_score(next((folder / "run" / "scores").iterdir())).score for folder in (alone, again))
    assert one == other and one.frechet_distance is not None
    counts = [
        [sum(map(int, path.read_text().split())) for path in sorted(folder.glob("generated-*.txt"))]
        for folder in (alone, again)
    ]
    (total,), shared = counts
    assert sum(shared) == total == 20 + 10 * 2 and len(shared) == 2 and min(shared) > total / 3

    measured = []
    for size in (1, 2):
        folder = tmp_path / f"scores-{size}"
        command = [f"models={alone / 'run'}", "num_images=20", "batch_size=3", "num_inference_steps=2"]
        said = forker.run(folder, [*command, f"output_dir={folder}"], size=size, script="evaluate")
        measured += [load_score(path).score for path in folder.rglob("*.json")]
        assert said.count("frechet distance") == 2, "a line as it comes, and the table"
    assert len(measured) == 2 and measured[0] == measured[1]


def test_a_signal_to_one_of_two_saves_the_same_step_on_both(
    forker: Forker, tiny_options: list[str], tmp_path: Path
) -> None:
    whole = tmp_path / "whole"
    options = ["train_batch_size=2", "checkpointing_steps=None"]
    forker.run(whole, run_options(tiny_options, whole / "run", *options), size=2)
    stopped = tmp_path / "stopped"
    command = run_options(tiny_options, stopped / "run", *options)
    trainers = forker.start_ranks(stopped, command, changes=["stopped:1,5"])
    codes = [trainer.wait() for trainer in trainers]
    forker.end(trainers)
    assert codes == [128 + signal.SIGTERM] * 2, trainers[0].text() + trainers[1].text()
    (saved,) = (stopped / "run").glob("checkpoint-*")
    step = int(saved.name.removeprefix("checkpoint-"))
    assert 5 <= step < 12 and f"Stopped at step {step}" in trainers[0].text()
    forker.run(tmp_path / "resumed", [*command, "resume_from_checkpoint=latest"], size=2)
    assert_same_checkpoint(whole / "run", stopped / "run", 12)
    assert metrics(whole / "run") == metrics(stopped / "run")


def test_what_is_not_finite_on_one_rank_stops_both_before_it_is_applied(
    forker: Forker, tiny_options: list[str], tmp_path: Path
) -> None:
    options = run_options(tiny_options, tmp_path / "run", "train_batch_size=2", "checkpointing_steps=3")
    trainers = forker.start_ranks(tmp_path, options, changes=["poisoned:1,7"])
    codes = [trainer.wait() for trainer in trainers]
    forker.end(trainers)
    assert codes == [1, 1]
    for trainer in trainers:
        assert re.search(r"error: FloatingPointError: The gradients of step 7 are not finite.*rank 1", trainer.text())
        assert "Traceback" not in trainer.text()
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-6"]
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]


def test_a_rank_that_is_killed_is_named(forker: Forker, tiny_options: list[str], tmp_path: Path) -> None:
    options = run_options(tiny_options, tmp_path / "run", "train_batch_size=2", "ddp_timeout=32")
    trainers = forker.start_ranks(tmp_path, options, changes=["dies:7"])
    codes = [trainer.wait() for trainer in trainers]
    forker.end(trainers)
    assert codes == [1, -signal.SIGKILL]
    said = trainers[0].text()
    assert re.search(r"error: ConnectionError: Rank 1: no sign of life; last seen at step \d \(", said), said
    assert "Traceback" not in said
