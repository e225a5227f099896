"""Images that lie on this machine: class folders, parquet files, saved `datasets`."""

import hashlib
import logging
import os
import re
from pathlib import Path

import datasets
import pyarrow as pa
from datasets.table import InMemoryTable

from ..errors import InputError, unknown_name

logger = logging.getLogger(__name__)

SPLIT_NAMES = frozenset(("train", "training", "val", "valid", "validation", "dev", "test", "eval", "evaluation"))
METADATA_FILES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
IMAGE_SUFFIXES = frozenset(
    (".avif", ".bmp", ".gif", ".jp2", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
)
SUPPORTED = "one sub-folder of images per class, or *.parquet files"


def load_local(path: Path, *, split: str, with_classes: bool, cache_dir: str | None) -> datasets.Dataset:
    """Opens a folder of images, a folder of parquet files, one parquet file or a `save_to_disk` folder.

    Args:
        path: The folder or file.
        split: Used where file or folder names carry one ("train-00000-of-00004.parquet", "train/cat/1.png"); files
            without one belong to "train".
        with_classes: False: a flat folder of images will do.
        cache_dir: Where `datasets` keeps its Arrow copy of parquet files; None for its default.

    Raises:
        InputError: If there is nothing at `path`, nothing usable in it, or not the split.
    """
    if not path.exists():
        raise InputError(f"No such file or folder: '{path}'.")
    if path.is_file():
        if path.suffix != ".parquet":
            raise InputError(f"'{path}' is a file but not *.parquet. Give one, or a folder with {SUPPORTED}.")
        return _load_packaged("parquet", [path], path, cache_dir)
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return _load_saved(path, split)
    if files := _parquet_files(path, split):
        return _load_packaged("parquet", files, path, cache_dir)
    root = _split_folder(path, split)
    if any((root / name).is_file() for name in METADATA_FILES):
        return _load_packaged("imagefolder", [root / "**"], path, cache_dir)
    return _load_image_folder(root, with_classes)


def _load_saved(path: Path, split: str) -> datasets.Dataset:
    saved = datasets.load_from_disk(str(path))
    if isinstance(saved, datasets.DatasetDict):
        if split not in saved:
            raise unknown_name("split", split, saved)
        return saved[split]
    return saved


def _load_packaged(builder: str, files: list[Path], path: Path, cache_dir: str | None) -> datasets.Dataset:
    """`load_dataset` on files of our choice: by itself it guesses splits from any word in a path ("test_1.png")."""
    names = {"train": [str(file) for file in files]}
    counts = datasets.config.HF_UPDATE_DOWNLOAD_COUNTS
    # Files on this disk are nobody's download: without this, `datasets` reports them over the network.
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    try:
        return datasets.load_dataset(builder, data_files=names, split="train", cache_dir=cache_dir)
    except (datasets.exceptions.DatasetGenerationError, ValueError) as error:
        reason = " ".join(str(error.__cause__ or error).split())
        if datasets.__version__ < "5":
            reason += f" (datasets {datasets.__version__}; from 5.0 on it reads more metadata files)"
        raise InputError(f"Cannot read the {builder} data in '{path}': {reason}") from error
    except OSError as error:
        where = cache_dir or datasets.config.HF_DATASETS_CACHE
        raise InputError(f"Cannot cache '{path}' in '{where}' (cache_dir, or HF_DATASETS_CACHE): {error}") from error
    finally:
        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = counts


def _parquet_files(folder: Path, split: str) -> list[Path]:
    """Parquet files of `split` in `folder`, `folder/data` or `folder/SPLIT`; empty if there is no parquet at all."""
    by_split: dict[str, list[Path]] = {}
    for file in sorted([*folder.glob("*.parquet"), *folder.glob("data/*.parquet")]):
        if file.name not in METADATA_FILES:
            by_split.setdefault(_split_of(file.stem, split), []).append(file)
    for name in SPLIT_NAMES | {split}:
        if files := sorted((folder / name).glob("*.parquet")):
            by_split.setdefault(name, []).extend(file for file in files if file.name not in METADATA_FILES)
    if by_split and split not in by_split:
        raise unknown_name("split", split, by_split)
    return by_split.get(split, [])


def _split_of(stem: str, split: str) -> str:
    match = re.match(r"(.+?)-\d+-of-\d+|([a-z]+)(?![a-z])", stem)
    name = (match[1] or match[2]) if match else ""
    return name if name in SPLIT_NAMES | {split} else "train"


def _subfolders(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith((".", "__")))


def _split_folder(folder: Path, split: str) -> Path:
    """`folder/SPLIT` where the sub-folders of `folder` are splits rather than classes, else `folder`."""
    names = {entry.name for entry in _subfolders(folder)}
    if split in names and _subfolders(folder / split):
        return folder / split
    if names and names <= SPLIT_NAMES:
        if split not in names:
            raise unknown_name("split", split, names)
        return folder / split
    return folder


def _load_image_folder(root: Path, with_classes: bool) -> datasets.Dataset:
    """One row per image, classes in the order of their folders' names (torchvision's numbering)."""
    # Not `load_dataset("imagefolder")`: it takes the innermost folder for the class, drops images whose path has a
    # word like "test" in it, and is 40 times slower to open.
    folders = _subfolders(root)
    loose = _images_in(root, recursive=False)
    if not with_classes:
        files = [(file, 0) for file in _images_in(root, recursive=True)]
        names = ["all"]
    elif not folders and loose:
        raise InputError(f"'{root}' has images but no class sub-folders; label_column=None trains without classes.")
    else:
        files = [(file, label) for label, folder in enumerate(folders) for file in _images_in(folder, recursive=True)]
        names = [folder.name for folder in folders]
        if loose:
            logger.warning("Ignoring %d images beside the class folders in '%s'.", len(loose), root)
    if not files:
        raise InputError(f"No images in '{root}'. It should have {SUPPORTED}.")
    if empty := sorted(set(range(len(names))) - {label for _, label in files}):
        raise InputError(f"Every sub-folder is a class, but '{folders[empty[0]]}' has no images: remove it.")
    return _as_dataset(root, files, names)


def _images_in(folder: Path, *, recursive: bool) -> list[str]:
    found: list[str] = []
    for place, inner, files in os.walk(folder):
        inner[:] = sorted(name for name in inner if recursive and not name.startswith("."))
        suffixed = (name for name in sorted(files) if not name.startswith("."))
        found += [f"{place}/{name}" for name in suffixed if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES]
    return found


def _as_dataset(root: Path, files: list[tuple[str, int]], names: list[str]) -> datasets.Dataset:
    # Size and time are in the fingerprint, so that latents of an image that was replaced are not taken from the cache.
    key = hashlib.sha256(repr(names).encode())
    for file, label in files:
        status = os.stat(file)
        key.update(f"{os.path.relpath(file, root)} {label} {status.st_size} {status.st_mtime_ns}\n".encode())
    paths = pa.array([os.path.abspath(file) for file, _ in files])
    images = pa.StructArray.from_arrays([pa.nulls(len(paths), pa.binary()), paths], ["bytes", "path"])
    labels = pa.array([label for _, label in files], pa.int64())
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=names))
    return datasets.Dataset(
        InMemoryTable(pa.table({"image": images, "label": labels})),
        info=datasets.DatasetInfo(features=features),
        fingerprint=key.hexdigest()[:32],
    )
