"""What tools/run_sweep.py and tools/fit_scaling_law.py left in a sweep's folder, as plain tables."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sisa_dist.config import UserError
from sisa_dist.report.read import read_json, reading

_FITS = ("fit/fit.json", "fit.json")


@dataclass(frozen=True)
class Law:
    """A fit as the page tells it: a cell for each of LAW, and rows of OPTIMUM."""

    cells: list[str]
    optima: list[list[str]]


@dataclass(frozen=True)
class LawOfDs:
    name: str
    verdict: str
    errors: list[list[str]]  # law, held-out error
    optima: list[list[str]]  # parameters, best d_s, whether that is among those tried


LAW = ("fit", "runs", "constants", "N* ∝ C to the power", "D* ∝ C to the power", "held-out error", "law")
OPTIMUM = ("fit", "FLOPs", "parameters N*", "tokens D*", "loss")


@dataclass(frozen=True)
class Sweep:
    folder: Path
    header: list[str]
    rows: list[list[str]]
    curves: dict[str, list[tuple[float, float]]]  # FLOPs and loss while training, by run
    ends: dict[str, tuple[float, float]]  # of finished runs
    groups: dict[str, str]  # run -> mixer, with its d_s
    laws: list[Law]
    d_s: list[LawOfDs]
    skipped: list[str]  # forms that were not fitted, and why


def is_sweep(folder: Path) -> bool:
    return (folder / "results.csv").is_file()


def read_sweep(folder: Path) -> Sweep:
    """Raises UserError that names a malformed file."""
    path = folder / "results.csv"
    with reading(path):
        header, *rows = _table(path)
        at = {name: header.index(name) for name in ("run", "mixer", "d_s", "flops", "loss")}
        ends, groups = {}, {}
        for row in rows:
            run = row[at["run"]]
            groups[run] = row[at["mixer"]] + (f", d_s {row[at['d_s']]}" if row[at["d_s"]] else "")
            if row[at["loss"]]:
                ends[run] = (float(row[at["flops"]]), float(row[at["loss"]]))
    path = folder / "curves.csv"
    curves: dict[str, list[tuple[float, float]]] = {}
    if path.is_file():
        with reading(path):
            header_of_curves, *points = _table(path)
            where = {name: header_of_curves.index(name) for name in ("run", "flops", "loss")}
            for point in points:
                curves.setdefault(point[where["run"]], []).append(
                    (float(point[where["flops"]]), float(point[where["loss"]]))
                )
    laws, d_s, skipped = [], [], []
    path = next((folder / name for name in _FITS if (folder / name).is_file()), folder / _FITS[0])
    if path.is_file():
        with reading(path):
            fitted = read_json(path)
            laws = [_law(entry) for entry in fitted["fits"]]
            d_s = [_law_of_d_s(entry) for entry in fitted["d_s"]]
            skipped = [f"{_where(entry)}{entry['form']}: {entry['reason']}" for entry in fitted["skipped"]]
    return Sweep(folder, header, rows, curves, ends, groups, laws, d_s, skipped)


def _table(path: Path) -> list[list[str]]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = [row for row in csv.reader(file) if row]
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): mend or remove it") from None
    except csv.Error as error:
        raise ValueError(str(error)) from None
    if not rows or any(len(row) != len(rows[0]) for row in rows):
        raise ValueError("no table, or a row of another length than the first")
    return rows


def _where(entry: Mapping[str, Any]) -> str:
    return "".join(f"{name} {value}, " for name, value in entry["where"].items())


def _law(entry: Mapping[str, Any]) -> Law:
    name, law, error = f"{_where(entry)}{entry['form']}", entry["law"], entry["held_out_error"]
    constants = [
        f"{each} {with_interval(value, entry['intervals'][each])}" for each, value in entry["parameters"].items()
    ]
    grows = ["", ""]
    if law is not None:
        grows = [with_interval(law[f"{each}_exponent"], law[f"{each}_exponent_interval"]) for each in "ND"]
    missed = "" if error is None else f"{100 * error:.2f} %, of {entry['held_out']['rule']}"
    optima = []
    for best in entry["optimum"]:
        values = [with_interval(best[each], best["intervals"][each]) for each in ("parameters", "tokens", "loss")]
        optima.append([name, number(best["flops"]), *values])
    return Law([name, str(entry["points"]), "\n".join(constants), *grows, missed, str(entry["source"])], optima)


def _law_of_d_s(entry: Mapping[str, Any]) -> LawOfDs:
    errors = [[str(law), number(error)] for law, error in entry["held_out_error"].items()]
    optima = [
        [number(best["parameters"]), with_interval(best["d_s"], best["interval"]), "yes" if best["inside"] else "no"]
        for best in entry["optimum"]
    ]
    return LawOfDs(f"{_where(entry)}d_s", str(entry["verdict"]), errors, optima)


def with_interval(value: float | None, interval: list[float] | None) -> str:
    if value is None:
        return "not known"
    if interval is None:
        return number(value)
    low, high = interval
    return f"{number(value)} [{number(low)}, {number(high)}]"


def number(value: float) -> str:
    """Four digits, with the exponent of large and small ones."""
    if not math.isfinite(value):
        return "not known"
    return f"{value:.4g}".replace("e+", "e")
