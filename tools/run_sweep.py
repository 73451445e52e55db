"""A grid of runs over size, mixer, d_s, tokens, lr, batch and seed: planned, trained, and read into one table.

    python tools/run_sweep.py plan GRID.yaml               every run with its FLOPs, memory, time and cost
    python tools/run_sweep.py run GRID.yaml --jobs 2       trains what is missing, two at a time, on this machine
    python tools/run_sweep.py run GRID.yaml --hosts a,b    or one on each of these hosts, by ssh
    python tools/run_sweep.py run GRID.yaml --slurm        or writes an array script for sbatch
    python tools/run_sweep.py status GRID.yaml             what is finished, running, failed, missing; the tables

Whatever stops it, the same command goes on: finished runs are skipped, others go on from their checkpoint. GRID.yaml:
tools/sweep_grid.py, and configs/scaling for examples; its paths are as seen from this checkout.
"""

from __future__ import annotations

import argparse
import fnmatch
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # the modules beside this one, when it is imported rather than run

from rich.console import Console
from sweep_grid import Grid, load_grid
from sweep_job import AGAIN, ROOT
from sweep_next import with_next
from sweep_plan import make_plan, print_plan
from sweep_pool import StopAsked, run_all
from sweep_results import State, refuse_others, share_left, state_of, write_tables
from sweep_rules import SweepRun, make_runs
from sweep_slots import Slot, host_slots, local_slots
from sweep_slurm import write_script

from data_pipeline.building import locked
from sisa_dist.config import UserError, dump_config, replace_file


def main(argv: list[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    console = Console(highlight=False, soft_wrap=True)
    try:
        grid = with_next(_load(arguments), getattr(arguments, "next", None), keep=arguments.command == "run")
        runs = make_runs(grid)
        chosen = _chosen(runs, arguments.only)
        return {"plan": _plan, "run": _run, "status": _status}[arguments.command](
            grid, runs, chosen, arguments, console
        )
    except UserError as error:
        print(f"run_sweep: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, told in (("plan", "print what it takes"), ("run", "train what is missing"), ("status", "how far it is")):
        command = commands.add_parser(name, help=told)
        command.add_argument("grid", type=Path, metavar="GRID.yaml")
        command.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help=_SET)
        command.add_argument("--only", action="append", default=[], metavar="PATTERN", help=_ONLY)
        if name != "status":
            command.add_argument("--next", type=Path, metavar="FIT.json", help=_NEXT)
            command.add_argument("--jobs", type=int, metavar="N", help=_JOBS)
    plan, run = commands.choices["plan"], commands.choices["run"]
    plan.add_argument("--flops-per-second", type=float, metavar="F", help=_SPEED)
    plan.add_argument("--device-hour-price", type=float, metavar="P", help="what a device costs an hour")
    plan.add_argument("--no-memory", action="store_true", help="leave it out, where it is not measured with the speed")
    where = run.add_mutually_exclusive_group()
    where.add_argument("--hosts", metavar="HOST,…", help=_HOSTS)
    where.add_argument("--slurm", action="store_true", help="write OUTPUT_DIR/sweep.sbatch and start nothing")
    return parser


_SET = "a key of the grid, e.g. base.training.eval_windows=8, or grids.NAME.flops=[1e12]"
_ONLY = "runs whose name fits, as in 0.1m_*; may be repeated"
_NEXT = "more runs: the best sizes that this fit of fit_scaling_law.py names for budgets beyond the grid's"
_JOBS = "runs at a time (1); of --hosts on each; of --slurm at most (all that SLURM lets)"
_SPEED = "that a device reaches in training; without it: the grid's machine, else a few steps are measured here"
_HOSTS = "by ssh, without a password; this folder with its .venv/ and the output_dir at one path on all of them"


def _load(arguments: argparse.Namespace) -> Grid:
    for name in ("jobs", "flops_per_second", "device_hour_price"):
        value = getattr(arguments, name, None)
        if value is not None and not 0 < value < float("inf"):
            raise UserError(f"--{name.replace('_', '-')} {value}: give a number above 0")
    grid = load_grid(arguments.grid, arguments.overrides)
    # Runs are started from this checkout's folder, wherever we are called.
    return grid if Path.cwd() == ROOT else grid.model_copy(update={"output_dir": str(Path(grid.output_dir).absolute())})


def _chosen(runs: list[SweepRun], patterns: list[str]) -> list[SweepRun]:
    found = [run for run in runs if not patterns or any(fnmatch.fnmatch(run.name, pattern) for pattern in patterns)]
    if not found:
        raise UserError(f"--only {' '.join(patterns)}: no run has such a name: see all by `plan`, as {runs[0].name}")
    return found


def _plan(
    grid: Grid, runs: list[SweepRun], chosen: list[SweepRun], arguments: argparse.Namespace, console: Console
) -> int:
    sweep, at_once = Path(grid.output_dir), arguments.jobs or 1
    refuse_others(runs)
    states = {run.name: state_of(sweep, run) for run in chosen}
    plan = make_plan(
        sweep,
        chosen,
        grid.machine,
        console,
        at_once=at_once,
        flops_per_second=arguments.flops_per_second,
        memory=not arguments.no_memory,
    )
    print_plan(plan, chosen, states, grid.machine, at_once=at_once, price=arguments.device_hour_price)
    return 0


def _run(
    grid: Grid, runs: list[SweepRun], chosen: list[SweepRun], arguments: argparse.Namespace, console: Console
) -> int:
    sweep = Path(grid.output_dir)
    refuse_others(runs)
    slots = _slots(grid, arguments, console)
    sweep.mkdir(parents=True, exist_ok=True)
    busy = f"{sweep}: another run_sweep is at work here: wait for it, or name another output_dir"
    with locked(sweep / ".lock", busy), StopAsked() as stop:
        states = write_tables(sweep, runs)
        done = {"finished", "running"} if arguments.slurm else {"finished"}  # a task that runs is left to its own array
        left = [run for run in chosen if states[run.name].status not in done]
        flops = sum(run.flops * share_left(run, states[run.name]) for run in left)
        console.print(f"{len(chosen)} runs, {len(left)} of them to do: {flops:.4g} FLOPs", markup=False)
        for run in left:
            path = sweep / "configs" / f"{run.name}.yaml"
            path.parent.mkdir(exist_ok=True)
            replace_file(path, dump_config(run.config))
        if left:
            _prepare(sweep / "configs" / f"{left[0].name}.yaml")
        if arguments.slurm:
            before = (sweep / "sweep.sbatch").is_file()
            script = write_script(sweep, left, grid.machine, name=grid.name, at_once=arguments.jobs)
            console.print(f"{len(left)} runs: sbatch {script}", markup=False)
            if before:
                console.print("tasks of an earlier one that still wait in SLURM's queue are among them: scancel those")
            return 0
        run_all(sweep, left, slots, console, stop, launch=grid.machine.devices > 1)
        states = write_tables(sweep, runs)
    _print_status(chosen, states, console)
    console.print(f"the tables: {sweep / 'results.csv'}, results.parquet, curves.csv", markup=False)
    if all(states[run.name].status == "finished" for run in chosen):
        return 0
    console.print("the same command goes on", markup=False)
    return AGAIN if stop else 1


def _slots(grid: Grid, arguments: argparse.Namespace, console: Console) -> list[Slot]:
    at_once = arguments.jobs or 1
    if arguments.slurm:
        return []
    if arguments.hosts is None:
        return local_slots(at_once, grid.machine.devices)
    hosts = [host for host in arguments.hosts.split(",") if host]
    if not hosts:
        raise UserError("--hosts names none: give them with commas, or leave it out")
    return host_slots(hosts, at_once, grid.machine.devices, console)


def _prepare(config: Path) -> None:
    """The data, once for all, by `sisa prepare`."""
    command = [sys.executable, "-m", "sisa_dist.cli", "prepare", str(config.resolve())]
    ended = subprocess.run(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    if ended.returncode:
        said = ended.stderr.strip().splitlines()
        raise UserError(f"the data cannot be prepared: {said[-1].removeprefix('sisa: ') if said else 'no word why'}")


def _status(
    grid: Grid, runs: list[SweepRun], chosen: list[SweepRun], arguments: argparse.Namespace, console: Console
) -> int:
    refuse_others(runs)
    sweep = Path(grid.output_dir)
    states = write_tables(sweep, runs)
    for run in chosen:
        state = states[run.name]
        at = f"step {state.step} of {run.config.training.steps}" if state.step else ""
        console.print(f"{state.status:9} {run.name}  {at}", markup=False)
    _print_status(chosen, states, console)
    console.print(f"the tables: {sweep / 'results.csv'}, results.parquet, curves.csv", markup=False)
    return 0


def _print_status(runs: list[SweepRun], states: dict[str, State], console: Console) -> None:
    counts = {
        status: sum(states[run.name].status == status for run in runs)
        for status in ("finished", "running", "failed", "missing")
    }
    console.print(", ".join(f"{count} {status}" for status, count in counts.items()), markup=False)
    for run in runs:
        if states[run.name].status == "failed":
            console.print(f"failed: {run.name}: {states[run.name].why}", markup=False)


if __name__ == "__main__":
    raise SystemExit(main())
