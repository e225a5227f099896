"""Writes the emoji of Google's Noto as two parquet files of 32x32 images on white: a small colour set of another kind.

    npm install emoji-datasource-google@16.0.0
    python train_scripts/assets/make_emoji_dataset.py package_dir=node_modules/emoji-datasource-google output_dir=emoji

Classes are Unicode's eight groups. Of each group a fixed seventh is held out. Variants of skin tone and emoji that
newer ones replaced are left out. The images are under the Apache License 2.0 (Noto Emoji, Google), the flags among
them in the public domain or exempt from copyright; the package's data is under the MIT licence.
"""

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import Image
from tqdm import tqdm

from speed_diffusers.config.command_line import run_script
from speed_diffusers.config.load import load_config
from speed_diffusers.config.schema import Options, option
from speed_diffusers.errors import InputError
from speed_diffusers.files import check_writable

NO_CLASS = "Component"
"""A group of five parts of emoji, such as tones of skin and hair, which are no pictures of their own."""

SIDE_IN_PACKAGE = 64


@dataclass
class EmojiSettings(Options):
    """All settings of this script."""

    package_dir: str = option("node_modules/emoji-datasource-google", "The npm package, unpacked.", path=True)
    output_dir: str = option("emoji", "Folder for train.parquet and test.parquet.", path=True)
    resolution: int = option(32, "Side of the images in pixels.", interval="[8, 64]")
    held_out: float = option(1 / 7, "Share of each class that is held out.", interval="(0, 1)")
    seed: int = option(0, "Chooses what is held out, and the order.", interval="[0, 2^63)")


def read_emoji(package: Path) -> list[dict[str, Any]]:
    """The emoji that are in the set, in Unicode's order.

    Raises:
        InputError: The folder is not that of the package.
    """
    path = package / "emoji.json"
    if not path.is_file():
        raise InputError(f"package_dir={package}: no emoji.json; run: npm install emoji-datasource-google@16.0.0")
    every: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    kept = [each for each in every if each["has_img_google"] and "obsoleted_by" not in each]
    return sorted((each for each in kept if each["category"] != NO_CLASS), key=lambda each: int(each["sort_order"]))


def on_white(path: Path, resolution: int) -> bytes:
    """PNG bytes of an emoji on white, RGB."""
    with Image.open(path) as image:
        pixels = image.convert("RGBA")
        sheet = Image.new("RGBA", pixels.size, "white")
        small = Image.alpha_composite(sheet, pixels).convert("RGB")
    buffer = io.BytesIO()
    small.resize((resolution, resolution), Image.Resampling.LANCZOS).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def split(labels: np.ndarray, held_out: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the training part and of the held-out part, each in a random order; a share of every class."""
    random = np.random.default_rng(seed)
    test = [
        random.permutation(np.flatnonzero(labels == label))[: round(held_out * int((labels == label).sum()))]
        for label in np.unique(labels)
    ]
    chosen = random.permutation(np.concatenate(test))
    return random.permutation(np.setdiff1d(np.arange(len(labels)), chosen)), chosen


def main(argv: list[str]) -> None:
    """Reads, puts on white, splits and writes."""
    config = load_config(EmojiSettings, argv, Path(__file__).parent)
    package, output_dir = Path(config.package_dir), Path(config.output_dir)
    emoji = read_emoji(package)
    check_writable("output_dir", output_dir)
    names = sorted({each["category"] for each in emoji})
    labels = np.array([names.index(each["category"]) for each in emoji])
    folder = package / "img" / "google" / str(SIDE_IN_PACKAGE)
    images = [on_white(folder / each["image"], config.resolution) for each in tqdm(emoji, unit="image")]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    output_dir.mkdir(parents=True, exist_ok=True)
    for name, rows in zip(("train", "test"), split(labels, config.held_out, config.seed), strict=True):
        columns = {
            "image": [{"bytes": images[row], "path": None} for row in rows],
            "label": labels[rows].tolist(),
        }
        path = output_dir / f"{name}.parquet"
        datasets.Dataset.from_dict(columns, features=features).to_parquet(path, batch_size=len(rows))
        print(f"{len(rows)} images, {path.stat().st_size / 2**20:.2f} MiB: {path}")


if __name__ == "__main__":
    run_script(main, __doc__, EmojiSettings)
