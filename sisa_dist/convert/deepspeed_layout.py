"""Where a parameter's elements lie in ZeRO's flat partitions: the arithmetic that reading and writing share.

Facts of DeepSpeed 0.19, of the slices of one tp rank. It opens no file.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from sisa_dist.config import OptimizerConfig
from sisa_dist.engine.optim import build_optimizer
from sisa_dist.model import LM

Group = Mapping[str, torch.Size]  # the parameters of one flat group, in order, with the shapes of their slices


class Span(NamedTuple):
    """`numel` elements: from `start` in data rank `rank`'s partition of `group`, from `first` in the parameter."""

    rank: int
    group: int
    start: int
    first: int
    numel: int


@dataclass(frozen=True)
class Layout:
    """Flat groups over `dp` data ranks.

    Stages 1 and 2 lay a group's parameters end to end and cut the whole into equal partitions. Stage 3 cuts each
    parameter into equal parts, the last padded, and lays a rank's parts end to end.
    """

    stage: int
    dp: int
    groups: tuple[Group, ...]
    offsets: Mapping[str, tuple[int, int]]  # name → group, first element: in the group, or in a rank's partition (3)
    lengths: tuple[int, ...]  # elements of a group (of a rank's part of it under 3) before the padding behind it
    partitions: tuple[int, ...]  # elements of one rank's partition, padding included, by group

    @staticmethod
    def of(groups: Sequence[Group], *, stage: int, dp: int, paddings: Sequence[Sequence[int]] | None = None) -> Layout:
        """`paddings`: elements left free behind each parameter of each group (parameter_alignment)."""
        offsets = {}
        lengths = []
        for number, group in enumerate(groups):
            at = 0
            for position, (name, shape) in enumerate(group.items()):
                offsets[name] = number, at
                numel = math.prod(shape)
                at += -(-numel // dp) if stage == 3 else numel + (paddings[number][position] if paddings else 0)
            lengths.append(at)
        # Stages 1 and 2 align a group to two elements a rank.
        partitions = tuple(lengths) if stage == 3 else tuple(-(-length // (2 * dp)) * 2 for length in lengths)
        return Layout(stage, dp, tuple(groups), offsets, tuple(lengths), partitions)

    def shape(self, name: str) -> torch.Size:
        return self.groups[self.offsets[name][0]][name]

    def spans(self, name: str) -> Iterator[Span]:
        """Where the parameter's elements are, in their order."""
        group, at = self.offsets[name]
        numel = math.prod(self.groups[group][name])
        if self.stage == 3:
            part = -(-numel // self.dp)
            for rank in range(self.dp):
                if rank * part < numel:
                    yield Span(rank, group, at, rank * part, min(part, numel - rank * part))
            return
        size = self.partitions[group]
        for rank in range(at // size, self.dp):
            low, high = max(at, rank * size), min(at + numel, (rank + 1) * size)
            if low >= high:
                return
            yield Span(rank, group, low - rank * size, low - at, high - low)

    def padding(self, rank: int, group: int) -> int:
        """Elements behind the last parameter in `rank`'s partition, which stages 1 and 2 leave out of the masters."""
        size = self.partitions[group]
        return 0 if self.stage == 3 else min(size, max(0, (rank + 1) * size - self.lengths[group]))


def sub_groups(groups: Sequence[Group], *, dp: int, largest: int) -> tuple[list[Group], list[int]]:
    """Stage 3's flat groups, closed once a rank holds `largest` elements; and of which of `groups` each is."""
    found: list[Group] = []
    owners = []
    for number, group in enumerate(groups):
        current: dict[str, torch.Size] = {}
        held = 0
        for name, shape in group.items():
            current[name] = shape
            held += -(-math.prod(shape) // dp)
            if held >= largest:
                found.append(current)
                owners.append(number)
                current, held = {}, 0
        if current:
            found.append(current)
            owners.append(number)
    return found, owners


def optimizer_groups(model: LM, config: OptimizerConfig) -> list[tuple[dict[str, Any], list[str]]]:
    """Our optimizer's groups: settings, as its `state_dict` has them, and the parameters' names in its order."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = build_optimizer(model, config, moments=False).param_groups
    return [
        ({k: v for k, v in group.items() if k != "params"}, [names[id(p)] for p in group["params"]]) for group in groups
    ]
