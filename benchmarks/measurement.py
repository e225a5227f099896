"""What every benchmark records of where it was measured."""

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from speed_diffusers.hardware import processor

ROOT = Path(__file__).resolve().parents[1]
SCRIPT_DIR = ROOT / "train_scripts"
"""The folder of the training script, in whose configs/ configurations are looked for."""
PACKAGES = ("torch", "diffusers", "accelerate", "datasets", "numpy")


def commit() -> str:
    """The commit that is measured, marked if the tree differs from it; "unknown" without git or its history."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--exclude=*"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:
        return "unknown"
    return described.stdout.strip() or "unknown"


def installed(package: str) -> str:
    """The version of a package; "unknown" of one that stands on the path without being installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def load_average() -> float:
    """Processes that ran or waited to, over the last minute."""
    return os.getloadavg()[0]


def environment() -> dict[str, object]:
    """Commit, versions and machine."""
    return {
        "commit": commit(),
        "python": platform.python_version(),
        **{name: installed(name) for name in PACKAGES},
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
