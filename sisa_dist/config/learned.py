"""The mapping form of `model.d_s`: channels per head that each layer finds in training."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt
from pydantic import model_validator as _model_validator

from sisa_dist.config.section import Section

LATTICE = 8  # of channels per head: kernels are made for multiples of it

SCHEDULE_KEYS = ("steps", "anneal_from", "anneal_until")  # which only training reads


class LearnedDsConfig(Section):
    """`max` channels per head in every layer that has d_s, in pairs with a gate each (model/gates.py).

    Shares are of `steps`. Until `anneal_from` gates are random and the mean falls to the budget; until
    `anneal_until` they harden to 0 or 1; from there on they stand, and the model trains without the rest.
    """

    learned: Literal[True]
    max: PositiveInt
    budget: PositiveFloat | None = None  # mean d_s over the layers that have one, met in every step
    penalty: PositiveFloat | None = None  # instead of a budget: nats that all channels of all layers together cost
    steps: PositiveInt | None = None  # that the shares are of; None: training.steps, or those of all stages
    anneal_from: float = Field(default=0.5, ge=0.0, le=1.0)
    anneal_until: float = Field(default=0.8, gt=0.0, le=1.0)

    @_model_validator(mode="after")
    def _consistent(self) -> LearnedDsConfig:
        if self.max % LATTICE:
            below = self.max // LATTICE * LATTICE
            near = " or ".join(str(n) for n in (below, below + LATTICE) if n)
            raise ValueError(f"max {self.max} is not a multiple of {LATTICE}, which kernels take: set {near}")
        if (self.budget is None) == (self.penalty is None):
            raise ValueError("give either budget, a mean d_s to end with, or penalty, nats for all channels")
        if self.budget is not None and not 2 <= self.budget < self.max:
            raise ValueError(f"budget {self.budget:g} is not from 2 to below max {self.max}: set one, or a larger max")
        if self.anneal_from >= self.anneal_until:
            raise ValueError(
                f"anneal_from {self.anneal_from:g} is not before anneal_until {self.anneal_until:g}: lower the first"
            )
        return self
