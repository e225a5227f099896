"""Who holds up a run of several processes: told by the places that ranks leave in a store, without waiting."""

import threading
import time
from collections.abc import Callable
from datetime import timedelta
from types import SimpleNamespace

import pytest
from accelerate import DistributedType
from accelerate.state import PartialState
from torch.distributed import HashStore

from speed_diffusers.errors import InputError
from speed_diffusers.training import parts
from speed_diffusers.training.config import TrainConfig
from speed_diffusers.training.parts import make_accelerator, start_process
from speed_diffusers.training.ranks import Ranks


class Clock:
    """Seconds that pass only when told to; events that are waited for pass them at once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def three_ranks(silent: int | None = None) -> list[Ranks]:
    """Ranks of one store that all tell their place whenever one of them looks around, but for a silent one."""
    store = HashStore()
    ranks = [Ranks(rank, 3, store, timeout=80.0) for rank in range(3)]

    def pass_a_period(seconds: float) -> bool:
        for each in ranks:
            if each.rank != silent:
                each.tell()
        return False

    for each in ranks:
        each.tell()
        each._closed.wait = pass_a_period  # type: ignore[assignment, method-assign]
    return ranks


def test_the_rank_that_is_behind_is_named_once_and_by_one_rank(clock: Clock) -> None:
    ranks = three_ranks()
    for each in ranks:
        each.at(7, "data")
    for rank in (0, 2):
        ranks[rank].at(7, "update")
    clock.now = 39.0
    assert [each.warning() for each in ranks] == [None, None, None], "before half of the timeout"
    clock.now = 41.0
    told = "Rank 1 holds up the run at step 7 (data); others wait at step 7 (update). After ddp_timeout=80 s"
    warnings = [each.warning() for each in ranks]
    assert warnings[0] is not None and warnings[0].startswith(told) and warnings[1:] == [None, None]
    assert ranks[0].warning() is None
    ranks[1].at(7, "update")
    for each in ranks:
        each.at(8, "data")
    assert [each.warning() for each in ranks] == [None, None, None], "it goes on"


def test_long_work_in_which_all_get_on_is_no_standstill(clock: Clock) -> None:
    ranks = three_ranks()
    for clock.now in (30.0, 60.0, 90.0):
        for each in ranks:
            each.gets_on()
    clock.now = 129.0
    assert [each.warning() for each in ranks] == [None, None, None]
    clock.now = 131.0
    warning = ranks[0].warning()
    assert warning is not None and warning.startswith("All ranks stand still at step 0 (start) for 41 s")


def test_a_rank_that_is_not_heard_of_is_named_by_the_next(clock: Clock) -> None:
    ranks = three_ranks(silent=0)
    for each in ranks:
        each.at(7, "update")
    clock.now = 41.0
    warning = ranks[1].warning()
    assert warning is not None and warning.startswith("Rank 0: no sign of life; last seen at step 0 (start).")
    assert ranks[2].warning() is None


def test_work_of_one_rank_that_the_others_wait_for_has_no_end(clock: Clock) -> None:
    ranks = three_ranks()
    for each in ranks:
        each.at(7, "checkpoint")
    meeting = [threading.Thread(target=each.meet, daemon=True) for each in ranks[1:]]
    for thread in meeting:
        thread.start()
    while int(ranks[0].store.add("meeting 1", 0)) < 2:
        pass
    clock.now = 41.0
    warning = ranks[0].warning()
    assert warning == "Rank 0 holds up the run at step 7 (checkpoint); others wait at step 7 (waiting for all)."
    clock.now = 10_000.0
    ranks[0].meet()
    for thread in meeting:
        thread.join(10)
        assert not thread.is_alive()


def test_nobody_waits_for_a_rank_that_has_gone(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = three_ranks(silent=2)
    monkeypatch.setattr(time, "sleep", lambda seconds: setattr(clock, "now", clock.now + 30.0))
    ranks[0].store.add("meeting 1", 1)
    with pytest.raises(TimeoutError, match=r"Rank 2: no sign of life; last seen at step 0 \(start\)"):
        ranks[0].meet()


def test_a_rank_that_ends_after_a_meeting_was_in_it_and_one_that_ends_before_was_not(clock: Clock) -> None:
    ranks = three_ranks()
    store = ranks[0].store
    for key in ("meeting 1", "end of meeting 1"):
        store.add(key, 2)
    ranks[0].meet()
    ranks[0].close()
    store.add("meeting 1", -1)
    ranks[1].meet()
    with pytest.raises(ConnectionError, match="Rank 0 has ended at step 0"):
        ranks[1].meet()


def test_a_rank_that_ends_right_after_a_meeting_does_not_hurry_rank_0_away_from_one_that_is_still_in_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ranks = three_ranks()
    store = ranks[0].store
    assert store is not None
    store.add("meeting 1", 2)
    store.add("end of meeting 1", 1)
    ranks[2].close()
    waited = []

    def another_look(seconds: float) -> None:
        waited.append(seconds)
        if len(waited) == 3:
            store.add("end of meeting 1", 1)  # rank 1 has read that the meeting is over

    monkeypatch.setattr(time, "sleep", another_look)
    ranks[0].meet()
    assert len(waited) == 3


def test_one_process_has_nobody_to_meet() -> None:
    ranks = Ranks(0, 1, None, timeout=80.0)
    ranks.at(1, "data")
    ranks.meet()


def test_the_timeout_is_that_of_the_process_group(
    fresh_accelerate: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {}
    made = PartialState.__init__

    def note(self: PartialState, cpu: bool = False, **options: object) -> None:
        given.update(options)
        made(self, cpu, **options)

    monkeypatch.setattr(PartialState, "__init__", note)
    make_accelerator(TrainConfig())
    assert given["timeout"] == timedelta(minutes=10)
    with pytest.raises(InputError, match=r"ddp_timeout=0: must lie in \[1, 604800\]"):
        TrainConfig(ddp_timeout=0)


@pytest.mark.parametrize("start", [lambda: make_accelerator(TrainConfig()), start_process], ids=["training", "other"])
def test_accelerate_has_joined_as_many_processes_as_were_launched(
    start: Callable[[], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = SimpleNamespace(num_processes=1, distributed_type=DistributedType.NO, mixed_precision="no")
    for name in ("Accelerator", "PartialState"):
        monkeypatch.setattr(parts, name, lambda **options: alone)
    monkeypatch.setenv("WORLD_SIZE", "-1")
    assert start() is alone, "-1 says that there is one process"
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match=r"^WORLD_SIZE=2, but accelerate runs 1 process\(es\); on CPUs launch with: "):
        start()
