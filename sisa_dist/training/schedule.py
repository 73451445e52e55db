"""Learning rate as a pure function of the step: nothing to save, nothing to resume."""

from __future__ import annotations

import math

from sisa_dist.config import ScheduleConfig


def learning_rate(step: int, *, peak: float, steps: int, schedule: ScheduleConfig) -> float:
    """lr of 0-based `step` of a run that ends at `steps`: linear warm-up to peak, then

    cosine: half a cosine from peak to peak · final_lr_ratio, reached one step after the last;
    wsd: peak until decay_steps before the end, then linear to peak · final_lr_ratio (Hu et al. 2024).

    Begin and end are schedule.first_step and end_step, where they are set.
    """
    first = schedule.first_step or 0
    assert step >= first
    step, steps = step - first, (schedule.end_step or steps) - first
    warmup = schedule.warmup_steps
    if step < warmup:
        return peak * (step + 1) / warmup
    floor = peak * schedule.final_lr_ratio
    if schedule.kind == "cosine":
        progress = (step - warmup) / max(1, steps - warmup)
        return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    assert schedule.decay_steps is not None
    left = (steps - step) / schedule.decay_steps
    return floor + (peak - floor) * min(1.0, max(0.0, left))
