"""Batches from shards in the exact order of a Stage, read ahead by threads.

The place in the data is one integer, the cursor: windows served so far in the stage, over epochs and sources. It means
the same at any number of data ranks; a fingerprint says which data and order it counts in.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from data_pipeline.buffers import Buffers
from data_pipeline.fetch import Missing
from data_pipeline.index import Index
from data_pipeline.lines import Concat, Stream
from data_pipeline.order import Int64, stored_order
from data_pipeline.read_ahead import ReadAhead
from data_pipeline.rows import Rows
from data_pipeline.source import Packing, Place, Places
from data_pipeline.stage import Stage
from data_pipeline.window import IGNORE, Batch, Without, read_window, stack, wants
from sisa_dist.config import UserError

__all__ = ["IGNORE", "Batch", "Loader", "StepBatch", "validation_batches"]


@dataclass(frozen=True)
class StepBatch:
    """This rank's part of one optimizer step."""

    micro_batches: list[Batch]
    next_cursor: int
    digest: str  # of the whole global batch, the same on every rank and at every dp
    num_targets: int  # labels that count, on this rank
    padding: float  # share of the whole global batch that holds no token
    without: frozenset[str] = frozenset()  # Loader.without as it was when this was read
    found_missing: frozenset[str] = frozenset()  # further shards that were not there, for this rank
    missing_windows: int = 0  # of the whole global batch, those with a part in a shard of `without`


class Loader:
    """Serves windows [cursor, cursor + global_batch_windows) a step; a rank takes the slots ≡ dp_rank mod dp_size.

    With document_mask each segment is a document of its own (doc_ids), and the label that would cross from one
    document into the next is ignored: nothing it could be predicted from is visible.
    """

    def __init__(
        self,
        sources: Index | Mapping[str, Index],
        *,
        seq_len: int,
        seed: int,
        global_batch_windows: int,
        micro_batch_size: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        lanes: int = 8,
        document_mask: bool = False,
        packing: Packing = "concat",
        shares: Mapping[str, float] | None = None,
        prefetch: int = 4,
        read_threads: int = 1,
        source: str = "train",
        begun: dict[str, Any] | None = None,
        on_missing: Literal["stop", "skip"] = "stop",
    ) -> None:
        """`sources` by name with their `shares` (data_pipeline.mixture), or one index, which is called `source`.

        `begun`: TrainState.stage, where this is not the first stage of its run. `on_missing`: whether a shard that is
        not there raises Missing, or what would be read from it counts for nothing (StepBatch.found_missing).
        """
        unit = dp_size * micro_batch_size
        if global_batch_windows % unit:
            below = global_batch_windows // unit * unit
            near = " or ".join(str(n * seq_len) for n in (below, below + unit) if n)
            raise UserError(
                f"training.global_batch_tokens is {global_batch_windows} windows of seq_len {seq_len}, not a "
                f"multiple of dp {dp_size} × micro_batch_size {micro_batch_size}: set it to {near}"
            )
        self._indexes = {source: sources} if isinstance(sources, Index) else dict(sources)
        self._order: dict[str, Any] = dict(
            seq_len=seq_len, seed=seed, lanes=lanes, document_mask=document_mask, packing=packing, shares=shares
        )
        self.stage = Stage(self._indexes, **self._order, begun=begun)
        self._global, self._micro = global_batch_windows, micro_batch_size
        self._dp_rank, self._dp_size = dp_rank, dp_size
        self._prefetch, self._threads = prefetch, read_threads
        self._skips = on_missing == "skip"
        self.without: frozenset[str] = frozenset()  # SOURCE/SHARD: what is read from now on does without them
        self._buffers = Buffers(
            (global_batch_windows // dp_size, seq_len),
            arrays=3 if document_mask else 2,
            most=prefetch + 2,  # one that is trained on, and one that is being made for who waits
        )

    @property
    def fingerprint(self) -> str:
        return self.stage.fingerprint

    def describe(self) -> dict[str, Any]:
        """See Stage.describe."""
        return self.stage.describe()

    @property
    def shards(self) -> list[str]:
        """SOURCE/SHARD of all, in a fixed order."""
        return [f"{name}/{shard['name']}" for name, index in self._indexes.items() for shard in index.shards]

    @property
    def windows_per_epoch(self) -> int:
        """Of the one source, or of all together."""
        return sum(source.windows for source in self.stage.sources.values())

    def begin(self, begun: dict[str, Any] | None) -> None:
        """The stage's first window is behind what an earlier one left: see Stage.carry. None: there is none before."""
        self.stage = Stage(self._indexes, **self._order, begun=begun)

    def steps(self, cursor: int) -> ReadAhead[StepBatch]:
        """Steps from `cursor` on, without end; use it in a `with`, so that the reading threads stop."""
        return ReadAhead(lambda number: self._make(cursor, number), ahead=self._prefetch, threads=self._threads)

    def again(self, batch: StepBatch) -> StepBatch:
        """The same step, read anew: `without` may have changed. It is `batch` itself where nothing would differ."""
        if not batch.found_missing and batch.without == self.without:
            return batch
        return self._step(batch.next_cursor - self._global)

    def window_ids(self, cursor: int) -> list[Place]:
        """Every slot of the global batch at `cursor`."""
        found: dict[int, Place] = {}
        for name, slots, places in self._places(cursor):
            rows = zip(slots.tolist(), places.epochs.tolist(), places.windows.tolist(), strict=True)
            found |= {slot: Place(name, epoch, window) for slot, epoch, window in rows}
        return [found[slot] for slot in range(self._global)]

    def digest(self, cursor: int) -> str:
        """StepBatch.digest of the step at `cursor`, without reading it."""
        return self._digest(cursor, self._places(cursor))

    def traffic(self) -> dict[str, int] | None:
        """What this process asked of servers and disk cache so far, over its sources; None where all is local."""
        counts = [index.remote.fetcher.traffic.as_dict() for index in self._indexes.values() if index.remote]
        return {name: sum(count[name] for count in counts) for name in counts[0]} if counts else None

    def _make(self, cursor: int, number: int) -> StepBatch:
        """Step `number` after `cursor`; what lies far away is asked for before, as far ahead as steps are made."""
        if any(index.remote for index in self._indexes.values()):
            for ahead in range(number + self._prefetch if number else 0, number + self._prefetch + 1):
                self._ask(cursor + ahead * self._global)
        return self._step(cursor + number * self._global)

    def _places(self, cursor: int) -> list[tuple[str, Int64, Places]]:
        return self.stage.places(cursor, cursor + self._global)

    def _mine(self, slots: Int64, places: Places) -> tuple[Int64, Places]:
        """Those of this rank: their rows in its part of the batch, and the windows."""
        if self._dp_size == 1:
            return slots, places
        chosen = slots % self._dp_size == self._dp_rank
        return slots[chosen] // self._dp_size, places.every(chosen)

    def _ask(self, cursor: int) -> None:
        for name, slots, places in self._places(cursor):
            source, members = self.stage.sources[name], dict[int, None]()
            _, mine = self._mine(slots, places)
            for epoch, window in zip(mine.epochs.tolist(), mine.windows.tolist(), strict=True):
                for run in source.runs(Place(name, epoch, window)):
                    members |= dict.fromkeys(range_.member for range_ in run.ranges)
            index, absent = self._indexes[name], _of(name, self.without)
            index.ask([m for m in members if not absent or index.shard_name(m) not in absent])

    def _step(self, cursor: int) -> StepBatch:
        stage, found, known = self.stage, self._places(cursor), self.without
        without = {name: Without(_of(name, known)) for name in self._indexes} if self._skips else {}
        rows = Rows(*self._buffers.take())
        filled = 0
        for name, slots, places in found:
            filled += stage.sources[name].fills(places)
            at, mine = self._mine(slots, places)
            if len(at):
                self._read(rows, name, at, mine, without.get(name))
        for name, missing in without.items():
            if missing.found:
                self._indexes[name].check_folder()
        return StepBatch(
            rows.batches(self._micro),
            cursor + self._global,
            self._digest(cursor, found),
            rows.targets,
            1 - filled / (self._global * stage.seq_len),
            without=known,
            found_missing=frozenset(f"{name}/{shard}" for name, w in without.items() for shard in w.found),
            missing_windows=self._num_missing(cursor, without) if known else 0,
        )

    def _read(self, rows: Rows, name: str, at: Int64, places: Places, without: Without | None) -> None:
        try:
            rows.read(self.stage.sources[name], at, places, without)
        except Missing as error:
            raise Missing(f"{error}, or go on without it by data.on_missing=skip") from None

    def _num_missing(self, cursor: int, without: Mapping[str, Without]) -> int:
        sources = self.stage.sources
        return sum(
            any(wants(sources[p.source].index, run, without[p.source].known) for run in sources[p.source].runs(p))
            for p in self.window_ids(cursor)
        )

    def _digest(self, cursor: int, found: list[tuple[str, Int64, Places]]) -> str:
        ids: list[Any]
        if self.stage.mixture is None:
            ((_, _, places),) = found
            ids = list(zip(places.epochs.tolist(), places.windows.tolist(), strict=True))
        else:
            ids = [tuple(place) for place in self.window_ids(cursor)]
        return hashlib.blake2b(f"{self.stage.digest_key} {ids}".encode(), digest_size=8).hexdigest()


def _of(source: str, shards: Collection[str]) -> frozenset[str]:
    """The names of those that are the source's."""
    return frozenset(shard.removeprefix(f"{source}/") for shard in shards if shard.startswith(f"{source}/"))


def validation_batches(
    index: Index,
    *,
    seq_len: int,
    batch_size: int,
    max_windows: int | None = None,
    dp_rank: int = 0,
    dp_size: int = 1,
    document_mask: bool = False,
) -> Iterator[Batch]:
    """The split's first max_windows windows in stored order, dealt to ranks in turn.

    Every rank gets equally many batches; those that run out get windows whose labels are all ignored.
    """
    numbering = Concat(Stream(stored_order(index.tokens)), seq_len)
    windows = numbering.count if max_windows is None else min(numbering.count, max_windows)
    for first in range(0, windows, batch_size * dp_size):
        if index.remote:  # this batch's members, all at once, and the next one's
            mine = range(first + dp_rank, min(windows, first + 2 * batch_size * dp_size), dp_size)
            index.ask(dict.fromkeys(r.member for w in mine for run in numbering.window(w) for r in run.ranges))
        rows = []
        for row in range(batch_size):
            window = first + row * dp_size + dp_rank
            if window < windows:
                rows.append(read_window(index, numbering.window(window), seq_len, document_mask=document_mask))
        if not rows:
            empty = torch.zeros(1, seq_len, dtype=torch.int64)
            rows = [Batch(empty, torch.full_like(empty, IGNORE), empty if document_mask else None)]
        yield stack(rows)
