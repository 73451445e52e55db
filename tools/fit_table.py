"""From any table of runs (csv or parquet) to the points a law is fitted to. Every mistake in it is one line.

It drops rows of a sweep's table that are not finished and says how many; it never drops a finished row by itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from fit_optimise import Array
from pandas.api.types import is_numeric_dtype

from sisa_dist.config import UserError
from sisa_dist.training.metrics_file import read_metrics

EQUAL_FLOPS = 1.1  # runs within 10 % of the FLOPs of a slice's smallest run are of that slice
_SAME = 1.05  # sizes, and token budgets, within 5 % are one: d_ff solved for equal size leaves 0.5 %


@dataclass(frozen=True)
class Columns:
    """Names in the table. `tokens` None: D = FLOPs / (factor·N). `flops` None: C = factor·N·D."""

    parameters: str = "parameters"
    tokens: str | None = "tokens"
    flops: str | None = "flops"
    loss: str = "loss"
    d_s: str = "d_s"
    unique: str = "unique_tokens"
    run: str = "run"


@dataclass(frozen=True)
class Points:
    """Runs, each array [n]; d_s and unique are nan where a run has none. `ratio`: the median of C / (N·D)."""

    parameters: Array
    tokens: Array
    flops: Array
    loss: Array
    d_s: Array
    unique: Array
    run: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.loss)

    def __getitem__(self, kept: Array) -> Points:
        kept = np.arange(len(self))[kept]
        arrays = (self.parameters, self.tokens, self.flops, self.loss, self.d_s, self.unique)
        return Points(*(a[kept] for a in arrays), tuple(self.run[i] for i in kept))

    @property
    def ratio(self) -> float:
        return float(np.median(self.flops / (self.parameters * self.tokens)))

    def log(self) -> Array:
        """log N and log D, [n, 2]."""
        return np.stack([np.log(self.parameters), np.log(self.tokens)], 1)


def clusters(values: Array, width: float = _SAME) -> Array:
    """The number of each value's cluster, by rising value: up to `width` times the cluster's smallest are one."""
    found, number, start = np.zeros(len(values), np.int64), -1, -np.inf
    for i in np.argsort(values, kind="stable"):
        if number < 0 or values[i] > width * start:
            number, start = number + 1, values[i]
        found[i] = number
    return found


def read_table(path: Path) -> pd.DataFrame:
    try:
        if path.suffix == ".csv":
            frame = pd.read_csv(path)
        elif path.suffix in (".parquet", ".pq"):
            frame = pd.read_parquet(path)
        else:
            raise UserError(f"{path}: a table is a .csv or a .parquet file")
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path}: no such file: name the table of a sweep or any csv or parquet of runs") from None
    except Exception as error:
        # pandas and pyarrow have a dozen classes for a file that is not what its name says.
        raise UserError(f"{path}: cannot be read as a table ({str(error).splitlines()[0]})") from None
    if frame.empty:
        raise UserError(f"{path}: the table has no rows")
    return frame


def finished(frame: pd.DataFrame, path: Path) -> tuple[pd.DataFrame, dict[str, int]]:
    """Rows whose `status`, where the table has it, is finished; how many of each other status were left out."""
    if "status" not in frame:
        return frame, {}
    left_out = frame["status"].fillna("without a status")[frame["status"] != "finished"].value_counts()
    kept = frame[frame["status"] == "finished"]
    if kept.empty:
        raise UserError(f"{path}: no run is finished yet: run the sweep first")
    return kept, {str(name): int(count) for name, count in left_out.items()}


def where(frame: pd.DataFrame, conditions: Sequence[str], path: Path) -> pd.DataFrame:
    """Rows that meet every `column=value[,value…]`; numbers are compared as numbers."""
    for condition in conditions:
        column, equals, text = condition.partition("=")
        if not equals:
            raise UserError(f"--where {condition}: write column=value")
        wanted = text.split(",")
        have = _column(frame, column, path)
        if is_numeric_dtype(have):
            try:
                mask = have.isin([float(value) for value in wanted])
            except ValueError:
                raise UserError(f"--where {condition}: {column} holds numbers, {text!r} is none") from None
        else:
            mask = have.astype(str).isin(wanted)
        if not mask.any():
            found = ", ".join(sorted({str(value) for value in have.unique()})[:8])
            raise UserError(f"--where {condition}: no row has it; {column} holds {found}")
        frame = frame[mask]
    return frame


def query(frame: pd.DataFrame, expression: str, option: str) -> pd.DataFrame:
    """Rows for which a pandas expression, such as "params < 1e9 and lr == 0.003", is true."""
    try:
        found = frame.query(expression, engine="python", local_dict={}, global_dict={})
    except Exception as error:  # of the parser, of Python's, of pandas'
        raise UserError(f"{option} {expression!r}: not an expression over the columns ({error})") from None
    if not isinstance(found, pd.DataFrame) or found.empty:
        raise UserError(f"{option} {expression!r}: no row meets it")
    return found


def points(frame: pd.DataFrame, columns: Columns, path: Path, factor: float) -> Points:
    """Raises UserError for a column that is missing and for values that no logarithm can be taken of."""
    number = _positive(frame, columns.parameters, "--params-column", path)
    loss = _positive(frame, columns.loss, "--loss-column", path)
    flops = None
    if columns.flops and (columns.tokens is None or columns.flops in frame):
        flops = _positive(frame, columns.flops, "--flops-column", path)
    if columns.tokens is None:
        assert flops is not None
        tokens = flops / (factor * number)
    else:
        tokens = _positive(frame, columns.tokens, "--tokens-column", path)
    if flops is None:
        flops = factor * number * tokens
    names = frame[columns.run].astype(str) if columns.run in frame else frame.index.astype(str)
    optional = (_optional(frame, name) for name in (columns.d_s, columns.unique))
    return Points(number, tokens, flops, loss, *optional, tuple(names))


def groups(frame: pd.DataFrame, by: Sequence[str], path: Path) -> list[tuple[dict[str, object], pd.DataFrame]]:
    """A table for each combination of the values of `by` (a missing value is one), with what it is."""
    for name in by:
        _column(frame, name, path)
    if not by:
        return [({}, frame)]
    found = []
    for values, part in frame.groupby(list(by), dropna=False, sort=True):
        found.append((dict(zip(by, map(_plain, values), strict=True)), part))
    return found


def read_curves(path: Path, frame: pd.DataFrame, columns: Columns, factor: float) -> dict[str, Array]:
    """FLOPs and loss along training, [steps, 2], of each run of the table.

    `path`: a folder with a run folder for each run (its metrics.jsonl is read; FLOPs rise with tokens to the run's
    total), or a long table with columns run, loss and flops or tokens.
    """
    if columns.run not in frame:
        raise UserError(f"--curves needs a column {columns.run!r} in the table of runs: name it with --run-column")
    whole = points(frame, columns, path, factor)
    if path.is_dir():
        found = {}
        for i, name in enumerate(whole.run):
            records = [r for r in read_metrics(path / name).get("train", []) if r.get("loss") is not None]
            steps = np.array([[r["tokens"], r["loss"]] for r in records], np.float64).reshape(-1, 2)
            steps[:, 0] *= whole.flops[i] / whole.tokens[i]
            found[name] = steps
    else:
        long = read_table(path)
        _column(long, columns.run, path)
        loss = _positive(long, columns.loss, "--loss-column", path)
        known = {name: i for i, name in enumerate(whole.run)}
        rows = np.array([known.get(str(name), -1) for name in long[columns.run]])
        if columns.flops and columns.flops in long:
            flops = _positive(long, columns.flops, "--flops-column", path)
        else:
            tokens = _positive(long, columns.tokens or "tokens", "--tokens-column", path)
            flops = tokens * (whole.flops / whole.tokens)[rows]
        found = {name: np.stack([flops[rows == i], loss[rows == i]], 1) for name, i in known.items()}
    if not any(len(curve) for curve in found.values()):
        raise UserError(f"{path}: no curve of any run of the table")
    return {name: curve[np.argsort(curve[:, 0], kind="stable")] for name, curve in found.items() if len(curve)}


def _column(frame: pd.DataFrame, name: str, path: Path) -> pd.Series:
    if name not in frame:
        raise UserError(f"{path}: no column {name!r}; it has {', '.join(map(str, frame.columns[:20]))}")
    return frame[name]


def _positive(frame: pd.DataFrame, name: str, option: str, path: Path) -> Array:
    if name not in frame:
        has = ", ".join(map(str, frame.columns[:20]))
        raise UserError(f"{path}: no column {name!r}; name it with {option}. It has {has}")
    values = pd.to_numeric(frame[name], errors="coerce").to_numpy(np.float64)
    bad = ~(np.isfinite(values) & (values > 0))
    if bad.any():
        first = frame[name].iloc[int(np.argmax(bad))]
        raise UserError(
            f"{path}: {name}: {int(bad.sum())} of {len(values)} rows are not positive numbers (the first: {first}): "
            "leave those runs out with --where or --fit"
        )
    return values


def _optional(frame: pd.DataFrame, name: str) -> Array:
    if name not in frame:
        return np.full(len(frame), np.nan)
    values = pd.to_numeric(frame[name], errors="coerce").to_numpy(np.float64)
    return np.where(values > 0, values, np.nan)


def _plain(value: object) -> object:
    """What JSON can hold."""
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and math.isnan(value) else value
