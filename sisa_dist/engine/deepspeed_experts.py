"""Tells DeepSpeed which parameters are experts dealt out over ep, and which ranks hold the same ones.

DeepSpeed's ZeRO-1 and 2 have the notion: a parameter with `allreduce = False` is reduced over, and partitioned among,
the expert data-parallel group of its name, its gradient still divided by all data ranks, and counted once in the norm.
They ask for it only if a module is of DeepSpeed's own MoE class, which ours is not: one without parameters stands in
the model while the engine is made. Of DeepSpeed (0.19) this uses attributes that it does not promise.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from sisa_dist.parallel.mesh import Mesh

_STAND_IN = "deepspeed_experts"


@contextmanager
def announced(model: nn.Module, names: Collection[str], adamw: torch.optim.AdamW, mesh: Mesh) -> Iterator[None]:
    """In force, `deepspeed.initialize` takes the parameters `names`, a group of their own in `adamw`, for experts."""
    from deepspeed.moe.layer import MoE
    from deepspeed.utils import groups

    class StandIn(MoE):
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.num_experts = 0

        def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
            """The groups are ours already."""

    group_name = f"ep_size_{mesh.ep_size}"
    # Tables of the process: what an engine before left there would be other groups' handles.
    for table, axis in ((groups._EXPERT_PARALLEL_GROUP, "ep"), (groups._EXPERT_DATA_PARALLEL_GROUP, "expert_dp")):
        table.clear()
        table[group_name] = mesh.group(axis)
    experts = [parameter for name, parameter in model.named_parameters() if name in names]
    for parameter in experts:
        parameter.allreduce, parameter.group_name = False, group_name  # type: ignore[attr-defined]
    (own,) = (group for group in adamw.param_groups if group["params"][0] is experts[0])
    own.update(moe=True, name=group_name)
    model.add_module(_STAND_IN, StandIn())
    try:
        yield
    finally:
        delattr(model, _STAND_IN)
