"""Which images make which batch: every id once an epoch, the same global batch on any layout, resumable anywhere."""

from collections import Counter
from itertools import chain, islice

import pytest

from speed_diffusers.data.batch_sampler import BatchLayout, BatchOrder

LAYOUTS = [(1, 4), (2, 2), (4, 1)]  # processes, accumulation


def batches_of(
    num_images: int, layout: BatchLayout, *, seed: int = 0, first_step: int = 0, max_steps: int = 10
) -> list[list[int]]:
    return list(BatchOrder(num_images, layout, seed=seed, first_step=first_step, max_steps=max_steps))


def global_batches(num_images: int, processes: int, accumulation: int, *, per_device: int = 3, **o: int) -> list[list]:
    """What the processes together train on at each optimizer step, in the order of the global batch."""
    layouts = [BatchLayout(per_device, processes, rank, accumulation) for rank in range(processes)]
    per_rank = [batches_of(num_images, layout, **o) for layout in layouts]
    micro_steps = [list(chain(*together)) for together in zip(*per_rank, strict=True)]
    return [list(chain(*micro_steps[i : i + accumulation])) for i in range(0, len(micro_steps), accumulation)]


@pytest.mark.parametrize(("processes", "accumulation"), LAYOUTS)
def test_spans_tile_the_global_batch(processes: int, accumulation: int) -> None:
    positions = []
    for micro_step in range(accumulation):
        for rank in range(processes):
            layout = BatchLayout(3, processes, rank, accumulation)
            assert layout.global_batch == 12
            positions.extend(range(12)[layout.span(micro_step)])
    assert positions == list(range(12))


@pytest.mark.parametrize(("num_images", "per_device"), [(24, 4), (26, 4), (7, 3), (9, 9)])
def test_every_image_comes_once_an_epoch(num_images: int, per_device: int) -> None:
    epochs = 4
    steps = -(-epochs * num_images // per_device)
    ids = list(chain(*batches_of(num_images, BatchLayout(per_device), max_steps=steps)))[: epochs * num_images]
    passes = [ids[start : start + num_images] for start in range(0, len(ids), num_images)]
    assert len(passes) == epochs
    assert all(sorted(one) == list(range(num_images)) for one in passes)
    assert len({tuple(one) for one in passes}) == epochs, "every epoch has an order of its own"


def test_batches_cross_the_turn_of_an_epoch() -> None:
    layout = BatchLayout(4)
    order = BatchOrder(6, layout, seed=0, first_step=0, max_steps=3)
    first, second = order.permutation(0).tolist(), order.permutation(1).tolist()
    assert list(order) == [first[:4], [*first[4:], *second[:2]], second[2:]]


@pytest.mark.parametrize("num_images", [1, 2, 5])
def test_data_smaller_than_a_batch(num_images: int) -> None:
    batches = batches_of(num_images, BatchLayout(12), max_steps=5)
    assert all(len(batch) == 12 for batch in batches)
    counts = Counter(chain(*batches))
    assert set(counts) == set(range(num_images)) and max(counts.values()) - min(counts.values()) <= 1


@pytest.mark.parametrize("num_images", [26, 100, 5])
def test_every_layout_sees_the_same_global_batches(num_images: int) -> None:
    one, two, four = (global_batches(num_images, *layout) for layout in LAYOUTS)
    assert one == two == four
    assert len(one) == 10 and all(len(batch) == 12 for batch in one)


@pytest.mark.parametrize(("processes", "accumulation"), LAYOUTS)
@pytest.mark.parametrize("first_step", [0, 1, 3, 9, 10])
def test_resuming_at_any_step_goes_on_where_it_stopped(processes: int, accumulation: int, first_step: int) -> None:
    whole = global_batches(26, processes, accumulation)
    assert global_batches(26, processes, accumulation, first_step=first_step) == whole[first_step:]


def test_resuming_on_another_layout_goes_on_where_it_stopped() -> None:
    assert global_batches(26, 4, 1, first_step=4) == global_batches(26, 1, 4)[4:]


@pytest.mark.parametrize(("accumulation", "first_step", "length"), [(1, 0, 10), (4, 0, 40), (4, 3, 28), (2, 10, 0)])
def test_length_counts_micro_steps(accumulation: int, first_step: int, length: int) -> None:
    order = BatchOrder(26, BatchLayout(3, 1, 0, accumulation), seed=0, first_step=first_step, max_steps=10)
    assert len(order) == length == len(list(order))


def test_order_is_a_function_of_the_seed() -> None:
    layout = BatchLayout(8)
    assert batches_of(50, layout, seed=1) == batches_of(50, layout, seed=1) != batches_of(50, layout, seed=2)


def test_iterating_twice_gives_the_same() -> None:
    order = BatchOrder(26, BatchLayout(3), seed=0, first_step=2, max_steps=9)
    assert list(order) == list(order)


def test_ids_are_plain_integers_and_far_steps_are_reached_at_once() -> None:
    order = BatchOrder(1_000, BatchLayout(4), seed=0, first_step=10**9, max_steps=10**9 + 3)
    batches = list(islice(order, 3))
    assert all(type(image) is int and 0 <= image < 1_000 for image in chain(*batches))
    assert len(set(chain(*batches))) == 12


def test_first_images_of_epochs_are_spread_over_the_data() -> None:
    order = BatchOrder(10, BatchLayout(1), seed=0, first_step=0, max_steps=1)
    counts = Counter(int(order.permutation(epoch)[0]) for epoch in range(2_000))
    # 200 expected each, standard deviation 13.4
    assert all(140 < counts[image] < 260 for image in range(10))
