"""Scaling laws of the runs in a table: fits with intervals, their error on runs they never saw, the best N and D for a
budget, pictures, and a JSON that tools/run_sweep.py reads to choose the next runs.

python tools/fit_scaling_law.py runs/sweep/results.csv --by mixer --budget 1e18
python tools/fit_scaling_law.py ANY.csv --params-column "Model Size" --flops-column "Training FLOP" \\
    --loss-column loss --drop-largest 5 --form chinchilla --budget 5.76e23

The table is a csv or parquet with a row a run; of one that has a column `status` only the finished rows count. Its
columns are those of run_sweep's (parameters, tokens, flops, loss, d_s, run) unless named here. With --flops-column and
no --tokens-column, D = C / (6·N). The best N and D for a budget C have C = k·N·D, where k is the median of the group's
own runs, or 6 in a table without FLOPs, or --flops-factor. N is as counted in its column: --params-column
parameters_non_embedding takes run_sweep's other count.

--form, several with commas; without it all that the table has the runs for:
  chinchilla, kaplan, over_training   laws of the loss in N and D, Huber on log loss (over_training: least squares)
  repeated                            the same with --unique-column: tokens there are, where D is tokens that were seen
  isoflop                             parabolas through runs of equal FLOPs
  envelope                            minimum over the training curves of --curves
  d_s                                 is there a best d_s, and does it depend on N?

It writes into --out (default: fit/ beside the table) a picture for each group and fit.json:
  {"table", "columns": {"parameters": that of N, ...}, "rows": {"used", "left_out": {status: rows}}, "notes": [line],
   "fits": [{"where": {column: value}, "form", "source", "factor": C/(N·D) of the optima, "ratio": the runs' own,
             "parameters": {name: value}, "intervals": {name: [low, high]}, "objective", "points", "starts", "draws",
             "held_out_error": mean |predicted/measured − 1|, "held_out",
             "law": {"N_coefficient", "N_exponent", "D_coefficient", "D_exponent", their intervals},
             "optimum": [{"flops", "parameters", "tokens", "loss", "intervals": {...}}]}],
   "d_s": [{"where", "chosen": "none"|"constant"|"power", "verdict", "held_out_error", "laws", "optimum":
            [{"parameters", "d_s", "interval", "inside": was it among the values tried}]}],
   "skipped": [{"where", "form", "reason"}]}
A value that is not known is null. Intervals are of 95 %.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from fit_d_s import describe_d_s, fit_d_s
from fit_envelope import describe_envelope, fit_envelope
from fit_figure import Found, draw
from fit_forms import FORMS
from fit_isoflop import describe_isoflop, fit_isoflop
from fit_optimise import Array
from fit_parametric import HeldOut, describe, extrapolation, fit_form, hold_out_largest
from fit_repeated import describe_repeated, fit_repeated, hold_out_repeated
from fit_table import Columns, Points, finished, groups, points, query, read_curves, read_table, where

from sisa_dist.config import UserError
from sisa_dist.evaluation.harness import write_results

_ALL = (*FORMS, "repeated", "isoflop", "envelope", "d_s")


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    try:
        result = _run(arguments)
    except UserError as error:
        print(f"fit_scaling_law: {error}", file=sys.stderr)
        return 2
    _print(result)
    print(f"fits: {_out(arguments) / 'fit.json'}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path, help="csv or parquet, a row a run")
    parser.add_argument("--params-column", default="parameters", metavar="NAME")
    parser.add_argument("--tokens-column", metavar="NAME", help="default: tokens")
    parser.add_argument("--flops-column", metavar="NAME", help="default: flops, where there is one")
    parser.add_argument("--loss-column", default="loss", metavar="NAME")
    parser.add_argument("--d-s-column", default="d_s", metavar="NAME")
    parser.add_argument("--unique-column", default="unique_tokens", metavar="NAME")
    parser.add_argument("--run-column", default="run", metavar="NAME")
    parser.add_argument("--where", action="append", default=[], metavar="COLUMN=VALUE", help="keep these rows; repeat")
    parser.add_argument("--fit", metavar="QUERY", help="fit only these rows: a pandas expression over the columns")
    parser.add_argument("--held-out", metavar="QUERY", help="predict these rows and do not fit them")
    parser.add_argument("--drop-largest", type=int, default=0, metavar="K", help="leave out the K largest losses")
    parser.add_argument("--by", default="", metavar="COLUMN[,COLUMN]", help="a fit for each value")
    parser.add_argument("--form", default="", metavar="FORM[,FORM]", help=", ".join(_ALL))
    parser.add_argument("--objective", choices=("huber", "squares"), help="default: that of the form's paper")
    parser.add_argument("--curves", type=Path, help="folder of run folders, or a table with run, loss, flops or tokens")
    parser.add_argument("--budget", action="append", type=float, metavar="FLOPS", help="repeat; default: ×10 and ×100")
    parser.add_argument("--unique-tokens", type=float, metavar="N", help="of the budgets; default: the table's largest")
    parser.add_argument("--flops-factor", type=float, metavar="K", help="C = K·N·D; default: as the runs have it")
    parser.add_argument("--bootstrap", type=int, default=1000, metavar="DRAWS", help="0: no intervals")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, metavar="FOLDER")
    return parser


@dataclass(frozen=True)
class _Group:
    """Rows that are fitted together. `factor`: C / (N·D) of their optima."""

    label: dict[str, object]
    frame: pd.DataFrame
    fitted: pd.DataFrame  # what --fit and --held-out leave of it
    runs: Points
    held_out: Points | None
    factor: float


def _run(arguments: argparse.Namespace) -> dict[str, Any]:
    forms = _forms(arguments)
    columns = _columns(arguments)
    frame, left_out = finished(read_table(arguments.table), arguments.table)
    frame = where(frame, arguments.where, arguments.table)
    parts = groups(frame, [name for name in arguments.by.split(",") if name], arguments.table)
    found = [_group(arguments, columns, label, part) for label, part in parts]
    budgets = _budgets(arguments, np.concatenate([group.runs.flops for group in found]))
    out = _out(arguments)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out}: cannot be made ({error.strerror}): name another --out FOLDER") from None
    result: dict[str, Any] = {
        "table": str(arguments.table),
        "columns": dataclasses.asdict(columns),
        "rows": {"used": sum(len(group.runs) for group in found), "left_out": left_out},
        "notes": list(dict.fromkeys(note for group in found for note in _notes(group, columns))),
        "fits": [],
        "d_s": [],
        "skipped": [],
    }
    for group in found:
        _fit(arguments, forms, columns, group, budgets, result)
    if not result["fits"] and not result["d_s"]:
        raise UserError("nothing could be fitted: " + "; ".join(dict.fromkeys(s["reason"] for s in result["skipped"])))
    write_results(out / "fit.json", result)
    return result


def _group(arguments: argparse.Namespace, columns: Columns, label: dict[str, object], frame: pd.DataFrame) -> _Group:
    fitted, predicted = _split(arguments, frame)
    factor = arguments.flops_factor or 6.0
    runs = _drop_largest(points(fitted, columns, arguments.table, factor), arguments.drop_largest)
    held_out = None if predicted is None else points(predicted, columns, arguments.table, factor)
    return _Group(label, frame, fitted, runs, held_out, arguments.flops_factor or runs.ratio)


def _notes(group: _Group, columns: Columns) -> Iterator[str]:
    """What a reader of the figures should know of the runs behind them."""
    name = _named({"where": group.label})
    off = group.runs.ratio / group.factor
    if not 0.9 < off < 1.1:
        yield (
            f"{name}the runs' FLOPs are {group.runs.ratio:.3g}·N·D (median), the optima are of C = {group.factor:g}"
            "·N·D: without --flops-factor theirs are taken"
        )
    ratio = group.runs.flops / (group.runs.parameters * group.runs.tokens)
    if 0.9 < off < 1.1 and ratio.max() > 1.1 * ratio.min():
        ends = group.runs.parameters[[np.argmin(group.runs.parameters), np.argmax(group.runs.parameters)]]
        small, large = (float(np.median(ratio[group.runs.parameters == end])) for end in ends)
        yield (
            f"{name}C/(N·D) is {small:.3g} at N = {ends[0]:.3g} and {large:.3g} at {ends[1]:.3g}, the optima are of "
            f"its median, {group.factor:.3g}: --flops-factor sets another for budgets far away"
        )
    for column in ("mixer", columns.d_s):
        if column in group.fitted and group.fitted[column].nunique() > 1:
            found = sorted(group.fitted[column].dropna().unique())
            values = ", ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in found)
            yield f"{name}the laws of N and D take runs of {column} {values} as one: --by {column} parts them"
    passes = group.runs.tokens / group.runs.unique
    repeated = int((passes > 1).sum())
    if repeated:
        yield (
            f"{name}{repeated} of {len(group.runs)} runs saw tokens more than once (at most {np.nanmax(passes):.2g} "
            "times): only the form `repeated` knows of that"
        )


def _fit(
    arguments: argparse.Namespace,
    forms: list[str],
    columns: Columns,
    group: _Group,
    budgets: list[float],
    result: dict[str, Any],
) -> None:
    """Adds a group's entries to the result and draws its picture."""
    found = Found(group.runs, group.held_out, budgets, group.factor)
    about = {"where": group.label, "factor": group.factor, "ratio": group.runs.ratio}
    for form in forms or _ALL:
        try:
            entry = _one(form, arguments, group.frame, columns, found)
        except UserError as error:
            if forms and not group.label:  # asked for, and there is no other group that might do
                raise
            result["skipped"].append({"where": group.label, "form": form, "reason": str(error)})
            continue
        result["d_s" if form == "d_s" else "fits"].append(about | entry)
    if found.fits or found.repeated or found.isoflop or found.envelope or found.d_s:
        named = "_".join(str(value) for value in group.label.values())
        safe = "".join(letter if letter.isalnum() or letter in "._-" else "_" for letter in named)
        title = ", ".join(f"{name} = {value}" for name, value in group.label.items()) or arguments.table.name
        draw(found, title, _out(arguments) / f"fit{'_' * bool(safe)}{safe}.png")


def _one(
    form: str, arguments: argparse.Namespace, frame: pd.DataFrame, columns: Columns, found: Found
) -> dict[str, Any]:
    """The JSON entry of one form; what the picture needs goes into `found`."""
    runs, factor = found.points, found.factor
    common: dict[str, Any] = {"draws": arguments.bootstrap, "seed": arguments.seed}
    if form in FORMS:
        squares = None if arguments.objective is None else arguments.objective == "squares"
        fit = fit_form(FORMS[form], runs, squares=squares, **common)
        if found.held_out is not None:
            error = extrapolation(fit, found.held_out, f"--held-out {arguments.held_out}")
        else:
            error = hold_out_largest(fit, squares=squares)
        fit = replace(fit, held_out=error)
        found.fits.append(fit)
        return describe(fit, found.budgets, factor)
    if form == "repeated":
        repeated = fit_repeated(runs, **common)
        if found.held_out is not None:
            errors = repeated.loss(found.held_out) / found.held_out.loss - 1
            rule = f"--held-out {arguments.held_out}"
            repeated = replace(repeated, held_out=HeldOut(rule, found.held_out.run, errors))
        else:
            repeated = replace(repeated, held_out=hold_out_repeated(repeated))
        found.repeated = repeated
        unique = arguments.unique_tokens or float(np.nanmax(runs.unique))
        return describe_repeated(repeated, found.budgets, unique, factor)
    if form == "isoflop":
        found.isoflop = fit_isoflop(runs, factor=factor, **common)
        return describe_isoflop(found.isoflop, found.budgets)
    if form == "envelope":
        if arguments.curves is None:
            raise UserError("the minimum over training curves needs --curves")
        curves = read_curves(arguments.curves, frame, columns, factor)
        found.envelope = fit_envelope(runs, curves, factor=factor, **common)
        return describe_envelope(found.envelope, found.budgets)
    found.d_s = fit_d_s(runs, **common)
    return describe_d_s(found.d_s)


def _forms(arguments: argparse.Namespace) -> list[str]:
    forms = [name for name in arguments.form.split(",") if name]
    for name in forms:
        if name not in _ALL:
            raise UserError(f"--form {name}: no such form; there are {', '.join(_ALL)}")
    if arguments.bootstrap < 0 or arguments.drop_largest < 0 or not (arguments.flops_factor or 1) > 0:
        raise UserError("--bootstrap and --drop-largest are 0 or more, --flops-factor is more than 0")
    return forms


def _columns(arguments: argparse.Namespace) -> Columns:
    tokens, flops = arguments.tokens_column, arguments.flops_column
    if flops is None:
        tokens, flops = tokens or "tokens", "flops"
    return Columns(
        arguments.params_column,
        tokens,
        flops,
        arguments.loss_column,
        arguments.d_s_column,
        arguments.unique_column,
        arguments.run_column,
    )


def _split(arguments: argparse.Namespace, frame: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame | None]:
    """Rows to fit, and those of --held-out."""
    predicted = None
    if arguments.held_out:
        predicted = query(frame, arguments.held_out, "--held-out")
        frame = frame.drop(predicted.index)
    if arguments.fit:
        frame = query(frame, arguments.fit, "--fit")
    if frame.empty:
        raise UserError("--held-out takes every row: nothing is left to fit")
    return frame, predicted


def _drop_largest(runs: Points, count: int) -> Points:
    if count >= len(runs):
        raise UserError(f"--drop-largest {count}: there are {len(runs)} runs")
    kept = np.sort(np.argsort(runs.loss, kind="stable")[: len(runs) - count])
    return runs[kept]


def _budgets(arguments: argparse.Namespace, flops: Array) -> list[float]:
    if arguments.budget is None:
        return [10 * float(flops.max()), 100 * float(flops.max())]
    for budget in arguments.budget:
        if not flops.min() <= budget < np.inf:
            raise UserError(
                f"--budget {budget:g} is below the smallest run ({flops.min():.3g} FLOPs): ask for that or more"
            )
    return arguments.budget


def _out(arguments: argparse.Namespace) -> Path:
    return arguments.out or arguments.table.parent / "fit"


def _print(result: dict[str, Any]) -> None:
    left_out = ", ".join(f"{count} {status}" for status, count in result["rows"]["left_out"].items())
    print(f"runs: {result['rows']['used']} fitted" + (f"; left out: {left_out}" if left_out else ""))
    for note in result["notes"]:
        print(f"note: {note}")
    for entry in result["fits"]:
        print(f"{_named(entry)}{entry['form']}: {entry['points']} runs, {entry['source']}")
        for name, value in entry["parameters"].items():
            print(f"    {name:13s} {value:.5g}{_range(entry['intervals'][name])}")
        if entry["objective"] is not None:
            print(f"    {'objective':13s} {entry['objective']:.6g}")
        if entry["law"]:
            law = entry["law"]
            bounds = _range(law["N_exponent_interval"])
            print(f"    N* ∝ C^{law['N_exponent']:.4f}{bounds}, D* ∝ C^{law['D_exponent']:.4f}")
        if entry["held_out_error"] is not None:
            print(f"    held out      {100 * entry['held_out_error']:.2f} % ({entry['held_out']['rule']})")
        for best in entry["optimum"]:
            each = [("N*", "parameters", ".3g"), ("D*", "tokens", ".3g"), ("loss", "loss", ".4f")]
            said = [f"{s} {best[n]:{f}}{_range(best['intervals'][n])}" for s, n, f in each if best[n] is not None]
            print(f"    at {best['flops']:.3g} FLOPs: {', '.join(said)} (C = {entry['factor']:.3g}·N·D)")
    for entry in result["d_s"]:
        print(f"{_named(entry)}d_s: {entry['verdict']}")
    for entry in result["skipped"]:
        print(f"{_named(entry)}{entry['form']}: not fitted: {entry['reason']}")


def _named(entry: dict[str, Any]) -> str:
    return "".join(f"{name}={value} " for name, value in entry["where"].items())


def _range(bounds: list[float] | None) -> str:
    return "" if bounds is None else f" [{bounds[0]:.4g}, {bounds[1]:.4g}]"


if __name__ == "__main__":
    raise SystemExit(main())
