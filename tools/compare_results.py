"""What the runs of tools/compare.py found, per system: means over seeds, intervals, whether each run converged.

The convergence check of a run, stated on the page too:
- any run: at most 1 % of its steps were skipped (spikes, infinities);
- text: the held-out loss ends below the unigram baseline, and fell by at most FLAT_LOSS over the last fifth of the
  steps at full learning rate (as the rate goes down every curve falls, then is flat, whatever is left to learn);
- a task: solved (accuracy ≥ SOLVED), or above chance and level: accuracy moved by at most FLAT_ACCURACY over that
  fifth. Level at chance says nothing: both tasks are learned of a sudden.
A system is ranked only where every run of it is there and passed.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from compare_plan import Comparison, Job
from compare_run import is_done, read_result
from compare_task import make_task

from sisa_dist.config import RunConfig
from sisa_dist.evaluation.bootstrap import interval
from sisa_dist.training.metrics_file import read_metrics

FLAT_LOSS = 0.2  # nats per token, for a quarter more steps
SOLVED = 0.9
FLAT_ACCURACY = 0.05
ABOVE_CHANCE = 0.05
_SKIPPED = 0.01  # of the steps


@dataclass(frozen=True)
class Figure:
    """One number of a system over its runs: `spread` is the standard deviation over seeds, None of a single one."""

    mean: float
    spread: float | None
    low: float
    high: float
    runs: list[float]


@dataclass
class Row:
    """A system in a task. `undertrained`: why it is not ranked, an entry for every run that failed."""

    system: str
    parameters: int
    excess: float
    seeds: list[int]
    lr: float
    figures: dict[str, Figure] = field(default_factory=dict)
    curves: dict[str, tuple[list[int], list[list[float]]]] = field(default_factory=dict)  # (steps, values[run])
    undertrained: list[str] = field(default_factory=list)
    tokens_per_second: float = 0.0
    peak_bytes: int = 0
    rank: int | None = None


def rows(comparison: Comparison, task: str) -> list[Row]:
    """Of the systems with a finished run, the ranked ones first. Where several learning rates were tried, each
    system's is the one whose mean is best."""
    key, lower = ("perplexity", True) if task == "text" else ("accuracy", False)

    def order(row: Row) -> tuple[bool, float]:
        return bool(row.undertrained), row.figures[key].mean * (1 if lower else -1)

    found = []
    for system in comparison.systems:
        tried = []
        for factor in comparison.lr_factors:
            jobs = [comparison.job(task, system, seed, factor) for seed in range(comparison.seeds)]
            done = [job for job in jobs if is_done(job.folder, {})]
            if done:
                tried.append(_row(comparison, done))
        if tried:
            found.append(min(tried, key=order))
    found.sort(key=order)
    for place, row in enumerate((row for row in found if not row.undertrained), 1):
        row.rank = place
    return found


def _row(comparison: Comparison, jobs: Sequence[Job]) -> Row:
    first = jobs[0]
    matched = comparison.matched[first.task, first.system]
    metrics, results = [read_metrics(job.folder) for job in jobs], [read_result(job.folder) for job in jobs]
    rates = [record["tokens_per_second"] for run in metrics for record in run["train"]]
    row = Row(
        system=first.system,
        parameters=matched.parameters,
        excess=matched.excess,
        seeds=[job.seed for job in jobs],
        lr=first.config.optimizer.lr,
        tokens_per_second=statistics.median(rates),
        peak_bytes=int(comparison.measured(first.task, first.system).get("peak_bytes", 0)),
    )
    row.curves["loss"] = _curve([run["train"] for run in metrics], "loss")
    if first.task == "text":
        _text(row, metrics, results)
    else:
        row.curves["accuracy"] = _curve([run["evaluation"] for run in metrics], "accuracy")
        row.figures["accuracy"] = figure([result["accuracies"] for result in results])
        row.figures["twice_as_long"] = figure([result["accuracies_twice_as_long"] for result in results])
        solved = [_first_solved(run) for run in metrics]
        if None not in solved:
            row.figures["steps_to_solve"] = figure([[step] for step in solved if step is not None])
    if len(jobs) < comparison.seeds:
        row.undertrained.append(f"{comparison.seeds - len(jobs)} of {comparison.seeds} runs are not there")
    for job, run, result in zip(jobs, metrics, results, strict=True):
        why = check(job.task, job.config, run, result)
        if why:
            row.undertrained.append(f"seed {job.seed}: {why}")
    return row


def _text(row: Row, metrics: list[dict[str, Any]], results: list[dict[str, Any]]) -> None:
    row.curves["validation_loss"] = _curve([run["evaluation"] for run in metrics], "validation_loss")
    losses = figure([result["losses"] for result in results], results[0]["tokens"])
    runs = [math.exp(loss) for loss in losses.runs]
    # Of exp the mean over seeds is not the exp of the mean: the interval is that of the mean loss, and so is the mean.
    row.figures["perplexity"] = Figure(
        math.exp(losses.mean), _spread(runs), math.exp(losses.low), math.exp(losses.high), runs
    )
    niah = [result["niah"] for result in results]
    row.figures["niah"] = figure([found[-1]["hits"] for found in niah])
    row.curves["niah"] = (
        [found["step"] for found in niah[0]],
        [[statistics.fmean(found["hits"]) for found in run] for run in niah],
    )
    for name in ("lambada", "blimp"):
        hits = [result[name]["hits"] for result in results if name in result]
        if len(hits) == len(results) and len({len(run) for run in hits}) == 1:
            row.figures[name] = figure(hits)


def figure(values: Sequence[Sequence[float]], weights: Sequence[float] | None = None) -> Figure:
    """Of values[run][item]."""
    low, high = interval(values, weights)
    runs = [float(np.average(run, weights=weights)) for run in values]
    return Figure(statistics.fmean(runs), _spread(runs), low, high, runs)


def check(task: str, config: RunConfig, run: dict[str, Any], result: dict[str, Any]) -> str:
    """Why a run counts as undertrained; empty where it does not. `run`: its metrics."""
    steps = config.training.steps
    full = steps - (config.schedule.decay_steps or 0)
    skipped = sum(record["skipped"] for record in run["train"]) / steps
    if skipped > _SKIPPED:
        return f"{skipped:.0%} of its steps were skipped"
    if task == "text":
        loss, unigram = float(np.average(result["losses"], weights=result["tokens"])), result["unigram_perplexity"]
        if not loss < math.log(unigram):
            return f"loss {loss:.2f} is not below the unigram baseline's {math.log(unigram):.2f}"
        fell = _at(run, "validation_loss", 0.8 * full) - _at(run, "validation_loss", full)
        return f"its loss still fell by {fell:.2f} in the last fifth at full rate" if fell > FLAT_LOSS else ""
    accuracy = statistics.fmean(result["accuracies"])
    if accuracy >= SOLVED:
        return ""
    chance = make_task(task, config.training.seq_len, evaluation=True).chance
    if accuracy < chance + ABOVE_CHANCE:
        return f"accuracy {accuracy:.2f} is that of chance ({chance:.2f})"
    moved = _at(run, "accuracy", full) - _at(run, "accuracy", 0.8 * full)
    return f"accuracy {accuracy:.2f} still moved by {moved:+.2f}" if abs(moved) > FLAT_ACCURACY else ""


def _first_solved(run: dict[str, Any]) -> int | None:
    """The first evaluated step with accuracy ≥ SOLVED."""
    return next((record["step"] for record in run["evaluation"] if record["accuracy"] >= SOLVED), None)


def _at(run: dict[str, Any], key: str, step: float) -> float:
    """The evaluation nearest to `step`."""
    return min(run["evaluation"], key=lambda record: abs(record["step"] - step))[key]


def _curve(runs: list[list[dict[str, Any]]], key: str) -> tuple[list[int], list[list[float]]]:
    return [record["step"] for record in runs[0]], [[float(record[key]) for record in run] for run in runs]


def _spread(runs: Sequence[float]) -> float | None:
    return statistics.stdev(runs) if len(runs) > 1 else None
