"""Writes Fashion-MNIST images as the parquet file that ships with the package, or as a full split to train assets on.

    python train_scripts/assets/make_embedded_dataset.py
    python train_scripts/assets/make_embedded_dataset.py split=test per_class=50
    python train_scripts/assets/make_embedded_dataset.py split=train per_class=0 output=fashion_mnist_train.parquet
    python train_scripts/assets/make_embedded_dataset.py split=test per_class=0 output=fashion_mnist_test.parquet

The first two commands make the embedded set (9,000 images, and 500 held-out ones for validation, seconds). The source
is the four IDX files of Fashion-MNIST (MIT), for example from the Debian package dataset-fashion-mnist.
"""

import gzip
import io
import struct
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
from PIL import Image
from tqdm import tqdm

from speed_diffusers.assets import EMBEDDED_HELD_OUT_IMAGES, EMBEDDED_IMAGES
from speed_diffusers.config.command_line import run_script
from speed_diffusers.config.load import load_config
from speed_diffusers.config.schema import Options, option
from speed_diffusers.errors import InputError
from speed_diffusers.files import check_output_file

LABEL_NAMES = [
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
]
IDX_PREFIXES = {"train": "train", "test": "t10k"}
EMBEDDED_FILES = {"train": EMBEDDED_IMAGES, "test": EMBEDDED_HELD_OUT_IMAGES}
PADDING = 2  # 28x28 becomes 32x32, which a VAE can halve twice and a DiT cut into patches


@dataclass
class EmbeddedDatasetSettings(Options):
    """All settings of this script."""

    idx_dir: str = option("/usr/share/datasets/fashion-mnist", "Folder of the four .gz IDX files.", path=True)
    split: str = option("train", "60,000 or 10,000 images.", choices=tuple(IDX_PREFIXES))
    per_class: int = option(
        900, "Images per class, chosen by the seed; 0 takes all, in their order.", interval="[0, inf)"
    )
    seed: int = option(0, "Chooses the images and their order.", interval="[0, 2^63)")
    output: str | None = option(None, "The parquet file to write; None: the embedded one of the split.", path=True)


def read_idx(path: Path) -> np.ndarray:
    """A uint8 array from a gzipped IDX file (big-endian: two zero bytes, type, rank, the dimensions, the values)."""
    if not path.is_file():
        raise InputError(f"No file '{path}'. idx_dir must hold the four .gz files of Fashion-MNIST.")
    data = gzip.decompress(path.read_bytes())
    zeros, dtype, rank = struct.unpack(">HBB", data[:4])
    if zeros != 0 or dtype != 8:
        raise InputError(f"'{path}' is not an IDX file of unsigned bytes.")
    shape = struct.unpack(f">{rank}I", data[4 : 4 + 4 * rank])
    return np.frombuffer(data, dtype=np.uint8, offset=4 + 4 * rank).reshape(shape)


def choose(labels: np.ndarray, per_class: int, seed: int) -> np.ndarray:
    """Indices (N,) of `per_class` images of each class in a random order; all images in their order if it is 0."""
    if per_class == 0:
        return np.arange(len(labels))
    smallest = int(np.bincount(labels).min())
    if not 0 < per_class <= smallest:
        raise InputError(f"per_class={per_class}, but the smallest class has {smallest} images (0 takes all).")
    random = np.random.default_rng(seed)
    chosen = [random.choice(np.flatnonzero(labels == label), per_class, replace=False) for label in np.unique(labels)]
    return random.permutation(np.concatenate(chosen))


def encode_png(image: np.ndarray) -> bytes:
    """Optimised PNG bytes of a grey image (H, W) uint8 after zero padding."""
    buffer = io.BytesIO()
    Image.fromarray(np.pad(image, PADDING)).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def main(argv: list[str]) -> None:
    """Reads, chooses, encodes and writes."""
    config = load_config(EmbeddedDatasetSettings, argv, Path(__file__).parent)
    output = check_output_file("output", config.output or EMBEDDED_FILES[config.split], ".parquet")
    stem = Path(config.idx_dir) / IDX_PREFIXES[config.split]
    images = read_idx(Path(f"{stem}-images-idx3-ubyte.gz"))
    labels = read_idx(Path(f"{stem}-labels-idx1-ubyte.gz"))
    indices = choose(labels, config.per_class, config.seed)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=LABEL_NAMES)})
    columns = {
        "image": [{"bytes": encode_png(images[i]), "path": None} for i in tqdm(indices, desc="encode", unit="image")],
        "label": labels[indices].tolist(),
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    # one row group: the images are small, and the footer of each further group would cost more than it gives
    datasets.Dataset.from_dict(columns, features=features).to_parquet(output, batch_size=len(indices))
    print(f"{len(indices)} images, {output.stat().st_size / 2**20:.2f} MiB: {output}")


if __name__ == "__main__":
    run_script(main, __doc__, EmbeddedDatasetSettings)
