"""Which weights ZeRO-3 gathers in a micro-batch, and when: its coordinator, played on names and sizes.

DeepSpeed (0.19) learns the order in which modules want their weights, gathers those of the next ones ahead, up to
`stage3_prefetch_bucket_size`, and lets go of weights that are not wanted again within `stage3_max_reuse_distance`
elements. A model smaller than these is gathered once for forward and backward together; of a larger one what was let go
of is gathered again for the backward.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from itertools import accumulate, groupby, takewhile
from typing import NamedTuple


class Use(NamedTuple):
    """A module begins, or ends, to need its own weights, of which it may have none: it looks ahead all the same."""

    begins: bool
    module: str
    names: tuple[str, ...]


def with_backward(forward: Sequence[Use], *, recomputed: bool) -> list[Use]:
    """The backward goes the other way; `recomputed`: with what is inside a block once more before it. An MLP that a
    block calls more than once has a chunk of tokens each time, and each is made once more before its backward."""
    uses = list(forward)
    for block, backwards in groupby(reversed(forward), key=lambda use: _block_around(use.module)):
        found = list(backwards)[::-1]
        calls = [number for number, use in enumerate(found) if use == Use(True, f"blocks.{block}.mlp", use.names)]
        if len(calls) < 2:
            again = _up_to_the_last(found) if recomputed and block is not None else []
            uses += _back(found, again)
            continue
        # What a block keeps ends with the last chunk's input, so that its second forward stops before that chunk.
        again = found[: calls[-1]] if recomputed else []
        for begin, end in reversed(list(zip(calls, [*calls[1:], len(found)], strict=True))):
            chunk = found[begin:end]
            uses += _back(chunk, [*again, *_up_to_the_last(chunk)])
            again = []
        uses += _back(found[: calls[0]], [])
    return uses


def _back(forward: Sequence[Use], again: Sequence[Use]) -> list[Use]:
    """`again` is done at the first operator's backward, when the modules around it have begun theirs."""
    back = [use._replace(begins=not use.begins) for use in reversed(forward)]
    begun = len(list(takewhile(lambda use: use.begins, back)))
    return [*back[:begun], *again, *back[begun:]]


def _up_to_the_last(forward: Sequence[Use]) -> list[Use]:
    """A second forward stops inside the last module."""
    again = list(forward)
    while not again[-1].begins:
        again.pop()
    return again


def _block_around(module: str) -> str | None:
    first, *rest = module.split(".")
    return rest[0] if first == "blocks" and len(rest) > 1 else None


def gathers(
    uses: Sequence[Use], sizes: Mapping[str, int], kept: Collection[str], *, prefetch: int, reuse: int, live: int
) -> list[list[str]]:
    """The weights of each all-gather of a forward and a backward; `kept` ones are there always. In elements:
    `prefetch` at most ahead, `live` at most there for more to be gathered ahead, `reuse` the distance above."""
    modules = [use.names for use in uses if use.begins]
    wanted = deque((name, step) for step, names in enumerate(modules) for name in names)
    steps: dict[str, list[int]] = {}
    for name, number in wanted:
        steps.setdefault(name, []).append(number)
    before = [0, *accumulate(sum(sizes[name] for name in names) for names in modules)]  # elements, by step
    there = set(kept)
    needed: dict[str, set[str]] = {name: set() for name in sizes}  # by which modules
    seen_until: dict[str, int] = {}  # the last use of a weight that looking ahead came past
    found: list[list[str]] = []
    step = available = 0

    def gather(names: list[str]) -> None:
        nonlocal available
        if names:
            found.append(names)
            there.update(names)
            available += sum(sizes[name] for name in names)

    for use in uses:
        if not use.begins:
            for name in use.names:
                needed[name].discard(use.module)
                later = steps[name][bisect_left(steps[name], step) :]
                soon = bool(later) and before[later[0]] - before[step] < reuse
                stays = name in kept or soon or seen_until.get(name, -1) > step or needed[name]
                if name in there and not stays:
                    there.discard(name)
                    available -= sizes[name]
            continue
        gather([name for name in use.names if name not in there])
        for name in use.names:
            needed[name].add(use.module)
        fresh = {name for name in use.names if seen_until.get(name, -1) < step}
        passed: set[str] = set()
        while wanted and len(passed) < len(fresh):
            name, last = wanted.popleft()
            seen_until[name] = last
            passed.add(name)
        room, ahead = min(live - available, prefetch), list[str]()
        while wanted and room > 0:
            name, last = wanted.popleft()
            seen_until[name] = max(seen_until.get(name, -1), last)
            if name not in there and name not in ahead:
                ahead.append(name)
                room -= sizes[name]
        gather(ahead)
        step += 1
    return found
