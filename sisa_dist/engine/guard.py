"""Whether a step may change the weights, decided on the device, alike on every rank, from its loss and gradient norm.

A step is skipped if either is not finite or lies `spike_sigma` standard deviations above its running mean. The verdict
never comes to the host before the optimizer has run: the fused AdamW reads it from `found_inf`, made for loss scaling,
and leaves weights, moments and its step count as they are. When to give up is the training loop's to say.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sisa_dist.parallel.mesh import Mesh

WINDOW = 128  # accepted steps that mean and variance remember, about
WARM_UP = 64  # accepted steps before a spike can be told from the first descent
# A loss that has gone flat to rounding has no spread, and then every ripple would be a spike: of the mean, at least.
LEAST_SPREAD = 1e-3


@dataclass(frozen=True)
class Verdict:
    """Two fp32 scalars on the mesh's device, 0 or 1, equal on every rank."""

    skip: Tensor  # the step must change nothing
    stop: Tensor  # some rank was asked to stop after this step


class Guard:
    """Running mean and variance of loss and gradient norm over the accepted steps, in fp64 on the mesh's device.

    The first WINDOW steps weigh alike (Welford), later ones fade with that time constant. A skipped step leaves no
    trace in them: one spike must not widen the gate for the next.
    """

    def __init__(self, mesh: Mesh, *, spike_sigma: float | None) -> None:
        self._mesh, self._sigma = mesh, spike_sigma
        # accepted steps; means of loss and norm; their variances
        self._seen = torch.zeros(5, dtype=torch.float64, device=mesh.device)

    def judge(self, loss: Tensor, grad_norm: Tensor, *, stop: bool = False) -> Verdict:
        """Between backward and optimizer, once a step. Collective over all ranks; nothing waits for the device.

        `loss` and `grad_norm` are scalars of the global batch, the norm before clipping; `stop` is whether this rank
        was asked to stop, which travels in the same all-reduce.
        """
        x_2 = torch.stack((loss, grad_norm)).double()
        count, mean_2, variance_2 = self._seen[0], self._seen[1:3], self._seen[3:5]
        bad = ~x_2.isfinite().all()
        if self._sigma is not None:
            spread_2 = torch.maximum(variance_2.sqrt(), LEAST_SPREAD * mean_2.abs())
            bad = bad | ((x_2 > mean_2 + self._sigma * spread_2).any() & (count >= WARM_UP))
        bad = bad.float()
        skip, stops = self._mesh.max_over_all(torch.stack((bad, torch.full_like(bad, float(stop))))).unbind()
        weight = 1 / (count + 1).clamp(max=WINDOW)
        delta_2 = x_2 - mean_2
        after = torch.cat(
            ((count + 1)[None], mean_2 + weight * delta_2, (1 - weight) * (variance_2 + weight * delta_2.square()))
        )
        self._seen = torch.where(skip.bool(), self._seen, after)
        return Verdict(skip, stops)

    def state(self) -> list[float]:
        """For the checkpoint; waits for the device."""
        return self._seen.tolist()

    def load(self, state: list[float]) -> None:
        self._seen = torch.tensor(state, dtype=torch.float64, device=self._mesh.device)


def skip_if(optimizer: torch.optim.AdamW, skip: Tensor) -> None:
    """Make the next `optimizer.step()` change nothing, its step count included, where `skip` is 1. Fused AdamW only."""
    assert all(group["fused"] for group in optimizer.param_groups), "only the fused AdamW reads found_inf"
    # Offloaded states: AdamW itself would copy without waiting for the copy.
    first = next(parameter for group in optimizer.param_groups for parameter in group["params"])
    optimizer.found_inf = skip.to(first.device)  # type: ignore[attr-defined]
