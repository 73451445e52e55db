"""What engines do for samples of scores: which queries of which window, and one value for all ranks.

They are of 16 queries, one in each sixteenth of the first window of the first data rank's next batch to score, drawn
from (seed, step). So they are the same in every layout, and cost about 32 / (windows · T) of an evaluation's scores. An
evaluation's first window is always the same held-out one, of a mixture that of its first source: they tell how a run
goes on, not what is true of all its text. Under engine.compile that first batch is scored eagerly.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from sisa_dist.model import LM
from sisa_dist.model.init import Uniform, initial_value
from sisa_dist.model.score_samples import sampled_layers, sampling
from sisa_dist.ops.sampled import ScoreSample
from sisa_dist.parallel.mesh import Mesh

ROWS = 16


@dataclass(frozen=True)
class ScoreSamples:
    """By layer; None where a layer has no such score. A largest value that is inf may have been nan: max hides that."""

    content_max: list[float | None]
    importance_max: list[float | None]
    moved: list[float | None]


class ScoreWatch:
    """Of a model without SISA layers, and under context parallelism, it does nothing."""

    def __init__(self, model: LM, mesh: Mesh, *, seed: int, compiled: bool = False) -> None:
        self._model, self._mesh, self._seed, self._compiled = model, mesh, seed, compiled
        self._layers = list(sampled_layers(model))
        self._step: int | None = None
        self._found: dict[int, ScoreSample] | None = None  # empty where another rank looked

    def ask(self, step: int) -> None:
        """The next batch to score is sampled, as of `step`."""
        self._step = step

    @contextmanager
    def look(self, seq_len: int) -> Iterator[None]:
        """Round a forward of windows of `seq_len` tokens, before any padding."""
        step, self._step = self._step, None
        if step is None or not self._layers:
            yield
            return
        looks = self._mesh.dp_rank == 0
        sampler: AbstractContextManager[dict[int, ScoreSample]] = nullcontext({})
        if looks:
            sampler = sampling(self._model, rows(self._seed, step, seq_len))
        # A compiled block does not see hooks that came later. Every rank goes without, so that all do alike.
        eager = torch.compiler.set_stance("force_eager") if self._compiled else nullcontext()
        with eager, sampler as found:
            yield
        assert len(found) == len(self._layers) * looks, "a layer's score was not called"
        self._found = found

    def take(self) -> ScoreSamples:
        """Of the batch that was sampled since the last call, over all ranks; None everywhere if none was. Collective;
        waits for the device."""
        nothing = ScoreSample(*(torch.zeros((), device=self._mesh.device),) * 3)
        largest: list[list[float]] = []
        moved: list[float] = []
        found, self._found = self._found, None
        if found is not None:
            sampled = [found.get(layer, nothing) for layer in self._layers]
            most = torch.stack([torch.stack((one.content_max, one.importance_max)).double() for one in sampled])
            share = torch.stack([one.moved.double() for one in sampled])
            most = most.nan_to_num(nan=torch.inf, posinf=torch.inf)  # of nan and 0 a collective's max may be 0
            largest = self._mesh.max_over_all(most).tolist()
            share = self._mesh.sum_over(share, "tp", "dp_shard", "dp_replicate")  # each tp rank has as many heads
            moved = (share / self._mesh.tp_size).tolist()
        return ScoreSamples(
            self._spread([content for content, _ in largest]),
            self._spread([importance for _, importance in largest]),
            self._spread(moved),
        )

    def _spread(self, values: list[float]) -> list[float | None]:
        by_layer = dict(zip(self._layers, values, strict=True)) if values else {}
        return [by_layer.get(layer) for layer in range(self._model.config.n_layers)]


def rows(seed: int, step: int, seq_len: int) -> Tensor:
    """One position in each of 16 equal stretches of the window, or of as many as it has positions; int64, ascending."""
    num = min(ROWS, seq_len)
    drawn = (initial_value(Uniform(1.0), f"score_samples.{step}", torch.Size((num,)), seed=seed) + 1) / 2
    return ((torch.arange(num) + drawn.double()) * (seq_len / num)).long().clamp(max=seq_len - 1)
