"""The exact order of an epoch, as pure functions of numbers: no files, no state, no world size.

An epoch of a source is one stream of tokens: its members in a permutation drawn from (seed, source, epoch). Window w of
length T holds tokens wT … (w+1)T of that stream, T inputs and their T labels; the last one is shorter. The W windows
are cut into L contiguous lanes whose sizes differ by at most one, larger first, and served round robin over the lanes.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Int64 = NDArray[np.int64]
ORDER_VERSION = 1  # in the loader's fingerprint: raise it with any change here that serves another order


class Range(NamedTuple):
    """Tokens start … stop-1 of one member."""

    member: int
    start: int
    stop: int


class Pieces(NamedTuple):
    """Stretches that are each one piece of one member; int64 [n] all. The member is −1 of those that are not."""

    members: Int64
    starts: Int64
    follows: Int64  # the member of the token behind the piece: the same, or another whose first token it is


@dataclass(frozen=True)
class EpochOrder:
    """An epoch's stream. members: as the stream has them; ends: cumulative token counts in that order, int64 both."""

    members: Int64
    ends: Int64

    @cached_property
    def tokens(self) -> Int64:
        """Of each member, in that order."""
        return np.diff(self.ends, prepend=0)

    def locate(self, start: int, stop: int) -> list[Range]:
        """Where tokens start … stop-1 of the stream are (fewer where it ends first), in stream order."""
        stop = min(stop, int(self.ends[-1]))
        slot = int(np.searchsorted(self.ends, start, side="right"))
        ranges = []
        while start < stop:
            begin = int(self.ends[slot - 1]) if slot else 0
            upto = min(stop, int(self.ends[slot]))
            ranges.append(Range(int(self.members[slot]), start - begin, upto - begin))
            start, slot = upto, slot + 1
        return ranges

    def pieces(self, starts: Int64, count: int) -> Pieces:
        """Of `count` tokens from each of `starts`, which are in the stream, and the one behind them."""
        slots = np.searchsorted(self.ends, starts, side="right")
        members, ends, stops = self.members[slots], self.ends[slots], starts + count
        follows = self.members[np.minimum(slots + (stops == ends), len(self.members) - 1)]
        whole = (stops <= ends) & (stops < self.ends[-1])
        return Pieces(np.where(whole, members, -1), starts - (ends - self.tokens[slots]), follows)


def epoch_order(tokens: Int64, *, seed: int, source: str, epoch: int) -> EpochOrder:
    """The stream of `epoch`: members of `tokens` [members] tokens each (none empty), permuted by `member_order`."""
    members = member_order(len(tokens), seed=seed, source=source, epoch=epoch)
    return EpochOrder(members, np.cumsum(tokens[members]))


def stored_order(tokens: Int64) -> EpochOrder:
    """The stream as it was written, in which a document that spans members is whole."""
    return EpochOrder(np.arange(len(tokens)), np.cumsum(tokens))


def member_order(num_members: int, *, seed: int, source: str, epoch: int) -> Int64:
    """Permutation [num_members] of the members of `source` in `epoch`.

    Sorts raw 64-bit Philox outputs (Salmon et al. 2011), whose stream NumPy guarantees on every platform and version,
    unlike that of Generator.permutation. Ties, one in 2^64 pairs, keep their order.
    """
    name = f"{seed}\0{source}\0{epoch}".encode()
    key = np.frombuffer(hashlib.blake2b(name, digest_size=16).digest(), dtype="<u8")
    draws = np.random.Philox(key=key).random_raw(num_members)
    return np.argsort(draws, kind="stable").astype(np.int64)


def num_windows(num_tokens: int, seq_len: int) -> int:
    """Windows of an epoch: every token but the first is a label exactly once."""
    return max(0, -(-(num_tokens - 1) // seq_len))


def lane_entry(served: int, windows: int, lanes: int) -> int:
    """The window served as number `served` < windows of an epoch: entry ⌊i/L⌋ of lane i mod L.

    Exactly once an epoch for any W and L, L > W too.
    """
    assert 0 <= served < windows and lanes > 0
    size, larger = divmod(windows, lanes)
    entry, lane = divmod(served, lanes)
    return lane * size + min(lane, larger) + entry


def lane_entries(served: Int64, windows: int, lanes: int) -> Int64:
    """`lane_entry` of many at once."""
    size, larger = divmod(windows, lanes)
    entry, lane = np.divmod(served, lanes)
    found: Int64 = lane * size + np.minimum(lane, larger) + entry
    return found


def unread(served: int, windows: int, lanes: int) -> list[tuple[int, int]]:
    """The windows that `lane_entry` has not named after `served` of an epoch: at most `lanes` intervals [a, b)."""
    size, larger = divmod(windows, lanes)
    found: list[tuple[int, int]] = []
    for lane in range(min(lanes, windows)):
        first = lane * size + min(lane, larger)
        start, stop = first + max(0, -(-(served - lane) // lanes)), first + size + (lane < larger)
        if start < stop and found and found[-1][1] == start:
            found[-1] = found[-1][0], stop
        elif start < stop:
            found.append((start, stop))
    return found
