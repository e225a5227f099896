"""Training runs of benchmarks that compare what is learned: started once, resumed after a stop."""

import subprocess
import sys
from pathlib import Path

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
