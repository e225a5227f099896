"""The processes of one run that generate a set of images together: the same images as one would, on all of them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

_FAILED = -1
Value = TypeVar("Value")


@dataclass(frozen=True)
class Processes:
    """Who generates together.

    Attributes:
        rank: Number of this process, from 0.
        size: How many there are; all of them must ask for the same images.
        device: By which they exchange tensors: the one that the network is on.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")

    @classmethod
    def of_process_group(cls, device: torch.device) -> "Processes":
        """Those of torch's process group; this one alone where there is none.

        Args:
            device: Where the network is.
        """
        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        return cls(dist.get_rank(), dist.get_world_size(), device)

    def in_turn(self, batches: Iterator[npt.NDArray[np.float32]], count: int) -> Iterator[npt.NDArray[np.float32]]:
        """Gives every process the batches of all, in order, of which each has made every `size`-th.

        Args:
            batches: This process's own, float32 (b, H, W, 3): the ones whose numbers leave `rank` over when divided by
                `size`.
            count: Of all processes together.

        Yields:
            Every batch.

        Raises:
            FloatingPointError: What another process generated is not finite; what its own iterator raises, a process
                raises after it has told the others.
        """
        for first in range(0, count, self.size):
            mine: npt.NDArray[np.float32] | None = None
            error: Exception | None = None
            if first + self.rank < count:
                try:
                    mine = next(batches)
                except Exception as raised:  # told to the others below, who would wait for this process
                    error = raised
            shapes = self._gathered(self._shape(mine, failed=error is not None))
            if error is not None:
                raise error
            if failed := [rank for rank, shape in enumerate(shapes.tolist()) if shape[0] == _FAILED]:
                raise FloatingPointError(f"Process {failed[0]} could not generate its images; it says why.")
            largest = tuple(shapes.amax(0).tolist())
            own = torch.zeros(largest, device=self.device)
            if mine is not None:
                own[: len(mine)] = torch.from_numpy(mine)
            every = self._gathered(own).cpu().numpy()
            for images, shape in zip(every, shapes.tolist(), strict=True):
                if shape[0]:
                    yield images[: shape[0]]

    def of_the_first(self, value: Value) -> Value:
        """What process 0 gives, on every process.

        Args:
            value: Anything that can be pickled; of the others it is not asked.
        """
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, device=self.device)
        return values[0]

    def _shape(self, images: npt.NDArray[np.float32] | None, *, failed: bool) -> torch.Tensor:
        shape = (0, 0, 0, 0) if images is None else images.shape
        return torch.tensor((_FAILED, 0, 0, 0) if failed else shape, device=self.device)

    def _gathered(self, tensor: torch.Tensor) -> torch.Tensor:
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(parts, tensor)
        return torch.stack(parts)


ALONE = Processes()
