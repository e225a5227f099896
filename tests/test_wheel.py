"""The wheel: all that a user needs is in it, and its scripts run from it without a checkout."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
# What a build reads.
SOURCES = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "NOTICE")
FOLDERS = ("speed_diffusers", "pipelines", "train_scripts")
IGNORED = shutil.ignore_patterns("__pycache__", "runs", "*.pyc")
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]

# Where the package and what stands at the top of the checkout are found, without importing the package and so torch.
WHERE = """
import sys
from importlib.util import find_spec
from types import ModuleType

found = find_spec("speed_diffusers")
sys.modules["speed_diffusers"] = package = ModuleType("speed_diffusers")
package.__path__ = found.submodule_search_locations
print(found.origin)
for name in ("pipelines", "train_scripts.train_dit_speed"):
    print(find_spec(f"speed_diffusers.{name}").origin)
"""

pytestmark = pytest.mark.slow


def checked(command: list[str], cwd: Path, **environment: str) -> str:
    """Runs a command that must succeed, and returns what it printed."""
    result = subprocess.run(
        command,
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def tracked(folder: str) -> set[str]:
    """The files under a folder of the checkout that a wheel must hold; links are other folders of it."""
    return {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and "runs" not in path.relative_to(ROOT).parts
    }


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout, built from a copy so that no build/ is left here."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in SOURCES:
        shutil.copy(ROOT / name, source)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=IGNORED)
    for link in (source / "speed_diffusers").iterdir():
        # A developer may have made the folders that stand at the top importable by links.
        if link.is_symlink():
            link.unlink()
    checked([*PIP, "wheel", str(source), "--no-deps", "--no-build-isolation", "-w", str(folder)], folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path) -> Path:
    """The folder that the wheel was installed into, and nothing else."""
    target = wheel.parent / "installed"
    checked([*PIP, "install", "--no-deps", "--no-index", "--target", str(target), str(wheel)], wheel.parent)
    return target


def test_the_wheel_holds_library_scripts_configs_pipelines_and_assets(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
        licences = {Path(name).name for name in archive.namelist() if "/licenses/" in name}
    expected = {name for name in tracked("speed_diffusers") if not (ROOT / name).parents[0].is_symlink()}
    for folder in ("pipelines", "train_scripts"):
        expected |= {f"speed_diffusers/{name}" for name in tracked(folder)}
    assert sorted(expected - held) == [], "missing in the wheel"
    assert sorted(held - expected) == [], "not of this checkout"
    for name in ("train_scripts/train_dit_speed.py", "train_scripts/configs/quickstart/fast.yaml"):
        assert f"speed_diffusers/{name}" in held
    assert licences == {"LICENSE", "NOTICE"}


def test_scripts_run_from_the_wheel_in_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    # An editable installation of this checkout puts finders and folders in the way, which the path goes before.
    environment = {"PYTHONPATH": str(installed), "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    work = tmp_path / "work"
    work.mkdir()
    places = checked([sys.executable, "-c", WHERE], work, **environment).split()
    assert len(places) == 3 and [place for place in places if not Path(place).is_relative_to(installed)] == []

    launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--quiet", "--cpu"]
    launch += ["--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    train = [*launch, "-m", "speed_diffusers.train_scripts.train_dit_speed"]
    short = ["max_train_steps=2", "num_score_images=None", "num_inference_steps=2", "num_validation_images=1"]
    printed = checked([*train, *short, "max_train_samples=200", "report_to=[]"], work, **environment)
    run = work / "runs" / "quickstart"
    assert "200 images, 10 classes" in printed and "Saved runs/quickstart/pipeline" in printed
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()][-1:] == [2]
    assert (run / "checkpoint-2" / "model.safetensors").is_file() and (run / "samples.png").is_file()
    config = (run / "config.yaml").read_text()
    assert re.search("^speed_sampling: gaussian:mean=-1$", config, re.M)
    assert re.search("^max_train_steps: 2$", config, re.M)

    sample = [sys.executable, "-m", "speed_diffusers.train_scripts.sample", "model=runs/quickstart"]
    printed = checked([*sample, "num_inference_steps=2", "num_images_per_class=1"], work, **environment)
    assert printed == "Saved samples.png: 10 images.\n"
    assert Image.open(work / "samples.png").width > 30
    assert sorted(path.name for path in work.iterdir()) == ["runs", "samples.png"]
