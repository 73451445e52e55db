"""What a sweep will take, before anything of it starts: FLOPs, memory, time and cost of every run, and of all.

The speed is, in this order: given on the command line; the share of the device's peak that the grid's `machine` states;
measured here, by a few steps of each distinct model on random tokens, as many side by side as will train. Memory is
measured with it (of a step, live tensors), else that of `sisa estimate`. What was found is kept in SWEEP/shapes.
"""

from __future__ import annotations

import hashlib
import heapq
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from sweep_grid import Machine
from sweep_results import State, share_left
from sweep_rules import SweepRun

from sisa_dist.config import RunConfig, UserError, replace_file
from sisa_dist.training.estimate import estimate

_PROCESSES = 2  # that a run starts: to train, and for the last evaluation
_START = 8.0  # seconds of one: imports, opening data; building the model is measured


@dataclass(frozen=True)
class Planned:
    seconds: float
    memory: int | None  # bytes of the fullest device; None: not asked for


@dataclass(frozen=True)
class Plan:
    runs: dict[str, Planned]  # by name
    how: str  # the speed came about


def make_plan(
    sweep: Path,
    runs: Sequence[SweepRun],
    machine: Machine,
    console: Console,
    *,
    at_once: int,
    flops_per_second: float | None = None,
    memory: bool = True,
) -> Plan:
    """`flops_per_second`: of one device. Raises UserError where a speed is neither given nor to be measured here."""
    if flops_per_second is None and machine.peak_flops is None:
        return _rehearsed(sweep, runs, machine, console, at_once=at_once)
    if flops_per_second is not None:
        how = f"given: {flops_per_second:.4g} FLOP/s of a device"
    else:
        assert machine.mfu is not None and machine.peak_flops is not None
        flops_per_second = machine.mfu * machine.peak_flops
        how = f"stated: {machine.mfu:.0%} (MFU) of a device's {machine.peak_flops:.4g} FLOP/s"
    rate = flops_per_second * machine.devices
    found = {}
    for run in runs:
        scored = scored_tokens(run.config) * run.shape.flops_per_token / 3  # forward only
        peak = _estimated(sweep, run, machine, console) if memory else None
        found[run.name] = Planned((run.flops + scored) / rate, peak)
    return Plan(found, how)


def scored_tokens(config: RunConfig) -> int:
    """Of the evaluations of a run and of the last one, as far as their number is said."""
    training = config.training
    rounds = -(-training.steps // (training.eval_every or training.steps))
    return (rounds * training.eval_windows + (config.evaluation.perplexity_windows or 0)) * training.seq_len


def _rehearsed(sweep: Path, runs: Sequence[SweepRun], machine: Machine, console: Console, *, at_once: int) -> Plan:
    from compare_plan import Job
    from compare_pool import run_jobs
    from compare_run import read_result

    if machine.devices > 1:
        raise UserError(
            f"machine.devices {machine.devices}: a few steps on this machine say nothing of so many: give "
            "--flops-per-second, or machine.peak_flops and mfu"
        )

    def folder_of(run: SweepRun) -> Path:
        return sweep / "shapes" / f"speed_{_digest(_shape_of(run.config) | {'at_once': at_once})}"

    jobs: dict[Path, Job] = {}
    for run in sorted(runs, key=lambda run: run.config.training.global_batch_tokens):
        # A larger batch shares the optimizer's step among more tokens: the smallest is the slowest.
        folder = folder_of(run)
        jobs.setdefault(folder, Job(folder, _title(run), "sweep", run.shape.mixer, run.config, {}, measure=True))
    left = [job for job in jobs.values() if not read_result(job.folder)]
    failed = run_jobs(left, at_once, console, what="measuring")
    if failed:
        job, why = next(iter(failed.items()))
        raise UserError(f"{job.name} cannot be measured: {why}")
    found = {}
    for run in runs:
        job = jobs[folder_of(run)]
        speed = read_result(job.folder)
        rate = speed["tokens_per_step"] / speed["seconds_per_step"]
        seconds = run.tokens / rate + scored_tokens(run.config) / speed["score_tokens_per_second"]
        found[run.name] = Planned(seconds + _PROCESSES * (_START + speed["start_seconds"]), int(speed["peak_bytes"]))
    return Plan(found, f"measured here, by a few steps of each of {len(jobs)} models, {at_once} at a time")


def _estimated(sweep: Path, run: SweepRun, machine: Machine, console: Console) -> int:
    key = _shape_of(run.config) | {"devices": machine.devices}
    training, parallel = run.config.training, run.config.parallel
    ranks = max(1, machine.devices // (parallel.tp * parallel.cp))
    key |= {"accumulates": training.global_batch_windows > training.micro_batch_size * ranks}
    key |= {"parallel": parallel.model_dump()}
    path = sweep / "shapes" / f"memory_{_digest(key)}.json"
    if not path.is_file():
        console.print(f"estimating the memory of {_title(run)}", markup=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            peak = estimate(run.config, world_size=machine.devices).peak
        except UserError as error:
            raise UserError(f"{run.name} on {machine.devices} device(s): {error}") from None
        replace_file(path, json.dumps({"peak": peak}))
    return int(json.loads(path.read_text(encoding="utf-8"))["peak"])


def _shape_of(config: RunConfig) -> dict[str, Any]:
    tree = config.model_dump()
    parts = {key: tree[key] for key in ("model", "attention", "engine", "device")}
    return parts | {key: tree["training"][key] for key in ("seq_len", "micro_batch_size")}


def _digest(tree: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:16]


def _title(run: SweepRun) -> str:
    return f"{run.shape.size} {run.shape.mixer}" + (f" d_s {run.shape.d_s}" if run.shape.d_s else "")


def print_plan(
    plan: Plan,
    runs: Sequence[SweepRun],
    states: dict[str, State],
    machine: Machine,
    *,
    at_once: int,
    price: float | None,
) -> None:
    """A line a run, then the sum of all and of what is left, of runs that have begun only the rest."""
    width = max(len(run.name) for run in runs)
    print(
        f"{'run':{width}}  {'parameters':>14} {'not embedding':>14} {'d_ff':>6} {'tokens':>16} {'batch':>10} {'lr':>9} "
        f"{'FLOPs':>9} {'memory':>10} {'time':>9}" + (f" {'cost':>10}" if price is not None else "") + "  status"
    )
    for run in runs:
        planned, shape = plan.runs[run.name], run.shape
        cost = "" if price is None else f" {_cost(planned.seconds, machine, price):>10,.2f}"
        print(
            f"{run.name:{width}}  {shape.parameters:>14,} {shape.parameters_non_embedding:>14,} "
            f"{run.config.model.d_ff:>6} {run.tokens:>16,} {run.config.training.global_batch_tokens:>10,} "
            f"{run.config.optimizer.lr:>9.4g} {run.flops:>9.3g} {_bytes(planned.memory):>10} "
            f"{_duration(planned.seconds):>9}{cost}  {states[run.name].status}"
        )
    print(f"\nspeed {plan.how}; {machine.devices} device(s) a run")
    whole = [(run, 1.0) for run in runs]
    left = [(run, share_left(run, states[run.name])) for run in runs if states[run.name].status != "finished"]
    for what, chosen in (("all", whole), ("left", left)):
        seconds = [plan.runs[run.name].seconds * share for run, share in chosen]
        wall = _side_by_side(seconds, at_once)
        hours = sum(seconds) / 3600 * machine.devices
        flops = sum(run.flops * share for run, share in chosen)
        line = f"{what}: {len(chosen)} runs, {flops:.4g} FLOPs, {hours:,.1f} device-hours, "
        line += f"{_duration(wall)} with {at_once} at a time"
        print(line + ("" if price is None else f", cost {sum(seconds) / 3600 * machine.devices * price:,.2f}"))


def _side_by_side(seconds: Sequence[float], at_once: int) -> float:
    """In order, each where a place gets free first."""
    places = [0.0] * at_once
    for run in seconds:
        heapq.heapreplace(places, places[0] + run)
    return max(places)


def _cost(seconds: float, machine: Machine, price: float) -> float:
    return seconds / 3600 * machine.devices * price


def _bytes(size: int | None) -> str:
    if size is None:
        return "-"
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def _duration(seconds: float) -> str:
    for unit, length in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"
