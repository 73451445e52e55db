"""What a real engine holds and allocates, from PyTorch's own accounts: the profiler's memory events see every storage
that the CPU allocator gives and takes back, also inside kernels, which the estimate cannot."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile, record_function

from data_pipeline.loader import Batch
from sisa_dist.config import RunConfig
from sisa_dist.engine import Engine, build_engine
from sisa_dist.parallel.mesh import init_mesh


def held_bytes(config: RunConfig) -> dict[str, Any]:
    """Of this rank, at the optimizer's step of a real engine: weights, gradients, moments; its place on dp_shard."""
    mesh = init_mesh(config.parallel, device="cpu")
    engine: Any = build_engine(config, mesh)
    found: dict[str, Any] = {"shard_rank": mesh.device_mesh.get_local_rank("dp_shard")}
    step = engine.optimizer.step

    def look(*arguments: Any) -> Any:
        parameters = list(engine.model.parameters())
        found["weights"] = sum(map(_bytes, parameters))
        found["stored"] = sum(_local(p).untyped_storage().nbytes() for p in parameters)
        found["gradients"] = sum(_bytes(p.grad) for p in parameters)
        return step(*arguments)

    engine.optimizer.step = look
    engine.train_step(batches(config, engine), 1e-3)
    found["moments"] = sum(_bytes(x) for state in engine.optimizer.state.values() for x in state.values())
    return found


def peak_rise(config: RunConfig) -> int:
    """Most bytes that stood at once beyond weights and moments in the second train_step of this rank."""
    engine = build_engine(config, init_mesh(config.parallel, device="cpu"))
    mine = batches(config, engine)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        engine.train_step(mine, 1e-3)
        with record_function("the second"):
            engine.train_step(mine, 1e-3)
    events = profiled.profiler.kineto_results.events()  # type: ignore[union-attr]
    started = next(event.start_ns() for event in events if event.name() == "the second")
    live = most = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda event: event.start_ns()):
        live += event.nbytes()
        if event.start_ns() > started:
            most = max(most, live)
    return most


def batches(config: RunConfig, engine: Engine) -> list[Batch]:
    """This rank's micro-batches of a step, random tokens."""
    training = config.training
    number = training.global_batch_windows // (training.micro_batch_size * engine.dp_size)
    shape = number, training.micro_batch_size, training.seq_len
    tokens = torch.randint(config.model.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    return [Batch(x, x, None) for x in tokens]


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _bytes(tensor: Tensor) -> int:
    return _local(tensor).nbytes
