"""Can weights make up for other timestep frequencies? The features by linear algebra, a checkpoint by a fit.

    OMP_NUM_THREADS=1 python benchmarks/timestep_frequencies.py    # half a minute

diffusers' DiT divides the exponents of its timestep frequencies by 127, DiT's own code by 128. How many of the one's
256 features, over t = 0 to 999, are no linear combination of the other's; and how far the embedded checkpoint's
predictions move if its frequencies are exchanged, as it is, and with a first layer fitted by ridge regression to the
inputs that it had. Predictions are of noisy held-out latents, 50 at each timestep. Results:
timestep_frequencies/result.json, a table and a picture beside this file.
"""

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from diffusers import DiTTransformer2DModel
from diffusers.models.embeddings import get_timestep_embedding
from matplotlib.figure import Figure
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from measurement import environment
from speed_diffusers.assets import EMBEDDED, EMBEDDED_HELD_OUT_IMAGES
from speed_diffusers.config.command_line import run_script
from speed_diffusers.config.load import load_config
from speed_diffusers.config.schema import Options, option
from speed_diffusers.generation import load_pipeline
from speed_diffusers.models import FREQ_SHIFT, apply_freq_shift
from speed_diffusers.randomness import keyed_generator

HERE = Path(__file__).resolve().parent
TIMESTEPS = (0, 1, 3, 10, 30, 100, 200, 300, 400, 500, 600, 700, 800, 900, 999)
RIDGE = 1e-5
EXACT = 1e-5
OURS, THEIRS = 1, 0


@dataclass
class BenchmarkConfig(Options):
    """Options of this benchmark."""

    num_images: int = option(50, "Held-out images per timestep.", interval="[1, 500]")
    results_dir: str = option(str(HERE / "timestep_frequencies"), "Where the results go.", path=True)


def features(shift: float) -> Tensor:
    """Sines and cosines of the 1,000 timesteps, float64 (1000, 256)."""
    timesteps = torch.arange(1000, dtype=torch.float64)
    return get_timestep_embedding(timesteps, 256, flip_sin_to_cos=True, downscale_freq_shift=shift).double()


def with_one(values: Tensor) -> Tensor:
    """The values with a column of ones, for a bias."""
    return torch.cat([values, torch.ones(len(values), 1, dtype=values.dtype)], dim=1)


def residuals() -> Tensor:
    """Root mean square of what linear combinations leave of each of the 256 features, (256,)."""
    known, wanted = with_one(features(OURS)), features(THEIRS)
    rest = wanted - known @ torch.linalg.lstsq(known, wanted, driver="gelsd").solution
    return rest.square().mean(0).sqrt()


@torch.no_grad()
def exchanged(transformer: DiTTransformer2DModel, *, fitted: bool) -> DiTTransformer2DModel:
    """A copy with the other frequencies; `fitted`: with first layers that get as close as they can."""
    other: Any = copy.deepcopy(transformer)
    other.register_to_config(**{FREQ_SHIFT: THEIRS})
    apply_freq_shift(other)
    if fitted:
        new = with_one(features(THEIRS))
        normal = new.T @ new + RIDGE * len(new) * torch.eye(new.shape[1], dtype=new.dtype)
        for block in other.transformer_blocks:
            layer = block.norm1.emb.timestep_embedder.linear_1
            inputs = features(OURS) @ layer.weight.double().T + layer.bias.double()
            solution = torch.linalg.solve(normal, new.T @ inputs)
            layer.weight.copy_(solution[:-1].T)
            layer.bias.copy_(solution[-1])
    return other


@torch.no_grad()
def embedding_error(transformer: Any, other: Any) -> float:
    """Root mean square by which the embeddings of the 1,000 timesteps differ, over theirs."""
    timesteps = torch.arange(1000)
    own, others = (
        model.transformer_blocks[0].norm1.emb.timestep_embedder(
            model.transformer_blocks[0].norm1.emb.time_proj(timesteps)
        )
        for model in (transformer, other)
    )
    return float((own - others).square().mean().sqrt() / own.square().mean().sqrt())


@torch.no_grad()
def prediction_errors(pipeline: Any, others: list[Any], num_images: int) -> list[list[float]]:
    """Root mean square by which predictions differ, over theirs: for each of the others, at each of `TIMESTEPS`."""
    rows = datasets.load_dataset("parquet", data_files=str(EMBEDDED_HELD_OUT_IMAGES), split="train")[:num_images]
    images = torch.stack([pil_to_tensor(image.convert("RGB")) for image in rows["image"]]).float() / 127.5 - 1
    latents = pipeline.vae.encode(images).latent_dist.mode() * pipeline.vae.config.scaling_factor
    noise = torch.randn(latents.shape, generator=keyed_generator(0, "noise", 0))
    found: list[list[float]] = [[] for _ in others]
    for timestep in TIMESTEPS:
        times = torch.full((len(latents),), timestep)
        inputs = {
            "hidden_states": pipeline.scheduler.add_noise(latents, noise, times),
            "timestep": times,
            "class_labels": torch.tensor(rows["label"]),
        }
        own = pipeline.transformer(**inputs).sample
        for errors, other in zip(found, others, strict=True):
            errors.append(float((own - other(**inputs).sample).square().mean().sqrt() / own.square().mean().sqrt()))
    return found


def table(result: dict[str, Any]) -> str:
    """The numbers as Markdown."""
    lines = [
        f"{result['features_not_explained']} of 256 features are no linear combination of the others' (to {EXACT:g}).",
        "",
        "The embedded checkpoint with the other frequencies: root mean square of the difference over the value's.",
        "",
        "| | as it is | first layer fitted |",
        "|---|---|---|",
        "| embedding of the timestep | " + " | ".join(f"{value:.1%}" for value in result["embedding"]) + " |",
    ]
    for index, timestep in enumerate(TIMESTEPS):
        values = " | ".join(f"{errors[index]:.1%}" for errors in result["predictions"])
        lines.append(f"| prediction at t = {timestep} | {values} |")
    return "\n".join(lines)


def plot(result: dict[str, Any], path: Path) -> None:
    """What linear combinations leave of each feature, and how far predictions move."""
    figure = Figure(figsize=(8.5, 3.2), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2)
    rest = np.maximum(result["residuals"], 1e-9)
    for name, values in (("cosines", rest[:128]), ("sines", rest[128:])):
        left.semilogy(values, label=name)
    left.axhline(EXACT, color="grey", linewidth=0.8)
    left.set_xlabel("number of the frequency, from 1 down to 1/10000")
    left.set_ylabel("left by linear combinations (RMS)")
    left.set_title("Features of t with the other frequencies", fontsize=10)
    left.legend(frameon=False, fontsize=8)
    for name, errors in zip(("as it is", "first layer fitted"), result["predictions"], strict=True):
        right.plot(TIMESTEPS, errors, marker="o", markersize=3, label=name)
    right.set_xlabel("t")
    right.set_ylabel("difference (relative RMS)")
    right.set_title("Predictions, frequencies exchanged", fontsize=10)
    right.legend(frameon=False, fontsize=8)
    figure.savefig(path)


def main(argv: list[str]) -> None:
    """Measures, prints and writes."""
    config = load_config(BenchmarkConfig, argv, HERE)
    about = environment()
    pipeline = load_pipeline(EMBEDDED)
    transformer = pipeline.transformer.eval()
    others = [exchanged(transformer, fitted=fitted) for fitted in (False, True)]
    rest = residuals()
    result = {
        "features_not_explained": int((rest > EXACT).sum()),
        "residuals": [float(f"{value:.3g}") for value in rest],
        "embedding": [embedding_error(transformer, other) for other in others],
        "timesteps": list(TIMESTEPS),
        "predictions": prediction_errors(pipeline, others, config.num_images),
        "num_images": config.num_images,
        "environment": about,
    }
    folder = Path(config.results_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    (folder / "table.md").write_text(table(result) + "\n")
    plot(result, folder / "timestep_frequencies.png")
    print(table(result))


if __name__ == "__main__":
    run_script(main, __doc__, BenchmarkConfig)
