"""Training on without shards that are not there (data.on_missing: skip), alike on every rank and in every sitting.

The ranks of a tensor- or context-parallel group read the same windows, each for itself; one of them finding a shard
that another did not would train on two different batches. So before each step all ranks agree on what is missing, by a
flag, and by a vector over the shards where something was found. From the first step that could not have a shard to the
end of the run it counts for nothing, also where a cache still holds it: a run that is resumed finds that in
missing_shards.json and does its steps as they were done before. Which windows come, and in which order, never changes.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

import torch

from data_pipeline.loader import Loader, StepBatch
from sisa_dist.config import UserError, replace_file
from sisa_dist.parallel.mesh import Mesh

log = logging.getLogger(__name__)

_NEVER = 2**53  # steps


class MissingShards:
    """What a run does without: SOURCE/SHARD and the first step that could not have it."""

    def __init__(self, loader: Loader, run_folder: Path, mesh: Mesh, *, step: int) -> None:
        """`step`: the next one. Collective. Raises UserError where missing_shards.json is damaged."""
        self._loader, self._mesh, self._shards = loader, mesh, loader.shards
        self._path = run_folder / "missing_shards.json"
        self.first = _read(self._path)
        # A host that does not see the run folder learns it here: the earliest step by any rank's file.
        steps = self._agreed([-float(self.first.get(name, _NEVER)) for name in self._shards])
        self.first = {name: int(-s) for name, s in zip(self._shards, steps, strict=True) if -s < _NEVER}
        self._use(step)

    def agreed(self, batch: StepBatch, *, step: int) -> StepBatch:
        """`batch` without what is missing for any rank at `step`, read again where it was read with it. Collective."""
        self._use(step)
        if batch.without != self._loader.without:  # made ahead, when less was known: what it found may be old
            batch = self._loader.again(batch)
        while self._agreed([float(bool(batch.found_missing))])[0]:
            found = self._agreed([float(name in batch.found_missing) for name in self._shards])
            for name, missing in zip(self._shards, found, strict=True):
                if missing:
                    self.first[name] = step
                    if self._mesh.is_main:
                        log.warning(
                            "%s: missing: from step %d on training goes on without it (remove it from %s to have it "
                            "asked for again)", name, step, self._path,
                        )  # fmt: skip
            if self._mesh.is_main:
                replace_file(self._path, json.dumps(self.first, indent=1))
            self._use(step)
            batch = self._loader.again(batch)
        return batch

    def _use(self, step: int) -> None:
        self._loader.without = frozenset(name for name, first in self.first.items() if first <= step)

    def _agreed(self, values: list[float]) -> list[float]:
        tensor = torch.tensor(values, dtype=torch.float64, device=self._mesh.device)
        return list(self._mesh.max_over_all(tensor).tolist())


def _read(path: Path) -> dict[str, int]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        assert isinstance(found, dict) and all(type(step) is int and step > 0 for step in found.values())
    except (OSError, ValueError, AssertionError, RecursionError) as error:
        raise UserError(
            f"{path}: cannot be read ({error}): restore it, or remove it to ask for all shards again"
        ) from None
    return found
