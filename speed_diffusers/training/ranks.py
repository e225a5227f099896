"""What the processes of a run know of one another besides tensors: where each of them is, and who holds up the rest.

A collective that times out does not say which rank did not come. So every rank keeps its place in the store by which
the process group was made, and reads there who is behind.
"""

import json
import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from typing import NamedTuple

from accelerate import Accelerator
from torch.distributed import DistError, PrefixStore, Store  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import _get_default_store

logger = logging.getLogger(__name__)

MEETING = "waiting for all"
"""The part of a step at which a rank is while it waits in `Ranks.meet`."""

_GONE = "gone"
_PERIODS_OF_SILENCE = 3
_RANKS_NAMED = 8
_numbers = count()


class Place(NamedTuple):
    """Where a rank is.

    Attributes:
        number: Of the places that it has come to; all ranks come to the same ones.
        step: Optimizer step at hand, from 1; 0 before the first.
        part: What of the step.
        beat: How often the rank has told where it is.
    """

    number: int = 0
    step: int = 0
    part: str = "start"
    beat: int = 0

    def __str__(self) -> str:
        return f"step {self.step} ({self.part})"


class Ranks:
    """Keeps each rank's place known to the others, and warns who holds up a run that stands still.

    To note its place costs a rank nothing: a thread tells the others, some 16 times within the timeout.

    Args:
        rank: Of this process.
        size: How many there are.
        store: What they share; None for one process, which has nobody to tell.
        timeout: Seconds after which the process group ends a collective; the warning comes after half of them.
    """

    def __init__(self, rank: int, size: int, store: Store | None, timeout: float) -> None:
        self.rank, self.size, self.store, self.timeout = rank, size, store, timeout
        self.period = min(10.0, timeout / 16)
        self._place, self._since, self._beat, self._warned_at = Place(), time.monotonic(), 0, -1
        self._meetings = 0
        self._closed = threading.Event()

    @classmethod
    def of(cls, accelerator: Accelerator, timeout: float) -> "Ranks":
        """Those of accelerate's process group, with the thread that tells; every process must call it."""
        store, number = None, next(_numbers)
        if accelerator.num_processes > 1:
            store = PrefixStore(f"speed_diffusers {number}", _get_default_store())
        ranks = cls(accelerator.process_index, accelerator.num_processes, store, timeout)
        if store is not None:
            threading.Thread(target=ranks._tell_and_look, name="ranks", daemon=True).start()
        return ranks

    def at(self, step: int, part: str) -> None:
        """Notes the place to which this rank has come; all ranks must come to the same ones.

        Args:
            step: Optimizer step at hand, from 1.
            part: What of it, in a word or two.
        """
        self._place = Place(self._place.number + 1, step, part)
        self._since = time.monotonic()

    def gets_on(self) -> None:
        """Notes that this rank does not stand still, though it comes to no new place."""
        self._since = time.monotonic()

    def meet(self) -> None:
        """Waits for all ranks, however long one of them works alone: in a collective they would time out.

        Raises:
            ConnectionError: A rank has ended before it came.
            TimeoutError: A rank gives no sign of life, after the timeout.
        """
        if self.store is None:
            return
        self.at(self._place.step, MEETING)
        self._meetings += 1
        meeting, end = f"meeting {self._meetings}", f"end of meeting {self._meetings}"
        self.store.add(meeting, 1)
        self._wait_for_all(self.store, meeting, minds_the_gone=True)
        self.store.add(end, 1)
        if self.rank == 0:
            # The store may live in this process, which must leave last. Whoever has gone by now was in the meeting,
            # and that others have not read yet that it is over is no reason to leave them.
            self._wait_for_all(self.store, end, minds_the_gone=False)

    def _wait_for_all(self, store: Store, key: str, *, minds_the_gone: bool) -> None:
        looked = self._since
        while True:
            # Asked before the count: who ended after this meeting was in it.
            has_gone = minds_the_gone and store.check([_GONE])
            if store.add(key, 0) == self.size:
                return
            if has_gone:
                raise ConnectionError(self._has_ended(store))
            # Rarely once it takes long, for the store is one process.
            time.sleep(min(1.0, 0.01 + (time.monotonic() - self._since) / 20))
            if time.monotonic() - looked > self.timeout:
                places, silent = self._look_around()
                if silent:
                    raise TimeoutError(_no_sign_of_life(places, silent))
                looked = time.monotonic()

    def tell(self) -> None:
        """Puts this rank's place into the store."""
        assert self.store is not None
        self._beat += 1
        self.store.set(str(self.rank), json.dumps(self._place._replace(beat=self._beat)))

    def warning(self) -> str | None:
        """Who holds up the run; None if it goes on, this rank has said so already, or a lower one will."""
        place, waited = self._place, time.monotonic() - self._since
        if waited < self.timeout / 2 or place.number == self._warned_at:
            return None
        self._warned_at = place.number
        places, silent = self._look_around()
        if self.rank != min(rank for rank in range(self.size) if rank not in silent):
            return None
        ending = f" After ddp_timeout={self.timeout:g} s of waiting the run ends."
        if silent:
            return _no_sign_of_life(places, silent) + ending
        last = min(each.number for each in places)
        behind = [rank for rank, each in enumerate(places) if each.number == last]
        if len(behind) == self.size:
            return f"All ranks stand still at {place} for {waited:.0f} s: a device or the network is stuck.{ending}"
        ahead = next(each for each in places if each.number > last)
        if ahead.part == MEETING:  # of which there is no end
            ending = ""
        verb = "hold" if len(behind) > 1 else "holds"
        return f"{_named(behind)} {verb} up the run at {places[behind[0]]}; others wait at {ahead}.{ending}"

    @contextmanager
    def naming_who_is_gone(self) -> Iterator[None]:
        """Lets a collective that fails say which rank has gone: the error itself knows an address at most.

        Raises:
            ConnectionError: A rank has ended, or gives no sign of life; one line with its number and its last place.
        """
        try:
            yield
        except RuntimeError as error:
            if self.store is None or not (isinstance(error, DistError) or "gloo" in str(error)):
                raise
            who = self._who_is_gone(self.store)
            if who is None:
                raise
            raise ConnectionError(who) from error

    def _who_is_gone(self, store: Store) -> str | None:
        try:
            if store.check([_GONE]):
                return self._has_ended(store)
            places, silent = self._look_around()
        except RuntimeError:
            return f"The rank that keeps the store (0, mostly) has gone; rank {self.rank} is at {self._place}."
        return _no_sign_of_life(places, silent) if silent else None

    def _has_ended(self, store: Store) -> str:
        rank = store.get(_GONE).decode()
        return f"Rank {rank} has ended at step {self._place.step}; its own message says why."

    def close(self) -> None:
        """Ends the thread, and tells those who would wait for this rank."""
        self._closed.set()
        if self.store is not None:
            with suppress(RuntimeError):  # the store has ended with its process
                self.store.set(_GONE, str(self.rank))

    def _tell_and_look(self) -> None:
        try:
            self.tell()
            while not self._closed.wait(self.period):
                self.tell()
                if warning := self.warning():
                    logger.warning(warning)
        except RuntimeError:
            # The store has ended, and with it the run.
            return

    def _look_around(self) -> tuple[list[Place], list[int]]:
        """The places of all ranks, and the ranks that have told nothing for three periods."""
        before = self._places()
        for _ in range(_PERIODS_OF_SILENCE):
            self._closed.wait(self.period)
            self.tell()
        places = self._places()
        return places, [
            rank for rank, (old, new) in enumerate(zip(before, places, strict=True)) if old.beat == new.beat
        ]

    def _places(self) -> list[Place]:
        assert self.store is not None
        keys = [str(rank) for rank in range(self.size)]
        return [Place(*json.loads(self.store.get(key))) if self.store.check([key]) else Place() for key in keys]


def _named(ranks: list[int]) -> str:
    more = " ..." if len(ranks) > _RANKS_NAMED else ""
    return f"Rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks[:_RANKS_NAMED]))}{more}"


def _no_sign_of_life(places: list[Place], silent: list[int]) -> str:
    return f"{_named(silent)}: no sign of life; last seen at {places[silent[0]]}."
