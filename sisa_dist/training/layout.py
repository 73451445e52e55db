"""`sisa doctor CONFIG`, under any launcher: who holds what, which kernels serve, and whether all ranks agree."""

from __future__ import annotations

import hashlib
import re
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

import data_pipeline
import sisa_dist
from data_pipeline.tokenizer import find_tokenizer
from sisa_dist.config import EngineConfig, ParallelConfig, RunConfig, dump_config
from sisa_dist.config.mixers import WITHOUT_HEADS
from sisa_dist.engine import build_engine
from sisa_dist.ops.backends import explain_backends
from sisa_dist.ops.forgetting import bias_channels
from sisa_dist.parallel.apply import Slice
from sisa_dist.parallel.context_group import Context
from sisa_dist.parallel.mesh import AXES, Mesh, init_mesh
from sisa_dist.parallel.plan import check_tp


def diagnose_layout(config: RunConfig) -> bool:
    """Build the run's engine and print its layout; True where all ranks agree. Collective; the main rank prints.

    Trains and writes nothing. Raises UserError where the config does not fit the launch.
    """
    check_tp(config.model, config.parallel.tp)
    init_mesh(ParallelConfig(), device=config.device)  # the process group; the run's own mesh once all agree on it
    everyone: list[dict[str, Any]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, _identity(config))
    console = Console(highlight=False, quiet=dist.get_rank() != 0)
    agreed, table = _agreement(everyone)
    if not agreed:  # a model built from two configs would hang in its first collective
        console.print(table)
        return False
    mesh = init_mesh(config.parallel, device=config.device)
    engine = build_engine(config, mesh)
    unequal = engine.unequal_replicas()
    for axis, names in unequal.items():
        told = f"{len(names)} differ: {', '.join(names[:3])}" if names else "to the bit, by checksum"
        _add(table, f"weights held alike along {axis}", not names, told)
    places: list[list[int]] = [[] for _ in everyone]
    axes = (*AXES, "cp") if mesh.cp_size > 1 else AXES
    mine = [mesh.cp_rank if axis == "cp" else mesh.device_mesh.get_local_rank(axis) for axis in axes]
    dist.all_gather_object(places, mine)
    console.print(_mesh_table(everyone, axes, places))
    if mesh.cp_size > 1:
        console.print(_context_table(config, mesh))
    console.print(_slice_table(engine.slices, mesh, config.engine))
    console.print(_backend_table(config, mesh))
    console.print(table)
    return not any(unequal.values())


def _identity(config: RunConfig) -> dict[str, Any]:
    place = config.data_place
    tokenizer = None if isinstance(place, str) else find_tokenizer(place)
    unseen = "at a URL" if isinstance(place, str) else "not prepared"
    return {
        "host": socket.gethostname(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() and config.device != "cpu" else "cpu",
        "config": _hash(dump_config(config).encode()),
        "tokenizer": _hash(tokenizer.read_bytes()) if tokenizer else unseen,
        "code": code_version(),
        "torch": torch.__version__,
    }


def code_version() -> str:
    """A hash of every source file of the two packages: edited files count, whatever git says."""
    folders = [Path(package.__path__[0]) for package in (sisa_dist, data_pipeline)]
    files = [(path.relative_to(folder.parent), path) for folder in folders for path in folder.rglob("*.py")]
    return _hash(b"".join(str(name).encode() + path.read_bytes() for name, path in sorted(files)))


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:12]


def _mesh_table(everyone: list[dict[str, Any]], axes: Sequence[str], places: list[list[int]]) -> Table:
    table = Table("rank", "host", "device", *axes, title="mesh: place on each axis", title_justify="left")
    for rank, (found, place) in enumerate(zip(everyone, places, strict=True)):
        table.add_row(str(rank), found["host"], found["device"], *map(str, place))
    return table


def _context_table(config: RunConfig, mesh: Mesh) -> Table:
    title = f"positions of each window: cp {mesh.cp_size} by {mesh.cp_kind}, ranks of dp_shard to the engine"
    table = Table("cp", "positions", title=title, title_justify="left")
    context, length = Context(mesh.group("cp"), mesh.cp_kind), config.training.seq_len // (2 * mesh.cp_size)
    for rank in range(mesh.cp_size):
        held = [f"{stretch * length}–{(stretch + 1) * length - 1}" for stretch in context.held_by(rank)]
        table.add_row(str(rank), ", ".join(held))
    return table


def _slice_table(slices: Mapping[str, Slice], mesh: Mesh, engine: EngineConfig) -> Table:
    """One line for what is alike in all blocks."""
    table = Table(title_justify="left")
    table.add_column("parameter", no_wrap=True, overflow="fold")
    for column in ("shape", "held by each rank of tp" + (" or ep" if mesh.ep_size > 1 else ""), "gradient"):
        table.add_column(column)
    then = "FSDP cuts dim 0 of a slice" if engine.kind == "fsdp2" else f"ZeRO-{engine.zero_stage} partitions slices"
    table.title = f"slices: tp {mesh.tp_size}, then {then} over {mesh.size('dp_shard')} data rank(s)"
    if mesh.ep_size > 1:
        table.title += f"; experts: ep {mesh.ep_size}, then over the {mesh.size('expert_dp')} that hold the same"
    kinds: dict[tuple[str, Slice], list[str]] = {}
    for name, part in slices.items():
        kinds.setdefault((re.sub(r"^blocks\.\d+", "blocks.*", name), part), []).append(name)
    for (pattern, part), names in kinds.items():
        if part.dim is None:
            held = "all of it"
        else:
            size = part.place(mesh)[1]
            ranges = [part.of(rank, size)[part.dim] for rank in range(size)]
            held = f"dim {part.dim}: " + ", ".join(f"{r.start}–{r.stop - 1}" for r in ranges)
        gradient = "its own" if part.dim is not None else "the same on all"
        if part.tp_grad == "partial":
            gradient = "a part, summed over tp"
        shape = " × ".join(map(str, part.shape))
        table.add_row(pattern if len(names) > 1 else names[0], shape, held, gradient)
    return table


def _backend_table(config: RunConfig, mesh: Mesh) -> Table:
    table = Table("layers", "backend", "", "why", title="attention backends", title_justify="left")
    model, tp = config.model, mesh.tp_size
    dtype = torch.bfloat16 if config.engine.precision == "bf16" else torch.float32
    group = (model.n_heads // tp) // max(model.kv_heads // tp, 1)
    kinds: dict[tuple[str, int], list[str]] = {}
    for layer, kind in enumerate(zip(model.layer_mixers, model.layer_d_s, strict=True)):
        # sigmoid_sisa has no softmax, so none of its kernels
        if kind[0] not in WITHOUT_HEADS and kind[0] != "sigmoid_sisa":
            kinds.setdefault(kind, []).append(str(layer))
    for (mixer, d_s), layers in kinds.items():
        d_qk = model.width_per_head + d_s + (config.data.document_mask if mixer == "sisa" else 0)
        if mixer == "fox":
            d_qk += bias_channels(dtype, group)
        boundless = not model.score_terms.decay and not config.data.document_mask  # score.py takes one call at any T
        one_call = mixer == "attention" or (mixer == "sisa" and boundless and config.attention.path != "bisected")
        verdicts = explain_backends(
            mesh.device,
            dtype,
            d_qk=d_qk,
            d_v=model.width_per_head,
            group=group,
            causal=one_call,
            backend=config.attention.backend,
        )
        label = f"{mixer}{f', d_s {d_s}' if d_s else ''}: {', '.join(layers)}"
        for verdict in verdicts:
            table.add_row(label, verdict.name, "[green]serves[/]" if verdict.chosen else "-", verdict.reason)
            label = ""
    return table


def _agreement(everyone: list[dict[str, Any]]) -> tuple[bool, Table]:
    table = Table("agreement of all ranks", "", "", title_justify="left")
    agreed = True
    for key in ("config", "tokenizer", "code", "torch"):
        values = [found[key] for found in everyone]
        odd = [str(rank) for rank, value in enumerate(values) if value != values[0]]
        agreed &= not odd
        _add(table, key, not odd, f"rank 0 has {values[0]}; ranks {', '.join(odd)} differ" if odd else values[0])
    return agreed, table


def _add(table: Table, what: str, good: bool, told: str) -> None:
    table.add_row(what, "[green]ok[/]" if good else "[red]differs[/]", told)
