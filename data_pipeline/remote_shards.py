"""Members of shards at URLs: asked for ahead of their use over several connections, kept on disk, checked every time.

It serves blocks, which are named by the hash of their content; what a member is, and the few of them that are kept in
memory, is for index.py.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from typing import NamedTuple

from data_pipeline.block_cache import BlockCache
from data_pipeline.fetch import Fetcher
from data_pipeline.leaving import stop_at_exit
from sisa_dist.config import UserError

log = logging.getLogger(__name__)


class Block(NamedTuple):
    """Bytes start … stop-1 of the file at `url`, whose hash is `key`, in hex."""

    name: str  # for messages
    url: str
    start: int
    stop: int
    key: str


_all: weakref.WeakSet[RemoteShards] = weakref.WeakSet()


def _forked() -> None:
    for shards in list(_all):
        shards._begin()


os.register_at_fork(after_in_child=_forked)


class RemoteShards:
    """Reads blocks for any number of threads. `hash`: what gives their keys; `beside(url)`: all blocks of a file.

    What was asked for and not read yet is in memory where there is no disk cache, or it would not take it: whoever asks
    bounds that.
    """

    def __init__(
        self,
        fetcher: Fetcher,
        *,
        hash: Callable[[bytes], str],
        beside: Callable[[str], Sequence[Block]],
        total_bytes: int,
    ) -> None:
        settings = fetcher.settings
        self.fetcher = fetcher
        self._hash, self._beside, self._total_bytes = hash, beside, total_bytes
        self._cache: BlockCache | None = None
        if settings.cache_folder is not None:
            self._cache = BlockCache(settings.cache_folder, limit=int(settings.cache_gb * 1e9), hash=hash)
        self._connections = settings.connections
        self._ranges = True  # until a server is met that has none
        self._begin()
        _all.add(self)

    def _begin(self) -> None:
        """With no thread and nothing asked for: at first, and in a forked process, where threads do not come along."""
        self._asked: dict[str, Future[bytes | None]] = {}
        self._jobs: queue.SimpleQueue[tuple[Block, Future[bytes | None]] | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._stop = False
        self._lock = threading.Lock()

    def ask(self, blocks: Iterable[Block]) -> None:
        """Has them fetched in the background, in this order; an error waits for whoever reads the block."""
        with self._lock:
            for block in blocks:
                if block.key not in self._asked:
                    future: Future[bytes | None] = Future()
                    self._asked[block.key] = future
                    self._jobs.put((block, future))
            # Daemons: a run that ends, by an error too, does not wait long for a server that does not answer.
            stop_at_exit(self)
            while self._asked and len(self._threads) < self._connections:
                self._threads.append(threading.Thread(target=self._work, name="fetch", daemon=True))
                self._threads[-1].start()

    def read(self, block: Block) -> bytes:
        """The bytes of a block. Raises UserError where they cannot be had or are not those its key says."""
        with self._lock:
            asked = self._asked.pop(block.key, None)
        found = asked.result() if asked is not None else None
        return self._find(block, asked=asked is not None)[0] if found is None else found

    def stop(self) -> None:
        """Its threads end after what they are fetching; what was asked for besides is never there."""
        self._stop = True
        for _ in self._threads:
            self._jobs.put(None)

    def threads(self) -> list[threading.Thread]:
        return self._threads

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None and not self._stop:
            block, future = job
            try:
                payload, on_disk = self._find(block)
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(None if on_disk else payload)  # memory is dear

    def _find(self, block: Block, *, asked: bool = False) -> tuple[bytes, bool]:
        """From the disk cache, or fetched and put there, once for all processes of the host; whether it lies there."""
        if self._cache is None:
            return self._fetch(block), False
        found = self._cache.get(block.key)
        if found is not None:
            self.fetcher.traffic.add(cache_hits=not asked)  # what was asked for is counted once
            return found, True
        with self._cache.alone(block.key if self._ranges else self._hash(block.url.encode())):
            found = self._cache.get(block.key)
            if found is not None:
                self.fetcher.traffic.add(cache_hits=1)
                return found, True
            payload = self._fetch(block)
            return payload, self._cache.put(block.key, payload)

    def _fetch(self, block: Block) -> bytes:
        for attempt in range(2):  # once more, for what was damaged on its way
            if attempt:
                log.warning("%s: %s is not what the index says: reading it again", block.url, block.name)
                self.fetcher.traffic.add(retries=1)
            payload = self.fetcher.read(block.url, block.start, block.stop)
            if len(payload) > block.stop - block.start:
                payload = self._from_whole(block, payload)
            if self._hash(payload) == block.key:
                return payload
        raise UserError(
            f"{block.url}: {block.name} is not what was written (cut short or changed, perhaps replaced since the "
            "index was read): restore it or run `sisa prepare --force`"
        )

    def _from_whole(self, block: Block, content: bytes) -> bytes:
        """The block, out of the whole file that a server without ranges sends; its other blocks go to the cache.

        Without a cache that holds all shards, every member would cost a whole one.
        """
        if self._cache is None or self._cache.limit < self._total_bytes:
            raise UserError(
                f"{block.url}: its server sends whole files and no ranges: use one that does, or set data.cache_folder "
                f"and data.cache_gb to at least {-(-self._total_bytes // 10**7) / 100:g}, so that each is sent once"
            )
        if self._ranges:
            self._ranges = False
            log.warning(
                "%s: its server sends whole files and no ranges: each shard is fetched once and kept", block.url
            )
        for other in self._beside(block.url):
            payload = content[other.start : other.stop]
            if self._hash(payload) == other.key:
                self._cache.put(other.key, payload)
        return content[block.start : block.stop]
