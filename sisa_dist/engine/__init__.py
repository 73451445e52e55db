"""Engines: one distributed library each behind the same seam."""

from sisa_dist.config import RunConfig
from sisa_dist.engine.base import Engine, StepResult
from sisa_dist.engine.fsdp import FSDP2Engine
from sisa_dist.parallel.mesh import Mesh

__all__ = ["Engine", "StepResult", "build_engine"]


def build_engine(config: RunConfig, mesh: Mesh) -> Engine:
    """The engine that `config.engine.kind` names, with its model at the initial weights."""
    if config.engine.kind == "deepspeed":
        from sisa_dist.engine.deepspeed import DeepSpeedEngine  # late: its import takes seconds, and it is an extra

        return DeepSpeedEngine(config, mesh)
    return FSDP2Engine(config, mesh)
