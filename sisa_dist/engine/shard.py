"""How FSDP2 wraps the model: groups, precision, prefetch, offload. One block is one group of gathered weights."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import Shard

from sisa_dist.config import EngineConfig
from sisa_dist.model import LM
from sisa_dist.parallel.expert import ExchangedExperts
from sisa_dist.parallel.mesh import Mesh
from sisa_dist.parallel.storage import fsdp_dim


def shard(model: LM, mesh: Mesh, engine: EngineConfig) -> None:
    """`fully_shard` over dp_shard, replicated over dp_replicate; experts over expert_dp, where ep deals them out.

    Before weights exist: the model is on meta. Gradients are averaged over the ranks of the mesh in question.
    """
    dtype = torch.bfloat16 if engine.precision == "bf16" else torch.float32
    axes = ("dp_replicate", "dp_shard") if mesh.size("dp_replicate") > 1 else ("dp_shard",)
    over_data = mesh.device_mesh[axes]
    offload = CPUOffloadPolicy(pin_memory=mesh.device.type == "cuda") if engine.cpu_offload else OffloadPolicy()

    def wrap(
        module: nn.Module | list[nn.Module],
        param_dtype: torch.dtype,
        *,
        reshard: bool | None,
        device_mesh: DeviceMesh = over_data,
    ) -> None:
        # Inputs are never cast: the embedding's output already has the compute dtype, and RoPE tables stay fp32.
        policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        fully_shard(
            module,
            mesh=device_mesh,
            mp_policy=policy,
            reshard_after_forward=reshard,
            offload_policy=offload,
            shard_placement_fn=lambda parameter: Shard(fsdp_dim(parameter.shape, device_mesh.size(-1))),
        )

    groups: list[list[FSDPModule]] = []
    for block in model.blocks:
        small = [module for module in block.modules() if getattr(module, "fp32_in_forward", False)]
        wrap(small, torch.float32, reshard=engine.reshard_after_forward)
        experts = [module for module in block.modules() if mesh.expert_mesh and isinstance(module, ExchangedExperts)]
        for module in experts:
            assert mesh.expert_mesh is not None
            wrap(module, dtype, reshard=engine.reshard_after_forward, device_mesh=mesh.expert_mesh["expert_dp"])
        wrap(block, dtype, reshard=engine.reshard_after_forward)
        groups.append([block, small[0], *experts])  # type: ignore[list-item]
    if model.gates is not None:
        wrap(model.gates, torch.float32, reshard=engine.reshard_after_forward)
    wrap(model.norm, torch.float32, reshard=engine.reshard_after_forward)
    wrap(model, dtype, reshard=None)
    for number, (first, *_) in enumerate(groups) if engine.prefetch else ():
        ahead, behind = groups[number + 1 :][: engine.prefetch], groups[:number][::-1][: engine.prefetch]
        first.set_modules_to_forward_prefetch([module for group in ahead for module in group])
        first.set_modules_to_backward_prefetch([module for group in behind for module in group])
