"""How far each run of a sweep is, and what the finished ones found, as tables that a fit reads.

    SWEEP/results.csv, results.parquet    a row for every run of the grid (COLUMNS)
    SWEEP/curves.csv                      run, tokens, flops, loss of every evaluation while it trained

The loss of a row is the last one, over more held-out text than those of the curves. Under a schedule that decays to its
own end, the losses before that end are higher than those of a run that ends there.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sweep_rules import SweepRun, config_hash

from sisa_dist.checkpoint import list_checkpoints
from sisa_dist.config import UserError, load_config
from sisa_dist.training.metrics_file import read_metrics

COLUMNS = ("run", "status", "mixer", "d_model", "n_layers", "d_ff", "d_s", "parameters", "parameters_non_embedding")
COLUMNS += ("tokens", "flops", "lr", "global_batch_tokens", "seed", "loss", "tokens_per_second", "config_hash")
CURVES = ("run", "tokens", "flops", "loss")


@dataclass(frozen=True)
class State:
    status: str  # finished, running, failed or missing
    step: int = 0  # the last one that its metrics hold
    why: str = ""  # it failed


def state_of(sweep: Path, run: SweepRun) -> State:
    if (run.folder / "final.json").is_file():
        return State("finished", run.config.training.steps)
    step = _last_step(run.folder)
    if _is_held(sweep / "jobs" / f"{run.name}.lock"):
        return State("running", step)
    try:
        ended = json.loads((sweep / "jobs" / f"{run.name}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return State("missing", step)
    return State("failed", step, ended["why"]) if ended["code"] else State("missing", step)


def refuse_others(runs: Sequence[SweepRun]) -> None:
    """Raises UserError where a folder holds a run that was begun with other settings."""
    for run in runs:
        stored = run.folder / "config.yaml"
        if stored.is_file() and list_checkpoints(run.folder) and config_hash(load_config(stored)) != run.config_hash:
            raise UserError(
                f"{run.folder}: was begun with other settings than the grid's now: set them as they were, or name "
                "another output_dir"
            )


def write_tables(sweep: Path, runs: Sequence[SweepRun]) -> dict[str, State]:
    """Writes all three and returns the states by name."""
    try:
        import pandas
        import pyarrow  # noqa: F401, which pandas needs for .parquet
    except ImportError:
        raise UserError("the tables need pandas and pyarrow: pip install 'sisa-dist[scaling]'") from None
    states = {run.name: state_of(sweep, run) for run in runs}
    rows = pandas.DataFrame([_row(run, states[run.name]) for run in runs], columns=list(COLUMNS))
    rows = rows.astype({"d_s": "Int64", "loss": "float64", "tokens_per_second": "float64"})
    curves = pandas.DataFrame([point for run in runs for point in _curve(run)], columns=list(CURVES))
    sweep.mkdir(parents=True, exist_ok=True)
    for table, name in ((rows, "results.csv"), (rows, "results.parquet"), (curves, "curves.csv")):
        beside = sweep / f"{name}.tmp"
        if name.endswith(".csv"):
            table.to_csv(beside, index=False)
        else:
            table.to_parquet(beside, index=False)
        os.replace(beside, sweep / name)
    return states


def _row(run: SweepRun, state: State) -> dict[str, Any]:
    model, shape = run.config.model, run.shape
    row: dict[str, Any] = {"run": run.name, "status": state.status, "mixer": shape.mixer, "d_s": shape.d_s}
    row |= {"d_model": model.d_model, "n_layers": model.n_layers, "d_ff": model.d_ff}
    row |= {"parameters": shape.parameters, "parameters_non_embedding": shape.parameters_non_embedding}
    row |= {"tokens": run.tokens, "flops": run.flops, "lr": run.config.optimizer.lr, "seed": run.config.seed}
    row |= {"global_batch_tokens": run.config.training.global_batch_tokens, "config_hash": run.config_hash}
    if state.status == "finished":
        final = json.loads((run.folder / "final.json").read_text(encoding="utf-8"))
        row["loss"] = final["perplexity"]["loss"]
        rates = [record["tokens_per_second"] for record in read_metrics(run.folder).get("train", [])]
        row["tokens_per_second"] = statistics.median(rates) if rates else math.nan
    return row


def _curve(run: SweepRun) -> list[dict[str, Any]]:
    if not (run.folder / "metrics.jsonl").is_file():
        return []
    batch = run.config.training.global_batch_tokens
    return [
        {
            "run": run.name,
            "tokens": record["step"] * batch,
            "flops": record["step"] * batch * run.shape.flops_per_token,
            "loss": record["validation_loss"],
        }
        for record in read_metrics(run.folder).get("evaluation", [])
    ]


def _last_step(folder: Path) -> int:
    if not (folder / "metrics.jsonl").is_file():
        return 0
    return max((record["step"] for record in read_metrics(folder).get("train", [])), default=0)


def _is_held(lock: Path) -> bool:
    """Whether a job holds it. Between hosts that is seen where their file system has locks."""
    try:
        with lock.open("r") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False
