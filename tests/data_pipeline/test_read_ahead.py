"""Threads change when something is made, never what is handed out, nor in which order."""

from __future__ import annotations

import threading
import time

import pytest

from data_pipeline.read_ahead import ReadAhead


@pytest.mark.parametrize(("ahead", "threads"), [(0, 1), (1, 1), (3, 2), (8, 8), (2, 5)])
def test_in_order_whoever_is_first(ahead: int, threads: int) -> None:
    def make(number: int) -> int:
        time.sleep((number * 7 % 5) / 2000)
        return number

    with ReadAhead(make, ahead=ahead, threads=threads) as items:
        assert [next(items) for _ in range(60)] == list(range(60))


def test_a_slow_item_holds_up_none_of_those_behind_it_and_nobody_before_it() -> None:
    release, made = threading.Event(), []

    def make(number: int) -> int:
        if number == 3:
            release.wait(10)
        made.append(number)
        return number

    with ReadAhead(make, ahead=4, threads=2) as items:
        assert [next(items) for _ in range(3)] == [0, 1, 2]  # without a wait for 3
        deadline = time.monotonic() + 5
        while sorted(made) != [0, 1, 2, 4, 5, 6] and time.monotonic() < deadline:
            time.sleep(0.005)
        assert sorted(made) == [0, 1, 2, 4, 5, 6], "made ahead, and no further than ahead"
        release.set()
        assert [next(items) for _ in range(4)] == [3, 4, 5, 6]


def test_an_error_waits_for_its_turn_and_stays() -> None:
    def make(number: int) -> int:
        if number == 2:
            raise OSError("gone")
        return number

    with ReadAhead(make, ahead=5, threads=3) as items:
        assert [next(items), next(items)] == [0, 1]
        for _ in range(2):
            with pytest.raises(OSError, match="gone"):
                next(items)


def test_as_many_threads_as_asked_for_work_at_once() -> None:
    together = threading.Barrier(3, timeout=10)

    def make(number: int) -> int:
        if number < 3:
            together.wait()
        return number

    with ReadAhead(make, ahead=3, threads=3) as items:
        assert [next(items) for _ in range(5)] == [0, 1, 2, 3, 4]
        assert len([thread for thread in threading.enumerate() if thread.name == "loader"]) == 3
    assert [thread for thread in threading.enumerate() if thread.name == "loader"] == []
