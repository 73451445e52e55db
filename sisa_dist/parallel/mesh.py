"""The processes of a run, their device and their axes. One place for rank arithmetic; no global state of ours."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from sisa_dist.config import ParallelConfig, UserError


@dataclass(frozen=True)
class Mesh:
    """This process's place. `device_mesh` has one axis, dp."""

    device: torch.device
    dp_rank: int
    dp_size: int
    device_mesh: DeviceMesh

    @property
    def is_main(self) -> bool:
        return self.dp_rank == 0

    def sum_over_dp(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over data ranks, on every rank; the argument is left as it is."""
        total = tensor.detach().clone()
        if self.dp_size > 1:
            dist.all_reduce(total, group=self.device_mesh.get_group("dp"))
        return total

    def barrier(self) -> None:
        if self.dp_size > 1:
            dist.barrier(group=self.device_mesh.get_group("dp"))


def init_mesh(parallel: ParallelConfig, *, device: str = "auto") -> Mesh:
    """The mesh of this launch: one process, or what torchrun put into RANK and WORLD_SIZE.

    One process gets a group of its own too, so that nothing above needs a second path. May be called again.
    Raises UserError where parallel.dp or device do not fit the launch.
    """
    chosen = _device(device)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if parallel.dp is not None and parallel.dp != world_size:
        raise UserError(
            f"parallel.dp is {parallel.dp} but {world_size} process(es) were launched: launch with "
            f"torchrun --nproc-per-node {parallel.dp}, or set parallel.dp to {world_size} or null"
        )
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
        if world_size > 1:
            dist.init_process_group(backend)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    device_mesh = dist.init_device_mesh(chosen.type, (dist.get_world_size(),), mesh_dim_names=("dp",))
    return Mesh(chosen, device_mesh.get_local_rank("dp"), device_mesh.size(), device_mesh)


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device is cuda but this machine has no usable CUDA device: set device to cpu or auto")
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device
