"""What engines do round a step for mixtures of experts: move the routers' biases, count who was chosen.

Counts are of the whole step, over all data ranks and micro-batches, so a bias is the same in every layout. It is a
buffer, alike on every rank, and part of the model's tensors in a checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sisa_dist.model import LM
from sisa_dist.model.lm import RoutingSums
from sisa_dist.model.moe import Router
from sisa_dist.parallel.mesh import Mesh


@dataclass(frozen=True)
class ExpertLoad:
    """How tokens went to experts since the last time it was asked for, one row for each layer that has them."""

    layers: list[int]
    counts: list[list[int]]  # tokens of each expert
    balance_loss: list[float]  # unweighted, mean over tokens; 1 where all is even
    z_loss: list[float]


class ExpertWatch:
    def __init__(self, model: LM, mesh: Mesh) -> None:
        self._model, self._mesh = model, mesh
        self._biased = [m for m in model.modules() if isinstance(m, Router) and m.settings.balance == "bias"]
        self._since: RoutingSums | None = None  # of this rank

    def after_step(self, skip: Tensor) -> None:
        """Behind the optimizer, which has waited for a save under way. `skip` (0 or 1): the step changes nothing.

        Collective where biases move: one sum of L × E counts over data ranks. Nothing waits for the device.
        """
        found = self._model.routed
        if found is None:
            return
        if self._biased:
            counts_LE = self._mesh.sum_over_dp(found.counts_LE)
            mean_L1 = counts_LE.double().mean(1, keepdim=True)
            move_LE = (mean_L1 - counts_LE).sign().float() * (1 - skip)
            for router, move_E in zip(self._biased, move_LE, strict=True):
                router.bias.add_(move_E.to(router.bias.device), alpha=router.settings.rate)
        since = self._since
        if since is not None:
            found = RoutingSums(
                found.counts_LE + since.counts_LE, found.losses_L2 + since.losses_L2, found.labels + since.labels
            )
        self._since = found

    def take(self) -> ExpertLoad | None:
        """Over all ranks, and from here on anew; None without experts, or without a step. Collective; waits."""
        found, self._since = self._since, None
        if found is None:
            return None
        sums = [found.counts_LE.double().flatten(), found.losses_L2.double().flatten(), found.labels.double()[None]]
        counts, losses, labels = self._mesh.sum_over_dp(torch.cat(sums)).cpu().split([len(part) for part in sums])
        layers = self._model.routed_layers
        losses_2L = (losses / labels.clamp(min=1)).view(len(layers), 2).t().tolist()
        return ExpertLoad(layers, counts.long().view(len(layers), -1).tolist(), *losses_2L)
