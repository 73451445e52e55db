"""A step of a deep model, told from rehearsals of two shallow ones: where all layers are alike, one more layer adds the
same calls and the same bytes at every place between the first and the last.

A rehearsal costs about half a second for each layer and micro-batch that is played; this one costs seven layers, more
where FSDP2 gathers far ahead, however deep the model. It is exact, and tested to be: what the engines add to the
model's part (ZeRO's partitions, buckets and gathers) is computed by estimate.py from all the layers afterwards.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sisa_dist.config import ModelConfig, RunConfig
from sisa_dist.parallel.mesh import Mesh
from sisa_dist.training.changes import changed
from sisa_dist.training.memory_meter import MemoryMeter
from sisa_dist.training.rehearsal import Rehearsed, rehearse_step
from sisa_dist.training.traffic_meter import TrafficMeter
from sisa_dist.training.work_meter import Call, WorkMeter
from sisa_dist.training.zero_gathers import Use

_MOMENT = re.compile(r"(.* of layer )(\d+)")
_MODULE = re.compile(r"(blocks\.)(\d+)(.*)")


def rehearse_deep(config: RunConfig, mesh: Mesh) -> Rehearsed:
    """What `rehearse_step` would see, from as few layers as tell it; from all of them where they differ."""
    depths = few_layers(config)
    if depths is None:
        return rehearse_step(config, mesh)
    shallow, deeper = (rehearse_step(changed(config, {"model.n_layers": depth}), mesh) for depth in depths)
    grow = _Growth(*depths, config.model.n_layers)
    memory, traffic, work = MemoryMeter(), TrafficMeter(mesh), WorkMeter()
    memory.starts = grow.moments(shallow.memory.starts, deeper.memory.starts)
    memory.peaks = grow.moments(shallow.memory.peaks, deeper.memory.peaks)
    memory.on_host = grow.number(shallow.memory.on_host, deeper.memory.on_host)
    traffic.calls = grow.counts(shallow.traffic.calls, deeper.traffic.calls)
    traffic.nbytes = grow.counts(shallow.traffic.nbytes, deeper.traffic.nbytes)
    calls = grow.calls(shallow.work.calls, deeper.work.calls)
    if calls is None:
        return rehearse_step(config, mesh)
    work.calls = calls
    from_host = grow.number(sum(shallow.from_host), sum(deeper.from_host))
    return Rehearsed(memory, traffic, work, [from_host], grow.uses(deeper.uses))


def few_layers(config: RunConfig) -> tuple[int, int] | None:
    """The depths of the two rehearsals; None: all layers have to be played.

    Each end of a model reaches as far into it as FSDP2 gathers ahead; one layer lies between in the shallow one.
    """
    end = max(1, config.engine.prefetch) if config.engine.kind == "fsdp2" else 1
    shallow = 2 * end + 1
    deep_enough = config.model.n_layers > 2 * shallow + 1
    return (shallow, shallow + 1) if deep_enough and layers_alike(config.model) else None


def layers_alike(model: ModelConfig) -> bool:
    per_layer = (model.mixer, model.mlp, model.ffn, model.d_s)
    return not any(isinstance(value, list) for value in per_layer) and not model.learned_d_s and model.mixer != "hymba"


@dataclass(frozen=True)
class _Growth:
    """From rehearsals of `shallow` and of `shallow + 1` layers to `layers`."""

    shallow: int
    deeper: int
    layers: int

    @property
    def _end(self) -> int:
        """Layers of each end."""
        return self.shallow // 2

    @property
    def _more(self) -> int:
        return self.layers - self.shallow

    def number(self, shallow: int, deeper: int) -> int:
        return shallow + self._more * (deeper - shallow)

    def counts(self, shallow: Counter[Any], deeper: Counter[Any]) -> Counter[Any]:
        return Counter({key: self.number(shallow[key], count) for key, count in deeper.items()})

    def calls(self, shallow: Counter[Call], deeper: Counter[Call]) -> Counter[Call] | None:
        """Of an operator that more layers do not call more often, as the optimizer's of all weights at once, the calls
        themselves grow, in the order they first came and equal ones together. Of another's some become more, and the
        rest grow, as a sum over the layers' own sums. None: the rest do not come out even."""
        grown: Counter[Call] = Counter()
        ours, theirs = _by_operator(shallow), _by_operator(deeper)
        if ours.keys() != theirs.keys():
            return None
        for operator, after in theirs.items():
            before = ours[operator]
            if before.total() != after.total():
                more = {call for call, times in before.items() if after[call] > times}
                grown.update({c: self.number(before[c], times) for c, times in after.items() if c in more})
                before, after = (
                    Counter({c: times for c, times in calls.items() if c not in more}) for calls in (before, after)
                )
            if before.total() != after.total():
                return None
            for one, other, times in _paired(before, after):
                flops = one.flops + self._more * (other.flops - one.flops)
                grown[one._replace(flops=flops, nbytes=self.number(one.nbytes, other.nbytes))] += times
        return grown

    def moments(
        self, shallow: Mapping[str, dict[str, int]], deeper: Mapping[str, dict[str, int]]
    ) -> dict[str, dict[str, int]]:
        """Bytes by purpose in each moment, in order; moments of layers by their distance from the nearer end."""

        def along(*terms: tuple[int, dict[str, int]]) -> dict[str, int]:
            return {purpose: sum(times * found[purpose] for times, found in terms) for purpose in terms[0][1]}

        def grown(before: dict[str, int], after: dict[str, int]) -> dict[str, int]:
            return along((1 - self._more, before), (self._more, after))

        whole: dict[str, dict[str, int]] = {}
        for moment, found in deeper.items():
            match = _MOMENT.fullmatch(moment)
            if match is None:
                whole[moment] = grown(shallow[moment], found)
                continue
            name, number = match[1], int(match[2])
            for layer in self._layers(number, descending="backward" in name):
                before = shallow[f"{name}{self._in_shallow(number)}"]
                if not self._inside(number):
                    whole[f"{name}{layer}"] = grown(before, found)
                    continue
                first, second = (deeper[f"{name}{self._end + place}"] for place in (0, 1))
                further = layer - self._end
                at_first = grown(before, first)
                whole[f"{name}{layer}"] = along((1, at_first), (further, second), (-further, first))
        return whole

    def uses(self, deeper: Iterable[Use]) -> list[Use]:
        """Of the weights of all layers, in order."""
        whole: list[Use] = []
        waiting: list[Use] = []  # of the layer that stands for those between

        def renamed(use: Use, layer: int) -> Use:
            def rename(name: str) -> str:
                return _MODULE.sub(lambda match: f"{match[1]}{layer}{match[3]}", name)

            return Use(use.begins, rename(use.module), tuple(map(rename, use.names)))

        for use in deeper:
            match = _MODULE.fullmatch(use.module)
            number = None if match is None else int(match[2])
            if number == self._end:
                waiting.append(use)
                continue
            if waiting:
                whole += (renamed(one, layer) for layer in self._layers(self._end) for one in waiting)
                waiting = []
            if number is None:
                whole.append(use)
            else:
                whole += (renamed(use, layer) for layer in self._layers(number))
        return whole

    def _inside(self, number: int) -> bool:
        """Whether a layer of the deeper rehearsal is of neither end."""
        return self._end <= number < self.deeper - self._end

    def _in_shallow(self, number: int) -> int:
        return number if number < self._end else self._end if self._inside(number) else number - 1

    def _layers(self, number: int, *, descending: bool = False) -> list[int]:
        """Those of the whole model that one of the deeper rehearsal tells: of its two in the middle the one that comes
        first tells all between the ends."""
        if not self._inside(number):
            return [number if number < self._end else number + self.layers - self.deeper]
        between = range(self._end, self.layers - self._end)
        if number != self._end + descending:
            return []
        return list(reversed(between) if descending else between)


def _by_operator(calls: Counter[Call]) -> dict[tuple[str, str, str], Counter[Call]]:
    found: dict[tuple[str, str, str], Counter[Call]] = defaultdict(Counter)
    for call, times in calls.items():
        found[call.phase, call.operator, call.dtype][call] = times
    return found


def _paired(before: Counter[Call], after: Counter[Call]) -> Iterator[tuple[Call, Call, int]]:
    """The calls of two counters of one total side by side, and how often each pair is one."""
    ones, others = list(before.items()), list(after.items())
    while ones:
        (one, left), (other, right) = ones.pop(0), others.pop(0)
        times = min(left, right)
        yield one, other, times
        if left > times:
            ones.insert(0, (one, left - times))
        if right > times:
            others.insert(0, (other, right - times))
