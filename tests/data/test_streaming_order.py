"""The order of streamed images: each once an epoch, the same on any layout, resumable anywhere, and read in one go."""

from collections import Counter
from itertools import chain

import numpy as np
import pytest

from speed_diffusers.data.batch_sampler import BatchLayout
from speed_diffusers.data.streaming_order import StreamOrder

ROWS = np.array([70, 33, 1, 90, 16, 54])


def stream_order(
    layout: BatchLayout, *, rows: np.ndarray = ROWS, buffer: int = 40, first_step: int = 0, max_steps: int = 50
) -> StreamOrder:
    return StreamOrder(rows, layout, shuffle_buffer_size=buffer, seed=0, first_step=first_step, max_steps=max_steps)


def global_batches(processes: int, per_device: int, accumulation: int, **options: int) -> list[list[int]]:
    """What the processes together train on at each optimizer step, in the order of the global batch."""
    layouts = [BatchLayout(per_device, processes, rank, accumulation) for rank in range(processes)]
    micro_steps = [
        list(chain(*parts)) for parts in zip(*(stream_order(one, **options) for one in layouts), strict=True)
    ]
    return [list(chain(*micro_steps[at : at + accumulation])) for at in range(0, len(micro_steps), accumulation)]


@pytest.mark.parametrize("global_batch", [1, 7, 12, 500])
@pytest.mark.parametrize("buffer", [1, 40, 10**6])
def test_every_image_comes_once_an_epoch(global_batch: int, buffer: int) -> None:
    count, steps = int(ROWS.sum()), 3 * int(ROWS.sum()) // global_batch + 1
    order = stream_order(BatchLayout(global_batch), buffer=buffer, max_steps=steps)
    ids = list(chain(*order))
    epochs = [ids[begin : begin + count] for begin in range(0, 3 * count, count)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3, "every epoch has an order of its own"


@pytest.mark.parametrize("first_step", [0, 17, 49])
def test_neither_processes_nor_a_stop_change_the_batches(first_step: int) -> None:
    whole = global_batches(1, 12, 1)
    assert all(len(batch) == 12 for batch in whole) and len(whole) == 50
    for layout in ((2, 6, 1), (2, 3, 2), (4, 3, 1), (1, 4, 3), (3, 2, 2)):
        assert global_batches(*layout, first_step=first_step) == whole[first_step:]


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_each_process_reads_stretches_of_its_own(processes: int) -> None:
    rows = np.full(96, 10)
    ends = np.cumsum(rows)
    readers: Counter[int] = Counter()
    for rank in range(processes):
        order = stream_order(BatchLayout(16 // processes, processes, rank), rows=rows, max_steps=60)
        assert order.num_lanes == 16
        readers.update(set(np.searchsorted(ends, list(chain(*order)), side="right").tolist()))
    assert set(readers) == set(range(96))
    # Where the lanes are cut, two of them share a stretch.
    assert sum(count > 1 for count in readers.values()) <= processes - 1


@pytest.mark.parametrize(("global_batch", "stretches", "lanes"), [(256, 1000, 32), (96, 1000, 32), (34, 20, 17)])
def test_lanes_divide_the_batch_and_have_a_stretch_each(global_batch: int, stretches: int, lanes: int) -> None:
    order = stream_order(BatchLayout(global_batch), rows=np.full(stretches, 8))
    assert order.num_lanes == lanes
    assert set(np.bincount(order.lanes(np.arange(global_batch)))) == {global_batch // lanes}


@pytest.mark.parametrize("buffer", [1, 64, 300])
def test_no_more_images_wait_than_the_buffer_holds(buffer: int) -> None:
    rows = np.full(60, 100)
    order = stream_order(BatchLayout(8), rows=rows, buffer=buffer)
    ids, lanes = order.permutation(1), order.lanes(6000 + np.arange(6000))
    waiting_most = 0
    for lane in range(8):
        # One behind the other as they are read: stretches in the order in which they begin, rows within them.
        mine = ids[lanes == lane]
        stretches = list(dict.fromkeys((mine // 100).tolist()))
        read = sorted(mine.tolist(), key=lambda row: (stretches.index(row // 100), row))
        place = {row: at for at, row in enumerate(read)}
        furthest = np.maximum.accumulate([place[row] for row in mine.tolist()])
        waiting = furthest - np.arange(len(mine))
        waiting_most += waiting.max()
        assert (waiting == 0).all() == (buffer == 1)
    assert waiting_most <= max(buffer, 8)
    assert buffer == 1 or waiting_most > buffer / 3


def test_a_buffer_for_all_images_shuffles_them_for_good() -> None:
    order = stream_order(BatchLayout(1), rows=np.array([4, 6]), buffer=10)
    counts = Counter((place, int(row)) for epoch in range(2000) for place, row in enumerate(order.permutation(epoch)))
    # 200 expected each, standard deviation 13.4
    assert len(counts) == 100 and all(130 < count < 270 for count in counts.values())
