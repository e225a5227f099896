"""Which images make which batch: a function of (seed, step), whatever the number of processes."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..randomness import keyed_seed


@dataclass(frozen=True)
class BatchLayout:
    """How a global batch falls into micro-steps and processes.

    Position i of the global batch belongs to micro-step i // (processes x per_device), and within it to process
    (i // per_device) % processes. One process that accumulates twice thus sees what two processes see together.

    Attributes:
        per_device: Images a process takes at once.
        processes: Number of processes.
        rank: This process.
        accumulation: Micro-steps per optimizer step.
    """

    per_device: int
    processes: int = 1
    rank: int = 0
    accumulation: int = 1

    @property
    def global_batch(self) -> int:
        """Images per optimizer step, over all processes."""
        return self.per_device * self.processes * self.accumulation

    def span(self, micro_step: int) -> slice:
        """Positions in the global batch of this process at one micro-step."""
        start = (micro_step * self.processes + self.rank) * self.per_device
        return slice(start, start + self.per_device)


class BatchOrder:
    """Endless batch sampler: ids for one process, one list per micro-step, from any optimizer step on.

    The data is read as one endless sequence of permutations, one per epoch, each made from (seed, epoch). Optimizer
    step s takes the positions from s x global_batch on, so every image comes exactly once an epoch, none is left over
    at its end, and a resumed run needs to know nothing but its step.

    Args:
        num_images: Size of the data, at least 1.
        layout: How a global batch is split.
        seed: Seed of the run.
        first_step: Optimizer step at which to begin, from 0.
        max_steps: Optimizer step at which to end.
    """

    def __init__(self, num_images: int, layout: BatchLayout, *, seed: int, first_step: int, max_steps: int) -> None:
        self.num_images = num_images
        self.layout = layout
        self.seed = seed
        self.first_step = first_step
        self.max_steps = max_steps

    def __iter__(self) -> Iterator[list[int]]:
        epochs: dict[int, np.ndarray] = {}
        for positions in self.positions():
            current = np.unique(positions // self.num_images).tolist()
            epochs = {epoch: epochs[epoch] if epoch in epochs else self.permutation(epoch) for epoch in current}
            yield [int(epochs[p // self.num_images][p % self.num_images]) for p in positions.tolist()]

    def positions(self) -> Iterator[npt.NDArray[np.int64]]:
        """Places of this process's images in the endless sequence, int64 (per_device,), micro-step by micro-step."""
        for step in range(self.first_step, self.max_steps):
            begin = step * self.layout.global_batch
            for micro_step in range(self.layout.accumulation):
                span = self.layout.span(micro_step)
                yield np.arange(begin + span.start, begin + span.stop)

    def __len__(self) -> int:
        return (self.max_steps - self.first_step) * self.layout.accumulation

    def permutation(self, epoch: int) -> np.ndarray:
        """The order of one epoch, int64 (num_images,)."""
        return np.random.default_rng(keyed_seed(self.seed, "epoch order", epoch)).permutation(self.num_images)
