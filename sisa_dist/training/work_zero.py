"""What DeepSpeed's ZeRO computes and copies in a step beyond what the model does: buckets, norms, AdamW, the host link.

Arithmetic on 0.19's code with fp32 parameters, as our engine runs it; nothing here is a matrix product.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sisa_dist.parallel.apply import Slice
from sisa_dist.training.work import Work
from sisa_dist.training.zero import FP32, States, optimizer_groups


def zero_work(
    stage: int, held: States, shapes: Mapping[str, Sequence[int]], slices: Mapping[str, Slice], *, micro_batches: int
) -> tuple[Work, ...]:
    """`held`: what a rank stores, `shapes`: its slices."""
    groups = optimizer_groups(shapes, slices)
    whole = FP32 * sum(map(sum, groups.values()))
    part = held.gradients // len(groups)  # of a group, on average
    calls = len(groups)

    def optimizer(operator: str, copies: int) -> Work:
        """`copies`: how often a group's part is read or written."""
        return Work("optimizer", operator, "float32", calls, 0.0, copies * part)

    rounds = micro_batches if stage > 1 else 1
    # Into a bucket and, where no rank keeps the bucket's memory, back out of it.
    bucket = Work("backward", "zero::bucket", "float32", rounds, 0.0, (2 if stage else 4) * whole)
    # Norm, clipping, then weight, gradient and two moments read and three written.
    found = [bucket, optimizer("aten::norm", 1), optimizer("aten::mul_", 2), optimizer("aten::_fused_adamw_", 7)]
    if stage:  # masters to the weights that forward reads
        found.append(optimizer("aten::copy_", 2))
    return tuple(found)


def zero_host_bytes(stage: int, held: States, *, micro_batches: int) -> int:
    """Over the host link in a step with engine.cpu_offload: gradients of a rank's part go to the host and, from the
    second micro-batch on, what is summed there comes and goes; weights come after the step (stages 1 and 2) or at every
    gather (3). Read off its code, not measured."""
    part = held.gradients
    rounds = micro_batches if stage > 1 else 1
    return (2 * rounds - 1) * part + (micro_batches if stage == 3 else 1) * part
