"""The processes of a run, their device and their axes. One place for rank arithmetic; no global state of ours.

Ranks are numbered with tp innermost, so that a tensor-parallel group stands on one host, then cp, then dp_shard, then
dp_replicate. The device mesh lists tp *before* dp_shard: a parameter is cut by tp first and its slice by FSDP, and in
that order both cuts are plain shards, also when they fall on one dimension.

Expert parallelism makes no ranks of its own. It lays a second mesh over the data ranks, ep × expert_dp: those of one
ep group exchange tokens and stand next to each other, those along expert_dp hold the same experts.

Nor does context parallelism make an axis that stores: to both engines its ranks are data ranks, over which weights are
sharded and gradients reduced, so they are part of dp_shard. They read the same windows, and hold parts of them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cached_property

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import _set_pg_timeout

from sisa_dist.config import ParallelConfig, UserError

AXES = ("dp_replicate", "tp", "dp_shard")
EXPERT_AXES = ("ep", "expert_dp")
CONTEXT_AXES = ("outside_cp", "cp")


class Pulse:
    """The step and phase this rank's main thread is in: what a post-mortem can say of it.

    Entering costs an attribute or two; `listener`, where somebody set one, is told.
    """

    def __init__(self) -> None:
        self.step, self.phase, self.since = 0, "start", time.monotonic()
        self.listener: Callable[[], None] | None = None

    def enter(self, phase: str, step: int | None = None) -> None:
        self.step = self.step if step is None else step
        self.phase, self.since = phase, time.monotonic()
        if self.listener:
            self.listener()


@dataclass(frozen=True)
class Mesh:
    """This process's place. `device_mesh` has the axes dp_replicate, tp, dp_shard, each of at least one rank.

    A place on dp_replicate × dp_shard is what an engine reduces over (`reduce_rank` of `reduce_size`). cp of them make
    one data rank (`dp_rank` of `dp_size`): its ranks, and those of their tp groups, have the same windows. Under
    sequence parallelism the tp group also shares out the sequence. With ep over 1 `expert_mesh` has the axes ep and
    expert_dp over the ranks of dp_shard; with cp over 1 `context_mesh` has cp, and all other ranks on one axis.
    """

    device: torch.device
    device_mesh: DeviceMesh
    sequence_parallel: bool = False
    pulse: Pulse = field(default_factory=Pulse, compare=False)
    expert_mesh: DeviceMesh | None = None
    context_mesh: DeviceMesh | None = None
    cp_kind: str = "all_gather"

    def enter(self, phase: str, *, step: int | None = None) -> None:
        """Say what this rank does next, before whatever may wait for other ranks."""
        self.pulse.enter(phase, step)

    @cached_property
    def stored_mesh(self) -> DeviceMesh:
        """Over which tp and FSDP cut a tensor. Kept: to slice a mesh takes 3 ms, and models have many tensors."""
        return self.device_mesh["tp", "dp_shard"] if self.tp_size > 1 else self.device_mesh["dp_shard"]

    @property
    def tp_rank(self) -> int:
        return self.device_mesh.get_local_rank("tp")

    @property
    def tp_size(self) -> int:
        return self.size("tp")

    @property
    def reduce_rank(self) -> int:
        return self.device_mesh.get_local_rank("dp_replicate") * self.size(
            "dp_shard"
        ) + self.device_mesh.get_local_rank("dp_shard")

    @property
    def reduce_size(self) -> int:
        """Ranks whose gradients make one average."""
        return self.size("dp_replicate") * self.size("dp_shard")

    @property
    def dp_rank(self) -> int:
        return self.reduce_rank // self.cp_size

    @property
    def dp_size(self) -> int:
        """Ranks with windows of their own, the cp ranks of one counted once."""
        return self.reduce_size // self.cp_size

    @property
    def cp_rank(self) -> int:
        return self.reduce_rank % self.cp_size

    @property
    def cp_size(self) -> int:
        return self.size("cp")

    @property
    def ep_rank(self) -> int:
        return 0 if self.expert_mesh is None else self.expert_mesh.get_local_rank("ep")

    @property
    def ep_size(self) -> int:
        return self.size("ep")

    @property
    def world_size(self) -> int:
        return self.device_mesh.size()

    @property
    def is_main(self) -> bool:
        return dist.get_rank() == 0

    def size(self, axis: str) -> int:
        """Of an axis of any mesh; without expert parallelism ep is 1 and expert_dp the whole of dp_shard."""
        if axis in AXES:
            return self.device_mesh.size(AXES.index(axis))
        if axis == "cp":
            return 1 if self.context_mesh is None else self.context_mesh.size(CONTEXT_AXES.index(axis))
        if self.expert_mesh is None:
            return 1 if axis == "ep" else self.size("dp_shard")
        return self.expert_mesh.size(EXPERT_AXES.index(axis))

    def group(self, axis: str) -> dist.ProcessGroup:
        if axis in AXES:
            return self.device_mesh.get_group(axis)
        if axis == "cp":
            assert self.context_mesh is not None, "without context parallelism there is no group for it"
            return self.context_mesh.get_group(axis)
        assert self.expert_mesh is not None, "without expert parallelism there are no groups for it"
        return self.expert_mesh.get_group(axis)

    def sum_over(self, tensor: torch.Tensor, *axes: str) -> torch.Tensor:
        """The sum over the ranks of `axes`, on every rank; the argument is left as it is."""
        total = tensor.detach().clone()
        for axis in axes:
            if self.size(axis) > 1:
                dist.all_reduce(total, group=self.group(axis))
        return total

    def sum_over_reduced(self, tensor: torch.Tensor) -> torch.Tensor:
        """Of what each rank has of its own tokens, those of cp ranks included."""
        return self.sum_over(tensor, "dp_shard", "dp_replicate")

    def sum_over_dp(self, tensor: torch.Tensor) -> torch.Tensor:
        """Of what data ranks have of their windows, which the cp ranks of one have alike."""
        total = self.sum_over_reduced(tensor)
        return total / self.cp_size if total.is_floating_point() else total // self.cp_size

    def max_over_all(self, tensor: torch.Tensor) -> torch.Tensor:
        """The element-wise maximum over every rank, on every rank; the argument is left as it is."""
        most = tensor.detach().clone()
        if self.world_size > 1:
            dist.all_reduce(most, dist.ReduceOp.MAX)
        return most

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()


def init_mesh(parallel: ParallelConfig, *, device: str = "auto", timeout: timedelta | None = None) -> Mesh:
    """The mesh of this launch: one process, or what torchrun put into RANK and WORLD_SIZE.

    One process gets a group of its own too, so that nothing above needs a second path. May be called again.
    `timeout` is what any rank waits for the others, at the rendezvous and in a collective; None: PyTorch's.
    Raises UserError where parallel or device do not fit the launch, or fewer processes came than WORLD_SIZE says.
    """
    chosen = _device(device)
    rank, world_size = (int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
    if not 0 <= rank < world_size:
        raise UserError(f"RANK is {rank} but WORLD_SIZE is {world_size}: set both as torchrun does, or neither")
    replicate, shard, tp = _sizes(parallel, world_size)
    if not dist.is_initialized():
        # NCCL wants a GPU for each rank; ranks that share one, as in tests, talk over gloo.
        crowded = torch.cuda.device_count() < int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        backend = "gloo" if chosen.type == "cpu" or crowded else "cpu:gloo,cuda:nccl"
        if world_size > 1:
            try:
                dist.init_process_group(backend, timeout=timeout)
            except dist.DistError as error:  # a store that nobody reaches, or that too few reached
                reason = " ".join(str(error).split())
                raise UserError(
                    f"rank {rank}: the {world_size} processes of WORLD_SIZE did not come together ({reason}): launch "
                    f"exactly {world_size}, all with the same MASTER_ADDR and MASTER_PORT"
                ) from None
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    if dist.get_world_size() != world_size:  # before a parameter is cut for a rank that does not exist
        raise UserError(
            f"the process group has {dist.get_world_size()} process(es) but WORLD_SIZE says {world_size}: start all of "
            "them by one launcher"
        )
    # A new tensor, row by row: torch 2.11 reads an axis's place off the strides, which a permuted axis of one keeps.
    ranks = torch.tensor(torch.arange(world_size).view(replicate, shard, tp).permute(0, 2, 1).tolist())
    device_mesh = DeviceMesh(chosen.type, ranks, mesh_dim_names=AXES)
    groups, expert_mesh = device_mesh.get_all_groups(), None
    context_mesh = None
    if parallel.ep > 1:
        ranks = torch.tensor(torch.arange(world_size).view(-1, parallel.ep).t().tolist())
        expert_mesh = DeviceMesh(chosen.type, ranks, mesh_dim_names=EXPERT_AXES)
        groups += expert_mesh.get_all_groups()
    if parallel.cp > 1:
        ranks = torch.arange(world_size).view(-1, parallel.cp, tp).transpose(1, 2).reshape(-1, parallel.cp)
        context_mesh = DeviceMesh(chosen.type, ranks, mesh_dim_names=CONTEXT_AXES)
        groups += context_mesh.get_all_groups()
    if timeout is not None and world_size > 1:
        # A DeviceMesh makes its groups with PyTorch's default, half an hour on gloo, whatever the world's is.
        for group in (dist.group.WORLD, *groups):
            _set_pg_timeout(timeout, group)
    return Mesh(
        chosen,
        device_mesh,
        parallel.sequence_parallel,
        expert_mesh=expert_mesh,
        context_mesh=context_mesh,
        cp_kind=parallel.cp_kind,
    )


def _sizes(parallel: ParallelConfig, world_size: int) -> tuple[int, int, int]:
    """(dp_replicate, dp_shard, tp) of `world_size` processes; cp is part of dp_shard."""
    tp, cp, replicate = parallel.tp, parallel.cp, parallel.dp_replicate
    axes, sizes = "parallel.tp", f"{tp}"
    if cp > 1:
        axes, sizes = f"{axes} × parallel.cp", f"{sizes} × {cp}"
    wanted = tp * cp * (parallel.dp or replicate)
    if parallel.dp is not None and wanted != world_size:
        raise UserError(
            f"{axes} × parallel.dp = {sizes} × {parallel.dp} but {world_size} process(es) were launched: launch with "
            f"torchrun --nproc-per-node {wanted}, or change parallel.dp (null takes every process that is left)"
        )
    if world_size % (tp * cp * replicate):
        raise UserError(
            f"{axes} × parallel.dp_replicate = {sizes} × {replicate} does not divide the {world_size} process(es) "
            f"launched: launch a multiple of {tp * cp * replicate}, or set parallel.tp=1, "
            f"{'parallel.cp=1, ' if cp > 1 else ''}parallel.dp_replicate=1 and parallel.sequence_parallel=false"
        )
    shard = world_size // (tp * replicate)
    if shard % parallel.ep:  # the config refuses ep beside tp or dp_replicate
        good = [n for n in range(1, shard + 1) if shard % n == 0]
        raise UserError(
            f"parallel.ep {parallel.ep} does not divide the {shard} data rank(s) launched: set it to one of {good}"
        )
    return replicate, shard, tp


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device is cuda but this machine has no usable CUDA device: set device to cpu or auto")
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device
