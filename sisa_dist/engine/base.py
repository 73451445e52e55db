"""The seam between the training loop and a distributed library, at the height of a step.

Accumulation, clipping and the optimizer stay behind it, because there the libraries really differ. The loop never
asks which engine it has, and an engine never looks inside a mixer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from data_pipeline.loader import Batch
from sisa_dist.engine.experts import ExpertLoad
from sisa_dist.engine.gates import LearnedDs
from sisa_dist.engine.guard import Guard
from sisa_dist.engine.score_samples import ScoreSamples
from sisa_dist.parallel.apply import Slice


@dataclass(frozen=True)
class StepResult:
    loss: float  # nats per token over the whole global batch
    grad_norm: float  # global L2 norm before clipping
    tokens: int  # labels that counted, over all ranks
    skipped: bool = False  # loss or norm was not finite or a spike: weights and moments are as they were
    stop: bool = False  # some rank was asked to stop; the same answer on every rank


class Engine(Protocol):
    """A model, its optimizer and their storage over the data ranks."""

    dp_rank: int
    dp_size: int
    guard: Guard  # its state is part of a checkpoint

    @property
    def slices(self) -> Mapping[str, Slice]:
        """What tensor parallelism gave this rank, by full parameter name."""

    def train_step(self, micro_batches: Sequence[Batch], lr: float, *, stop: bool = False) -> StepResult:
        """One optimizer step on this rank's micro-batches, unless the guard skips it. Collective.

        `stop`: this rank was asked to stop; every rank's result says whether any was. Says each phase to the mesh.
        """

    def score(self, tokens_BT: Tensor, labels_BT: Tensor, doc_ids_BT: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(log-probability fp32, is-argmax bool) of each label, [B, T] on the CPU; label −100 gives (0, True).

        Collective: every rank calls it equally often, with batches of any shape.
        """

    def sum_over_dp(self, values: list[float]) -> list[float]:
        """float64 sums over data ranks."""

    def state_tensors(self) -> dict[str, Tensor]:
        """The live weights and moments under `model.`, `exp_avg.`, `exp_avg_sq.` + full parameter name, and the model's
        buffers, which have no moments, under `model.`.

        Checkpoints read them and write into them in place.
        """

    def unequal_replicas(self) -> dict[str, list[str]]:
        """By mesh axis, names of weights that its ranks should hold alike, to the bit, but do not. Collective."""

    def set_step(self, step: int) -> None:
        """Optimizer steps taken so far, skipped ones not counted (Adam's bias correction); called after a load."""

    def before_update(self, call: Callable[[], None]) -> None:
        """From now on `call` is called before a step changes weights or moments; forward and backward leave both."""

    def layer_statistics(self) -> dict[str, list[float | None]]:
        """Per layer the mean λ and, over the last step's tokens, the half-life of the decay in tokens. Collective."""

    def expert_load(self) -> ExpertLoad | None:
        """How steps since the last call went to experts; None where no layer has any. Collective."""

    def learned_d_s(self) -> LearnedDs | None:
        """What the last step found of d_s; None where it is not learned."""

    def sample_scores(self, step: int) -> None:
        """Of the next batch that `score` is given a few queries are looked at, drawn from the seed and `step`. On every
        rank."""

    def score_samples(self) -> ScoreSamples:
        """What was seen of them. Collective."""
