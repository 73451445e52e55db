"""One source of a run: its windows in exact order, epoch after epoch, over what an earlier stage left unread first.

A stage that ends in mid-epoch leaves windows nobody has read: at most `lanes` intervals. `frozen` writes them down as
JSON, in slots of the line they were cut from, and the next stage numbers windows of its own over them, whatever its
sequence length and packing; after them come whole epochs again.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property, lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np

from data_pipeline.index import Index
from data_pipeline.lines import Concat, Cut, Line, Numbering, Run, Stream
from data_pipeline.order import Int64, Pieces, epoch_order, lane_entries, member_order, num_windows, unread
from data_pipeline.packing import Bins, Documents, Packed, Rest, group_tokens
from sisa_dist.config import UserError

Packing = Literal["concat", "best_fit"]


class Place(NamedTuple):
    """A window. `epoch` is the rest's own where a rest is served; the fresh ones that follow have higher numbers."""

    source: str
    epoch: int
    window: int


class Places(NamedTuple):
    """Windows of one source in the order in which they are served, so that epochs do not fall; int64 [n] both."""

    epochs: Int64
    windows: Int64

    def every(self, chosen: Any) -> Places:
        """Those that `chosen` picks: a slice, a mask or numbers that rise."""
        return Places(self.epochs[chosen], self.windows[chosen])


class Source:
    """The windows of `index` under `name`, which the order of its members is drawn from, with seed and epoch."""

    def __init__(
        self,
        name: str,
        index: Index,
        *,
        seed: int,
        seq_len: int,
        lanes: int,
        packing: Packing,
        begun: dict[str, Any] | None = None,
    ) -> None:
        """`begun`: `frozen()` of the stage before; None: from the first epoch on."""
        if index.num_tokens < 2:
            raise UserError(f"{index.folder}: holds {index.num_tokens} tokens, too few to train on: add text")
        self.name, self.index = name, index
        self._seed, self._seq_len, self._lanes, self._packing = seed, seq_len, lanes, packing
        self._first_epoch: int = begun["epoch"] if begun else 0
        self._rest: dict[str, Any] | None = begun["rest"] if begun else None
        # A lane reads one member or group of them, and at its end the next: what is in use stays, whatever its size.
        held = group_tokens(seq_len) if packing == "best_fit" else int(index.tokens.max())
        index.cache_bytes = max(index.cache_bytes, 2 * lanes * held * index.dtype.itemsize)
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)

    @cached_property
    def windows(self) -> int:
        """Of a whole epoch."""
        if self._packing == "concat":
            return num_windows(self.index.num_tokens, self._seq_len)
        return int(self._bins(self._seq_len).counts.sum())

    @cached_property
    def padding(self) -> float:
        """The share of a whole epoch's slots that hold no token."""
        if self._packing == "best_fit":
            return self._bins(self._seq_len).padding
        return 1 - (self.index.num_tokens - 1) / (self.windows * self._seq_len)

    @cached_property
    def rest_windows(self) -> int:
        return self._over_rest.count if self._rest else 0

    def epochs(self, served: int) -> float:
        """Epochs behind the run after `served` windows of this stage."""
        return self._first_epoch + (served - self.rest_windows) / self.windows

    def places(self, served: Int64) -> Places:
        """The windows served as numbers `served` of this source in this stage, which do not fall."""
        rest = self.rest_windows
        epochs, numbers = np.divmod(served - rest, self.windows)
        found = Places(self._first_epoch + epochs, lane_entries(numbers, self.windows, self._lanes))
        if self._rest and (of_rest := int(np.searchsorted(served, rest))):
            found.epochs[:of_rest] = self._rest["epoch"]
            found.windows[:of_rest] = lane_entries(served[:of_rest], rest, self._lanes)
        return found

    def runs(self, place: Place) -> list[Run]:
        return self._numbering(place.epoch).window(place.window)

    def fill(self, place: Place) -> int:
        """Slots of the window that hold a token."""
        return self._numbering(place.epoch).fill(place.window)

    def fills(self, places: Places) -> int:
        """Slots of the windows that hold a token, together."""
        return sum(self._numbering(epoch).fills(windows) for epoch, windows in _by_epoch(places))

    def pieces(self, places: Places) -> Pieces:
        """See Numbering.pieces."""
        found = []
        for epoch, windows in _by_epoch(places):
            pieces = self._numbering(epoch).pieces(windows)
            found.append(pieces or Pieces(np.full_like(windows, -1), windows, windows))
        return found[0] if len(found) == 1 else Pieces(*(np.concatenate(column) for column in zip(*found, strict=True)))

    def frozen(self, served: int) -> dict[str, Any]:
        """JSON: the next whole epoch, and what is unread of the one before after `served` windows of this stage."""
        if self._rest and served < self.rest_windows:
            cut = self._unread(self._over_rest, served, self._rest["cut"])
            return {"epoch": self._first_epoch, "rest": self._rest | {"cut": cut}}
        epoch, number = divmod(served - self.rest_windows, self.windows)
        epoch += self._first_epoch
        if number == 0:
            return {"epoch": epoch, "rest": None}
        cut = self._unread(self._epoch(epoch), number, None)
        return {
            "epoch": epoch + 1,
            "rest": {"name": self.name, "seed": self._seed, "epoch": epoch, "cut": cut},
        }

    def _unread(self, numbering: Numbering, served: int, of: dict[str, Any] | None) -> dict[str, Any]:
        """The windows of `numbering` after the first `served`, as intervals of a line; `of`: the cut it numbers."""
        windows = unread(served, numbering.count, self._lanes)
        slots = [(numbering.first_slot(a), numbering.first_slot(b)) for a, b in windows]
        if self._packing == "best_fit":
            return {"line": {"best_fit": self._seq_len, "of": of}, "intervals": slots}
        assert isinstance(numbering, Concat)
        if isinstance(numbering.line, Cut):  # back to the line below, so that cuts do not pile up
            slots = [interval for a, b in slots for interval in numbering.line.inner(a, b)]
            assert of is not None
            return {"line": of["line"], "intervals": slots}
        return {"line": "stream", "intervals": slots}

    def _numbering(self, epoch: int) -> Numbering:
        return self._over_rest if epoch < self._first_epoch else self._epoch(epoch)

    def _make_epoch(self, epoch: int) -> Numbering:
        if self._packing == "concat":
            return Concat(self._stream(self.name, self._seed, epoch), self._seq_len)
        return self._packed(self._seq_len, self.name, self._seed, epoch)

    @cached_property
    def _over_rest(self) -> Numbering:
        rest = self._rest
        assert rest is not None
        cut = self._cut(rest["cut"], rest)
        if self._packing == "concat":
            return Concat(cut, self._seq_len)
        return self._packed_rest(cut, self._seq_len, rest)

    def _cut(self, cut: dict[str, Any], rest: dict[str, Any]) -> Cut:
        name, seed, epoch = rest["name"], rest["seed"], rest["epoch"]
        line: Line
        if cut["line"] == "stream":
            line = self._stream(name, seed, epoch)
        elif cut["line"]["of"] is None:
            line = self._packed(cut["line"]["best_fit"], name, seed, epoch)
        else:
            line = self._packed_rest(self._cut(cut["line"]["of"], rest), cut["line"]["best_fit"], rest)
        return Cut(line, cut["intervals"])

    def _stream(self, name: str, seed: int, epoch: int) -> Stream:
        return Stream(epoch_order(self.index.tokens, seed=seed, source=name, epoch=epoch))

    def _packed(self, seq_len: int, name: str, seed: int, epoch: int) -> Packed:
        bins = self._bins(seq_len)
        order = member_order(bins.pieces.groups, seed=seed, source=name, epoch=epoch)
        return Packed(bins, order, _shuffle(name, seed, epoch))

    def _packed_rest(self, cut: Cut, seq_len: int, rest: dict[str, Any]) -> Packed:
        bins = Bins(Rest(self.index, cut, seq_len), seq_len, plans=self._plans)
        order = member_order(bins.pieces.groups, seed=rest["seed"], source=rest["name"], epoch=rest["epoch"])
        return Packed(bins, order, _shuffle(rest["name"], rest["seed"], rest["epoch"]))

    @lru_cache(maxsize=2)  # noqa: B019  # a run has few sources, and they live as long as it does
    def _bins(self, seq_len: int) -> Bins:
        return Bins(Documents(self.index, seq_len), seq_len, plans=self._plans)

    @property
    def _plans(self) -> int:
        return 2 * self._lanes + 8


def _by_epoch(places: Places) -> Iterator[tuple[int, Int64]]:
    first, last = int(places.epochs[0]), int(places.epochs[-1])
    if first == last:
        yield first, places.windows
        return
    for epoch in range(first, last + 1):
        a, b = np.searchsorted(places.epochs, [epoch, epoch + 1])
        if a < b:
            yield epoch, places.windows[a:b]


class _shuffle:
    """A group's bins in an order of their own in every epoch."""

    def __init__(self, name: str, seed: int, epoch: int) -> None:
        self._name, self._seed, self._epoch = name, seed, epoch

    def __call__(self, group: int, number: int) -> Int64:
        return member_order(number, seed=self._seed, source=f"{self._name}\0bins {group}", epoch=self._epoch)
