"""A torch.profiler trace of a few chosen steps, one file a rank, for chrome://tracing or ui.perfetto.dev."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from sisa_dist.config import ProfileConfig
from sisa_dist.parallel.mesh import Mesh


class Profiler:
    """`before(step)` and `after(step)` stand round every step; outside the chosen ones they compare two integers."""

    def __init__(self, config: ProfileConfig | None, run_folder: Path, mesh: Mesh) -> None:
        first, steps = (config.start, config.steps) if config else (0, 0)
        self._chosen = range(first, first + steps)
        self._folder, self._cuda = run_folder / "profile", mesh.device.type == "cuda"
        self._running: profile | None = None
        self._traced: list[int] = []

    def before(self, step: int) -> None:
        if step in self._chosen and self._running is None:
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._cuda else [])]
            self._running = profile(activities=activities, record_shapes=True)
            self._running.start()

    def after(self, step: int) -> None:
        if self._running is not None:
            self._traced.append(step)
            if step + 1 not in self._chosen:
                self._write()

    def __enter__(self) -> Profiler:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._running is not None:  # the run ends inside the chosen steps
            self._write()

    def _write(self) -> None:
        assert self._running is not None
        if self._cuda:
            torch.cuda.synchronize()
        self._running.stop()
        running, self._running = self._running, None
        if self._traced:
            self._folder.mkdir(exist_ok=True)
            name = f"steps_{self._traced[0]}-{self._traced[-1]}_rank_{dist.get_rank()}.json"
            running.export_chrome_trace(str(self._folder / name))
