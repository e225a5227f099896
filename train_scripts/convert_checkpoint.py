r"""Converts checkpoints of DiT's own code (facebookresearch/DiT) and of SpeeD's official code to diffusers, and back.

From a file to a folder, a whole pipeline if its autoencoder is named too:

    python train_scripts/convert_checkpoint.py checkpoint=DiT-XL-2-256x256.pt output=dit_xl \
        vae=stabilityai/sd-vae-ft-ema
    python train_scripts/sample.py model=dit_xl class_labels=207,360 guidance_scale=4

And from a run, a pipeline or a transformer to a file that both codes sample from:

    python train_scripts/convert_checkpoint.py checkpoint=runs/speed output=speed.pt

Files are read without running code that they may hold. Width, depth and classes are read from the tensors; the number
of attention heads, which they do not tell, is that of the known DiT of this size. The stock DiTPipeline computes other
timestep frequencies than DiT's own code; SpeeDDiTPipeline and all scripts here take those that the folder names
(freq_shift in transformer/config.json) and predict what the original network does.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from speed_diffusers.config.command_line import run_script
from speed_diffusers.config.load import load_config
from speed_diffusers.config.schema import Options, option
from speed_diffusers.errors import InputError
from speed_diffusers.files import check_output_file, check_writable
from speed_diffusers.generation.conversion import (
    WEIGHTS,
    DiTCheckpoint,
    read_folder,
    read_original,
    write_folder,
    write_original,
)
from speed_diffusers.generation.original_dit import (
    ORIGINAL_CONSTANTS,
    STOCK_CONSTANTS,
    constants_of,
    prediction_difference,
)
from speed_diffusers.generation.pretrained import load_vae
from speed_diffusers.models import FREQ_SHIFT

SUFFIX = ".pt"


@dataclass(frozen=True)
class ConvertConfig(Options):
    """Options of `convert_checkpoint.py`."""

    checkpoint: str | None = option(
        None, "A .pt file; or a run, a folder of a pipeline or transformer, or a Hub id.", path=True
    )
    output: str | None = option(None, "New folder for a .pt file; new .pt file for anything else.", path=True)
    num_attention_heads: int | None = option(
        None, "Attention heads, where the file is of no known DiT's size.", interval="[1, inf)"
    )
    weights: str = option("ema", "Which weights of a training checkpoint to take.", choices=WEIGHTS)
    vae: str | None = option(
        None, "Autoencoder of the new pipeline: folder, Hub id, 'embedded'; None: write no pipeline.", path=True
    )


def main(argv: list[str]) -> None:
    """Converts one checkpoint.

    Raises:
        InputError: Wrong options or a checkpoint that cannot be converted; nothing has been written.
    """
    config = load_config(ConvertConfig, argv, Path(__file__).resolve().parent)
    if config.checkpoint is None or config.output is None:
        raise InputError("Give both: checkpoint=FILE.pt output=FOLDER, or checkpoint=FOLDER output=FILE.pt.")
    output = Path(config.output)
    if output.exists():
        raise InputError(f"output={output}: exists already; give a new name.")
    if config.checkpoint.endswith(SUFFIX) or Path(config.checkpoint).is_file():
        import_file(config, Path(config.checkpoint), output)
    else:
        export_folder(config, config.checkpoint, output)


def import_file(config: ConvertConfig, path: Path, output: Path) -> None:
    """Writes the folder of a file."""
    if output.suffix == SUFFIX:
        raise InputError(f"checkpoint={path} output={output}: both are {SUFFIX} files; output must be a folder.")
    check_writable("output", output)
    vae = None if config.vae is None else load_vae(config.vae)
    checkpoint = read_original(path, weights=config.weights, num_attention_heads=config.num_attention_heads)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_folder(checkpoint, output, vae=vae, source=path.name)
    what = "transformer/ and scheduler/ (vae=... makes a pipeline)" if vae is None else "a pipeline"
    print(f"Saved {output}, {what}: {describe(checkpoint)}.")
    if constants_of(checkpoint.transformer)[FREQ_SHIFT] != STOCK_CONSTANTS[FREQ_SHIFT]:
        stock = {**constants_of(checkpoint.transformer), FREQ_SHIFT: STOCK_CONSTANTS[FREQ_SHIFT]}
        print(
            "SpeeDDiTPipeline and train_dit_speed.py predict what the original network does. The stock DiTPipeline "
            "computes other timestep frequencies: on noise its predictions differ by "
            f"{prediction_difference(checkpoint.transformer, stock):.2%} (root mean square)."
        )


def export_folder(config: ConvertConfig, name: str, output: Path) -> None:
    """Writes the file of a folder."""
    check_output_file("output", output, SUFFIX)
    for option_name in ("num_attention_heads", "vae"):
        if getattr(config, option_name) is not None:
            raise InputError(f"{option_name}={getattr(config, option_name)}: only for a checkpoint={SUFFIX} file.")
    if config.weights != WEIGHTS[0]:
        raise InputError(f"weights={config.weights}: only for a checkpoint={SUFFIX} file.")
    checkpoint = read_folder(name)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_original(checkpoint, output)
    print(f"Saved {output}: {describe(checkpoint)}.")
    if constants_of(checkpoint.transformer) != ORIGINAL_CONSTANTS:
        print(
            "The model was trained with diffusers' timestep frequencies, and DiT's own code computes others: on noise "
            f"its predictions differ by {prediction_difference(checkpoint.transformer, ORIGINAL_CONSTANTS):.2%} (root "
            "mean square). Converted back, the file gives the same model again."
        )


def describe(checkpoint: DiTCheckpoint) -> str:
    """A transformer in a few words."""
    shape: Any = checkpoint.transformer.config
    heads, channels = shape.num_attention_heads, shape.attention_head_dim
    variance = ", learned variance" if shape.out_channels == 2 * shape.in_channels else ""
    return (
        f"{shape.num_layers} blocks of width {heads * channels} with {heads} heads, patches of {shape.patch_size}, "
        f"latents {shape.in_channels}x{shape.sample_size}x{shape.sample_size}, {shape.num_embeds_ada_norm} classes"
        f"{variance}"
    )


if __name__ == "__main__":
    run_script(main, __doc__, ConvertConfig)
