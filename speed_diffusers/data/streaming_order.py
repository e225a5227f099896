"""The order of streamed images: stretches at random, rows at random within a buffer; a function of seed and epoch."""

import numpy as np
import numpy.typing as npt

from ..randomness import keyed_seed
from .batch_sampler import BatchLayout, BatchOrder

MOST_LANES = 32
"""Of so many places of the set, at most, the images of a batch are."""


class StreamOrder(BatchOrder):
    """As `BatchOrder`, every image once an epoch; but neighbours come soon after one another, to be read together.

    An epoch's stretches, in random order one behind the other, are cut into lanes of equal length. Each position of a
    global batch belongs to one lane, always the same, so that every process reads lanes of its own; each lane goes
    through its rows in their order, but for a random shift of up to its share of the buffer (as in the order "py1e"
    of mosaicml-streaming). All of it follows from seed, epoch, global batch and the stretches' numbers of rows.
    """

    def __init__(
        self,
        stretch_rows: npt.NDArray[np.int64],
        layout: BatchLayout,
        *,
        shuffle_buffer_size: int,
        seed: int,
        first_step: int,
        max_steps: int,
    ) -> None:
        """Lays out the lanes.

        Args:
            stretch_rows: Rows of each stretch, int64 (S,), each at least 1.
            layout: How a global batch is split.
            shuffle_buffer_size: Images that may wait, over all lanes, for their turn; 1: none does.
            seed: Seed of the run.
            first_step: Optimizer step at which to begin, from 0.
            max_steps: Optimizer step at which to end.
        """
        super().__init__(int(stretch_rows.sum()), layout, seed=seed, first_step=first_step, max_steps=max_steps)
        self.stretch_rows = stretch_rows
        self.starts = np.cumsum(stretch_rows) - stretch_rows
        self.num_lanes = _num_lanes(layout.global_batch, len(stretch_rows))
        self.buffer_per_lane = -(-shuffle_buffer_size // self.num_lanes)

    def lanes(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The lane, 0..num_lanes-1, of each position in the endless sequence of images."""
        return positions % self.layout.global_batch * self.num_lanes // self.layout.global_batch

    def permutation(self, epoch: int) -> npt.NDArray[np.int64]:
        """The order of one epoch, int64 (num_images,)."""
        count = self.num_images
        rng = np.random.default_rng(keyed_seed(self.seed, "epoch order", epoch))
        shuffled = rng.permutation(len(self.stretch_rows))
        rows = self.stretch_rows[shuffled]
        in_stretch = np.arange(count) - np.repeat(np.cumsum(rows) - rows, rows)
        sequence = np.repeat(self.starts[shuffled], rows) + in_stretch

        lanes = self.lanes(np.arange(epoch * count, (epoch + 1) * count))
        lengths = np.bincount(lanes, minlength=self.num_lanes)
        in_lane = np.arange(count) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        # A lane that fits into its buffer is shuffled for good, not only shifted.
        starts = np.where(np.repeat(lengths, lengths) <= self.buffer_per_lane, 0, in_lane)
        turns = starts + self.buffer_per_lane * rng.random(count)
        order = np.empty(count, dtype=np.int64)
        lane_by_lane = np.argsort(lanes, kind="stable")
        order[lane_by_lane] = sequence[np.lexsort((turns, lanes[lane_by_lane]))]
        return order


def _num_lanes(global_batch: int, num_stretches: int) -> int:
    """The most that divide the global batch, if every lane is to have a stretch of its own."""
    most = min(MOST_LANES, num_stretches, global_batch)
    return next(count for count in range(most, 0, -1) if global_batch % count == 0)
