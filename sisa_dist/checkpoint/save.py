"""Saving during training: a thread copies the state and writes the copy while training goes on.

Forward and backward leave weights and moments as they are, so the copy is made behind those of the next step, and
only the optimizer waits for it.
"""

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

import torch
import torch.distributed as dist
from torch import Tensor

from sisa_dist.checkpoint.folder import list_checkpoints, step_name, step_of
from sisa_dist.checkpoint.staging import Moment, Staging, num_bytes
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
    blocked: float  # seconds training waited: for the save before and for the copy, or, without a copy, for all of it
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
        files: Mapping[str, bytes],
        mesh: Mesh,
        failed: Callable[[str], None] = lambda why: None,
    ) -> None:
        """`files` go into each folder as they are, beside config and state: the tokenizer, what the cursor counts in.

        `failed` is called, from the thread, when a save under way fails: the next call here says why.
        """
        self._folder, self._engine, self._config, self._mesh = run_folder, engine, config, mesh
        self._files, self._failed = files, failed
        self._staging, self._copied, self._held = Staging(), threading.Event(), 0.0
        self._copied.set()
        engine.before_update(self._before_update)
        # Of its own: collectives of two threads on one group meet in any order, and hang.
        self._group = dist.new_group(backend="gloo") if mesh.world_size > 1 else dist.group.WORLD
        self._thread: threading.Thread | None = None
        self._error: UserError | BaseException | None = None
        self._done: list[Saved] = []

    def save(self, state: TrainState, *, wait: bool = False) -> None:
        """Save `state` and the engine's tensors as they are now. Returns at once, or, to `wait`, when they are written.

        Waits for the save before, and raises UserError if that failed, on every rank.
        """
        mesh, started = self._mesh, time.perf_counter()
        mesh.enter("checkpoint")
        self.finish()
        state = replace(state, guard=self._engine.guard.state())
        tensors = self._engine.state_tensors()
        copied = not wait and self._may_copy(state, num_bytes(tensors))
        files = dict(self._files)
        files["config.yaml"] = dump_config(self._config).encode()
        files["state.json"] = json.dumps(asdict(state), indent=1).encode()
        changed = Moment.now(mesh.device)
        if copied:
            self._copied.clear()
        self._held = time.perf_counter() - started
        self._thread = threading.Thread(
            target=self._write, args=(state, tensors, files, changed, copied), name="save", daemon=True
        )
        self._thread.start()
        if not copied:
            self.finish()

    def _write(
        self,
        state: TrainState,
        tensors: Mapping[str, Tensor],
        files: Mapping[str, bytes],
        changed: Moment,
        copied: bool,
    ) -> None:
        """The thread's. `changed` is when the device was done with the last change of `tensors`."""
        folder, started, size = self._folder / "checkpoints", time.perf_counter(), num_bytes(tensors)
        try:
            if copied:
                tensors = self._staging.copy(tensors, after=changed)
                self._copied.set()
            final, group = folder / step_name(state.step), self._group
            write_checkpoint(final, tensors, files=files, process_group=group, begin=lambda: self._clear(folder))
            seconds = time.perf_counter() - started
            if self._mesh.is_main:
                self._retain()
            self._done.append(Saved(state.step, self._held if copied else self._held + seconds, seconds, size))
        except BaseException as error:
            self._error = error
            self._failed("a checkpoint could not be saved")
        finally:
            self._copied.set()

    def _may_copy(self, state: TrainState, size: int) -> bool:
        """The same answer on every rank."""
        most, asked = self._config.training.save_staging_gb, self._config.training.async_save
        if not asked or most is None:
            return asked
        largest = self._mesh.max_over_all(torch.tensor(float(size), device=self._mesh.device)).item() / 1e9
        if largest > most:
            _log.warning(
                "step %d: training waits for this save: a copy of %.1f GB is more than training.save_staging_gb",
                state.step,
                largest,
            )
        return largest <= most

    def _before_update(self) -> None:
        """Training's thread, ahead of the optimizer: until the copy is made nothing may change."""
        started = time.perf_counter()
        self._copied.wait()
        self._held += time.perf_counter() - started

    def finish(self) -> None:
        """Wait for the save under way. Raises UserError, on every rank, if it failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            saved = list_checkpoints(self._folder)
            then = "there is no other one, the same command begins anew"
            if saved:
                then = f"the newest whole one is {saved[-1].name}, the same command goes on from it"
            if isinstance(error, UserError):
                raise UserError(f"{error}; {then}") from error
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
