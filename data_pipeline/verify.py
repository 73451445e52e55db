"""`sisa data verify`: everything a prepared folder says, held against what lies there. It mends nothing.

The index's own files are covered by hashes (index_files.py) and checked first; then every shard is read once, front to
back, by one of several threads (shard_check.py), here or at a URL. Every fault is one line, and the search goes on.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from data_pipeline.fetch import RemoteSettings
from data_pipeline.index import Index
from data_pipeline.index_files import NoIndex
from data_pipeline.manifest import read_manifest
from data_pipeline.places import Place, is_url, join
from data_pipeline.prepared import SPLITS, small_files
from data_pipeline.shard_check import ShardReport, check_shard
from data_pipeline.tokenizer import Tokenizer
from data_pipeline.tokenizer_card import read_card
from sisa_dist.config import UserError

_REMOTE_WORKERS = 8  # there waiting is most of it


@dataclass
class Checked:
    """What was looked at and found wanting so far."""

    members: int = 0
    tokens: int = 0
    shards: int = 0
    faults: int = 0


class Verification:
    """Of one folder, a path or URL. `total_bytes`: of the shards; `checked` grows while `faults` is drawn from."""

    def __init__(self, folder: Place, *, workers: int | None = None, remote: RemoteSettings | None = None) -> None:
        """`workers`: threads, each of which holds a member. Raises UserError where there is nothing to verify."""
        self.folder, self.checked = folder, Checked()
        self._remote = remote
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self._workers = workers or max(cores, _REMOTE_WORKERS if is_url(folder) else 1)
        self._early: list[str] = []
        self._splits: dict[str, Index] = {}
        absent = []
        for name in SPLITS:
            try:
                self._splits[name] = Index.load(join(folder, name), remote=remote, check_shards=False)
            except NoIndex as error:
                absent.append((name, str(error)))
            except UserError as error:
                self._early.append(f"{error}; its shards cannot be checked")
        if len(absent) == len(SPLITS):
            raise UserError(absent[0][1])
        self._check_small_files(dict(absent))
        self.total_bytes = sum(shard["bytes"] for index in self._splits.values() for shard in index.shards)

    def faults(self, report: Callable[[int], None] = lambda more: None) -> Iterator[str]:
        """A line for each thing that is not as it was written; `report` is told the bytes of every shard done."""
        for line in self._all(report):
            self.checked.faults += 1
            yield line

    def _all(self, report: Callable[[int], None]) -> Iterator[str]:
        yield from self._early
        for index in self._splits.values():
            lines = _index_faults(index)
            yield from lines
            if lines:  # where its members lie is not known
                report(sum(shard["bytes"] for shard in index.shards))
                continue
            counts, whole = np.zeros(index.vocab_size, np.int64), True
            for number, found in enumerate(self._shards(index)):
                yield from found.faults
                whole &= not found.faults
                counts += found.token_counts
                self.checked.shards += 1
                self.checked.members += found.members
                self.checked.tokens += found.tokens
                report(index.shards[number]["bytes"])
            if whole and (counts != index.token_counts).any():
                yield f"{index.folder}/token_counts.npy: counts other tokens than the shards hold"

    def _shards(self, index: Index) -> Iterator[ShardReport]:
        """In order, with a few more under way than there are threads."""
        bounds = np.searchsorted(index.members["shard"], np.arange(len(index.shards) + 1))
        with ThreadPoolExecutor(self._workers, thread_name_prefix="verify") as pool:
            waiting: deque[Future[ShardReport]] = deque()
            try:
                for number in range(len(index.shards)):
                    if len(waiting) > 2 * self._workers:
                        yield waiting.popleft().result()
                    first, last = int(bounds[number]), int(bounds[number + 1])
                    waiting.append(pool.submit(check_shard, index, number, first, last, remote=self._remote))
                while waiting:
                    yield waiting.popleft().result()
            finally:
                for future in waiting:
                    future.cancel()

    def _check_small_files(self, absent: dict[str, str]) -> None:
        with small_files(self.folder, remote=self._remote) as local:
            manifest, tokenizer = None, None
            for look in (read_card, read_manifest, Tokenizer.load):
                try:
                    found = look(local)
                except UserError as error:
                    self._early.append(str(error).replace(str(local), str(self.folder)))
                    continue
                if isinstance(found, Tokenizer):
                    tokenizer = found
                elif look is read_manifest:
                    manifest = found
        counts = (manifest or {}).get("counts", {})
        for name, why in absent.items():
            if counts.get(name, {}).get("documents"):
                self._early.append(why)
        for name, index in self._splits.items():
            if tokenizer is not None and index.tokenizer_sha256 != tokenizer.sha256:
                self._early.append(
                    f"{index.folder}: its shards were made with another tokenizer ({index.tokenizer_sha256[:12]}) than "
                    f"{tokenizer.path.name} here ({tokenizer.sha256[:12]})"
                )
            elif tokenizer is not None and (index.vocab_size, index.eos_id) != (tokenizer.vocab_size, tokenizer.eos_id):
                self._early.append(f"{index.folder}/index.json: has another vocabulary size or eos than the tokenizer")
            said = counts.get(name)
            if said and (said["documents"], said["tokens"]) != (index.documents, index.num_tokens):
                self._early.append(
                    f"{self.folder}/prepared.json: says {said['documents']:,} documents, {said['tokens']:,} tokens "
                    f"of {name}, its index {index.documents:,} and {index.num_tokens:,}"
                )


def _index_faults(index: Index) -> list[str]:
    """Rows that contradict each other, though each file is what was written."""
    members, found = index.members, []
    where = f"{index.folder}/members.npy"
    shards = members["shard"].astype(np.int64)
    if len(members) and (shards.max() >= len(index.shards) or (np.diff(shards) < 0).any()):
        return [f"{where}: members are not in the order of the shards"]
    ends = members["offset"].astype(np.int64) + index.tokens * index.dtype.itemsize
    before = np.concatenate([[0], ends])[:-1]
    same = np.concatenate([[False], shards[1:] == shards[:-1]])[: len(members)]
    sizes = np.array([shard["bytes"] for shard in index.shards], np.int64)
    for name, wrong in (
        ("holds no token", index.tokens == 0),
        ("lies over the one before", same & (members["offset"].astype(np.int64) < before)),
        ("ends behind its shard", ends > sizes[shards] if len(members) else np.zeros(0, bool)),
        ("has segments that end before they begin", np.diff(members["segments_end"].astype(np.int64), prepend=0) < 0),
    ):
        if wrong.any():
            found.append(f"{where}: member {int(np.flatnonzero(wrong)[0])} {name}")
    if found:
        return found
    rows = int(members["segments_end"][-1]) if len(members) else 0
    if index.documents != rows - int((members["continued"] != 0).sum()):
        found.append(f"{index.folder}/index.json: says {index.documents:,} documents, its members hold another number")
    if len(members) and members["continued"][0]:
        found.append(f"{where}: member 0 goes on with a document that none began")
    return found
