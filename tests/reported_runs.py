"""Two tiny runs with everything that a report shows: samples over training, held-out losses, scores."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from speed_diffusers.generation.pretrained import load_pipeline
from speed_diffusers.metrics.score import ScoreSettings, make_protocol
from speed_diffusers.metrics.score_record import Environment, Score, save_score

HERE = Environment(torch="2", diffusers="0", speed_diffusers="0", device="cpu", seconds=1.0)


def held_out_images(folder: Path) -> Path:
    """A folder with the classes of the fixture `image_folder` and other images."""
    rng = np.random.default_rng(1)
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        for index in range(2):
            pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{index}.png")
    return folder


def reported_runs(train: Callable[..., Path], folder: Path) -> list[Path]:
    """The runs `speed` and `uniform` of 12 steps, the second with other learning rates, each scored at two steps."""
    held_out = held_out_images(folder / "held_out")
    shared = [f"validation_data_dir={held_out}", "validation_steps=5"]
    uniform = ["speed_sampling=uniform", "speed_weighting=none", "learning_rate=3e-3"]
    runs = [train(folder / "speed", *shared), train(folder / "uniform", *shared, *uniform)]
    for index, run in enumerate(runs):
        protocol = make_protocol(load_pipeline(str(run)), ScoreSettings(num_images=10))
        for step, distance in ((5, 9.5), (10, 8.25)):
            values = {"class_agreement": 0.5, "frechet_distance": distance - index, "recall": None}
            score = Score(values, "ab", protocol, HERE)
            save_score(score, run / "scores", step=step, images_seen=4 * step, seconds=0.5 * step)
    return runs
