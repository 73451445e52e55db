"""What a run, or a stage of it, takes at a step's time: days, device-hours and their price."""

from __future__ import annotations

from dataclasses import dataclass

from sisa_dist.config import RunStage
from sisa_dist.training.roofline import Roofline


@dataclass(frozen=True)
class Cost:
    """Of the training steps alone: evaluations and checkpoints are not counted."""

    steps: int
    tokens: int
    days: float
    device_hours: float
    price: float | None  # in whatever a device-hour was given in


def cost_of(stage: RunStage, bound: Roofline, *, ranks: int, price_per_hour: float | None = None) -> Cost:
    """Of a stage's own steps; a run without stages is one."""
    steps = stage.end_step - stage.first_step
    hours = steps * bound.seconds / 3600
    price = None if price_per_hour is None else hours * ranks * price_per_hour
    return Cost(steps, steps * bound.tokens, hours / 24, hours * ranks, price)
