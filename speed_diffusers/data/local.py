"""Images that lie on this machine: class folders, parquet files, saved `datasets`."""

import glob
import hashlib
import os
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from itertools import islice
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.table import InMemoryTable

from ..assets import EMBEDDED_IMAGES
from ..errors import InputError
from ..files import file_sha256
from .folders import SUPPORTED, load_images
from .scan import Folder, Scan, check_names, number, scan, shown
from .shards import ArrowShards, ParquetShards, Shards
from .splits import (
    HELD_OUT,
    SPLIT_OF_WORD,
    TRAIN,
    Few,
    LocalSplit,
    UnknownSplit,
    choose,
    is_whole,
    other_splits,
    own_split,
    read_split,
    split_in_name,
)

FIRST_ENTRIES = 100
"""Of a sub-folder so many are looked at for parquet files."""


def load_local(
    path: Path, *, split: str | None, label_column: str | None, cache_dir: str | None, few: Few | None = None
) -> LocalSplit:
    """Opens a folder of images, a folder of parquet files, one parquet file or a `save_to_disk` folder.

    Args:
        path: The folder or file.
        split: Which split, by the names of files and folders (see `splits`), with slices as in `datasets`. None, for
            images to measure on: what is called validation, else test, else all that there is.
        label_column: The column with the classes; None: a flat folder of images will do.
        cache_dir: Where `datasets` keeps its Arrow copy of parquet files; None for its default.
        few: Of folders of images, which rows of a whole split to open by themselves; `all_labels` is set then.

    Raises:
        UnknownSplit: If the data does not have the split.
        InputError: If there is nothing at `path`, nothing usable in it, or something that cannot be read.
    """
    open_split = _opener(path, label_column, cache_dir, few if is_whole(split) else None)
    if split is None:
        for name in HELD_OUT:
            with suppress(UnknownSplit):
                return open_split(name)
        split = TRAIN
    return read_split(split, open_split)


def _opener(
    path: Path, label_column: str | None, cache_dir: str | None, few: Few | None
) -> Callable[[str], LocalSplit]:
    """What loads the whole of a split at `path`, by the split's name."""
    if not path.exists():
        raise InputError(f"No such file or folder: '{shown(path)}'.")
    if path.is_file():
        if path.suffix.lower() != ".parquet":
            raise InputError(f"'{shown(path)}' is a file but not *.parquet. Give one, or a folder with {SUPPORTED}.")
        return partial(_load_parquet, path, Scan([Folder((), parquet=[path.name])]), cache_dir)
    if is_saved(path):
        return partial(_load_saved, path)
    found = scan(path)
    if any(folder.parquet for folder in found.folders):
        return partial(_load_parquet, path, found, cache_dir)
    return partial(load_images, path, found, label_column, few)


def open_shards(path: Path, split: str | None) -> tuple[Shards, tuple[str, ...]]:
    """What can be streamed of a folder or file, see `load_local`, and what lies beside it.

    Args:
        path: A folder of parquet files, one parquet file, or a folder written by `Dataset.save_to_disk`.
        split: Which split, whole; None as for `load_local`.

    Raises:
        UnknownSplit: If the data does not have the split.
        InputError: If there is nothing at `path`, or something that cannot be streamed.
    """
    if split is None:
        for name in HELD_OUT:
            with suppress(UnknownSplit):
                return open_shards(path, name)
        split = TRAIN
    if is_saved(path):
        saved = _load_saved(path, split)
        return ArrowShards(saved.dataset), saved.ignored
    if path.is_file() and path.suffix.lower() == ".parquet":
        found = Scan([Folder((), parquet=[path.name])])
    elif not path.is_dir():
        raise InputError(f"No such folder or parquet file: '{shown(path)}'.")
    else:
        found = scan(path)
        if not any(folder.parquet for folder in found.folders):
            raise InputError(
                f"'{shown(path)}' has no parquet files. Folders of images are read in place, without a copy: "
                "leave streaming out."
            )
    files, ignored = _parquet_files(path, found, split)
    check_names([str(file) for file in files])
    return ParquetShards([str(file) for file in files]), ignored


def parquet_shards(path: Path, split: str | None) -> tuple[ParquetShards | None, tuple[str, ...]]:
    """The parquet files of a whole split, read as they lie, and what lies beside them; None where there are no such.

    Args:
        path: As for `load_local`, whose messages for what is wrong are left to it.
        split: As there.
    """
    if split is None or not is_whole(split) or not path.exists() or is_saved(path) or not can_be_streamed(path):
        return None, ()
    shards, ignored = open_shards(path, split)
    return (shards if isinstance(shards, ParquetShards) else None), ignored


def can_be_streamed(path: Path) -> bool:
    """Whether a folder or file looks as if `open_shards` took it; a million images in it are not looked through."""
    if not path.is_dir():
        return path.suffix.lower() == ".parquet"
    with os.scandir(path) as listing:
        entries = list(listing)
    places = [entry.path for entry in entries if entry.is_dir()]
    return is_saved(path) or _names_parquet(entries) or any(map(_begins_with_parquet, places))


def _begins_with_parquet(folder: str) -> bool:
    with os.scandir(folder) as listing:
        return _names_parquet(islice(listing, FIRST_ENTRIES))


def _names_parquet(entries: Iterable["os.DirEntry[str]"]) -> bool:
    return any(entry.name.lower().endswith(".parquet") for entry in entries)


def is_saved(path: Path) -> bool:
    """Whether `datasets` has saved a set, or several splits, in a folder."""
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def _load_saved(path: Path, split: str) -> LocalSplit:
    saved = datasets.load_from_disk(str(path))
    if isinstance(saved, datasets.DatasetDict):
        chosen = choose(split, list(saved), path)
        assert chosen is not None
        others = [f"split '{name}': {number(len(rows), 'row')}" for name, rows in saved.items() if name != chosen]
        return LocalSplit(saved[chosen], tuple(others))
    choose(split, [own_split(path) or (split_in_name(str(saved.split)) if saved.split else None)], path)
    return LocalSplit(saved, ())


def _load_parquet(path: Path, found: Scan, cache_dir: str | None, split: str) -> LocalSplit:
    files, ignored = _parquet_files(path, found, split)
    return LocalSplit(_read_parquet(files, path, cache_dir), ignored)


def _parquet_files(path: Path, found: Scan, split: str) -> tuple[list[Path], tuple[str, ...]]:
    """The files of a split, in the order of their names, and what lies beside them."""
    by_split: dict[str | None, list[Path]] = {}
    root = path if path.is_dir() else path.parent
    for folder in found.folders:
        for name in folder.parquet:
            by_split.setdefault(_split_of_parquet(folder.parts, name, split), []).append(
                root.joinpath(*folder.parts, name)
            )
    if set(by_split) == {None}:
        by_split = {own_split(path) if path.is_dir() else None: by_split[None]}
    chosen = choose(split, by_split, path)
    ignored = other_splits({name: len(files) for name, files in by_split.items()}, chosen, "parquet file")
    if images := sum(len(folder.images) for folder in found.folders):
        ignored.append(f"beside parquet files: {number(images, 'image')}")
    return sorted(by_split[chosen]), (*ignored, *found.ignored())


def _split_of_parquet(folders: Sequence[str], name: str, split: str) -> str | None:
    """The split of a parquet file; `split` itself may be any name, as in "fold1-00000-of-00002"."""
    stem = re.sub(r"-\d+-of-\d+$", "", os.path.splitext(name)[0])
    said = split_in_name(*folders, stem)
    is_asked_for = split in (stem, *folders) or re.match(rf"{re.escape(split)}(?![a-z])", stem)
    if split.lower() not in SPLIT_OF_WORD and (split == stem or (is_asked_for and said is None)):
        return split
    return said


def _read_into_memory(files: list[Path]) -> datasets.Dataset:
    """The small set of the package, for which nothing is written: its latents may lie on a read-only disk."""
    features = datasets.Features.from_arrow_schema(pq.read_schema(files[0]))
    return datasets.Dataset(
        InMemoryTable(pa.concat_tables(pq.read_table(file) for file in files)),
        info=datasets.DatasetInfo(features=features),
        fingerprint=hashlib.sha256("".join(map(file_sha256, files)).encode()).hexdigest()[:32],
    )


def _read_parquet(files: list[Path], path: Path, cache_dir: str | None) -> datasets.Dataset:
    """`load_dataset` on files of our choice: by itself it guesses splits from any word in a path ("test_1.png")."""
    if path == EMBEDDED_IMAGES.parent:
        return _read_into_memory(files)
    check_names([str(file) for file in files])
    if "::" in str(path):
        raise InputError(f"'{path}': datasets reads '::' in a path as an archive; rename the folder.")
    # It reads names as patterns: "b[12]" would open "b1".
    names = {"train": [glob.escape(str(file)) for file in files]}
    counts = datasets.config.HF_UPDATE_DOWNLOAD_COUNTS
    # Files on this disk are nobody's download: without this, `datasets` reports them over the network.
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    try:
        return datasets.load_dataset("parquet", data_files=names, split="train", cache_dir=cache_dir)
    except (datasets.exceptions.DatasetGenerationError, ValueError) as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise InputError(f"Cannot read the parquet data in '{path}': {reason}") from error
    except OSError as error:
        where = cache_dir or datasets.config.HF_DATASETS_CACHE
        raise InputError(f"Cannot cache '{path}' in '{where}' (cache_dir, or HF_DATASETS_CACHE): {error}") from error
    finally:
        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = counts
