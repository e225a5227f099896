"""What a run of the training script leaves in its folder, for tests that compare runs."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def run_folder(options: list[str]) -> Path:
    """The folder of the run that a command line names."""
    return Path(next(option.removeprefix("output_dir=") for option in options if option.startswith("output_dir=")))


def metrics(folder: Path) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl without times, which are never the same twice."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    times = ("images_per_second", "seconds")
    return [{key: value for key, value in line.items() if key not in times} for line in lines]


def final_tensors(folder: Path, step: int) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint: parameters, averages, moments."""
    files = sorted((folder / f"checkpoint-{step}").glob("*.safetensors"))
    assert [file.name for file in files] == ["ema.safetensors", "model.safetensors", "optimizer.safetensors"]
    return {f"{file.stem}/{name}": tensor for file in files for name, tensor in load_file(file).items()}


def assert_same_checkpoint(first: Path, second: Path, step: int) -> None:
    """Bit-equal parameters, averages and moments."""
    one, other = final_tensors(first, step), final_tensors(second, step)
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different


def assert_same_run(first: Path, second: Path, step: int) -> None:
    """The same checkpoint at the end, and the same losses all along."""
    assert_same_checkpoint(first, second, step)
    assert metrics(first) == metrics(second)


def tensorboard_scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Steps and values of every curve that TensorBoard would show, without times; empty without the tracker."""
    found = {}
    for logs in (folder / "logs").glob("*"):
        events = EventAccumulator(str(logs), size_guidance={"scalars": 0}).Reload()
        for tag in events.Tags()["scalars"]:
            if tag not in ("images_per_second", "seconds"):
                found[tag] = [(event.step, event.value) for event in events.Scalars(tag)]
    return found
