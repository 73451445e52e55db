"""Runs that move: what a place is, a run that stays at its place, and checkpoints of others continued there.

Both are jobs for the pool's ranks. They go through the library's own Loader, Saver and load_checkpoint on real files,
round an engine that is built once for many checkpoints.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipeline.loader import Loader
from distributed.moving_mistakes import mistaken
from sisa_dist.checkpoint import Saver, TrainState, load_checkpoint
from sisa_dist.checkpoint.staging import local_memory
from sisa_dist.config import RunConfig, UserError
from sisa_dist.engine import Engine, build_engine
from sisa_dist.parallel.flat_shard import FlatShard
from sisa_dist.parallel.mesh import init_mesh
from sisa_dist.training.run_data import open_data
from sisa_dist.training.schedule import learning_rate

BEFORE, AFTER = 3, 10  # steps up to a checkpoint; steps behind it that are compared
WINDOWS = 4  # of a global batch
WHOLE = "whole.pt"  # beside a checkpoint: its tensors, whole


@dataclass(frozen=True)
class Place:
    """Where a run stands: everything that may differ between saving and loading."""

    engine: str  # fsdp2 | zero0 | zero1 | zero2 | zero3
    ranks: int
    tp: int = 1
    sp: bool = False
    precision: str = "fp32"
    replicate: int = 1
    offload: bool = False
    cp: int = 1
    cp_kind: str = "all_gather"

    @property
    def dp(self) -> int:
        return self.ranks // (self.tp * self.cp)

    def config(self, base: RunConfig, run: Path) -> RunConfig:
        """`base` at this place, with `run` as its run folder."""
        engine: dict[str, Any] = {"precision": self.precision, "cpu_offload": self.offload}
        if self.engine != "fsdp2":
            engine |= {"kind": "deepspeed", "zero_stage": int(self.engine[-1])}
        parallel = {"tp": self.tp, "sequence_parallel": self.sp, "dp_replicate": self.replicate}
        parallel |= {"cp": self.cp, "cp_kind": self.cp_kind}
        # One micro-batch, but two at two data ranks without tp, where they are cheap.
        training = {"micro_batch_size": WINDOWS // self.dp // (2 if (self.tp, self.dp) == (1, 2) else 1)}
        sections = {"engine": engine, "parallel": parallel, "training": training}
        update: dict[str, Any] = {
            name: getattr(base, name).model_copy(update=values) for name, values in sections.items()
        }
        return base.model_copy(update=update | {"output_dir": str(run)})

    def __str__(self) -> str:
        extra = {"sp": self.sp, self.precision: self.precision != "fp32", "hsdp": self.replicate > 1}
        extra[f"cp{self.cp}_{self.cp_kind}"] = self.cp > 1
        names = [name for name, is_so in (extra | {"offload": self.offload}).items() if is_so]
        return "_".join([self.engine, f"tp{self.tp}", f"dp{self.dp}", *names])


@dataclass
class Track:
    """What a run said of its steps, and how far its tensors are from those they should be."""

    rows: dict[int, tuple[float, float, str]] = field(default_factory=dict)  # by step: loss, norm, digest of samples
    loaded: dict[str, float] = field(default_factory=dict)  # by tensor, right after the load: |difference| at most
    final: dict[str, float] = field(
        default_factory=dict
    )  # `AFTER` steps later; of moments in units of the module's largest
    guard: bool = True  # the guard remembers what it did when the checkpoint was made


def stays(config: RunConfig, run: Path, *, mistake: str | None = None) -> Track:
    """Trains from the start without a break; checkpoints of steps 3 and 13 in `run`."""
    with mistaken(mistake):
        here = Here(config)
        with here.saver(run) as saver:
            here.train(BEFORE)
            saver.save(here.state)  # written while the next steps run
            here.train(BEFORE + AFTER)
            saver.save(here.state)
    return here.track


def moves(
    config: RunConfig, runs: Sequence[tuple[Path, Path]], *, run: Path | None = None, mistake: str | None = None
) -> list[Track]:
    """Continues the first checkpoint of each pair, up to the step of the second, which is compared with.

    With `run`, the last of them is saved in it after 3 steps and, for whoever goes on from there, 10 steps later.
    """
    here, tracks = Here(config), []
    for number, (first, last) in enumerate(runs, start=1):
        here.load(first, mistake)
        done = here.state.step
        if run is None or number < len(runs):
            here.train(done + AFTER)
            here.track.final = _differences(here.engine, last, relative=True)
        else:
            with here.saver(run) as saver:
                here.train(done + BEFORE)
                saver.save(here.state)
                here.train(done + AFTER)
                here.track.final = _differences(here.engine, last, relative=True)
                here.train(done + BEFORE + AFTER)
                saver.save(here.state)
        tracks.append(here.track)
    return tracks


def refuses(config: RunConfig, checkpoint: Path) -> str:
    """What is said where it cannot be loaded, alike on every rank."""
    try:
        Here(config).load(checkpoint, None)
    except UserError as error:
        return str(error)
    raise AssertionError(f"{checkpoint} was loaded")


def trains(config: RunConfig, until: int) -> Track:
    """The run that never moves and never saves."""
    here = Here(config)
    here.train(until)
    return here.track


class Here:
    """An engine with its data at one place, and where its run stands."""

    def __init__(self, config: RunConfig) -> None:
        self.config, self.mesh = config, init_mesh(config.parallel, device="cpu")
        self.data = open_data(config)
        self.loader = Loader(
            self.data.train,
            seq_len=config.training.seq_len,
            seed=config.seed,
            global_batch_windows=config.training.global_batch_windows,
            micro_batch_size=config.training.micro_batch_size,
            dp_rank=self.mesh.dp_rank,
            dp_size=self.mesh.dp_size,
            lanes=config.data.lanes,
            prefetch=0,
        )
        self.engine = build_engine(config, self.mesh)
        self.state, self.track = TrainState(0, 0, 0, 0.0, self.loader.fingerprint), Track()

    def saver(self, run: Path) -> Saver:
        described = json.dumps(self.loader.describe()).encode()
        files = {"tokenizer.model": self.data.tokenizer.model, "data.json": described}
        return Saver(run, self.engine, config=self.config, files=files, mesh=self.mesh)

    def load(self, checkpoint: Path, mistake: str | None) -> None:
        for view in self.engine.state_tensors().values():  # what a load leaves out must not be right by chance
            local_memory(view).fill_(math.nan)
        model, tokenizer = self.config.model, self.data.tokenizer
        with mistaken(mistake):
            self.state = load_checkpoint(
                checkpoint, self.engine, model=model, tokenizer=tokenizer, loader=self.loader, mesh=self.mesh
            )
        same = self.engine.guard.state() == self.state.guard
        self.track = Track(loaded=_differences(self.engine, checkpoint, relative=False), guard=same)

    def train(self, until: int) -> None:
        peak, steps, schedule = self.config.optimizer.lr, self.config.training.steps, self.config.schedule
        with self.loader.steps(self.state.cursor) as batches:
            for step in range(self.state.step, until):
                batch = next(batches)
                lr = learning_rate(step, peak=peak, steps=steps, schedule=schedule)
                result = self.engine.train_step(batch.micro_batches, lr)
                self.state = self.state.after(result, cursor=batch.next_cursor, seconds=0.0)
                self.track.rows[step + 1] = (result.loss, result.grad_norm, batch.digest)


def _differences(engine: Engine, checkpoint: Path, *, relative: bool) -> dict[str, float]:
    """By name, the largest difference of what this rank holds from the checkpoint's whole tensors."""
    wanted: dict[str, Tensor] = torch.load(checkpoint / WHOLE, weights_only=True)
    scales: dict[str, float] = {}
    for name, tensor in wanted.items():
        scales[_owner(name)] = max(scales.get(_owner(name), 0.0), tensor.abs().max().item())
    found = {}
    for name, view in engine.state_tensors().items():
        want = wanted.pop(name)
        if want.shape != view.size():
            found[name] = math.inf
            continue
        scale = scales[_owner(name)] if relative and not name.startswith("model.") else 1.0
        errors = [(part - want[index]).abs().max().item() for index, part in _parts(view) if part.numel()]
        found[name] = max((math.inf if error != error else error for error in errors), default=0.0) / scale
    assert not wanted, f"not in the engine: {sorted(wanted)}"
    return found


def _owner(name: str) -> str:
    """A bias's gradient is a sum, which cancels, of the terms that its module's weight sums: they share a scale."""
    return name.rpartition(".")[0]


def _parts(view: Tensor) -> Iterator[tuple[tuple[slice, ...], Tensor]]:
    """This rank's parts of a view of `state_tensors`, and where in the whole tensor they lie."""
    local = local_memory(view)
    if isinstance(view, FlatShard):
        for offset, box in view.offsets.items():
            part = local[box.start : box.start + math.prod(box.sizes)].view(box.sizes)
            yield _index(offset, box.sizes), part
    elif hasattr(view, "__create_chunk_list__"):  # a DTensor
        for chunk in view.__create_chunk_list__():
            yield _index(chunk.offsets, chunk.sizes), local
    else:
        yield _index((0,) * view.dim(), view.shape), local


def _index(offset: Sequence[int], sizes: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(start, start + size) for start, size in zip(offset, sizes, strict=True))
