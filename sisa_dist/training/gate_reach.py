"""Whether the gates of a learned d_s have the time to close, told before a run spends it."""

from __future__ import annotations

import math

from sisa_dist.config import RunConfig
from sisa_dist.model.gates import START
from sisa_dist.training.schedule import learning_rate


def too_slow_gates(config: RunConfig) -> str | None:
    """A line where no gate of a learned d_s can get from where it starts to closed before all harden: AdamW moves a
    weight by about its learning rate a step, at most. What is open too many is then cut at once, having learned
    nothing of it."""
    learned, steps = config.model.learned_d_s, config.training.steps
    if learned is None:
        return None
    ratio, first = config.optimizer.gate_lr_ratio, config.schedule.first_step or 0
    rates = (
        learning_rate(step, peak=config.optimizer.lr, steps=steps, schedule=config.schedule)
        for step in range(first, max(first, round(learned.anneal_until * steps)))
    )
    reach = sum(rates)
    if reach * ratio >= START:
        return None
    remedy = f"raise it to {math.ceil(2 * START / reach)} or more" if reach else "raise training.steps"
    return (
        f"warning: with optimizer.gate_lr_ratio {ratio:g} no gate of d_s can close before all harden (log α moves by "
        f"at most {reach * ratio:.2g} of {START:g}), so d_s stays {learned.max} until then: {remedy}"
    )
