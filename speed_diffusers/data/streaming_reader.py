"""Reads streamed images ahead of the training and hands them, still encoded, to whoever decodes them."""

import logging
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..errors import InputError
from .decode import UnreadableImage
from .images import as_batch
from .shards import Stretch
from .streaming import EncodedImage, StreamSource
from .streaming_order import StreamOrder

logger = logging.getLogger(__name__)

READERS = 8
"""Threads that read, each a stretch of its own."""

IMAGES_AHEAD = 2048
MICRO_STEPS_AHEAD = (4, 32)
"""Micro-steps for which images are being read: as many as have `IMAGES_AHEAD`, within these limits."""

PAUSES = (5.0, 10.0, 20.0, 40.0, 80.0)
"""Seconds before each further try to read, over those that huggingface_hub makes by itself."""


class StreamDataset(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Decodes what `StreamReader` has read, in the workers of a loader; see `ImageDataset`.

    Use it with a `StreamReader` as `batch_sampler` and `collate_fn=collate`.
    """

    def __init__(self, source: StreamSource, *, resolution: int, center_crop: bool = True) -> None:
        self.source = source
        self.resolution = resolution
        self.center_crop = center_crop

    def __getitems__(self, encoded: list[EncodedImage]) -> dict[str, Tensor]:
        """A batch as of `ImageDataset`, in which the next good image stands for one that cannot be read.

        Raises:
            InputError: No image at all can be read.
        """
        images, labels, bad_rows = [], [], []
        for row, image, label in encoded:
            try:
                images.append(self.source.decode(image, row, self.resolution, self.center_crop))
                labels.append(label)
            except UnreadableImage:
                # Read anew, the images behind it too: rows that nobody has asked for are not at hand.
                pixels, used, bad = self.source.load_or_next(row, self.resolution, self.center_crop)
                images.append(pixels)
                labels.append(int(self.source.labels_of([used])[0]))
                bad_rows += [found.row for found in bad]
        return as_batch(images, np.array(labels, dtype=np.int64), bad_rows)


class StreamReader:
    """Endless batch sampler of encoded images for one process, from any optimizer step on.

    Threads read the stretches that hold the images of the next micro-steps; of each stretch only what this process
    has not trained on in this epoch is kept. A process that is resumed opens the stretches it was in the middle of
    from their beginning, and reads no others.
    """

    def __init__(self, source: StreamSource, order: StreamOrder) -> None:
        """Prepares; nothing is read.

        Args:
            source: The images.
            order: Which of them make which batch.
        """
        self.source = source
        self.order = order

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[list[EncodedImage]]:
        least, most = MICRO_STEPS_AHEAD
        ahead = min(max(IMAGES_AHEAD // self.order.layout.per_device, least), most)
        reading = _Reading(self.source, self.order)
        waiting: deque[_Batch] = deque()
        try:
            for positions in self.order.positions():
                waiting.append(reading.request(positions))
                if len(waiting) > ahead:
                    yield waiting.popleft().wait()
            while waiting:
                yield waiting.popleft().wait()
        finally:
            reading.close()


@dataclass(frozen=True)
class _Epoch:
    """What one process trains on in one epoch."""

    order: npt.NDArray[np.int64]
    lane_of_row: npt.NDArray[np.int16]
    is_wanted: npt.NDArray[np.bool_]
    """Of each row: whether this process trains on it, in this start of the run."""


@dataclass(frozen=True)
class _Batch:
    """A batch whose images are being read, stretch by stretch."""

    rows: list[int]
    parts: list[Future[dict[int, EncodedImage]]]

    def wait(self) -> list[EncodedImage]:
        found: dict[int, EncodedImage] = {}
        for part in self.parts:
            found |= part.result()
        return [found[row] for row in self.rows]


class _Reading:
    """The stretches that are open, and the threads that read them."""

    def __init__(self, source: StreamSource, order: StreamOrder) -> None:
        self.source = source
        self.order = order
        self.stop = threading.Event()
        self.threads = ThreadPoolExecutor(READERS, thread_name_prefix="read_stretch")
        self.epochs: dict[int, _Epoch] = {}
        self.opened: dict[tuple[int, int, int], _OpenStretch] = {}

    def request(self, positions: npt.NDArray[np.int64]) -> _Batch:
        """Begins to read the images at some positions of the sequence, those of one micro-step."""
        numbers = positions // self.order.num_images
        current = np.unique(numbers).tolist()
        self.epochs = {number: self.epochs.get(number) or self._epoch(number) for number in current}
        lanes = self.order.lanes(positions)
        rows = np.array(
            [self.epochs[n].order[p % self.order.num_images] for n, p in zip(numbers, positions, strict=True)]
        )
        stretches = np.searchsorted(self.source.starts, rows, side="right") - 1
        parts: dict[tuple[int, int, int], list[int]] = {}
        for number, lane, stretch, row in zip(numbers, lanes, stretches, rows, strict=True):
            parts.setdefault((int(number), int(lane), int(stretch)), []).append(int(row))
        return _Batch(rows.tolist(), [self._take(key, wanted) for key, wanted in parts.items()])

    def _take(self, key: tuple[int, int, int], rows: list[int]) -> Future[dict[int, EncodedImage]]:
        if key not in self.opened:
            number, lane, stretch = key
            epoch, begin = self.epochs[number], int(self.source.starts[stretch])
            inside = np.arange(begin, int(self.source.starts[stretch + 1]))
            wanted = inside[epoch.is_wanted[inside] & (epoch.lane_of_row[inside] == lane)]
            self.opened[key] = _OpenStretch(self.source, self.source.stretches[stretch], begin, wanted, self.stop)
        stretch_read = self.opened[key]
        stretch_read.num_left -= len(rows)
        if not stretch_read.num_left:
            del self.opened[key]
        return self.threads.submit(stretch_read.take, rows)

    def _epoch(self, number: int) -> _Epoch:
        order, layout = self.order, self.order.layout
        rows = order.permutation(number)
        positions = number * order.num_images + np.arange(order.num_images)
        lane_of_row = np.empty(order.num_images, dtype=np.int16)
        lane_of_row[rows] = order.lanes(positions)
        is_own = np.zeros(layout.global_batch, dtype=np.bool_)
        for micro_step in range(layout.accumulation):
            is_own[layout.span(micro_step)] = True
        to_come = (positions >= order.first_step * layout.global_batch) & (
            positions < order.max_steps * layout.global_batch
        )
        is_wanted = np.zeros(order.num_images, dtype=np.bool_)
        is_wanted[rows] = is_own[positions % layout.global_batch] & to_come
        return _Epoch(rows, lane_of_row, is_wanted)

    def close(self) -> None:
        """Stops the threads; a read that is under way is waited for."""
        self.stop.set()
        self.threads.shutdown(cancel_futures=True)


class _OpenStretch:
    """A stretch of which one process reads some rows, in their order, and gives them away in another."""

    def __init__(
        self,
        source: StreamSource,
        stretch: Stretch,
        begin: int,
        wanted: npt.NDArray[np.int64],
        stop: threading.Event,
    ) -> None:
        self.source = source
        self.stretch = stretch
        self.begin = begin
        self.wanted = frozenset(wanted.tolist())
        self.first = int(wanted[0])
        self.stop = stop
        self.num_left = len(wanted)
        """Rows that have not been asked for."""
        self.held: dict[int, EncodedImage] = {}
        self.lock = threading.Lock()
        self.next_row = self.first
        self.reading: Iterator[list[EncodedImage]] | None = None
        self.num_taken = 0

    def take(self, rows: list[int]) -> dict[int, EncodedImage]:
        """Reads on until it has the rows, and gives them away."""
        with self.lock:
            while any(row not in self.held for row in rows):
                for image in self._read_on():
                    if image.row in self.wanted:
                        self.held[image.row] = image
            self.num_taken += len(rows)
            if self.num_taken == len(self.wanted):
                self.reading = None  # the file is closed with it
            return {row: self.held.pop(row) for row in rows}

    def _read_on(self) -> list[EncodedImage]:
        """The next images of the stretch; a read that fails is tried again, from the image where it failed."""
        for pause in (*PAUSES, None):
            try:
                if self.reading is None:
                    self.reading = self.source.read(self.stretch, self.begin, self.next_row)
                images = next(self.reading)
                self.next_row = images[-1].row + 1
                return images
            except InputError:
                raise
            # Sockets, HTTP clients and Arrow raise what they like; each of it may be gone at the next try.
            except Exception as error:
                self.reading = None
                if pause is None or not self.source.is_remote:
                    raise self.source.unreadable(self.stretch, error) from error
                logger.warning("%s Trying again in %g s.", self.source.unreadable(self.stretch, error), pause)
                if self.stop.wait(pause):
                    raise
        raise AssertionError("the last try has returned or raised")
