"""Checkpoints: exact continuation, damage of every kind, full disks, and nothing that runs code on loading."""

import contextlib
import copy
import json
import logging
import pickle
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from speed_diffusers import InputError, SpeeDDDPMScheduler
from speed_diffusers.checkpoints import (
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    prune_checkpoints,
    read_state,
    save_checkpoint,
)
from speed_diffusers.draws import StepDraws
from speed_diffusers.ema import ExponentialMovingAverage
from speed_diffusers.models import build_dit
from speed_diffusers.objective import denoising_loss, drop_labels

DIT = {
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "patch_size": 2,
    "sample_size": 4,
    "in_channels": 4,
    "out_channels": 4,
    "num_embeds_ada_norm": 1000,
}
FILES = {"model.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json", "manifest.json"}


class Run:
    """A training run in small: DiT, AdamW, average, draws keyed by the step."""

    def __init__(self, seed: int = 0, *, fused: bool = True, model: nn.Module | None = None) -> None:
        self.model = build_dit(DIT, torch.Generator().manual_seed(seed)) if model is None else model
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=3e-3, weight_decay=0.01, fused=fused)
        self.ema = ExponentialMovingAverage(self.model, 0.9)
        self.scheduler = SpeeDDDPMScheduler()
        self.step = 0

    def train(self, steps: int) -> list[float]:
        losses = []
        latents = torch.randn(8, 4, 4, 4, generator=torch.Generator().manual_seed(5))
        for _ in range(steps):
            draws = StepDraws.at_step(
                self.scheduler,
                seed=1,
                step=self.step,
                latent_shape=(8, 4, 4, 4),
                class_dropout_prob=0.1,
                random_flip=False,
                device=torch.device("cpu"),
            )
            rows = drop_labels(torch.arange(8), draws.dropped)
            loss = denoising_loss(self.model, self.scheduler, latents, rows, draws.timesteps, draws.noise).loss
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.ema.update()
            self.step += 1
            losses.append(loss.item())
        return losses

    def save(self, folder: Path, **state: Any) -> Path:
        return save_checkpoint(
            folder,
            step=self.step,
            model=self.model,
            ema=self.ema,
            optimizer=self.optimizer,
            state=state,
            is_main_process=True,
        )

    def load(self, folder: Path) -> None:
        load_checkpoint(folder, model=self.model, ema=self.ema, optimizer=self.optimizer)
        self.step = read_state(folder)["step"]

    def state(self) -> dict[str, Tensor]:
        """Parameters, averages, moments and step counts, as copies."""
        found = {f"model/{name}": value for name, value in self.model.state_dict().items()}
        found |= {f"ema/{name}": value for name, value in self.ema.state_dict().items()}
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        for parameter, values in self.optimizer.state.items():
            found |= {f"optimizer/{names[id(parameter)]}/{key}": value for key, value in values.items()}
        return copy.deepcopy(found)


class Light:
    """As `Run`, with one linear layer: for the tests that look at files only."""

    def __new__(cls, width: int = 8) -> Run:
        torch.manual_seed(0)
        run = Run(model=nn.Linear(width, width))
        run.model(torch.ones(1, width)).sum().backward()
        run.optimizer.step()
        return run


def assert_same_state(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert value.dtype == second[name].dtype and torch.equal(value, second[name]), name


def saved_steps(folder: Path, *steps: int) -> Run:
    run = Light()
    for step in steps:
        run.step = step
        run.save(folder)
    return run


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@contextlib.contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Writes beyond `size` bytes of a file fail as they do on a full disk; Python ignores the signal."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("fused", [True, False])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path: Path, fused: bool) -> None:
    whole = Run(fused=fused)
    whole.train(4)
    saved = whole.state()
    folder = whole.save(tmp_path, note="kept")
    assert_same_state(whole.state(), saved)
    expected = whole.train(5)

    resumed = Run(seed=99, fused=fused)
    resumed.load(find_checkpoint(tmp_path, "latest") or Path())
    assert_same_state(resumed.state(), saved)
    assert resumed.step == 4 and read_state(folder)["note"] == "kept"
    assert resumed.optimizer.param_groups[0]["lr"] == 3e-3
    assert resumed.train(5) == expected
    assert_same_state(resumed.state(), whole.state())


def test_loading_into_a_run_under_way_replaces_everything(tmp_path: Path) -> None:
    run = Run()
    run.train(2)
    folder, saved = run.save(tmp_path), run.state()
    run.train(3)
    run.load(folder)
    assert_same_state(run.state(), saved)


def test_saving_before_the_first_step_changes_nothing(tmp_path: Path) -> None:
    run, untouched = Run(), Run()
    folder = run.save(tmp_path)
    assert folder.name == "checkpoint-0"
    assert run.train(3) == untouched.train(3)
    resumed = Run(seed=99)
    resumed.load(folder)
    resumed.train(3)
    assert_same_state(resumed.state(), untouched.state())


def test_folder_holds_safetensors_and_json_only(tmp_path: Path) -> None:
    folder = saved_steps(tmp_path, 3).save(tmp_path, config={"seed": 1})
    assert {path.name for path in folder.iterdir()} == FILES
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1, "all files are as readable as one another"
    state = json.loads((folder / "state.json").read_text())
    assert state["step"] == 3 and state["format_version"] == 1 and state["config"] == {"seed": 1}


def test_other_processes_write_nothing(tmp_path: Path) -> None:
    run = Light()
    parts = {"model": run.model, "ema": run.ema, "optimizer": run.optimizer}
    save_checkpoint(tmp_path, step=1, **parts, state={}, is_main_process=False)
    assert list(tmp_path.iterdir()) == []


def test_latest_is_the_highest_step(tmp_path: Path) -> None:
    saved_steps(tmp_path, 9, 100, 20)
    (tmp_path / "checkpoint-abc").mkdir()
    (tmp_path / "checkpoint-7000").write_text("a file, not a folder")
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-100", "checkpoint-20", "checkpoint-9"]
    assert find_checkpoint(tmp_path, "latest") == tmp_path / "checkpoint-100"
    assert find_checkpoint(tmp_path, str(tmp_path / "checkpoint-9")) == tmp_path / "checkpoint-9"


def test_latest_of_nothing_is_none(tmp_path: Path) -> None:
    assert find_checkpoint(tmp_path, "latest") is None
    assert find_checkpoint(tmp_path / "missing", "latest") is None


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, tuple[str, Callable[[Path], object]]] = {
    **{f"{name} lacks its end": (name, lambda path: path.write_bytes(path.read_bytes()[:-1])) for name in FILES},
    **{f"{name} is missing": (name, Path.unlink) for name in FILES},
    **{f"{name} is empty": (name, lambda path: path.write_bytes(b"")) for name in FILES},
    **{f"{name} has a flipped bit": (name, flip_bit) for name in FILES},
    "the folder is empty": ("manifest.json", lambda path: [file.unlink() for file in path.parent.iterdir()]),
    "the manifest is no object": ("manifest.json", lambda path: path.write_text("[]")),
    "the manifest is null": ("manifest.json", lambda path: path.write_text("null")),
    "the manifest names nothing": ("manifest.json", lambda path: path.write_text("{}")),
    "the manifest is no text": ("manifest.json", lambda path: path.write_bytes(b"\xff\xfe\x00")),
    "a file is a folder": ("ema.safetensors", lambda path: (path.unlink(), path.mkdir())),
}


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    saved_steps(folder, 5, 10)
    return folder


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoint_is_passed_over_or_named(
    two_checkpoints: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    folder = shutil.copytree(two_checkpoints, tmp_path / "run")
    (folder / "checkpoint-abc").mkdir()
    name, inflict = DAMAGES[damage]
    broken = folder / "checkpoint-10"
    inflict(broken / name)
    with caplog.at_level(logging.WARNING):
        assert find_checkpoint(folder, "latest") == folder / "checkpoint-5"
    (warning,) = [record.getMessage() for record in caplog.records]
    assert "damaged" in warning and str(broken / name) in warning
    with pytest.raises(InputError) as error:
        find_checkpoint(folder, str(broken))
    assert str(broken / name) in str(error.value) and "\n" not in str(error.value)
    assert str(error.value).startswith("resume_from_checkpoint=")


def test_nothing_but_damaged_checkpoints(two_checkpoints: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(two_checkpoints, tmp_path / "run")
    for broken in list_checkpoints(folder):
        (broken / "model.safetensors").unlink()
    assert find_checkpoint(folder, "latest") is None


def test_named_folder_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="^resume_from_checkpoint=.*checkpoint-3 is not a folder"):
        find_checkpoint(tmp_path, str(tmp_path / "checkpoint-3"))


def test_newer_format_is_refused(tmp_path: Path) -> None:
    folder = saved_steps(tmp_path, 1).save(tmp_path)
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps({**state, "format_version": 2}))
    with pytest.raises(InputError, match="checkpoint format 2; this version reads up to 1"):
        read_state(folder)


@pytest.mark.parametrize("other", [nn.Linear(8, 9), nn.Sequential(nn.Linear(8, 8)), nn.Linear(8, 8, bias=False)])
def test_checkpoint_of_another_model_is_refused(tmp_path: Path, other: nn.Module) -> None:
    folder = saved_steps(tmp_path, 1).save(tmp_path)
    with pytest.raises(InputError, match="is a checkpoint of another model: ") as error:
        Run(model=other).load(folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


class Payload:
    """Runs code when it is unpickled: creates a file."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.sentinel,)


def test_pickles_in_a_checkpoint_are_never_opened(tmp_path: Path) -> None:
    sentinel = tmp_path / "executed"
    payload = pickle.dumps(Payload(sentinel))
    pickle.loads(payload)
    assert sentinel.exists(), "the payload works"
    sentinel.unlink()

    run = Light()
    folder = run.save(tmp_path / "run")
    for name in ("optimizer.bin", "pytorch_model.bin", "custom_checkpoint_0.pkl", "random_states_0.pkl", "model.ckpt"):
        (folder / name).write_bytes(payload)
    Light().load(find_checkpoint(tmp_path / "run", "latest") or Path())
    run.save(tmp_path / "run")
    assert not sentinel.exists()

    for name in ("model.safetensors", "optimizer.safetensors", "state.json"):
        (folder / name).write_bytes(payload)
        with pytest.raises(Exception, match="(?i)header|json|decode"):
            Light().load(folder)
        run.save(tmp_path / "run")
    assert not sentinel.exists()


@pytest.mark.parametrize("limit", [20_000, 45_000], ids=["at the model", "at the optimizer"])
@pytest.mark.parametrize("next_step", [5, 6], ids=["same step", "next step"])
def test_full_disk_leaves_the_last_checkpoint_whole_and_no_part_of_a_new_one(
    tmp_path: Path, limit: int, next_step: int
) -> None:
    run = Light(width=100)  # 40 kB of parameters, 80 kB of moments
    run.step = 5
    before = contents(run.save(tmp_path))
    run.step = next_step
    with file_size_limit(limit), pytest.raises(OSError, match="(?i)too large|space"):
        run.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-5"]
    assert contents(tmp_path / "checkpoint-5") == before
    assert find_checkpoint(tmp_path, "latest") == tmp_path / "checkpoint-5"
    run.save(tmp_path)
    assert find_checkpoint(tmp_path, "latest") == tmp_path / f"checkpoint-{next_step}"


def test_checkpoint_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    run = saved_steps(tmp_path, 5)
    with torch.no_grad():
        run.model.weight.add_(1.0)
    folder = run.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-5"]
    again = Light()
    again.load(find_checkpoint(tmp_path, "latest") or Path())
    assert torch.equal(again.model.weight, run.model.weight) and folder.name == "checkpoint-5"


def test_what_a_killed_save_left_is_removed_by_the_next(tmp_path: Path) -> None:
    run = saved_steps(tmp_path, 5)
    for leftover in (".tmp-checkpoint-6", ".tmp-checkpoint-old-1"):
        (tmp_path / leftover).mkdir()
        (tmp_path / leftover / "model.safetensors").write_bytes(b"part")
    assert find_checkpoint(tmp_path, "latest") == tmp_path / "checkpoint-5"
    run.step = 6
    run.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-5", "checkpoint-6"]


@pytest.mark.parametrize(
    ("limit", "kept"), [(None, [9, 20, 100]), (5, [9, 20, 100]), (2, [20, 100]), (1, [100]), (0, [100])]
)
def test_pruning_keeps_the_newest(tmp_path: Path, limit: int | None, kept: list[int]) -> None:
    saved_steps(tmp_path, 9, 100, 20)
    (tmp_path / "checkpoint-abc").mkdir()
    (tmp_path / "pipeline").mkdir()
    prune_checkpoints(tmp_path, limit)
    assert sorted(int(path.name.split("-")[1]) for path in list_checkpoints(tmp_path)) == kept
    assert {"checkpoint-abc", "pipeline"} < {path.name for path in tmp_path.iterdir()}
    assert len(list(tmp_path.iterdir())) == len(kept) + 2
