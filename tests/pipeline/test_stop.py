"""All ranks stop after the same update, whenever who hears of it: ranks as threads, over a real store."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from datetime import timedelta

import pytest
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.hosts import free_port
from pipeline.stop import ASKED, UPDATE, WANTED, Stop

END = 60  # updates of a training that nobody stops


def exchange_all(stops: list[Stop], store: dist.Store, times: int = 1) -> None:
    for _ in range(times):
        for stop in stops:
            stop.exchange(store)


class Updates:
    """The updates of all ranks, which are collectives: none ends before every rank has begun it.

    Each rank is a thread; `begin` is given its rank and the update before it is begun, to sleep or to look.
    """

    def __init__(self, stops: list[Stop], begin: Callable[[int, int], None] = lambda rank, update: None) -> None:
        self.done = [0] * len(stops)
        self._stops, self._begin = stops, begin
        self._together = threading.Barrier(len(stops), timeout=10)
        self.threads = [threading.Thread(target=self._train, args=(rank,), daemon=True) for rank in range(len(stops))]

    def _train(self, rank: int) -> None:
        while self.done[rank] < END and self._stops[rank].may_begin(self.done[rank]):
            self._begin(rank, self.done[rank])
            self._together.wait()
            self.done[rank] += 1

    def run(self, talk: Callable[[], None]) -> list[int]:
        """Train to the end, with `talk` again and again beside it; returns the updates that each rank did."""
        for thread in self.threads:
            thread.start()
        deadline = time.monotonic() + 20
        while any(thread.is_alive() for thread in self.threads):
            assert time.monotonic() < deadline, f"ranks wait for each other: {self.done} updates done"
            talk()
        return self.done


# ---------------------------------------------------------------- of threads


@pytest.mark.parametrize("seed", range(12))
def test_ranks_that_run_on_stop_after_the_same_update(seed):
    rng = random.Random(seed)
    size = rng.choice([1, 2, 3, 5])
    store = dist.HashStore()
    stops = [Stop(rank, size) for rank in range(size)]
    wanting, at = rng.randrange(size), rng.randrange(1, 20)
    pauses = [rng.choice([0, 0.0005, 0.002]) for _ in range(size)]
    wanted_after: list[int] = []

    def begin(rank: int, update: int) -> None:
        time.sleep(pauses[rank])
        if (rank, update) == (wanting, at):
            wanted_after.append(update)
            stops[rank].want("SIGTERM")

    def talk() -> None:
        stops[rng.randrange(size)].exchange(store)
        time.sleep(rng.choice([0, 0.0003]))

    done = Updates(stops, begin).run(talk)
    assert len(set(done)) == 1, done
    assert wanted_after and wanted_after[0] < done[0] < END
    exchange_all(stops, store)  # the last one's threads end before it hears why
    assert {stop.why for stop in stops} == {"SIGTERM"}


def test_a_rank_inside_an_update_answers_and_none_waits_for_it_for_ever():
    """Rank 0 is told to stop in update 3, where it waits for rank 1, which has not begun it and hears first."""
    store = dist.HashStore()
    stops = [Stop(0, 2), Stop(1, 2)]
    updates = Updates(stops)
    held = threading.Event()

    def begin(rank: int, update: int) -> None:
        if update == 2 and rank == 1:
            held.wait(10)

    updates._begin = begin
    for thread in updates.threads:
        thread.start()
    while stops[0]._begun < 3 or stops[1]._begun < 3:
        time.sleep(0.001)
    stops[0].want("SIGTERM")
    exchange_all(stops, store, 3)
    assert store.get(UPDATE) == b"3" and updates.done == [2, 2], "agreed while both were inside"
    held.set()
    for thread in updates.threads:
        thread.join(10)
    assert updates.done == [3, 3]


def test_a_rank_that_hears_late_holds_the_others_up_but_goes_no_further():
    """Rank 2's thread talks to nobody for a while: the others wait at their limit, and all end at the furthest one."""
    store = dist.HashStore()
    stops = [Stop(rank, 3) for rank in range(3)]
    for stop, begun in zip(stops, (7, 8, 8), strict=True):  # as asynchronous devices have it
        assert stop.may_begin(begun - 1)
    stops[1].want("SIGINT")
    exchange_all(stops[1:2], store)
    exchange_all(stops[:2], store, 5)
    assert store.check([ASKED]) and not store.check([UPDATE])
    answers: list[bool] = []
    waiting = threading.Thread(target=lambda: answers.append(stops[1].may_begin(8)), daemon=True)
    waiting.start()
    waiting.join(0.2)
    assert waiting.is_alive() and not answers, "nobody knows yet whether update 9 is done"
    assert stops[2].may_begin(8)  # it has not heard, and may
    exchange_all(stops[2:], store)
    exchange_all(stops, store, 2)
    waiting.join(10)
    assert answers == [True], "rank 2 has begun update 9, so all do it"
    assert stops[0].may_begin(7) and stops[0].may_begin(8)
    assert [stop.may_begin(9) for stop in stops] == [False] * 3


def test_over_a_real_store_with_a_connection_for_each_rank():
    port = free_port()
    first = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=10))
    rest = [dist.TCPStore("127.0.0.1", port, wait_for_workers=False, timeout=timedelta(seconds=10)) for _ in range(2)]
    stops = [Stop(rank, 3) for rank in range(3)]
    ended = threading.Event()

    def talk_of(rank: int) -> None:
        while not ended.is_set():
            stops[rank].exchange([first, *rest][rank])
            time.sleep(0.002)

    talking = [threading.Thread(target=talk_of, args=(rank,), daemon=True) for rank in range(3)]
    for thread in talking:
        thread.start()

    def begin(rank: int, update: int) -> None:
        time.sleep(0.001)
        if (rank, update) == (2, 10):
            stops[rank].want("its launcher was killed")

    done = Updates(stops, begin).run(lambda: time.sleep(0.01))
    ended.set()
    for thread in talking:
        thread.join(10)
    assert len(set(done)) == 1 and 10 < done[0] < END
    assert {stop.why for stop in stops} == {"its launcher was killed"}


# ---------------------------------------------------------------- of any order of events


@settings(max_examples=300, deadline=None)
@given(
    size=st.integers(1, 4),
    ahead=st.integers(1, 4),
    begun=st.integers(0, 100),
    wanting=st.sets(st.integers(0, 3), min_size=1, max_size=3),
    wanted_at=st.integers(0, 30),
    steps=st.lists(st.tuples(st.booleans(), st.integers(0, 3)), max_size=60),
)
def test_any_interleaving_ends_after_one_update(size, ahead, begun, wanting, wanted_at, steps):
    """Single steps of a model: a rank exchanges, or begins its next update, as far ahead as its device lets it."""
    store = dist.HashStore()
    stops = [Stop(rank, size) for rank in range(size)]
    for stop in stops:
        stop.resume_at(begun)
    done, stopped = [begun] * size, [False] * size

    def can_begin(rank: int) -> bool:
        """Whether the rank would not wait: for the others inside an update, or for the number of the last one."""
        stop = stops[rank]
        undecided = stop._limit is not None and done[rank] >= stop._limit and stop._last is None
        return not stopped[rank] and done[rank] < min(done) + ahead and not undecided

    def begin(rank: int) -> None:
        if can_begin(rank):
            stopped[rank] = not stops[rank].may_begin(done[rank])
            done[rank] += not stopped[rank]

    everybody = [(talks, rank) for rank in range(4) for talks in (True, False)] * 12
    for number, (talks, rank) in enumerate([*steps, *everybody]):
        if number == wanted_at:
            for who in wanting:
                stops[who % size].want(f"rank {who % size}")
        if talks:
            stops[rank % size].exchange(store)
        else:
            begin(rank % size)
        assert not (any(stopped) and number < wanted_at)
    assert stopped == [True] * size
    assert len(set(done)) == 1
    assert len({stop.why for stop in stops}) == 1 and stops[0].why in {f"rank {who % size}" for who in wanting}


def test_nothing_is_asked_while_nobody_wants_to_stop():
    store = dist.HashStore()
    stops = [Stop(rank, 2) for rank in range(2)]
    for step in range(50):
        assert all(stop.may_begin(step) for stop in stops)
        exchange_all(stops, store)
    assert store.num_keys() == 0 and not any(store.check([key]) for key in (WANTED, ASKED, UPDATE))
    assert [stop.why for stop in stops] == ["", ""]


def test_the_first_reason_is_everybodys():
    store = dist.HashStore()
    stops = [Stop(rank, 3) for rank in range(3)]
    stops[1].want("SIGTERM")
    stops[1].want("SIGINT")
    exchange_all([stops[1]], store)
    stops[2].want("its launcher is gone")
    exchange_all(stops, store, 3)
    assert {stop.why for stop in stops} == {"SIGTERM"}


def test_stopping_before_the_first_update_does_none():
    store = dist.HashStore()
    stops = [Stop(rank, 2) for rank in range(2)]
    for stop in stops:
        stop.resume_at(41)
    stops[0].want("SIGTERM")
    exchange_all(stops, store, 2)
    assert [stop.may_begin(41) for stop in stops] == [False, False]
    assert store.get(UPDATE) == b"41"
