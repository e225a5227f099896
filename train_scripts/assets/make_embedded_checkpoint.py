"""Puts the transformer of a run, in half precision, beside the embedded autoencoder, and scores it.

accelerate launch --quiet --config_file accelerate_configs/cpu.yaml train_scripts/train_dit_speed.py \
    config=quickstart/fashion_mnist
python train_scripts/assets/make_embedded_checkpoint.py run=runs/quickstart_speed
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from speed_diffusers.assets import EMBEDDED, EMBEDDED_PIPELINE
from speed_diffusers.config.command_line import run_script
from speed_diffusers.config.load import load_config
from speed_diffusers.config.schema import Options, option
from speed_diffusers.data.moments import vae_fingerprint
from speed_diffusers.errors import InputError
from speed_diffusers.files import give_usual_mode
from speed_diffusers.generation.export import SIDECAR, forget_paths
from speed_diffusers.generation.generate import row_names_of
from speed_diffusers.generation.pretrained import load_pipeline, load_vae
from speed_diffusers.metrics.score import ScoreSettings, score_pipeline

QUALITY_FILE = "quality.json"


@dataclass
class EmbeddedCheckpointConfig(Options):
    """Options of `make_embedded_checkpoint.py`."""

    run: str = option("runs/quickstart_speed", "Run, or pipeline folder, to take the transformer from.", path=True)
    output_dir: str = option(str(EMBEDDED_PIPELINE), "Pipeline folder that holds the autoencoder already.", path=True)
    num_images: int = option(2000, "Generated images of the score.", interval="[2, inf)")


def main(argv: list[str]) -> None:
    """Stores and scores the checkpoint.

    Raises:
        InputError: No such run, or one that was trained with another autoencoder.
    """
    config = load_config(EmbeddedCheckpointConfig, argv, Path(__file__).resolve().parent)
    folder = Path(config.output_dir)
    pipeline = load_pipeline(config.run)
    if vae_fingerprint(pipeline.vae.float()) != vae_fingerprint(load_vae(EMBEDDED)):
        raise InputError(f"run={config.run}: it was trained with another autoencoder than the embedded one.")
    pipeline.transformer.to(torch.float16).save_pretrained(folder / "transformer")
    pipeline.scheduler.save_pretrained(folder / "scheduler")
    # diffusers reads the names but would not save them again.
    pipeline.register_to_config(id2label={str(row): name for row, name in row_names_of(pipeline).items()})
    pipeline.save_config(folder)
    forget_paths(folder)
    sidecar = Path(config.run) / "pipeline" / SIDECAR
    (folder / SIDECAR).write_text(sidecar.read_text())
    give_usual_mode(folder)
    score = score_pipeline(load_pipeline(str(folder)), ScoreSettings(num_images=config.num_images))
    (folder / "transformer" / QUALITY_FILE).write_text(json.dumps(score.to_dict(), indent=1) + "\n")
    print(f"Fréchet distance {score.frechet_distance:.3f}, class agreement {score.class_agreement:.1%}.")


if __name__ == "__main__":
    run_script(main, __doc__, EmbeddedCheckpointConfig)
