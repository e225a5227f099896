"""Encoding of the shards that a latent cache lacks, by as many processes of as many machines as there are.

The processes need to know nothing of one another but the cache's folder: each encodes the shards that are missing,
beginning at a place of its own, and holds a lock on the one it is at. The system releases the lock of a process that
dies, so what it was at is taken by another; a run that starts later helps.
"""

import logging
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from filelock import Timeout
from tqdm.auto import tqdm

from ..errors import InputError
from ..files import remove_unfinished
from ..locks import take_lock
from .bad_images import BadImage, BadImages
from .decode import UnreadableImage
from .images import ImageSource
from .latents_shard import HEADER_FILE, SHARDS, CacheHeader, DamagedShard, Shard, shard_name, write_file, write_shard
from .moments import encode_moments

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

logger = logging.getLogger(__name__)

SINGLE_FILE = ("latents.arrow", "tmp-latents.arrow", "parts.jsonl", "lock")
"""What a cache was before there were shards."""

VERIFIED_AT_ONCE = 2**30
"""Of a cache of at most so many bytes all are verified when it is opened, which takes about a third of a second."""

THREADS = 8

SECONDS_BETWEEN_LOOKS = 0.5
SECONDS_BEFORE_TELLING = 30.0
SECONDS_TO_WAIT = 600.0
"""For a shard that another process encodes; then it is encoded here too, for the other may be stopped or hang."""


_Loaded = tuple[npt.NDArray[np.uint8], int, list[BadImage]]


def write_header(folder: Path, header: CacheHeader) -> None:
    """Writes `header.json`, unless it is there as it should be. What else lies in the folder is of other latents.

    Raises:
        OSError: The folder cannot be written.
    """
    with _lock(folder / "header.lock", wait=True) as held:
        if held:
            remove_unfinished(folder, HEADER_FILE)
        try:
            found = CacheHeader.from_json((folder / HEADER_FILE).read_text(encoding="utf-8"))
        except FileNotFoundError:
            pass
        except (ValueError, TypeError, KeyError):
            logger.warning("'%s' is damaged; writing it again.", folder / HEADER_FILE)
        else:
            if not (differences := header.differences(found)):
                return
            told = "; ".join(f"{name} is {values}" for name, values in differences.items())
            logger.warning("'%s' is of other latents (%s); writing it again.", folder / HEADER_FILE, told)
        write_file(folder / HEADER_FILE, header.to_json().encode())


def survey(
    folder: Path, header: CacheHeader, *, verify: bool, indices: Sequence[int] | None = None
) -> tuple[dict[int, str], list[BadImage]]:
    """Looks at the shards.

    Args:
        folder: Of the cache.
        header: Of the cache.
        verify: Read and verify all rows, not the shards' headers alone.
        indices: Which shards; None for all.

    Returns:
        What is wrong with those that are missing or damaged, by number; and the bad images of the others.
    """
    there = {path.name for path in folder.glob(SHARDS)}

    def look_at(index: int) -> list[BadImage] | str:
        if shard_name(index) not in there:
            return ""
        try:
            shard = Shard(folder, header, index)
            if verify:
                shard.verify()
        except DamagedShard as error:
            return str(error)
        return shard.bad_images

    chosen = range(header.num_shards) if indices is None else indices
    with ThreadPoolExecutor(THREADS) as threads:
        found = dict(zip(chosen, threads.map(look_at, chosen), strict=True))
    wrong = {index: look for index, look in found.items() if isinstance(look, str)}
    return wrong, [image for look in found.values() if not isinstance(look, str) for image in look]


def remove_locks(folder: Path, whole: Iterable[int]) -> None:
    """Removes the locks of processes that were killed when they had finished a shard, unless the disk is read-only.

    Args:
        folder: Of the cache.
        whole: Numbers of the shards that were found whole. The lock of another keeps two processes from replacing it.
    """
    there = {path.name for suffix in ("lock", "holder") for path in folder.glob(f"*.{suffix}")}
    for index in whole:
        lock_file, holder_file = (_beside(folder, index, suffix) for suffix in ("lock", "holder"))
        if there.isdisjoint((lock_file.name, holder_file.name)):
            continue
        with suppress(OSError), _lock(lock_file) as held:
            if held is not False:
                _remove_lock(lock_file, holder_file)


@dataclass
class Encoding:
    """The work on one cache.

    Attributes:
        folder: Of the cache; it exists.
        header: Of the cache.
        source: The images.
        vae: The autoencoder, on its device.
        batch_size: Images encoded at a time.
        num_threads: Threads that decode images.
        bad_images: Takes in those that cannot be read.
        rank: Number of this process; 0 shows the progress.
        num_processes: How many there are.
        on_progress: Called again and again.
    """

    folder: Path
    header: CacheHeader
    source: ImageSource
    vae: "AutoencoderKL"
    batch_size: int
    num_threads: int
    bad_images: BadImages
    rank: int
    num_processes: int
    on_progress: Callable[[], object] | None = None

    def remove_damaged(self, damaged: dict[int, str]) -> None:
        """Removes shards that were found damaged, unless another process has replaced them, and names each."""
        for index, reason in damaged.items():
            with _lock(_beside(self.folder, index, "lock"), wait=True):
                again, _ = survey(self.folder, self.header, verify=True, indices=[index])
                if again.get(index):
                    logger.warning("%s It alone is encoded again.", reason)
                    (self.folder / shard_name(index)).unlink()

    def make_room(self, missing: Sequence[int]) -> None:
        """Removes what an older version left, and checks that the disk holds what is missing.

        Raises:
            InputError: It does not.
        """
        leftovers = [path for name in SINGLE_FILE if (path := self.folder / name).exists()]
        if any(path.name == SINGLE_FILE[0] for path in leftovers):
            logger.warning(
                "'%s' is of an earlier version, which kept latents in one file; they are encoded again.",
                self.folder / SINGLE_FILE[0],
            )
        for path in leftovers:
            path.unlink(missing_ok=True)
        num_bytes = sum(map(self.header.bytes_of, missing))
        free = shutil.disk_usage(self.folder).free
        if free < num_bytes:
            raise InputError(
                f"The latents need {num_bytes:,} bytes in '{self.folder}', where {free:,} are free. "
                "Give another cache_dir (or HF_DATASETS_CACHE), or train with cache_latents=false."
            )

    def encode(self, missing: Sequence[int]) -> None:
        """Returns when all missing shards are there, whoever has encoded them.

        Raises:
            InputError: Too many images cannot be read, or the VAE yields NaN.
            OSError: A shard cannot be written.
        """
        # Processes begin far from one another, and each reads images that lie side by side.
        first = len(missing) * self.rank // self.num_processes
        pending = [*missing[first:], *missing[:first]]
        since, told = time.monotonic(), -1
        with ThreadPoolExecutor(self.num_threads) as threads, _Progress(self, missing) as progress:
            while pending:
                for index in pending.copy():
                    held_up = time.monotonic() - since > SECONDS_TO_WAIT
                    if self._try(index, threads, progress, without_lock=held_up):
                        pending.remove(index)
                        since = time.monotonic()
                if not pending:
                    break
                if time.monotonic() - since > SECONDS_BEFORE_TELLING and pending[0] != told:
                    told = pending[0]
                    logger.warning("Waiting for '%s', which %s encodes.", shard_name(told), self._holder(told))
                time.sleep(SECONDS_BETWEEN_LOOKS)
                progress.look()

    def _holder(self, index: int) -> str:
        """Who encodes a shard, as it has said itself."""
        try:
            return _beside(self.folder, index, "holder").read_text(encoding="utf-8") or "another process"
        except FileNotFoundError:
            return "another process"

    def _try(self, index: int, threads: ThreadPoolExecutor, progress: "_Progress", *, without_lock: bool) -> bool:
        """Encodes a shard unless it is there; False if another process is at it."""
        path = self.folder / shard_name(index)
        if path.exists():
            return True
        if without_lock:
            logger.warning("'%s' does not come from %s; encoding it here too.", path.name, self._holder(index))
            self._encode_shard(index, threads, progress)
            return True
        lock_file, holder_file = (_beside(self.folder, index, suffix) for suffix in ("lock", "holder"))
        with _lock(lock_file) as held:
            if held is False:
                return False
            if not path.exists():
                holder_file.write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
                if held:
                    remove_unfinished(self.folder, path.name)
                self._encode_shard(index, threads, progress)
            _remove_lock(lock_file, holder_file)
        return True

    def _encode_shard(self, index: int, threads: ThreadPoolExecutor, progress: "_Progress") -> None:
        header, rows = self.header, self.header.rows_of(index)
        columns = {name: np.empty((len(rows), *header.shape), dtype=np.float16) for name in header.columns}
        labels = np.empty(len(rows), dtype=np.int64)
        bad_images: list[BadImage] = []
        for batch, loaded in self._load(rows, threads):
            pixels, used, found = zip(*loaded, strict=True)
            bad_images += [image for some in found for image in some]
            self.bad_images.add(bad_images)
            place = slice(batch.start - rows.start, batch.stop - rows.start)
            encoded = encode_moments(np.stack(pixels), self.vae, flipped=header.random_flip)
            for name, values in zip(header.columns, encoded, strict=True):
                if not np.isfinite(values).all():
                    raise InputError(
                        f"The VAE ({self.vae.dtype}) yields NaN or infinity on rows {used[0]} to {used[-1]}."
                    )
                columns[name][place] = values
            labels[place] = self.source.labels[list(used)]
            progress.add(len(batch))
        write_shard(self.folder, header, index, columns, labels, bad_images)
        progress.add_shard()

    def _load(self, rows: range, threads: ThreadPoolExecutor) -> Iterator[tuple[range, list[_Loaded]]]:
        """The rows' images in batches; threads decode the next batch while the caller encodes one."""
        images = self.source.dataset.select_columns([self.source.image_column])
        resolution, center_crop = self.header.resolution, self.header.center_crop

        def load(image: dict[str, object] | None, row: int) -> _Loaded:
            try:
                return self.source.decode(image, row, resolution, center_crop), row, []
            except UnreadableImage:
                return self.source.load_or_next(row, resolution, center_crop)

        def start(batch: range) -> Iterator[_Loaded]:
            return threads.map(load, images[batch.start : batch.stop][self.source.image_column], batch)

        begins = range(rows.start, rows.stop, self.batch_size)
        batches = [range(begin, min(begin + self.batch_size, rows.stop)) for begin in begins]
        loading = start(batches[0])
        for batch, following in zip_longest(batches, batches[1:]):
            loaded = list(loading)
            if following is not None:
                loading = start(following)
            yield batch, loaded


class _Progress:
    """A bar with the rows of all processes: those of finished shards, and of the one that this process is at."""

    def __init__(self, encoding: Encoding, missing: Sequence[int]) -> None:
        self.encoding = encoding
        self.missing = missing
        self.num_rows = encoding.header.num_rows
        self.before = self.num_rows - sum(len(encoding.header.rows_of(index)) for index in missing)
        self.own_rows = 0
        self.looked = 0.0
        # Nothing about `disable` from process 0, which leaves it to the environment (TQDM_DISABLE).
        options: dict[str, Any] = {"disable": True} if encoding.rank else {}
        # smoothing=0: shards of other processes come at once, so only the mean rate says when all will be there.
        options |= {"total": self.num_rows, "initial": self.before, "unit": "image", "smoothing": 0}
        self.bar = tqdm(desc="Caching latents", **options)

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.close()

    def add(self, rows: int) -> None:
        """Rows of this process's shard have been encoded."""
        self.own_rows += rows
        if time.monotonic() - self.looked >= SECONDS_BETWEEN_LOOKS:
            self.look()

    def add_shard(self) -> None:
        """This process's shard is there."""
        self.own_rows = 0
        self.look()

    def look(self) -> None:
        """Brings the bar to what there is."""
        if self.encoding.on_progress is not None:
            self.encoding.on_progress()
        self.looked = time.monotonic()
        if self.bar.disable:
            return
        there = {path.name for path in self.encoding.folder.glob(SHARDS)}
        header = self.encoding.header
        finished = sum(len(header.rows_of(index)) for index in self.missing if shard_name(index) in there)
        self.bar.update(min(self.before + finished + self.own_rows, self.num_rows) - self.bar.n)


def _beside(folder: Path, index: int, suffix: str) -> Path:
    return (folder / shard_name(index)).with_suffix(f".{suffix}")


def _remove_lock(lock_file: Path, holder_file: Path) -> None:
    """Removes the lock of a shard that is there; whoever waits for it looks at the shard before doing anything."""
    for file in (holder_file, lock_file):
        with suppress(OSError):  # Windows removes nothing that is open
            file.unlink()


@contextmanager
def _lock(file: Path, *, wait: bool = False) -> Iterator[bool | None]:
    """Holds a lock, which the system releases when its holder dies.

    Args:
        file: The lock.
        wait: For it.

    Yields:
        True; False where another process holds it; None where the file system knows no locks. Two processes may then
        encode the same shard, and the second replaces the first's bytes by the same ones.
    """
    try:
        lock = take_lock(file, wait=wait)
    except Timeout:
        yield False
        return
    try:
        yield None if lock is None else True
    finally:
        if lock is not None:
            lock.release()
