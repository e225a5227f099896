"""The profile command: its table, picture and trace, and that nothing of a run is touched."""

import json
import re
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent

from speed_diffusers.config.load import load_config
from speed_diffusers.errors import InputError
from speed_diffusers.models import dit_config
from speed_diffusers.reports.training_cost import training_flops
from speed_diffusers.train_scripts.profile_training import ProfileConfig, main
from speed_diffusers.train_scripts.train_dit_speed import SCRIPT_DIR
from speed_diffusers.training.config import TrainConfig, trainer_options
from speed_diffusers.training.profiling import OTHER, PARTS, part_times
from speed_diffusers.training.setup import temporary_run
from speed_diffusers.training.step import training_steps

SHORT = ["profile_steps=2", "profile_warmup_steps=1"]
PRESETS = [
    path.relative_to(SCRIPT_DIR / "configs").with_suffix("").as_posix()
    for path in sorted((SCRIPT_DIR / "configs").rglob("*.yaml"))
    if path.name != "base.yaml"
]


pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.fixture
def temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary folders of the test are made."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def rows_of(printed: str) -> dict[str, list[float]]:
    """Part to milliseconds, share in percent and operations, from the printed table."""
    found = re.findall(r"^([a-z ]+?) +([\d.]+) +([\d.]+)% +([\d,]+)$", printed, re.MULTILINE)
    return {name: [float(text.replace(",", "")) for text in numbers] for name, *numbers in found}


def test_a_profile_shows_every_part_and_touches_no_run(
    tiny_options: list[str], tmp_path: Path, temporary_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture, trace = tmp_path / "new" / "profile.png", tmp_path / "new" / "profile.json"
    main([*tiny_options, *SHORT, f"output={picture}", f"trace={trace}"])
    printed = capsys.readouterr().out
    rows = rows_of(printed)
    # What happens between some steps only has lines of its own; validation was not asked for.
    assert list(rows) == [*(part for part in PARTS if part not in ("checkpoint", "validation")), OTHER, "total"]
    assert re.findall(r"one (\w+): [\d,]+ ms, every ([\d,]+) steps: [\d.]+% of the time", printed) == [
        ("checkpoint", "5")
    ]
    total = rows.pop("total")
    for column, tolerance in ((0, 0.01), (1, 1.0), (2, 0)):
        assert sum(row[column] for row in rows.values()) == pytest.approx(total[column], abs=tolerance)
    assert rows["forward and loss"][2] > 100 < rows["backward"][2]
    assert rows["ema"][2] == 1
    shape = dit_config("DiT-tiny/4", sample_size=8, in_channels=4, out_channels=4, num_classes=2)
    assert f"{4 * training_flops(shape) / 1e9:.2f} GFLOP per step" in printed
    assert re.search(r"without the profiler: [\d.]+ ms/step, [\d.]+ images/s", printed)
    assert Image.open(picture).width > 500
    names = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert {"data", "forward and loss", "logging", "aten::addmm"} <= names
    assert not (tmp_path / "run").exists()
    assert list(temporary_folder.iterdir()) == []


@pytest.mark.parametrize("name", PRESETS)
def test_the_options_of_every_preset_are_the_trainers(name: str) -> None:
    config = load_config(ProfileConfig, [f"config={name}", "profile_steps=3"], SCRIPT_DIR)
    assert config.profile_steps == 3
    assert trainer_options(config) == load_config(TrainConfig, [f"config={name}"], SCRIPT_DIR)


def test_a_preset_of_imagenet_is_profiled(tiny_options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    options = [
        option for option in tiny_options if not option.startswith(("config", "max_train", "lr_", "checkpointing"))
    ]
    small = ["resolution=32", "dataloader_num_workers=0", "gradient_accumulation_steps=2", "validation_steps=5"]
    small.append("validation_class_labels=cat")
    main(["config=imagenet_256/dit_xl2", *options, *small, *SHORT])
    printed = capsys.readouterr().out
    assert "DiT-tiny/4, 8 images per step, cpu" in printed
    between = dict(re.findall(r"one (\w+): .* every ([\d,]+) steps", printed))
    assert between == {"checkpoint": "10,000", "validation": "5"}


def test_a_dry_run_prints_the_plan(tiny_options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    main([*tiny_options, "dry_run=true"])
    printed = capsys.readouterr().out
    assert "12 of 4 images" in printed and "ms/step" not in printed


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("profile_steps=0", "profile_steps=0: must lie in"),
        ("profile_warmup_steps=0", "profile_warmup_steps=0: must lie in"),
        ("output=picture.jpg", r"output=picture.jpg: must be a file that ends in .png"),
        ("trace=trace.png", r"trace=trace.png: must be a file that ends in .json or .json.gz"),
        ("profile_step=3", "profile_step.*Did you mean 'profile_steps'"),
        ("train_batch_size=0", "train_batch_size=0: must lie in"),
    ],
)
def test_wrong_options_are_one_line(tiny_options: list[str], wrong: str, message: str) -> None:
    kept = [option for option in tiny_options if option.split("=")[0] != wrong.split("=")[0]]
    with pytest.raises(InputError, match=message):
        main([*kept, wrong])


def test_a_temporary_run_leaves_nothing_behind(tiny_options: list[str], temporary_folder: Path) -> None:
    config = load_config(TrainConfig, tiny_options, SCRIPT_DIR)
    # The whole run's decay is longer than these steps.
    decay = {"lr_scheduler": "warmup_stable_decay", "lr_warmup_steps": 4, "lr_decay_steps": 6}
    with temporary_run(replace(config, overwrite_output_dir=True, **decay), steps=2) as run:  # type: ignore[arg-type]
        assert run.output_dir.parent == temporary_folder
        assert [step.done for step in training_steps(run)] == [1, 2], "and no more than it was made for"
    with pytest.raises(KeyError, match="stopped"), temporary_run(config, steps=1):
        raise KeyError("stopped")
    assert list(temporary_folder.iterdir()) == [] and not Path(config.output_dir).exists()


def test_kernels_belong_to_the_part_that_launched_them() -> None:
    """On a GPU autograd launches from a thread of its own."""

    def event(name: str, start: float, end: float, thread: int = 1, **more: object) -> FunctionEvent:
        return FunctionEvent(0, name, thread, start, end, **more)

    step, forward = event("ProfilerStep#7", 0, 1000), event("forward and loss", 100, 300)
    backward, ema = event("backward", 300.5, 800), event("ema", 850, 900, is_user_annotation=True)
    operations = [event("aten::mm", 150, 160), event("aten::mm", 400, 420, thread=2), event("aten::add_", 820, 830)]
    for operation, microseconds in zip(operations, (2000, 4000, 500), strict=True):
        operation.append_kernel("kernel", 0, microseconds)
    # The profiler repeats labels on the device; they are no work.
    ema.append_kernel("ema", 0, 7777)
    repeated = event("backward", 500, 5000, device_type=DeviceType.CUDA)
    second = event("ProfilerStep#8", 1000, 3000)
    host, on_device = part_times([step, forward, *operations, backward, ema, repeated, second])
    assert {name: value for name, value in host.items() if value} == pytest.approx(
        {"forward and loss": 0.1, "backward": 0.24975, "ema": 0.025, OTHER: 1.5 - 0.37475}
    )
    assert {name: value for name, value in on_device.items() if value} == pytest.approx(
        {"forward and loss": 1.0, "backward": 2.0, OTHER: 0.25}
    )
