"""A VAE's view of the training images, computed once: mean and log-variance of every latent, and of its flipped image.

What is stored are the moments, not samples, so that every epoch samples new latents; and those of the flipped images
too, because a VAE does not commute with flipping. `latents_shard` says how they are stored, `latents_encoding` who
encodes them.
"""

import hashlib
import json
import logging
import zlib
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import datasets
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..errors import InputError
from .bad_images import BadImages
from .images import ImageSource
from .latents_encoding import VERIFIED_AT_ONCE, Encoding, remove_locks, survey, write_header
from .latents_shard import HEADER_FILE, MAX_SHARDS, CacheHeader, DamagedShard, Shard, read_at, rows_per_shard
from .moments import check_resolution, sample_latents, vae_factor, vae_fingerprint

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

KEY_VERSION = 1
"""Part of the cache's key; raise it when what is stored for the same images and VAE changes."""

CACHE_FOLDER = "speed_diffusers_latents"


class LatentDataset(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Cached moments and labels, read a whole batch at a time; of a row no more than 16 bytes stay in memory.

    Use it with a `batch_sampler` and `collate_fn=collate`; it travels to DataLoader workers as a path.

    Attributes:
        folder: Where the cache lies.
        header: What it is of.
        shape: (2C, h, w) of the moments.
    """

    def __init__(self, folder: str | Path) -> None:
        """Opens a cache that `cache_latents` has made; a shard is opened, and verified, when it is first read from.

        Args:
            folder: Of the cache, with `header.json` in it.

        Raises:
            InputError: There is no cache, or one of another version.
        """
        self.folder = Path(folder)
        file = self.folder / HEADER_FILE
        try:
            self.header = CacheHeader.from_json(file.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise InputError(f"'{folder}' holds no latent cache: there is no {HEADER_FILE}.") from error
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(f"'{file}' is damaged, or of another version; remove it and encode again.") from error
        self.shape = self.header.shape
        self._forget()

    def _forget(self) -> None:
        """As it is before the first row is read."""
        num_shards = self.header.num_shards
        self._shards: dict[int, Shard] = {}
        # Numbers of their open files, -1 for none, and in which order they were opened.
        self._files = [-1] * num_shards
        self._opened: deque[int] = deque()
        # Of all shards together: a row that is read then touches as little memory as in a cache of one shard.
        self._begins = np.zeros((len(self.header.columns), num_shards), dtype=np.int64)
        self._labels = np.empty(len(self), dtype=np.int64)
        self._checksums = np.empty(len(self), dtype=np.int64)

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "header": self.header, "shape": self.shape}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def __len__(self) -> int:
        return self.header.num_rows

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        """One image's moments and label, without a batch axis."""
        return {name: value[0] for name, value in self.__getitems__([row]).items()}

    def __getitems__(self, rows: list[int]) -> dict[str, Tensor]:
        """A batch.

        Args:
            rows: Numbers of images, each in [0, len).

        Returns:
            "moments": float16 (B, 2C, h, w); "moments_flipped": the same of the flipped images, if stored; "labels":
            int64 (B,).

        Raises:
            DamagedShard: A row does not match its checksum, or its shard is missing. The shard is removed if that is
                possible, so that the next `cache_latents` encodes it, and it alone, again.
            OSError: The disk or the share failed.
            IndexError: No such row.
        """
        numbers = np.asarray(rows, dtype=np.int64)
        if len(wrong := numbers[(numbers < 0) | (numbers >= len(self))]):
            raise IndexError(f"Row {wrong[0]} of {len(self)}.")
        indices, places = np.divmod(numbers, self.header.rows_per_shard)
        for index in set(indices.tolist()) - self._shards.keys():
            self._use(index, Shard(self.folder, self.header, index))
        width = self.header.column_bytes
        positions = (self._begins[:, indices] + places * width).T.tolist()
        checksums = self._checksums[numbers].tolist()
        values = np.empty((len(self.header.columns), len(rows), width), dtype=np.uint8)
        # In their order on the disk, so that a shard is opened once a batch at most.
        for item in np.argsort(numbers, kind="stable").tolist():
            index, crc32 = int(indices[item]), 0
            file = self._files[index]
            if file < 0:
                file = self._open(index)
            buffers = values[:, item]
            try:
                for buffer, position in zip(buffers, positions[item], strict=True):
                    read_at(file, buffer, position)
                    crc32 = zlib.crc32(buffer, crc32)
            except OSError:
                crc32 = -1
            if crc32 != checksums[item]:
                self._read_again(index, rows[item], buffers)
        batch = {"labels": torch.from_numpy(self._labels[numbers])}
        for name, column in zip(self.header.columns, values, strict=True):
            batch[name] = torch.from_numpy(column.view(np.float16).reshape(-1, *self.shape))
        return batch

    def _use(self, index: int, shard: Shard) -> None:
        """Takes a shard that has just been opened."""
        rows = slice(shard.rows.start, shard.rows.stop)
        self._shards[index] = shard
        self._begins[:, index] = shard.begins
        self._labels[rows], self._checksums[rows] = shard.labels, shard.checksums
        shard.close()
        self._files[index] = -1

    def _open(self, index: int) -> int:
        """The descriptor of a shard's file; the file that was opened first is closed where there are too many."""
        if len(self._opened) >= MAX_SHARDS:
            first = self._opened.popleft()
            self._shards[first].close()
            self._files[first] = -1
        self._opened.append(index)
        self._files[index] = self._shards[index].open()
        return self._files[index]

    def _read_again(self, index: int, row: int, buffers: npt.NDArray[np.uint8]) -> None:
        """Reads a row that did not come as it should from its file as it stands now: it may have been replaced."""
        shard = Shard(self.folder, self.header, index)
        try:
            shard.read_row(row, buffers)
        except DamagedShard as error:
            with suppress(OSError):
                if shard.is_file_of(shard.path):
                    shard.path.unlink()
            raise DamagedShard(f"{error} Start again: what is missing, and that alone, is encoded again.") from error
        if index in self._opened:
            self._opened.remove(index)
        self._use(index, shard)


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
    rank: int = 0,
    num_processes: int = 1,
    verify: bool = False,
    on_progress: Callable[[], object] | None = None,
) -> LatentDataset:
    """Encodes all images, or finds them encoded by an earlier run.

    The cache lies in `cache_dir` under a key of images, labels, VAE, resolution, crop and flipping, in shards that
    appear only when they are complete. All processes that call this, on all machines that share the folder, encode
    the missing shards together, and each returns when all are there. What was encoded before an interruption is kept,
    whatever the number of processes; a shard that is missing or damaged is encoded again, and no other.

    What is stored does not depend on the number of processes or on interruptions.

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
        num_threads: Threads of this process that decode images.
        bad_images: Takes in the images that cannot be read; None for one of its own, with the usual limit.
        rank: Number of this process, in [0, num_processes); process 0 shows the progress of all.
        num_processes: How many processes call this, for where each begins.
        verify: Verify every row of what is there already. Otherwise that is done for caches of up to 1 GiB; of larger
            ones only the shards' headers are verified here, and each row when it is read.
        on_progress: Called again and again while something is encoded, here or by the processes waited for.

    Raises:
        InputError: If more images than `bad_images` allows cannot be read, the resolution does not fit, the VAE
            yields NaN, or the cache's folder cannot be written or has too little space.
    """
    bad_images = BadImages(len(source)) if bad_images is None else bad_images
    side = check_resolution(resolution, vae)
    shape = (2 * int(vae.config["latent_channels"]), side, side)
    header = CacheHeader(
        images=source.fingerprint,
        vae=vae_fingerprint,
        resolution=resolution,
        center_crop=center_crop,
        random_flip=random_flip,
        num_rows=len(source),
        shape=shape,
        rows_per_shard=0,
    )
    header = replace(header, rows_per_shard=rows_per_shard(len(source), len(header.columns) * header.column_bytes))
    key = _key(KEY_VERSION, source.fingerprint, vae_fingerprint, resolution, center_crop, random_flip)
    folder = Path(cache_dir or datasets.config.HF_DATASETS_CACHE).expanduser() / CACHE_FOLDER / key
    header = _as_divided_before(folder, header)
    verify = verify or sum(map(header.bytes_of, range(header.num_shards))) <= VERIFIED_AT_ONCE
    try:
        # Without having to write anything, so that a finished cache can lie on a read-only disk.
        wrong, bad = survey(folder, header, verify=verify)
        remove_locks(folder, (index for index in range(header.num_shards) if index not in wrong))
        bad_images.add(bad)
        if wrong or not (folder / HEADER_FILE).exists():
            if rank == 0 and not folder.exists():
                _tell_of_another(folder, header)
            folder.mkdir(parents=True, exist_ok=True)
            write_header(folder, header)
        if wrong:
            encoding = Encoding(
                folder, header, source, vae, batch_size, num_threads, bad_images, rank, num_processes, on_progress
            )
            encoding.remove_damaged({index: reason for index, reason in wrong.items() if reason})
            encoding.make_room([*wrong])
            cast(Any, vae).to(device)
            encoding.encode([*wrong])
            # Those of other processes too.
            wrong, bad = survey(folder, header, verify=False)
            bad_images.add(bad)
            for reason in wrong.values():
                raise DamagedShard(reason or f"'{folder}': shards have been removed meanwhile.")
    except OSError as error:
        raise InputError(f"Cannot keep latents in '{folder}' (cache_dir, or HF_DATASETS_CACHE): {error}.") from error
    return LatentDataset(folder)


def _key(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _as_divided_before(folder: Path, header: CacheHeader) -> CacheHeader:
    """The header with the shards as large as those of the cache that is there."""
    with suppress(OSError, ValueError, TypeError, KeyError):
        found = CacheHeader.from_json((folder / HEADER_FILE).read_text(encoding="utf-8"))
        if found.differences(header).keys() <= {"rows_per_shard"} and found.rows_per_shard > 0:
            return found
    return header


_TOLD = {
    "images": "the images (fingerprint {})",
    "vae": "the VAE (hash {})",
    "resolution": "the resolution ({})",
    "center_crop": "the crop (center_crop {})",
    "random_flip": "the flips (random_flip {})",
}
"""The fields of a header that users choose, in words."""


def _tell_of_another(folder: Path, header: CacheHeader) -> None:
    """Says, before encoding, of which one thing a cache beside this one is different: it may have been meant."""
    for file in folder.parent.glob(f"*/{HEADER_FILE}"):
        with suppress(OSError, ValueError, TypeError, KeyError):
            differences = header.differences(CacheHeader.from_json(file.read_text(encoding="utf-8")))
            if len(names := [name for name in _TOLD if name in differences]) == 1:
                told = _TOLD[names[0]].format(differences[names[0]])
                logger.warning("The latents in '%s' differ in %s; encoding.", file.parent, told)
                return
