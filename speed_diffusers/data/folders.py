"""Folders of images: which folder is a split, which a class, and which rows a metadata file makes of them."""

import hashlib
import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
import pyarrow as pa
from datasets.table import InMemoryTable

from ..errors import InputError
from .metadata import image_name_column, read_metadata
from .scan import METADATA_FILES, Folder, Scan, check_names, count_others, number, shown
from .splits import (
    SPLIT_OF_WORD,
    TRAIN,
    Few,
    LocalSplit,
    choose,
    is_split_name,
    other_splits,
    own_split,
    split_in_name,
    splits_of_folders,
)

logger = logging.getLogger(__name__)

SUPPORTED = "one sub-folder of images per class, or *.parquet files"
FOLDER_LABEL = "label"
"""The label column that class folders give."""


class _Place(NamedTuple):
    """A folder with images, and the names on the way to it that are no splits, of which the first is the class."""

    folder: Folder
    inside: tuple[str, ...]


def load_images(path: Path, found: Scan, label_column: str | None, few: Few | None, split: str) -> LocalSplit:
    """One row per image, classes in the order of their folders' names (torchvision's numbering).

    With `few` the other images of class folders are not even looked up on the disk, only their names are known.

    Not `load_dataset("imagefolder")`: it takes the innermost folder for the class, drops images whose path has a word
    like "test" in it, and is 40 times slower to open.
    """
    tops = _splits_of_tops(found, split, with_classes=label_column is not None)
    by_split: dict[str | None, list[_Place]] = {}
    for folder in found.folders:
        if folder.images:
            name, inside = _split_and_rest(folder, tops)
            by_split.setdefault(name, []).append(_Place(folder, inside))
    if not by_split:
        others = count_others(found.folders)
        raise InputError(
            f"No images in '{shown(path)}'. It should have {SUPPORTED}." + f" Other files: {others}." * bool(others)
        )
    if set(by_split) == {None} and (own := own_split(path)):
        choose(split, [own], path)
        chosen = None
    else:
        chosen = choose(split, list(by_split), path)
    counts = {name: sum(len(place.folder.images) for place in places) for name, places in by_split.items()}
    ignored = other_splits(counts, chosen, "image")
    chosen_tops = [top for top, name in tops.items() if name is not None and name == chosen]
    root = path / chosen_tops[0] if len(chosen_tops) == 1 else path
    classes = _class_names(found, by_split[chosen], tops, chosen)
    dataset = _metadata_rows(path, root, found, by_split, chosen, label_column, ignored, has_classes=bool(classes))
    all_labels = None
    if dataset is None and label_column is None:
        places, classes = [(place.folder, 0) for place in by_split[chosen]], ["all"]
        dataset, all_labels = _labelled_rows(path, root, places, classes, few)
    elif dataset is None:
        places = _class_folders(root, found, by_split[chosen], classes, ignored)
        dataset, all_labels = _labelled_rows(path, root, places, classes, few)
    return LocalSplit(dataset, (*ignored, *found.ignored()), all_labels)


def _splits_of_tops(found: Scan, split: str, *, with_classes: bool) -> dict[str, str | None]:
    """The folders right below the data's, and the split that each is; None for the others."""
    with_images = {folder.parts[0]: None for folder in found.folders if folder.images and folder.parts}
    with_folders = {folder.parts[0] for folder in found.folders if len(folder.parts) > 1}
    tops = {folder.parts[0]: None for folder in found.folders if folder.parts}
    splits = {name: split_in_name(name) if is_split_name(name) else None for name in tops if name not in with_images}
    splits |= splits_of_folders(with_images)
    if split in with_images and split.lower() not in SPLIT_OF_WORD and (split in with_folders or not with_classes):
        splits[split] = split  # any name will do that is asked for
    return {name: splits[name] for name in tops}


def _split_and_rest(folder: Folder, tops: Mapping[str, str | None]) -> tuple[str | None, tuple[str, ...]]:
    """The split of a folder, and the names on the way to it without that split."""
    top = tops[folder.parts[0]] if folder.parts else None
    inside = folder.parts[1:] if top is not None else folder.parts
    inner = split_in_name(*(name for name in inside[1:] if is_split_name(name)))
    return (top if inner is None or (inner == TRAIN and top is not None) else inner), inside


def _class_names(
    found: Scan, places: Iterable[_Place], tops: Mapping[str, str | None], chosen: str | None
) -> list[str]:
    """Names of the class folders of a split, those without images too, so that each keeps its id."""
    if chosen in tops.values() and chosen is not None:
        names = {
            folder.parts[1] for folder in found.folders if len(folder.parts) > 1 and tops[folder.parts[0]] == chosen
        }
        return sorted(names | {place.inside[0] for place in places if place.inside})
    return sorted(name for name, split in tops.items() if split is None)


def _class_folders(
    root: Path, found: Scan, places: list[_Place], classes: list[str], ignored: list[str]
) -> list[tuple[Folder, int]]:
    """The folders of images with their class ids, in the order of these."""
    with_images = {place.inside[0] for place in places if place.inside}
    loose = sum(len(place.folder.images) for place in places if not place.inside)
    if not with_images:
        raise InputError(
            f"'{shown(root)}' has images but no class sub-folders; label_column=None trains without classes."
        )
    if loose:
        ignored.append(f"beside the class folders: {number(loose, 'image')}")
    for name in (name for name in classes if name not in with_images):
        inside = [folder for folder in found.folders if name in folder.parts[:2]]
        others = count_others(inside)
        if others and not any(folder.images for folder in inside):
            raise InputError(
                f"Every sub-folder of '{shown(root)}' is a class, but '{shown(name)}' has no images, only other "
                f"files: {others}. Convert them, or put the folder elsewhere if it is no class."
            )
    if len(with_images) == 1 and not any(len(place.inside) == 1 for place in places):
        (only,) = with_images
        logger.warning("There is one class, '%s'. Are those in its sub-folders meant? Give '%s'.", only, root / only)
    ids = {name: label for label, name in enumerate(classes)}
    # By class, as folders of the same split may each have all of them.
    return sorted(((place.folder, ids[place.inside[0]]) for place in places if place.inside), key=lambda row: row[1])


def _labelled_rows(
    path: Path, root: Path, places: list[tuple[Folder, int]], names: list[str], few: Few | None
) -> tuple[datasets.Dataset, datasets.Dataset | None]:
    """The images of folders, each with a label; or a few of them, and the label column of all."""
    counts = np.array([len(folder.images) for folder, _ in places])
    rows = few(int(counts.sum())) if few is not None else None
    if rows is None:
        files = [(file, label) for folder, label in places for file in _files(path, folder)]
        return _with_label(root, files, names), None
    firsts = np.cumsum(counts) - counts
    numbers = np.searchsorted(firsts, rows, side="right") - 1
    chosen = [
        (os.path.join(path, *places[number][0].parts, places[number][0].images[row]), places[number][1])
        for number, row in zip(numbers.tolist(), (rows - firsts[numbers]).tolist(), strict=True)
    ]
    labels = pa.table({FOLDER_LABEL: np.repeat(np.array([label for _, label in places]), counts)})
    info = datasets.DatasetInfo(features=datasets.Features({FOLDER_LABEL: datasets.ClassLabel(names=names)}))
    return _with_label(root, chosen, names), datasets.Dataset(InMemoryTable(labels), info=info)


def _metadata_rows(
    path: Path,
    root: Path,
    found: Scan,
    by_split: Mapping[str | None, list[_Place]],
    chosen: str | None,
    label_column: str | None,
    ignored: list[str],
    *,
    has_classes: bool,
) -> datasets.Dataset | None:
    """The rows of the metadata file in `root`, or of the one in `path`; None where none is about these images."""
    places = [place / name for place in dict.fromkeys((root, path)) for name in METADATA_FILES]
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        return None
    # It is no file that is passed over in silence: it is read, or named below.
    for folder in found.folders:
        if folder.parts == file.parent.relative_to(path).parts:
            del folder.others[file.name]
    table = read_metadata(file)
    key = image_name_column(table.column_names)
    missing = "file_name" if key is None else label_column if label_column not in table.column_names else None
    if missing is not None and (key is None or label_column == FOLDER_LABEL) and (has_classes or label_column is None):
        ignored.append(f"{file.name}: it has no column '{missing}'")
        return None
    if key is None:
        raise InputError(f"'{shown(file)}' has no column 'file_name'; columns: {', '.join(table.column_names)}.")
    split_of = {
        image: name for name, places in by_split.items() for place in places for image in _files(path, place.folder)
    }
    images = [_image_of_row(file, name) for name in table[key].to_pylist()]
    if absent := [image for image in images if image not in split_of and not os.path.isfile(image)]:
        raise InputError(
            f"'{shown(file)}' names {number(len(absent), 'file')} that {'is' if len(absent) == 1 else 'are'} not "
            f"there, the first is '{shown(absent[0])}'."
        )
    rows = [row for row, image in enumerate(images) if split_of.get(image, chosen) == chosen]
    images = [images[row] for row in rows]
    if unnamed := sum(name == chosen for name in split_of.values()) - len(split_of.keys() & set(images)):
        ignored.append(f"not named in {file.name}: {number(unnamed, 'image')}")
    image_column = key[: -len("_file_name")] or "image"
    others = table.take(pa.array(rows, pa.int64())).drop_columns([key, *({image_column} & set(table.column_names))])
    features = datasets.Features.from_arrow_schema(others.schema)
    return _as_dataset(root, [(image, 0) for image in images], others, features, [], image_column)


def _image_of_row(file: Path, name: object) -> str:
    """The path of an image that a metadata file names; below its own folder, for the file may be somebody else's."""
    text = os.path.normpath("" if name is None else str(name))
    if os.path.isabs(text) or text.split(os.sep)[0] == ".." or text == ".":
        raise InputError(f"'{shown(file)}' names '{name}': file names are relative, and below the folder of the file.")
    return os.path.join(file.parent, text)


def _files(path: Path, folder: Folder) -> list[str]:
    place = os.path.join(path, *folder.parts)
    return [os.path.join(place, name) for name in folder.images]


def _as_dataset(
    root: Path,
    files: list[tuple[str, int]],
    columns: pa.Table,
    features: Mapping[str, object],
    names: list[str],
    image_column: str = "image",
) -> datasets.Dataset:
    """Images by path, with a label each for the fingerprint, and their other columns."""
    # Most lie below `root`, and then need no relpath of their own, which takes longer than all the rest.
    start, place = f"{root}{os.sep}", os.path.abspath(root)
    inside = [file[len(start) :] if file.startswith(start) else os.path.relpath(file, root) for file, _ in files]
    paths = [os.path.abspath(name) if ".." in name else name for name in (f"{place}{os.sep}{each}" for each in inside)]
    check_names(paths)
    check_names(names)
    # Size and time are in the fingerprint, so that latents of an image that was replaced are not taken from the cache.
    key = hashlib.sha256(repr(names).encode())
    for (file, label), name in zip(files, inside, strict=True):
        status = os.stat(file)
        key.update(f"{name} {label} {status.st_size} {status.st_mtime_ns}\n".encode())
    images = pa.StructArray.from_arrays(
        [pa.nulls(len(paths), pa.binary()), pa.array(paths, pa.string())], ["bytes", "path"]
    )
    return datasets.Dataset(
        InMemoryTable(columns.add_column(0, image_column, images)),
        info=datasets.DatasetInfo(features=datasets.Features({image_column: datasets.Image(), **features})),
        fingerprint=key.hexdigest()[:32],
    )


def _with_label(root: Path, files: list[tuple[str, int]], names: list[str]) -> datasets.Dataset:
    labels = pa.array([label for _, label in files], pa.int64())
    return _as_dataset(
        root, files, pa.table({FOLDER_LABEL: labels}), {FOLDER_LABEL: datasets.ClassLabel(names=names)}, names
    )
