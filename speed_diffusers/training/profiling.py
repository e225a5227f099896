"""Where a training step goes: names for its parts, and a count of the operations that each of them dispatches."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import record_function
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import unknown_name

PARTS = (
    "data",
    "draws",
    "latents",
    "forward and loss",
    "backward",
    "gradient norm",
    "optimizer",
    "learning rate",
    "ema",
    "logging",
    "checkpoint",
    "validation",
)
"""The parts of a step of the training script, in their order, by the labels that a profiler sees."""

OTHER = "other"
"""What carries no label."""

SCALAR_READ = "aten._local_scalar_dense"
"""What `.item()`, `float()`, `bool()` and `int()` of a tensor come down to."""

# The size of what these return, or the answer itself, depends on values, so the host waits for the device.
_WAITING = {
    SCALAR_READ,
    *(
        f"aten.{name}"
        for name in ("nonzero", "masked_select", "equal", "bincount", "_unique2", "unique_dim", "unique_consecutive")
    ),
}
_INDEXING = {"aten.index", "aten.index_put", "aten.index_put_", "aten._index_put_impl_"}


def labelled(part: str) -> record_function:
    """Names a part of a step for profilers; a context, or a decorator of the function that is the part.

    It costs some microseconds where nobody looks, and changes nothing that is computed.

    Args:
        part: One of `PARTS`.

    Raises:
        InputError: No part of this name.
    """
    if part not in PARTS:
        raise unknown_name("part of a step", part, PARTS)
    return record_function(part)


def part_times(events: list[FunctionEvent]) -> tuple[dict[str, float], dict[str, float]]:
    """Mean milliseconds per step of each part, on the host and in kernels on the device.

    A kernel belongs to the part during which the host launched it, on whatever thread: autograd has its own for a GPU.

    Args:
        events: What the profiler recorded, whole steps.
    """
    host_events = [event for event in events if event.device_type == DeviceType.CPU]
    steps = [event for event in host_events if event.name.startswith("ProfilerStep")]
    parts = [event for event in host_events if event.name in PARTS]
    host, on_device = dict.fromkeys((*PARTS, OTHER), 0.0), dict.fromkeys((*PARTS, OTHER), 0.0)
    for event in parts:
        host[event.name] += event.time_range.elapsed_us() / 1e3 / len(steps)
    total = sum(event.time_range.elapsed_us() for event in steps) / 1e3 / len(steps)
    host[OTHER] = total - sum(host.values())
    for event in host_events:
        if event.kernels and not event.is_user_annotation:
            start = event.time_range.start
            name = next((part.name for part in parts if part.time_range.start <= start <= part.time_range.end), OTHER)
            on_device[name] += sum(kernel.duration for kernel in event.kernels) / 1e3 / len(steps)
    return host, on_device


class OperationCounter(TorchDispatchMode):
    """Counts the operations that torch dispatches within its context, and those that make the host wait.

    Each counted operation costs the host some microseconds, and on a GPU mostly a launch, whatever the size of its
    tensors. Views and bookkeeping count too; a fused or foreach operation counts once, however many tensors it takes.
    A wait that an operation does within itself, unseen by torch's dispatcher, is not counted, and of a tensor that
    already lives on the CPU `.cpu()`, `.numpy()` and `.tolist()` dispatch nothing.

    Args:
        labels: Names under `record_function` to count by; the innermost one that is open gets an operation.

    Attributes:
        by_part: Label, or `OTHER`, to the number of times that each operation was dispatched under it.
        host_waits: Operations to the number of times that they would have made the host wait for a device: reads of
            a number, results whose size depends on values, and copies from a device to the CPU.
    """

    def __init__(self, labels: Sequence[str] = PARTS) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.by_part: dict[str, Counter[str]] = {label: Counter() for label in (*labels, OTHER)}
        self.host_waits: Counter[str] = Counter()
        self._open: list[str] = []

    @property
    def operations(self) -> Counter[str]:
        """Operations to the number of times that they were dispatched, under any label."""
        return sum(self.by_part.values(), Counter())

    @property
    def total(self) -> int:
        """Number of operations dispatched."""
        return self.operations.total()

    @property
    def scalar_reads(self) -> int:
        """How often the host asked a tensor for a number."""
        return sum(count for name, count in self.host_waits.items() if name.startswith(SCALAR_READ))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet = str(func.overloadpacket)
        # record_function comes through the dispatcher itself.
        if packet == "profiler._record_function_enter_new":
            self._open.append(args[0])
        elif packet == "profiler._record_function_exit":
            if self._open:
                self._open.pop()
        else:
            part = next((label for label in reversed(self._open) if label in self.by_part), OTHER)
            self.by_part[part][str(func)] += 1
            self.host_waits[str(func)] += _waits(packet, args, kwargs)
        return func(*args, **kwargs)


def _waits(packet: str, args: Any, kwargs: Any) -> bool:
    """Whether an operation makes the host wait for the device of its tensors."""
    if packet in _INDEXING:
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    if packet == "aten._to_copy":
        target = kwargs.get("device")
        leaves_device = target is not None and torch.device(target).type == "cpu" and _on_device(args[0])
        return leaves_device and not kwargs.get("non_blocking", False)
    if packet == "aten.copy_":
        blocking = not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
        return blocking and _on_device(args[1]) and not _on_device(args[0])
    return packet in _WAITING


def _on_device(tensor: Tensor) -> bool:
    return tensor.device.type != "cpu"
