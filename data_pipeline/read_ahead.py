"""Items made ahead by threads and handed out in order: whoever asks waits only for an item that is not made yet.

Each item is a function of its number alone, so any thread may make any; a slow one holds up none of those behind it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType
from typing import Generic, TypeVar

from data_pipeline.leaving import join, stop_at_exit

T = TypeVar("T")


class ReadAhead(Generic[T]):
    """The iterator make(0), make(1), … without end; use it in a `with`, so that its threads stop.

    `ahead` items at most are made, or in the making, that nobody has asked for (0: each is made when asked for), by at
    most `threads` daemon threads. An error surfaces where its item is asked for, and there again.
    """

    def __init__(self, make: Callable[[int], T], *, ahead: int, threads: int = 1) -> None:
        self._make, self._ahead, self._number = make, ahead, min(threads, ahead)
        self._changed = threading.Condition()
        self._made: dict[int, T | BaseException] = {}
        self._wanted = self._claimed = 0
        self._stop = False
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> ReadAhead[T]:
        self._threads = [threading.Thread(target=self._work, name="loader", daemon=True) for _ in range(self._number)]
        stop_at_exit(self)
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.stop()
        join(self._threads)

    def stop(self) -> None:
        with self._changed:
            self._stop = True
            self._changed.notify_all()

    def threads(self) -> list[threading.Thread]:
        return self._threads

    def __iter__(self) -> ReadAhead[T]:
        return self

    def __next__(self) -> T:
        if not self._number:
            item = self._make(self._wanted)
            self._wanted += 1
            return item
        assert self._threads, "use the stream in a with block"
        with self._changed:
            while self._wanted not in self._made:
                self._changed.wait()
            found = self._made[self._wanted]
            if isinstance(found, BaseException):
                raise found
            del self._made[self._wanted]
            self._wanted += 1
            self._changed.notify_all()
            return found

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._stop and self._claimed >= self._wanted + self._ahead:
                    self._changed.wait()
                if self._stop:
                    return
                number, self._claimed = self._claimed, self._claimed + 1
            item: T | BaseException
            try:
                item = self._make(number)
            except BaseException as error:
                item = error
            with self._changed:
                self._made[number] = item
                self._changed.notify_all()
            if isinstance(item, BaseException):
                return
