"""The README's code runs, and every command in it starts."""

import inspect
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, DiTPipeline, UNet2DModel

from speed_diffusers.generation.samplers import SAMPLERS
from speed_diffusers.metrics.score_record import load_scores
from speed_diffusers.pipelines import SpeeDDiTPipeline
from speed_diffusers.train_scripts import evaluate, make_reference_statistics, plan, sample, train_dit_speed

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text("utf-8")
COMMANDS = [
    line
    for block in re.findall(r"```bash\n(.*?)```", README, re.S)
    for line in block.replace("\\\n", " ").splitlines()
    if line and not line.startswith("#")
]
PYTHON = re.findall(r"```python\n(.*?)```", README, re.S)


def arguments_of(script: str) -> list[list[str]]:
    """The options of every README command that runs a script."""
    lines = [shlex.split(line) for line in COMMANDS if script in line]
    return [words[next(i for i, word in enumerate(words) if word.endswith(script)) + 1 :] for words in lines]


def test_the_scheduler_example_trains_a_diffusers_model() -> None:
    assert len([line for line in PYTHON[0].splitlines() if line.strip()]) <= 10
    names: dict[str, Any] = {}
    exec(PYTHON[0], names)
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    model = UNet2DModel(sample_size=8, block_out_channels=(32, 32), layers_per_block=1, **blocks)
    names["training_loss"](model, torch.randn(4, 3, 8, 8)).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_the_pipeline_example_runs_without_this_package(tmp_path: Path) -> None:
    shipped = ROOT / "speed_diffusers" / "assets" / "fashion_mnist" / "pipeline"
    (tmp_path / "runs" / "quickstart").mkdir(parents=True)
    (tmp_path / "runs" / "quickstart" / "pipeline").symlink_to(shipped)
    check = "\nimport sys\nassert len(images) == 2 and 'speed_diffusers' not in sys.modules\n"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", PYTHON[1] + check], cwd=tmp_path, env=environment, check=True)


def test_the_generation_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs" / "quickstart").mkdir(parents=True)
    shipped = ROOT / "speed_diffusers" / "assets" / "fashion_mnist" / "pipeline"
    (tmp_path / "runs" / "quickstart" / "pipeline").symlink_to(shipped)
    (tmp_path / "pipelines").symlink_to(ROOT / "pipelines")
    monkeypatch.chdir(tmp_path)
    by_import, as_file = PYTHON[2:4]
    assert len([line for line in by_import.splitlines() if line.strip()]) <= 10
    names: dict[str, Any] = {}
    exec(by_import, names)
    assert len(names["images"]) == 2 and type(names["pipeline"].scheduler) is DDPMScheduler
    exec(as_file, names)
    assert names["image"].size == (32, 32) and type(names["pipeline"]).__name__ == "SpeeDDiTPipeline"


def test_the_readme_lists_every_new_argument_and_sampler() -> None:
    stock, ours = (inspect.signature(kind.__call__).parameters for kind in (DiTPipeline, SpeeDDiTPipeline))
    section = README.split("## Generate")[1].split("\n## ")[0]
    missing = [name for name in [*(set(ours) - set(stock)), *SAMPLERS] if f"`{name}" not in section]
    assert not missing


@pytest.mark.usefixtures("fresh_accelerate")
@pytest.mark.parametrize("index", range(len(arguments_of("train_dit_speed.py"))))
def test_every_training_command_starts(index: int, image_folder: Path, tiny_vae: Path, tmp_path: Path) -> None:
    options = arguments_of("train_dit_speed.py")[index]
    dry = [f"output_dir={tmp_path / 'run'}", "dry_run=true"]
    kept = [option for option in options if not option.startswith("output_dir=")]
    if any(option.startswith("config=imagenet_256") for option in kept):
        # What needs the network or the machine of an ImageNet run is replaced by something small.
        kept = [option for option in kept if option.split("=")[0] not in ("train_data_dir", "dataset_name")]
        dry += [f"train_data_dir={image_folder}", "dataset_name=None", "model=DiT-tiny/2"]
        dry += [f"pretrained_vae_model_name_or_path={tiny_vae}"]
    train_dit_speed.main([*kept, *dry])
    assert not (tmp_path / "run").exists()


def test_the_sampling_command_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (options,) = arguments_of("sample.py")
    sample.main([*options, "num_inference_steps=2", "num_images_per_class=1"])
    assert (tmp_path / "samples.png").stat().st_size > 1000


def test_the_planning_command_plans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (options,) = arguments_of("plan.py")
    plan.main(options)
    assert (tmp_path / "plan.png").stat().st_size > 20_000


def test_the_scoring_commands_score(image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shipped = ROOT / "speed_diffusers" / "assets" / "fashion_mnist" / "pipeline"
    for run in ("quickstart", "mine"):
        (tmp_path / "runs" / run).mkdir(parents=True)
        (tmp_path / "runs" / run / "pipeline").symlink_to(shipped)
    (tmp_path / "path" / "to").mkdir(parents=True)
    for name in ("images", "held_out"):
        (tmp_path / "path" / "to" / name).symlink_to(image_folder)
    maker = "extractor = lambda: lambda images: images.mean(dim=(2, 3))\n"
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "features.py").write_text(maker)
    monkeypatch.syspath_prepend(str(tmp_path))
    few = ["num_images=6", "num_inference_steps=2"]
    shipped_features, own_features = arguments_of("evaluate.py")
    evaluate.main([*shipped_features, *few])
    (reference,) = arguments_of("make_reference_statistics.py")
    make_reference_statistics.main(["resolution=32" if "resolution" in part else part for part in reference])
    evaluate.main([*own_features, *few])
    for run, extractor in (("runs_quickstart", "fashion_mnist"), ("runs_mine", "my_package.features:extractor")):
        (record,) = load_scores(tmp_path / "scores" / run)
        assert record.score.protocol.extractor == extractor and len(record.score.values) == 5


def test_files_that_the_readme_names_exist() -> None:
    named = re.findall(r"\]\((?!http)([^)#]+)\)", README) + re.findall(r"[\w/]+\.(?:py|yaml)\b", " ".join(COMMANDS))
    assert named
    missing = [name for name in named if not (ROOT / name).exists()]
    assert not missing
