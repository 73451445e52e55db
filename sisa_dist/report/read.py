"""What a run's folder holds, as plain numbers: the one place that knows the keys of its files.

A run may be going on. A file that does not hold what is written there is one UserError that names it, and what is drawn
from these classes cannot meet such a file any more.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sisa_dist.config import Run as ConfiguredRun
from sisa_dist.config import UserError, load_run
from sisa_dist.training.metrics_file import read_metrics

Records = list[dict[str, Any]]
_LAYERS = ("lambda", "half_life")  # of records of kind layers
_SCORES = ("content_max", "importance_max", "moved")  # of kind scores


@dataclass(frozen=True)
class Curve:
    """y over training tokens; nan where a value is not known."""

    x: list[float]
    y: list[float]


@dataclass(frozen=True)
class ByLayer:
    """A curve for each layer that has the value."""

    layers: list[int]
    curves: list[Curve]

    @property
    def last(self) -> Curve:
        """The newest value that is known of each, over layers."""
        return Curve([float(layer) for layer in self.layers], [_last(curve.y) for curve in self.curves])


@dataclass(frozen=True)
class Positions:
    """Mean loss in stretches of the window: edges [n + 1], losses [n]."""

    source: str  # of a mixture
    edges: list[float]
    losses: list[float]


@dataclass(frozen=True)
class Grid:
    """Scores, 0 to 1, nan where there is none: a row for each depth, a column for each length."""

    title: str
    lengths: list[str]
    depths: list[str]
    rows: list[list[float]]


@dataclass(frozen=True)
class Run:
    name: str
    folder: Path
    steps: list[int]
    train: dict[str, Curve]  # loss, lr, grad_norm, tokens_per_second, mfu, memory_bytes
    validation: Curve
    by_layer: dict[str, ByLayer]  # of _LAYERS, _SCORES, d_s and load, where the run has them
    positions: list[Positions]
    grids: list[Grid]
    results: dict[str, float]  # of evaluation.json, by what it is
    config: dict[str, Any] = field(default_factory=dict)  # by dotted key; nothing where there is no config.yaml


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """What a malformed file raises, as one line that names it."""
    try:
        yield
    except UserError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, OverflowError) as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(f"{path}: does not hold what belongs there ({said}): remove it, or write it again") from None


def read_run(folder: Path, name: str) -> Run:
    """Raises UserError where there is no training step yet, or a file is malformed."""
    with reading(folder / "metrics.jsonl"):
        found = read_metrics(folder)
        train = found.get("train")
        if not train:
            raise UserError(f"{folder}: metrics.jsonl holds no training step yet: train it first")
        steps = [int(record["step"]) for record in train]
        tokens = [_number(record["tokens"]) for record in train]
        keys = ("loss", "lr", "grad_norm", "tokens_per_second", "mfu", "memory_bytes")
        curves = {key: Curve(tokens, [_number(record[key]) for record in train]) for key in keys}

        def place(records: Records) -> list[float]:
            """Such records know only their step."""
            return [float(x) for x in np.interp([int(record["step"]) for record in records], steps, tokens)]

        checked = found.get("evaluation", [])
        validation = Curve(place(checked), [_number(record["validation_loss"]) for record in checked])
        by_layer: dict[str, ByLayer] = {}
        for kind, names in (("layers", _LAYERS), ("scores", _SCORES)):
            records = found.get(kind, [])
            for key in names if records else ():
                by_layer |= _by_layer(key, place(records), [record[key] for record in records])
        by_layer |= _learned(found.get("d_s", []), place) | _experts(found.get("experts", []), place)
        positions = _positions(found["positions"][-1]) if found.get("positions") else []
        grids = _grids(found["retrieval"][-1]) if found.get("retrieval") else []
    results: dict[str, float] = {}
    for path in (folder / "evaluation.json", folder / "final.json"):  # the second is a sweep's
        if path.is_file():
            with reading(path):
                evaluated = read_json(path)
                results = _results(evaluated)
                if "positions" in evaluated:
                    positions = _positions(evaluated["positions"])
                grids = (_grids(evaluated["retrieval"]) if "retrieval" in evaluated else grids) + _niah(evaluated)
            break
    config: dict[str, Any] = {}
    if (folder / "config.yaml").is_file():
        configured = load_run(folder / "config.yaml")
        config = _dotted(configured)
        by_layer = _configured_d_s(configured, tokens) | by_layer
    return Run(name, folder, steps, curves, validation, by_layer, positions, grids, results, config)


def read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): mend or remove it") from None
    if not isinstance(found, dict):
        raise TypeError(f"a JSON object is wanted, not {type(found).__name__}")
    return found


def _number(value: Any) -> float:
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{value!r} is no number")
    return float(value)


def _last(values: Sequence[float]) -> float:
    return next((value for value in reversed(values) if not math.isnan(value)), math.nan)


def _by_layer(key: str, x: list[float], rows: Sequence[Sequence[Any]]) -> dict[str, ByLayer]:
    """`rows`: a record's values, one a layer. A layer of another kind has None everywhere."""
    columns = [[_number(value) for value in column] for column in zip(*rows, strict=True)]
    have = [layer for layer, column in enumerate(columns) if not all(map(math.isnan, column))]
    return {key: ByLayer(have, [Curve(x, columns[layer]) for layer in have])} if have else {}


def _learned(records: Records, place: Any) -> dict[str, ByLayer]:
    if not records:
        return {}
    x, layers = place(records), [int(layer) for layer in records[0]["layers"]]
    columns = zip(*(record["d_s"] for record in records), strict=True)
    return {
        "d_s": ByLayer(
            layers, [Curve(x, [_number(v) for v in column]) for _, column in zip(layers, columns, strict=True)]
        )
    }


def _experts(records: Records, place: Any) -> dict[str, ByLayer]:
    """The busiest and the idlest expert of each layer, as multiples of a fair share."""
    if not records:
        return {}
    x, layers, found = place(records), [int(layer) for layer in records[0]["layers"]], {}
    for key, pick in (("load_max", max), ("load_min", min)):
        curves = []
        for row in range(len(layers)):
            counts = [[_number(n) for n in record["counts"][row]] for record in records]
            curves.append(Curve(x, [pick(each) * len(each) / sum(each) if sum(each) else math.nan for each in counts]))
        found[key] = ByLayer(layers, curves)
    return found


def _configured_d_s(run: ConfiguredRun, tokens: list[float]) -> dict[str, ByLayer]:
    d_s = run.stages[-1].config.model.layer_d_s
    layers = [layer for layer, channels in enumerate(d_s) if channels]
    ends = [tokens[0], tokens[-1]]
    return {"d_s": ByLayer(layers, [Curve(ends, [float(d_s[layer])] * 2) for layer in layers])} if layers else {}


def _positions(found: Mapping[str, Any]) -> list[Positions]:
    tables = found.get("sources", {"": found})
    return [
        Positions(
            str(source),
            [_number(edge) for edge in [*table["from"], table["seq_len"]]],
            [_number(loss) for loss in table["loss_by_position"]],
        )
        for source, table in tables.items()
    ]


def _grids(found: Mapping[str, Any]) -> list[Grid]:
    lengths, depths = [str(length) for length in found["lengths"]], [f"{_number(depth):g}" for depth in found["depths"]]
    grids = []
    for name, task in found["tasks"].items():
        title = f"{name}: effective length {task['effective_length'] or 'none'}"
        by_depth = "score" in task
        rows = [list(row) for row in zip(*task["score"], strict=True)] if by_depth else [task["score_by_length"]]
        if len(rows) != (len(depths) if by_depth else 1) or any(len(row) != len(lengths) for row in rows):
            raise ValueError(f"{name}: scores are not of {len(lengths)} lengths and {len(depths)} depths")
        numbers = [[_number(score) for score in row] for row in rows]
        grids.append(Grid(title, lengths, depths if by_depth else ["all"], numbers))
    return grids


def _niah(evaluated: Mapping[str, Any]) -> list[Grid]:
    if "niah" not in evaluated:
        return []
    found = evaluated["niah"]
    rows = [[_number(value)] for value in found["accuracy_by_depth"]]
    depths = [f"{(row + 0.5) / len(rows):g}" for row in range(len(rows))]
    return [Grid("needle of the SISA paper", [str(found["context"])], depths, rows)]


def _results(evaluated: Mapping[str, Any]) -> dict[str, float]:
    found = {}
    wanted = {
        "perplexity": {"loss": "held-out loss", "perplexity": "held-out perplexity"},
        "lambada": {"accuracy": "LAMBADA accuracy", "target_perplexity": "LAMBADA target perplexity"},
        "niah": {"accuracy": "needle accuracy"},
        "retrieval": {"effective_length": "effective length"},
    }
    for task, keys in wanted.items():
        for key, said in keys.items():
            if task in evaluated and key in evaluated[task]:
                found[said] = _number(evaluated[task][key])
    return found


def _dotted(run: ConfiguredRun) -> dict[str, Any]:
    found: dict[str, Any] = {}

    def walk(tree: Mapping[str, Any], prefix: str) -> None:
        for key, value in tree.items():
            if isinstance(value, dict) and value:
                walk(value, f"{prefix}{key}.")
            else:
                found[prefix + key] = value

    for stage in run.stages:
        walk(stage.config.model_dump(), f"stages.{stage.name}." if run.staged else "")
    return found
