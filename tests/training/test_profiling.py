"""Counting operations and host waits, and the labels that they are counted by."""

import pytest
import torch
from torch.profiler import profile, record_function

from speed_diffusers.errors import InputError
from speed_diffusers.training.profiling import OTHER, PARTS, OperationCounter, labelled


def test_operations_are_counted_by_the_innermost_label() -> None:
    x = torch.ones(3, 3)

    @labelled("ema")
    def average() -> None:
        x.add(1)

    with OperationCounter() as counter:
        x.mul(2)
        with labelled("optimizer"):
            x.add(1)
            with record_function("a label of somebody else"):
                x.add(1)
            average()
            x.mm(x)
        average()
    found = {part: dict(operations) for part, operations in counter.by_part.items() if operations}
    assert found == {
        OTHER: {"aten.mul.Tensor": 1},
        "optimizer": {"aten.add.Tensor": 2, "aten.mm.default": 1},
        "ema": {"aten.add.Tensor": 2},
    }
    assert counter.total == 6 and counter.operations["aten.add.Tensor"] == 4
    assert set(counter.by_part) == {*PARTS, OTHER}


def test_labels_of_ones_own_count_within_a_part() -> None:
    x = torch.ones(3)
    with OperationCounter(("network",)) as counter, labelled("backward"):
        x.add(1)
        with record_function("network"):
            x.add(1)
    assert counter.by_part["network"].total() == counter.by_part[OTHER].total() == 1


def test_the_backward_pass_is_counted() -> None:
    x = torch.ones(3, 3, requires_grad=True)
    y = (x @ x).sum()
    with OperationCounter() as counter, labelled("backward"):
        y.backward()
    assert counter.by_part["backward"]["aten.mm.default"] == 2
    assert counter.by_part[OTHER].total() == 0


@pytest.mark.parametrize("read", [torch.Tensor.item, float, bool, int])
def test_a_number_that_is_read_is_a_wait(read: object) -> None:
    x = torch.ones(())
    with OperationCounter() as counter:
        read(x)  # type: ignore[operator]
    assert counter.scalar_reads == counter.host_waits.total() == 1


@pytest.mark.parametrize(
    "operation",
    [
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.index_put_((x > 0,), torch.ones(3)),
        lambda x: x.masked_select(x > 0),
        lambda x: torch.equal(x, x),
        lambda x: x.unique(),
        lambda x: torch.bincount(x.long()),
    ],
    ids=["nonzero", "mask", "assignment by mask", "masked_select", "equal", "unique", "bincount"],
)
def test_what_depends_on_values_is_a_wait(operation: object) -> None:
    x = torch.ones(3)
    with OperationCounter() as counter:
        operation(x)  # type: ignore[operator]
    assert counter.host_waits.total() == 1 and counter.scalar_reads == 0


def test_a_copy_from_a_device_is_a_wait() -> None:
    # A meta tensor refuses to be copied, after the copy was asked for.
    on_device, on_cpu = torch.ones(3, device="meta"), torch.ones(3)
    with OperationCounter() as counter:
        for copy in (lambda: on_device.to("cpu"), lambda: on_cpu.copy_(on_device)):
            with pytest.raises(NotImplementedError):
                copy()
        for copy in (lambda: on_device.to("cpu", non_blocking=True), lambda: on_cpu.copy_(on_device, True)):
            with pytest.raises(NotImplementedError):
                copy()
        on_cpu.to("meta")
        on_device.copy_(on_cpu)
        on_cpu.to(torch.float64)
    assert counter.host_waits.total() == 2


def test_arithmetic_and_indexing_by_rows_wait_for_nothing() -> None:
    x = torch.rand(5, 3)
    with OperationCounter() as counter:
        y = x[torch.tensor([0, 2])].exp()
        y = torch.where(y > 1, y, 0.0)
        y.add_(1).sum().clamp(max=1)
    assert counter.total > 5 and counter.host_waits.total() == 0


def test_profilers_see_the_labels() -> None:
    with profile() as profiler, labelled("gradient norm"):
        torch.ones(3).norm()
    (event,) = [event for event in profiler.events() if event.name == "gradient norm"]
    assert "aten::linalg_vector_norm" in {child.name for child in event.cpu_children}


def test_an_unknown_part_is_refused() -> None:
    with pytest.raises(InputError, match="part of a step.*optimiser.*optimizer"):
        labelled("optimiser")
