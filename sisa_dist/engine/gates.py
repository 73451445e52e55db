"""What engines do round a step for the gates of a learned d_s: hand them their noise, and move them on afterwards.

Noise is a function of seed, step and place among the gates, so it is the same on every rank, in every micro-batch and
recomputation, and after a resume. What moves stands in buffers, alike on every rank and part of a checkpoint; it is
computed from weights that all ranks have alike, so nothing is sent.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sisa_dist.model import LM
from sisa_dist.model.init import Uniform, initial_value
from sisa_dist.parallel.mesh import Mesh


@dataclass(frozen=True)
class LearnedDs:
    """Before the last step, one entry for each layer that has d_s."""

    layers: list[int]
    d_s: list[float]  # channels per head with a gate that evaluation leaves open
    expected: list[float]  # mean number that the step's noise left open
    share: float  # of training.steps done


class GateWatch:
    """Of a model without gates it does nothing."""

    def __init__(self, model: LM, mesh: Mesh, *, seed: int, steps: int) -> None:
        """`steps`: training.steps, of which the gates' schedule is shares unless the config says of how many it is."""
        self._gates, self._mesh, self._seed, self._steps = model.gates, mesh, seed, steps
        if model.gates is not None:
            self._steps = model.gates.settings.steps or steps
        self._step: int | None = None
        self._reached = 0.0  # share, by what was loaded

    def loaded(self) -> None:
        """The buffers are others now."""
        self._step = None

    def before_step(self) -> None:
        if self._gates is None:
            return
        if self._step is None:
            self._step, self._reached = round(self._gates.step.item()), self._gates.share.item()
        shape = torch.Size((len(self._gates.layers), self._gates.settings.max // 2))
        self._gates.noise_LP = noise(self._seed, self._step, shape).to(self._mesh.device, non_blocking=True)

    @property
    def stand(self) -> bool:
        """Whether the step that runs has hard gates. They get no gradient, but momentum would still move them past one
        another."""
        if self._gates is None:
            return False
        assert self._step is not None
        return max(self._reached, self._share(self._step)) >= self._gates.settings.anneal_until

    def _share(self, step: int) -> float:
        return min(1.0, step / self._steps)

    def after_step(self) -> None:
        """Behind the optimizer, which has waited for a save under way. A step that is skipped counts."""
        if self._gates is None:
            return
        gates = self._gates
        assert self._step is not None
        self._step += 1
        gates.noise_LP = None
        gates.step.fill_(self._step)
        # Never back: where a run goes on longer than was meant, what has hardened stays so.
        gates.share.clamp_(min=self._share(self._step))

    def take(self) -> LearnedDs | None:
        """As the last step saw it; None without gates, or without a step. Waits for the device."""
        gates = self._gates
        if gates is None or gates.seen is None:
            return None
        open_L, expected_L = gates.seen
        return LearnedDs(gates.layers, open_L.tolist(), expected_L.tolist(), gates.share.item())


def noise(seed: int, step: int, shape: torch.Size) -> Tensor:
    """u of a step, uniform in [0, 1), fp32 on the CPU."""
    return (initial_value(Uniform(1.0), f"gates.noise.{step}", shape, seed=seed) + 1) / 2
