"""Reading threads are stopped and waited for before the interpreter is taken down.

They are daemons, so that a server that never answers cannot hold up the end of a run. But a daemon that is inside a
library's C++ when the interpreter goes is ended in the middle of it, and the process aborts ("terminate called without
an active exception"). So at exit all are asked to stop, then waited for a short time, and only what waits for the
network longer than that is left behind: it waits in plain C, which may be ended.
"""

from __future__ import annotations

import atexit
import threading
import time
import weakref
from collections.abc import Iterable
from typing import Protocol

LEAVE = 2.0  # seconds


class Owner(Protocol):
    def stop(self) -> None:
        """Asks its threads to end; returns at once."""
        ...

    def threads(self) -> Iterable[threading.Thread]: ...


_owners: weakref.WeakSet[Owner] = weakref.WeakSet()


def stop_at_exit(owner: Owner) -> None:
    """To be called before the first of its threads starts."""
    _owners.add(owner)


def join(threads: Iterable[threading.Thread]) -> None:
    """Waits for them, LEAVE seconds in all."""
    deadline = time.monotonic() + LEAVE
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))


@atexit.register
def _leave() -> None:
    owners = list(_owners)
    for owner in owners:
        owner.stop()
    join([thread for owner in owners for thread in owner.threads()])
