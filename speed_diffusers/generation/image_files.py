"""Generated images on the disk: one PNG for each, written whole, checked, and packed into parquet or npz."""

import csv
import dataclasses
import io
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from tqdm.auto import tqdm

from ..errors import InputError
from ..files import file_sha256, remove, remove_unfinished, written_whole
from .image_set import MANIFEST, ImageSet, Manifest

Pixels = npt.NDArray[np.uint8]

METADATA_FILE = "metadata.csv"
"""What `datasets` reads the columns of an image folder from."""
NPZ_FILE = "images.npz"
IMAGES_PER_PARQUET = 10_000
IMAGES_PER_ROW_GROUP = 500
ENCODERS = 4
PNG_NAME = re.compile(r"\d{7}\.png")
PARQUET_NAME = re.compile(r"images-\d{5}-of-\d{5}\.parquet")


def png_name(number: int) -> str:
    """Name of an image's file; names and numbers have one order."""
    return f"{number:07d}.png"


def to_bytes(images: npt.NDArray[np.float32]) -> Pixels:
    """Images in [0, 1], rounded to bytes as diffusers' pipelines round theirs."""
    return (images * 255).round().astype(np.uint8)


def is_whole(path: Path, resolution: int) -> bool:
    """Whether a file is an RGB PNG of this resolution, all of whose parts fit their check sums."""
    try:
        with Image.open(path) as image:
            fits = (image.format, image.mode, image.size) == ("PNG", "RGB", (resolution, resolution))
            image.verify()
    except Exception:  # whatever Pillow makes of a damaged file
        return False
    return fits


def read_pixels(path: Path) -> Pixels:
    """An image (H, W, 3).

    Raises:
        InputError: It is missing or damaged.
    """
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except Exception as error:  # whatever Pillow makes of a damaged file
        raise InputError(f"{path} is missing or damaged ({error}); generate_samples.py makes it anew.") from error


class PngWriter:
    """Writes images as PNG while the next ones are generated; at most one batch is waited for.

    Used as a context manager: leaving it waits until all images are on the disk.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._pool = ThreadPoolExecutor(ENCODERS)
        self._pending: list[Future[None]] = []

    def write(self, images: Sequence[tuple[int, Pixels]]) -> None:
        """Begins to write images by number, after those of the last call are written.

        Raises:
            OSError: The disk is full, read-only or broken.
        """
        self.wait()
        self._pending = [self._pool.submit(_write_png, self.folder, number, pixels) for number, pixels in images]

    def wait(self) -> None:
        """Waits for what is being written.

        Raises:
            OSError: The disk is full, read-only or broken.
        """
        for pending in self._pending:
            pending.result()
        self._pending = []

    def __enter__(self) -> "PngWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=error is not None)
        if error is None:
            self.wait()


def _write_png(folder: Path, number: int, pixels: Pixels) -> None:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    with written_whole(folder / png_name(number), buffer.tell()) as temporary:
        temporary.write_bytes(buffer.getvalue())


def missing_numbers(folder: Path, numbers: Iterable[int], resolution: int) -> list[int]:
    """Those of some images whose file is missing or damaged."""
    return [number for number in numbers if not is_whole(folder / png_name(number), resolution)]


def write_metadata(folder: Path, image_set: ImageSet, num_images: int) -> None:
    """Writes the classes of PNG files as a table of file name, row of the label table and class name."""
    names = image_set.class_names
    with (
        written_whole(folder / METADATA_FILE) as temporary,
        temporary.open("w", encoding="utf-8", newline="") as file,
    ):
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["file_name", "label", "class_name"])
        for number in range(num_images):
            label = image_set.label(number)
            table.writerow([png_name(number), label, names.get(str(label), "")])


def pack_npz(folder: Path, image_set: ImageSet, num_images: int) -> list[Path]:
    """Packs the PNG files as ADM's evaluation reads them: arr_0 (N, H, W, 3) uint8, arr_1 (N,) int64, the labels.

    Returns:
        The file.
    """
    side = image_set.resolution
    path = folder / NPZ_FILE
    with written_whole(path, num_images * side * side * 3) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        # A fixed date, so that the same images are the same file. Written one by one: all need not fit into memory.
        with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as member:
            header = {"descr": "|u1", "fortran_order": False, "shape": (num_images, side, side, 3)}
            np.lib.format.write_array_header_1_0(member, header)
            for number in tqdm(range(num_images), desc=path.name, unit="image"):
                member.write(read_pixels(folder / png_name(number)).tobytes())
        with archive.open(zipfile.ZipInfo("arr_1.npy"), "w", force_zip64=True) as member:
            labels = np.array([image_set.label(number) for number in range(num_images)], dtype=np.int64)
            np.lib.format.write_array(member, labels)
    return [path]


def pack_parquet(folder: Path, image_set: ImageSet, num_images: int) -> list[Path]:
    """Packs the PNG files with their labels as `datasets` reads them, 10,000 to a file.

    Returns:
        The files.
    """
    schema = _parquet_schema(image_set)
    starts = range(0, num_images, IMAGES_PER_PARQUET)
    paths = [folder / f"images-{index:05d}-of-{len(starts):05d}.parquet" for index in range(len(starts))]
    with tqdm(total=num_images, desc="images.parquet", unit="image") as progress:
        for path, start in zip(paths, starts, strict=True):
            stop = min(start + IMAGES_PER_PARQUET, num_images)
            with written_whole(path) as temporary, pq.ParquetWriter(temporary, schema) as writer:
                for first in range(start, stop, IMAGES_PER_ROW_GROUP):
                    numbers = range(first, min(first + IMAGES_PER_ROW_GROUP, stop))
                    rows = [
                        {
                            "image": {"bytes": (folder / png_name(number)).read_bytes(), "path": png_name(number)},
                            "label": image_set.label(number),
                        }
                        for number in numbers
                    ]
                    writer.write_table(pa.Table.from_pylist(rows, schema=schema))
                    progress.update(len(numbers))
    return paths


def _parquet_schema(image_set: ImageSet) -> pa.Schema:
    """Columns image and label, with the types that `datasets` keeps beside them."""
    import datasets  # takes seconds to import, and is needed here only

    names = image_set.class_names
    rows = {int(row) for row in names}
    # A ClassLabel's classes are 0 to C-1; rows of a label table with a gap are plain numbers.
    dense = bool(rows) and rows == set(range(len(rows))) and set(image_set.class_rows) <= rows
    labels = [names[str(row)] for row in sorted(rows)] if dense else []
    kind = datasets.ClassLabel(names=labels) if dense and len(set(labels)) == len(labels) else datasets.Value("int64")
    schema: pa.Schema = datasets.Features({"image": datasets.Image(), "label": kind}).arrow_schema
    return schema


Packer = Callable[[Path, ImageSet, int], list[Path]]

PACKERS: dict[str, Packer] = {"parquet": pack_parquet, "npz": pack_npz}


def finish(folder: Path, manifest: Manifest) -> Manifest:
    """Completes a folder all of whose PNG files are there: packs them where that is asked for, and says so.

    A folder that was interrupted meanwhile is finished by another call.

    Returns:
        The manifest as it was saved.
    """
    if manifest.format == "png":
        write_metadata(folder, manifest.image_set, manifest.num_images)
        done = dataclasses.replace(manifest, complete=True)
    else:
        paths = PACKERS[manifest.format](folder, manifest.image_set, manifest.num_images)
        done = dataclasses.replace(manifest, complete=True, files={path.name: file_sha256(path) for path in paths})
    done.save(folder)
    if manifest.format != "png":
        remove_pngs(folder)
    return done


def is_damaged(folder: Path, manifest: Manifest) -> bool:
    """Whether a packed file of a complete set is missing or is no longer what was written."""
    paths = [(folder / name, sha256) for name, sha256 in manifest.files.items()]
    return any(not path.is_file() or file_sha256(path) != sha256 for path, sha256 in paths)


def remove_leftovers(folder: Path) -> None:
    """Removes what killed processes left half-written; only for who alone writes to the folder."""
    remove_unfinished(folder, "*.png", "*.parquet", NPZ_FILE, METADATA_FILE, MANIFEST)


def remove_set(folder: Path) -> None:
    """Removes a set, and nothing else that may lie in its folder; the manifest last."""
    remove_pngs(folder)
    for path in list(folder.iterdir()):
        if path.name in (METADATA_FILE, NPZ_FILE) or PARQUET_NAME.fullmatch(path.name):
            remove(path)
    remove(folder / MANIFEST)


def remove_pngs(folder: Path) -> None:
    """Removes the PNG files of a set."""
    for path in list(folder.iterdir()):
        if PNG_NAME.fullmatch(path.name):
            path.unlink()


def read_images(folder: Path, manifest: Manifest, batch_size: int) -> Iterator[Pixels]:
    """The images of a complete set, in the order of their numbers, in batches (B, H, W, 3).

    Raises:
        InputError: One is missing or damaged.
    """
    side = manifest.image_set.resolution
    one_by_one = READERS[manifest.format](folder, manifest)
    batch: list[Pixels] = []
    for pixels in one_by_one:
        if pixels.shape != (side, side, 3):
            raise InputError(f"{folder}: an image of {pixels.shape}, but the set is of {side}x{side} in colour.")
        batch.append(pixels)
        if len(batch) == batch_size:
            yield np.stack(batch)
            batch = []
    if batch:
        yield np.stack(batch)


def _read_png(folder: Path, manifest: Manifest) -> Iterator[Pixels]:
    for number in range(manifest.num_images):
        yield read_pixels(folder / png_name(number))


def _read_npz(folder: Path, manifest: Manifest) -> Iterator[Pixels]:
    shape = (manifest.num_images, manifest.image_set.resolution, manifest.image_set.resolution, 3)
    path = folder / NPZ_FILE
    try:
        with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as member:
            version = np.lib.format.read_magic(member)
            found, order, dtype = np.lib.format.read_array_header_1_0(member)
            if version != (1, 0) or found != shape or order or dtype != np.uint8:
                raise InputError(f"{path}: arr_0 is {dtype} {found}, but must be uint8 {shape}.")
            for _ in range(manifest.num_images):
                yield np.frombuffer(member.read(int(np.prod(shape[1:]))), np.uint8).reshape(shape[1:])
    except (OSError, zipfile.BadZipFile, KeyError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is missing or damaged ({error}); generate_samples.py makes it anew.") from error


def _read_parquet(folder: Path, manifest: Manifest) -> Iterator[Pixels]:
    for name in sorted(manifest.files):
        try:
            with pq.ParquetFile(folder / name) as file:
                for batch in file.iter_batches(IMAGES_PER_ROW_GROUP, columns=["image"]):
                    for image in batch["image"].to_pylist():
                        with Image.open(io.BytesIO(image["bytes"])) as opened:
                            yield np.asarray(opened.convert("RGB"))
        except Exception as error:  # whatever pyarrow and Pillow make of a damaged file
            raise InputError(
                f"{folder / name} is missing or damaged ({error}); generate_samples.py makes it anew."
            ) from error


READERS: dict[str, Callable[[Path, Manifest], Iterator[Any]]] = {
    "png": _read_png,
    "npz": _read_npz,
    "parquet": _read_parquet,
}
