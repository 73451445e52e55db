"""Saving during training: the step waits while the state is copied, a thread writes the copy while training goes on."""

from __future__ import annotations

import json
import logging
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

from data_pipeline.tokenizer import Tokenizer
from sisa_dist.checkpoint.folder import list_checkpoints, step_name, step_of
from sisa_dist.checkpoint.staging import Staging, num_bytes
from sisa_dist.checkpoint.state import TrainState
from sisa_dist.checkpoint.write import remove, write_checkpoint
from sisa_dist.config import RunConfig, UserError, dump_config
from sisa_dist.engine import Engine
from sisa_dist.parallel.mesh import Mesh

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Saved:
    """One save, for the metrics."""

    step: int
    blocked: float  # seconds training waited: for the save before, and for the copy or, not asynchronous, for all of it
    seconds: float  # from the first byte copied to the last rename
    bytes: int  # of this rank's tensors


class Saver:
    """Writes checkpoints of one run, one after another. Every method is collective but `collect`.

    As a context manager it waits at the end for what is under way, unless an error of ours ends the run.
    """

    def __init__(
        self,
        run_folder: Path,
        engine: Engine,
        *,
        config: RunConfig,
        tokenizer: Tokenizer,
        data: Mapping[str, Any],
        mesh: Mesh,
        failed: Callable[[str], None] = lambda why: None,
    ) -> None:
        """`tokenizer` and `data` (what the cursor counts in, as JSON) go into each folder.

        `failed` is called, from the thread, when a save under way fails: the next call here says why.
        """
        self._folder, self._engine, self._config, self._mesh = run_folder, engine, config, mesh
        self._tokenizer, self._data, self._failed = tokenizer, data, failed
        self._staging = Staging()
        # Of its own: collectives of two threads on one group meet in any order, and hang.
        self._group = dist.new_group(backend="gloo") if mesh.world_size > 1 else dist.group.WORLD
        self._thread: threading.Thread | None = None
        self._error: UserError | BaseException | None = None
        self._done: list[Saved] = []

    def save(self, state: TrainState, *, wait: bool = False) -> None:
        """Save `state` and the engine's tensors as they are now. Returns when they are copied, or, to `wait`, written.

        Waits for the save before, and raises UserError if that failed, on every rank.
        """
        mesh, training, started = self._mesh, self._config.training, time.perf_counter()
        mesh.enter("checkpoint")
        self.finish()
        state = replace(state, guard=self._engine.guard.state())
        tensors = self._engine.state_tensors()
        size, copying = num_bytes(tensors), time.perf_counter()
        most = training.save_staging_gb
        fits = most is None or mesh.max_over_all(torch.tensor(float(size))).item() <= most * 1e9
        if training.async_save and fits and not wait:
            tensors = self._staging.copy(tensors)
        else:
            wait = True
            if training.async_save and not fits:
                _log.warning(
                    "step %d: training waits for this save: a copy of %.1f GB exceeds training.save_staging_gb",
                    state.step,
                    size / 1e9,
                )
        files = self._files(state) if mesh.is_main else {}
        blocked = time.perf_counter() - started

        def write() -> None:
            try:
                final = self._folder / "checkpoints" / step_name(state.step)
                write_checkpoint(
                    final, tensors, files=files, process_group=self._group, begin=lambda: self._clear(final.parent)
                )
                seconds = time.perf_counter() - copying
                if mesh.is_main:
                    self._retain()
                self._done.append(Saved(state.step, blocked if not wait else seconds, seconds, size))
            except BaseException as error:
                self._error = error
                self._failed("a checkpoint could not be saved")

        self._thread = threading.Thread(target=write, name="save", daemon=True)
        self._thread.start()
        if wait:
            self.finish()

    def finish(self) -> None:
        """Wait for the save under way. Raises UserError, on every rank, if it failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            saved = list_checkpoints(self._folder)
            newest = f"the newest whole one is {saved[-1].name}" if saved else "there is no other one"
            if isinstance(error, UserError):
                raise UserError(f"{error}; {newest}, the same command goes on from it") from error
            raise error

    def collect(self) -> list[Saved]:
        """The saves done since the last call."""
        done, self._done = self._done, []
        return done

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if error is None or isinstance(error, UserError | SystemExit | KeyboardInterrupt):
            self.finish()

    def _files(self, state: TrainState) -> dict[str, bytes]:
        return {
            "config.yaml": dump_config(self._config).encode(),
            "tokenizer.model": self._tokenizer.model,
            "data.json": json.dumps(self._data, indent=1).encode(),
            "state.json": json.dumps(asdict(state), indent=1).encode(),
        }

    def _clear(self, folder: Path) -> None:
        """What a kill left behind."""
        folder.mkdir(parents=True, exist_ok=True)
        for stale in (*folder.glob(".step_*.tmp"), *folder.glob(".step_*.old")):
            if stale.is_dir():
                shutil.rmtree(stale)

    def _retain(self) -> None:
        every = self._config.training.keep_every
        for old in list_checkpoints(self._folder)[: -self._config.training.keep_last]:
            if every is None or step_of(old) % every:
                try:
                    remove(old)
                except OSError as error:  # the save itself is done
                    _log.warning("%s: an old checkpoint that cannot be removed (%s)", old, error.strerror)
