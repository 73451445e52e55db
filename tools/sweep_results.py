"""How far each run of a sweep is, and what the finished ones found, as tables that a fit reads.

    SWEEP/results.csv, results.parquet    a row for every run of the grid (COLUMNS)
    SWEEP/curves.csv                      run, tokens, flops, loss of every evaluation while it trained

unique_tokens are those of the training split of all the data that a run reads, however much of it, or how often; empty
where the data are not prepared yet.
The loss of a row is the last one, over more held-out text than those of the curves. Under a schedule that decays to its
own end, the losses before that end are higher than those of a run that ends there.
"""

from __future__ import annotations

import fcntl
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sweep_job import ROOT
from sweep_rules import SweepRun, config_hash

from data_pipeline.fetch import RemoteSettings
from data_pipeline.manifest import read_manifest
from data_pipeline.places import is_url
from data_pipeline.prepared import small_files
from sisa_dist.checkpoint import list_checkpoints
from sisa_dist.checkpoint.folder import step_of
from sisa_dist.config import UserError, load_config, replace_file
from sisa_dist.training.metrics_file import read_metrics

COLUMNS = ("run", "status", "mixer", "d_model", "n_layers", "d_ff", "d_s", "parameters", "parameters_non_embedding")
COLUMNS += ("tokens", "unique_tokens", "flops", "lr", "global_batch_tokens", "seed", "loss", "tokens_per_second")
COLUMNS += ("config_hash",)
CURVES = ("run", "tokens", "flops", "loss")


@dataclass(frozen=True)
class State:
    status: str  # finished, running, failed or missing
    step: int = 0  # the last one that its metrics hold
    why: str = ""  # it failed
    kept: int = 0  # steps that are not to be done again


def state_of(sweep: Path, run: SweepRun) -> State:
    final, steps = run.folder / "final.json", run.config.training.steps
    if final.is_file():
        if _final_loss(final) is not None:
            return State("finished", steps, kept=steps)
        return State("failed", steps, _without_a_loss(final), kept=steps)
    step = _last_step(run.folder)
    if _is_held(sweep / "jobs" / f"{run.name}.lock"):
        return State("running", step, kept=step)
    kept = max(map(step_of, list_checkpoints(run.folder)), default=0)
    try:
        ended = json.loads((sweep / "jobs" / f"{run.name}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return State("missing", step, kept=kept)
    return State("failed", step, ended["why"], kept) if ended["code"] else State("missing", step, kept=kept)


def share_left(run: SweepRun, state: State) -> float:
    """Of its tokens."""
    return 1 - state.kept / run.config.training.steps


def refuse_others(runs: Sequence[SweepRun]) -> None:
    """Raises UserError where a folder holds a run, or the result of one, of other settings."""
    for run in runs:
        stored = run.folder / "config.yaml"
        counts = (run.folder / "final.json").is_file() or list_checkpoints(run.folder)
        if stored.is_file() and counts and config_hash(load_config(stored)) != run.config_hash:
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
    unique = _unique_tokens(runs)
    rows = pandas.DataFrame(
        [_row(run, states[run.name]) | {"unique_tokens": unique[run.name]} for run in runs], columns=list(COLUMNS)
    )
    integers = {"d_s": "Int64", "unique_tokens": "Int64"}
    rows = rows.astype(integers | {"loss": "float64", "tokens_per_second": "float64"})
    curves = pandas.DataFrame([point for run in runs for point in _curve(run)], columns=list(CURVES))
    sweep.mkdir(parents=True, exist_ok=True)
    replace_file(sweep / "results.csv", rows.to_csv(index=False))
    replace_file(sweep / "results.parquet", rows.to_parquet(index=False))
    replace_file(sweep / "curves.csv", curves.to_csv(index=False))
    return states


def _row(run: SweepRun, state: State) -> dict[str, Any]:
    model, shape = run.config.model, run.shape
    row: dict[str, Any] = {"run": run.name, "status": state.status, "mixer": shape.mixer, "d_s": shape.d_s}
    row |= {"d_model": model.d_model, "n_layers": model.n_layers, "d_ff": model.d_ff}
    row |= {"parameters": shape.parameters, "parameters_non_embedding": shape.parameters_non_embedding}
    row |= {"tokens": run.tokens, "flops": run.flops, "lr": run.config.optimizer.lr, "seed": run.config.seed}
    row |= {"global_batch_tokens": run.config.training.global_batch_tokens, "config_hash": run.config_hash}
    if state.status == "finished":
        row["loss"] = _final_loss(run.folder / "final.json")
        rates = [record["tokens_per_second"] for record in _metrics(run.folder).get("train", [])]
        row["tokens_per_second"] = statistics.median(rates) if rates else math.nan
    return row


def _final_loss(final: Path) -> float | None:
    """None where there is none, or no number."""
    try:
        loss = json.loads(final.read_text(encoding="utf-8"))["perplexity"]["loss"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return loss if isinstance(loss, float) else None


def _without_a_loss(final: Path) -> str:
    try:
        told = json.loads(final.read_text(encoding="utf-8"))["perplexity"]
        diverged = "loss" in told  # which a result that is not finite leaves null
    except (OSError, ValueError, KeyError, TypeError):
        diverged = False
    if diverged:
        return f"its loss on held-out text is not finite: lower lr, and remove {final.parent}"
    return f"{final} holds no loss on held-out text: see to data.validation_fraction, remove the file and run again"


def _unique_tokens(runs: Sequence[SweepRun]) -> dict[str, int | None]:
    """By a run's name; each folder is looked at once."""
    read: dict[str, set[str]] = {}
    for run in runs:
        data, shares = run.config.data, run.config.data.shares or {}
        sources = {source.folder for name, source in (data.mixture or {}).items() if shares[name]}
        read[run.name] = sources or {str(data.folder)}
    known = {folder: _tokens_of(folder) for folder in set().union(*read.values())}
    counts = {name: [known[folder] for folder in folders] for name, folders in read.items()}
    return {name: None if None in found else sum(found) for name, found in counts.items()}


def _tokens_of(folder: str) -> int | None:
    """For training; None where nothing is prepared, or it cannot be read from here."""
    try:
        with small_files(folder if is_url(folder) else ROOT / folder, remote=RemoteSettings(retries=0)) as local:
            counts = (read_manifest(local) or {}).get("counts", {})
    except UserError:
        return None
    return counts.get("train", {}).get("tokens")


def _curve(run: SweepRun) -> list[dict[str, Any]]:
    batch = run.config.training.global_batch_tokens
    return [
        {
            "run": run.name,
            "tokens": record["step"] * batch,
            "flops": record["step"] * batch * run.shape.flops_per_token,
            "loss": record["validation_loss"],
        }
        for record in _metrics(run.folder).get("evaluation", [])
    ]


def _last_step(folder: Path) -> int:
    return max((record["step"] for record in _metrics(folder).get("train", [])), default=0)


def _metrics(folder: Path) -> dict[str, list[dict[str, Any]]]:
    return read_metrics(folder) if (folder / "metrics.jsonl").is_file() else {}


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
