"""Training runs of benchmarks that compare what is learned: started once, resumed after a stop."""

import json
import subprocess
import sys
from pathlib import Path

from speed_diffusers.errors import InputError

ROOT = Path(__file__).resolve().parents[1]
TRAIN = ROOT / "train_scripts" / "train_dit_speed.py"
SPEED_CONFIG = "quickstart/fashion_mnist"
"""What is trained where a benchmark names no other: SpeeD with AdamW, on the embedded images."""


def trained_run(folder: Path, **settings: object) -> Path:
    """Trains in a folder, or resumes there, unless the run is done; returns the folder.

    Args:
        folder: Of the run.
        settings: Options of the training script, over those of `SPEED_CONFIG`.
    """
    if (folder / "pipeline").is_dir():
        return folder
    settings = {"config": SPEED_CONFIG} | settings | {"output_dir": folder, "resume_from_checkpoint": "latest"}
    subprocess.run([sys.executable, TRAIN, *(f"{key}={value}" for key, value in settings.items())], check=True)
    return folder


def is_measured(result: Path, **options: object) -> bool:
    """Whether a result is there already.

    Args:
        result: Its file: options stand beside the scores or in their protocols.
        options: What it must have been measured with, as far as it says so.

    Raises:
        InputError: It was measured with another value, and would pass for one of these options.
    """
    if not result.exists():
        return False
    kept = json.loads(result.read_text())
    scores = [kept, *kept.get("scores", {}).values()]
    places = [kept, *(score["protocol"] for score in scores if "protocol" in score)]
    for name, value in options.items():
        for other in (place[name] for place in places if name in place):
            if other != value:
                raise InputError(f"{name}={value}: {result} was measured with {other}; give a new results_dir.")
    return True
