"""A VAE's view of the training images, computed once: mean and log-variance of every latent, and of its flipped image.

What is stored are the moments, not samples, so that every epoch samples new latents; and those of the flipped images
too, because a VAE does not commute with flipping. The file is an Arrow stream that `datasets` reads, memory-mapped. A
second file has a checksum of each part of it, by which it is verified when it is opened, and the images that could not
be read.
"""

import hashlib
import json
import logging
import math
import mmap
import shutil
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import datasets
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from filelock import FileLock, Timeout
from torch import Tensor
from tqdm.auto import tqdm

from ..errors import InputError
from ..files import write_text
from .bad_images import BadImage, BadImages, replacements
from .decode import UnreadableImage
from .images import ImageSource
from .moments import check_resolution, encode_moments, sample_latents, vae_factor, vae_fingerprint

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

__all__ = [
    "LatentDataset",
    "cache_latents",
    "check_resolution",
    "sample_latents",
    "vae_factor",
    "vae_fingerprint",
]

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
"""Part of the cache's key; raise it when what is stored for the same images and VAE changes."""

CACHE_FOLDER = "speed_diffusers_latents"
LATENTS_FILE = "latents.arrow"
UNFINISHED_FILE = "tmp-latents.arrow"
PARTS_FILE = "parts.jsonl"
"""One `Part` a line, of the finished file or of the unfinished one."""

END_OF_STREAM = b"\xff\xff\xff\xff\x00\x00\x00\x00"
"""Of Arrow's IPC format."""

PART_BYTES = 2**24
"""Size of the parts into which a file that came without checksums is divided for them."""

VERIFYING_THREADS = 8


class LatentDataset(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Cached moments and labels, read a whole batch at a time from a memory-mapped file.

    Use it with a `batch_sampler` and `collate_fn=collate`; it travels to DataLoader workers as a path.
    """

    def __init__(self, dataset: datasets.Dataset, shape: tuple[int, int, int]) -> None:
        """Wraps what `cache_latents` wrote.

        Args:
            dataset: Columns "moments" and, if flipped images were stored, "moments_flipped" (flat float16), "label".
            shape: (2C, h, w) of the moments.
        """
        self.dataset = dataset.with_format("arrow")
        self.shape = shape

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        """One image's moments and label, without a batch axis."""
        return {name: value[0] for name, value in self.__getitems__([row]).items()}

    def __getitems__(self, rows: list[int]) -> dict[str, Tensor]:
        """A batch.

        Returns:
            "moments": float16 (B, 2C, h, w); "moments_flipped": the same of the flipped images, if stored; "labels":
            int64 (B,).
        """
        table = self.dataset[rows]
        batch = {"labels": torch.from_numpy(table["label"].to_numpy().copy())}
        for name in table.column_names:
            if name != "label":
                # Flat lists of fixed length: one copy per batch, 30 times faster than datasets' Array3D.
                values = table[name].combine_chunks().flatten().to_numpy()
                batch[name] = torch.from_numpy(values.reshape(-1, *self.shape).copy())
        return batch


def cache_latents(
    source: ImageSource,
    vae: "AutoencoderKL",
    *,
    vae_fingerprint: str,
    resolution: int,
    center_crop: bool,
    random_flip: bool,
    batch_size: int,
    device: torch.device,
    cache_dir: str | None = None,
    num_threads: int = 8,
    bad_images: BadImages | None = None,
) -> LatentDataset:
    """Encodes all images, or finds them encoded by an earlier run.

    The file lies in `cache_dir` under a key of images, labels, VAE, resolution, crop and flipping. It appears there
    only when it is complete, and a lock makes a second process wait for the first instead of doing the work twice.
    What was encoded before an interruption is kept for the next start. A finished file is verified against its
    checksums and its labels against the images'; where they differ it is made again.

    In place of an image that cannot be read, the next good one and its label are stored.

    Args:
        source: The images.
        vae: The autoencoder; moved to `device` if there is something to encode. Its dtype is used.
        vae_fingerprint: `vae_fingerprint(vae)`.
        resolution: Side of the images in pixels, a multiple of the VAE's factor.
        center_crop: See `load_image`.
        random_flip: Store the moments of the flipped images too.
        batch_size: Images encoded at a time; it does not change the key.
        device: Where to encode.
        cache_dir: Folder of the caches; None for that of `datasets` (HF_DATASETS_CACHE).
        num_threads: Threads that decode images.
        bad_images: Takes in the images that cannot be read; None for one of its own, with the usual limit.

    Raises:
        InputError: If more images than `bad_images` allows cannot be read, the resolution does not fit, the VAE
            yields NaN, or the cache's folder cannot be written or has too little space.
    """
    bad_images = BadImages(len(source)) if bad_images is None else bad_images
    side = check_resolution(resolution, vae)
    shape = (2 * int(vae.config["latent_channels"]), side, side)
    columns = ["moments", "moments_flipped"] if random_flip else ["moments"]
    key = _key(FORMAT_VERSION, source.fingerprint, vae_fingerprint, resolution, center_crop, random_flip)
    folder = Path(cache_dir or datasets.config.HF_DATASETS_CACHE).expanduser() / CACHE_FOLDER / key
    try:
        # Before the lock, so that a finished cache can lie on a read-only disk.
        cached = _finished(folder, source, bad_images)
        if cached is None:
            folder.mkdir(parents=True, exist_ok=True)
            with _only_one(folder):
                cached = _finished(folder, source, bad_images)
                if cached is None:
                    cast(Any, vae).to(device)
                    writer = _Writer(folder, source, columns, shape, bad_images)
                    writer.encode(vae, resolution, center_crop, batch_size, num_threads)
                    cached = _opened(folder / LATENTS_FILE)
    except OSError as error:
        raise InputError(f"Cannot keep latents in '{folder}' (cache_dir, or HF_DATASETS_CACHE): {error}.") from error
    return LatentDataset(cached, shape)


def _key(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


@contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """Holds the folder's lock; the system releases it when its holder dies."""
    lock = FileLock(folder / "lock")
    try:
        lock.acquire(timeout=1)
    except Timeout:
        logger.warning("Another process is making the latents in '%s'; waiting for it.", folder)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@dataclass(frozen=True)
class Part:
    """A stretch of a cache's file, from the end of the part before it."""

    end: int
    """Its last byte's position + 1."""
    crc32: int
    rows: int = 0
    """Images that it completes."""
    bad_images: Sequence[BadImage] = ()
    """Those that could not be read on the way."""


def _read_parts(folder: Path) -> list[Part]:
    """What is known of the file; lines from the first damaged one on are left out."""
    parts: list[Part] = []
    try:
        for line in (folder / PARTS_FILE).read_text(encoding="utf-8").splitlines():
            values = json.loads(line)
            bad = [BadImage(**image) for image in values["bad_images"]]
            parts.append(Part(int(values["end"]), int(values["crc32"]), int(values["rows"]), bad))
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        pass
    return parts


def _to_line(part: Part) -> str:
    return f"{json.dumps(asdict(part))}\n"


def _whole_parts(file: Path, parts: list[Part]) -> list[Part]:
    """The parts up to the first that the file does not hold as it was written."""
    with file.open("rb") as opened:
        if not (size := file.stat().st_size):
            return []
        with mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as mapped, memoryview(mapped) as content:

            def is_whole(span: tuple[int, int], part: Part) -> bool:
                with content[slice(*span)] as stretch:
                    return span[0] < span[1] <= size and zlib.crc32(stretch) == part.crc32

            spans = pairwise([0, *(part.end for part in parts)])
            with ThreadPoolExecutor(VERIFYING_THREADS) as threads:
                for index, whole in enumerate(threads.map(is_whole, spans, parts)):
                    if not whole:
                        return parts[:index]
    return parts


def _opened(file: Path) -> datasets.Dataset:
    return datasets.Dataset.from_file(str(file))


def _finished(folder: Path, source: ImageSource, bad_images: BadImages) -> datasets.Dataset | None:
    """The cache if it is there, whole, and of these images; its bad images are added.

    Raises:
        InputError: They are too many.
    """
    file = folder / LATENTS_FILE
    if not file.exists():
        return None
    parts = _read_parts(folder)
    if parts and (_whole_parts(file, parts) != parts or parts[-1].end != file.stat().st_size):
        logger.warning("The latent cache '%s' does not match its checksums; making it again.", file)
        return None
    try:
        dataset = _opened(file)
        labels = dataset.select_columns(["label"]).with_format("arrow")[:]["label"].to_numpy()
    # Arrow and datasets raise almost anything on a damaged file without checksums (ArrowInvalid, JSONDecodeError,
    # KeyError, ...); whatever it is, there is one thing to do.
    except Exception as error:
        logger.warning("The latent cache '%s' is damaged (%s); making it again.", file, error)
        return None
    if len(dataset) != len(source):
        logger.warning("The latent cache '%s' has %d rows, not %d; making it again.", file, len(dataset), len(source))
        return None
    bad = [image for part in parts for image in part.bad_images]
    if not np.array_equal(labels, source.labels[replacements(len(source), {image.row for image in bad})]):
        logger.warning("The latent cache '%s' has other labels than the images; making it again.", file)
        return None
    bad_images.add(bad)
    if not parts:
        _add_checksums(folder)
    return dataset


def _add_checksums(folder: Path) -> None:
    """Of a cache that version 0.1 made, which wrote none; from now on it is verified too."""
    file = folder / LATENTS_FILE
    parts = []
    with file.open("rb") as opened:
        while content := opened.read(PART_BYTES):
            parts.append(Part(opened.tell(), zlib.crc32(content)))
    try:
        write_text(folder / PARTS_FILE, "".join(map(_to_line, parts)))
    except OSError as error:
        logger.warning("The latent cache '%s' has no checksums and none can be kept beside it: %s.", file, error)


class _Writer:
    """Makes the cache's file part by part; only under the lock, where nobody else is writing."""

    def __init__(
        self,
        folder: Path,
        source: ImageSource,
        columns: list[str],
        shape: tuple[int, int, int],
        bad_images: BadImages,
    ) -> None:
        """Takes up what an interrupted run has left, and checks that the rest fits on the disk."""
        self.folder = folder
        self.source = source
        self.columns = columns
        self.num_values = math.prod(shape)
        self.bad_images = bad_images
        moments = datasets.Sequence(datasets.Value("float16"), length=self.num_values)
        features = datasets.Features({**dict.fromkeys(columns, moments), "label": datasets.Value("int64")})
        self.schema = features.arrow_schema
        # A damaged file, and what version 0.1 left unfinished.
        for leftover in (folder / LATENTS_FILE, *folder.glob("tmp*")):
            if leftover.name != UNFINISHED_FILE:
                leftover.unlink(missing_ok=True)
        self.file = folder / UNFINISHED_FILE
        self.parts = _whole_parts(self.file, _read_parts(folder)) if self.file.exists() else []
        self.bad_images.add(image for part in self.parts for image in part.bad_images)
        self._make_room()

    @property
    def rows_done(self) -> int:
        return sum(part.rows for part in self.parts)

    def _make_room(self) -> None:
        rest = len(self.source) - self.rows_done
        num_bytes = rest * (len(self.columns) * 2 * self.num_values + 8)
        free = shutil.disk_usage(self.folder).free
        if free < num_bytes:
            raise InputError(
                f"The latents need {num_bytes / 1e9:.1f} GB in '{self.folder}', where {free / 1e9:.1f} GB are free. "
                "Give another cache_dir (or HF_DATASETS_CACHE), or train with cache_latents=false."
            )

    def encode(
        self, vae: "AutoencoderKL", resolution: int, center_crop: bool, batch_size: int, num_threads: int
    ) -> None:
        """Writes what is not there yet; the file has its final name only when it is complete."""
        images = self.source.dataset.select_columns([self.source.image_column])
        count = len(self.source)
        write_text(self.folder / PARTS_FILE, "".join(map(_to_line, self.parts)))
        progress = tqdm(total=count, initial=self.rows_done, desc="Caching latents", unit="image")
        with (
            self.file.open("ab") as file,
            (self.folder / PARTS_FILE).open("a", encoding="utf-8") as parts_file,
            ThreadPoolExecutor(num_threads) as threads,
            progress,
        ):

            def write(content: pa.Buffer | bytes, rows: int = 0, bad: Sequence[BadImage] = ()) -> None:
                file.write(content)
                file.flush()
                self.parts.append(Part(file.tell(), zlib.crc32(content), rows, bad))
                parts_file.write(_to_line(self.parts[-1]))
                parts_file.flush()

            def load(image: dict[str, object] | None, row: int) -> tuple[npt.NDArray[np.uint8], int, list[BadImage]]:
                try:
                    return self.source.decode(image, row, resolution, center_crop), row, []
                except UnreadableImage:
                    return self.source.load_or_next(row, resolution, center_crop)

            file.truncate(self.parts[-1].end if self.parts else 0)
            file.seek(0, 2)
            if not self.parts:
                write(self.schema.serialize())
            for begin in range(self.rows_done, count, batch_size):
                rows = range(begin, min(begin + batch_size, count))
                column = images[begin : rows.stop][self.source.image_column]
                pixels, used, found = zip(*threads.map(load, column, rows), strict=True)
                bad = [image for some in found for image in some]
                self.bad_images.add(bad)
                write(self._encoded(np.stack(pixels), used, vae).serialize(), len(rows), bad)
                progress.update(len(rows))
            write(END_OF_STREAM)
        self.file.replace(self.folder / LATENTS_FILE)

    def _encoded(self, pixels: npt.NDArray[np.uint8], rows: Sequence[int], vae: "AutoencoderKL") -> pa.RecordBatch:
        """Moments of images (B, R, R, 3) and the labels of their rows."""
        encoded = encode_moments(pixels, vae, flipped="moments_flipped" in self.columns)
        if not all(np.isfinite(values).all() for values in encoded):
            raise InputError(f"The VAE ({vae.dtype}) yields NaN or infinity on rows {rows[0]} to {rows[-1]}.")
        flat = [pa.array(values.reshape(-1)) for values in encoded]
        lists = [pa.FixedSizeListArray.from_arrays(values, self.num_values) for values in flat]
        labels = pa.array(self.source.labels[list(rows)])
        return pa.RecordBatch.from_arrays([*lists, labels], schema=self.schema)
