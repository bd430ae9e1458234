"""Heartbeats of two ranks in one process, over a real store: what is left of them when a rank ends."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
from torch.distributed import TCPStore

from mvsplit.utils import heartbeat
from mvsplit.utils.heartbeat import FINISHED, Heartbeat

Pair = tuple[Heartbeat, Heartbeat]


@pytest.fixture
def ended() -> list[tuple[int, int]]:
    """(rank, status) of each process that its heartbeat would have ended."""
    return []


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch, ended: list[tuple[int, int]]) -> Iterator[Pair]:
    monkeypatch.setattr(heartbeat, "UNWIND_S", 600.0)  # this process does not end after a failure
    store = TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=20))
    monkeypatch.setattr(heartbeat, "_get_default_store", store.clone)

    def begin(rank: int) -> Heartbeat:
        return Heartbeat(rank, 2, 5.0, lambda status: ended.append((rank, status)), reports=rank == 1)

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(begin, (0, 1))
    yield first, second
    for beats in (first, second):
        beats._hang_up()


def talking(beats: Heartbeat) -> Any:
    return [talker for talker in beats._talkers if talker.is_alive()]


def test_no_thread_waits_for_the_store_when_the_work_is_done(pair: Pair, ended: list[tuple[int, int]]) -> None:
    """A thread that waits in C++ while the interpreter ends aborts the process if the store's host ends first."""
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(Heartbeat.leave, pair))
    assert [beats.verdict.rank for beats in pair if beats.verdict] == [FINISHED, FINISHED]
    assert [talking(beats) for beats in pair] == [[], []]
    assert ended == []


def test_the_first_rank_waits_for_one_that_may_still_fail(pair: Pair, ended: list[tuple[int, int]]) -> None:
    first, second = pair
    with ThreadPoolExecutor(1) as pool:
        leaving = pool.submit(first.leave)
        time.sleep(0.5)  # the other looks whether its error is only an echo
        assert second.fail(1)
        first.gone.set()
        leaving.result()
    assert ended == [(0, 1)]


def test_a_rank_that_fails_first_hangs_up_and_the_other_ends(pair: Pair, ended: list[tuple[int, int]]) -> None:
    first, second = pair
    second.step = 7
    assert second.fail(2)
    assert talking(second) == []
    assert not first.fail(1)  # too late: it does not report its own error
    first.gone.set()  # as its launcher finds
    first.join()
    assert ended == [(0, 2)]
    assert first.verdict is not None
    assert (first.verdict.rank, first.verdict.step) == (1, 7)
