"""What a real engine sends in a step, counted as it sends it."""

from __future__ import annotations

import contextlib

from distributed.measured import batches
from distributed.mutations import mutated
from sisa_dist.config import RunConfig
from sisa_dist.engine import build_engine
from sisa_dist.parallel.mesh import init_mesh
from sisa_dist.training.traffic import Transfer
from sisa_dist.training.traffic_meter import TrafficMeter


def sent_in_a_step(config: RunConfig, mutation: str | None = None) -> tuple[Transfer, ...]:
    """Of this rank, in the third step: ZeRO-3 first learns in which order weights are wanted, and says so to others.

    `mutation`: a mistake of mutations.py that the engine is made with.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(mutated(mutation))
        mesh = init_mesh(config.parallel, device="cpu")
        engine = build_engine(config, mesh)
        mine = batches(config, engine)
        for _ in range(2):
            engine.train_step(mine, 1e-3)
        with TrafficMeter(mesh) as meter:
            engine.train_step(mine, 1e-3)
    return meter.transfers()
