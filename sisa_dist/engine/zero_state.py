"""Where DeepSpeed keeps fp32 weights and moments at each ZeRO stage, as tensors a checkpoint can write and fill.

It reads attributes that DeepSpeed does not promise (0.19): flat partitions, their offsets, the padding behind the last.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sisa_dist.parallel.apply import Slice
from sisa_dist.parallel.flat_shard import FlatShard
from sisa_dist.parallel.mesh import Mesh
from sisa_dist.parallel.storage import as_global

MOMENTS = ("exp_avg", "exp_avg_sq")


def make_moments(zero: Any, stage: int) -> None:
    """Moments of zeros for every flat partition, so that a checkpoint can be read into them before the first step."""
    if stage == 0:
        return
    optimizer = zero.optimizer
    for flat in optimizer.fp32_partitioned_groups_flat if stage == 3 else optimizer.single_partition_of_fp32_groups:
        optimizer.optimizer.state[flat] = {
            "step": torch.zeros((), dtype=torch.float32, device=flat.device),
            **{moment: torch.zeros_like(flat) for moment in MOMENTS},
        }


def state_tensors(
    zero: Any, stage: int, model: nn.Module, slices: Mapping[str, Slice], mesh: Mesh
) -> dict[str, Tensor]:
    """`Engine.state_tensors` of any stage."""
    state: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        part = slices[name]
        if stage == 0:
            moments = zero.optimizer.state[parameter]
            state[f"model.{name}"] = as_global(parameter, part, mesh)
            state |= {f"{moment}.{name}": as_global(moments[moment], part, mesh) for moment in MOMENTS}
            continue
        flat, at, start, numel = (_partition_3 if stage == 3 else _partition_12)(zero.optimizer, parameter)
        stored = {"model": flat, **{moment: zero.optimizer.optimizer.state[flat][moment] for moment in MOMENTS}}
        for kind, tensor in stored.items():
            state[f"{kind}.{name}"] = FlatShard.of(tensor.detach().narrow(0, at, numel), start, part, mesh)
    return state


def set_step(zero: Any, stage: int, step: int) -> None:
    """Adam's count of steps; and, after weights were written, the copies that forward uses."""
    optimizer = zero.optimizer
    for state in (optimizer.state if stage == 0 else optimizer.optimizer.state).values():
        state["step"].fill_(step)
    if stage in (1, 2):
        optimizer.update_lp_params()
    if stage == 3:
        kept = optimizer.persistent_parameters  # small ones, which every rank keeps whole
        if kept:
            kept[0].partition(kept)
        for number, flat in enumerate(optimizer.fp32_partitioned_groups_flat):
            optimizer.fp16_partitioned_groups_flat[number].data.copy_(flat.data)
            optimizer._reassign_or_swap_out_partitioned_parameters(number)
        if kept:
            kept[0].all_gather(kept)


def held(parameter: Any) -> Tensor:
    """This rank's flat partition of a ZeRO-3 parameter, without the padding behind the last, which nobody sets."""
    partition = parameter.ds_tensor
    start = dist.get_rank(parameter.ds_process_group) * partition.numel()
    return partition.flatten()[: max(0, parameter.ds_numel - start)]


def _partition_12(optimizer: Any, parameter: Any) -> tuple[Tensor, int, int, int]:
    """(flat fp32 partition, position in it, position in the flattened slice, elements) of this rank's part."""
    mapping = parameter._hp_mapping
    if mapping is None:  # another rank's
        return optimizer.single_partition_of_fp32_groups[0], 0, 0, 0
    flat = optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
    inside, within = mapping.hp_fragment_address, mapping.lp_fragment_address
    return flat, inside.start, within.start, within.numel


def _partition_3(optimizer: Any, parameter: Any) -> tuple[Tensor, int, int, int]:
    group, at, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
    start = dist.get_rank(parameter.ds_process_group) * size
    return optimizer.fp32_partitioned_groups_flat[group], at, start, max(0, min(size, parameter.ds_numel - start))
