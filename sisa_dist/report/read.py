"""What a run's folder holds, as plain numbers: the one place that knows the keys of its files.

A run may be going on. A file that does not hold what is written there is one UserError that names it, and what is drawn
from these classes cannot meet such a file any more.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from sisa_dist.config import Run as ConfiguredRun
from sisa_dist.config import UserError, load_run
from sisa_dist.training.metrics_file import read_metrics

_Picked = TypeVar("_Picked")
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

    step: int  # that it is of
    source: str  # of a mixture
    edges: list[float]
    losses: list[float]


@dataclass(frozen=True)
class Grid:
    """Scores, 0 to 1, nan where there is none: a row for each depth, a column for each length."""

    step: int  # that it is of
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
    results: dict[str, float]  # of evaluation.json or a sweep's final.json, by what it is
    results_step: int  # that they are of; the last where there are none
    config: dict[str, Any] = field(default_factory=dict)  # by dotted key; nothing where there is no config.yaml


@contextmanager
def reading(path: Path, advice: str = "remove it, or write it again") -> Iterator[None]:
    """What a malformed file raises, as one line that names it."""
    try:
        yield
    except UserError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, ArithmeticError) as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(f"{path}: does not hold what belongs there ({said}): {advice}") from None


def read_run(folder: Path, name: str) -> Run:
    """Raises UserError where there is no training step yet, or a file is malformed."""
    path = folder / "metrics.jsonl"
    with reading(path, "see which of its lines is not as the others, and mend that one"):
        found = read_metrics(folder)
        train = found.get("train")
        if not train:
            raise UserError(f"{folder}: metrics.jsonl holds no training step yet: train it first")

        def each(kind: str, pick: Callable[[dict[str, Any]], _Picked]) -> list[_Picked]:
            """Of every record of the kind."""
            picked = []
            for record in found.get(kind, []):
                with reading(path, f"mend its {kind} record of step {record['step']}, or take that line out"):
                    picked.append(pick(record))
            return picked

        steps = [int(record["step"]) for record in train]
        keys = ("tokens", "loss", "lr", "grad_norm", "tokens_per_second", "mfu", "memory_bytes")
        columns = list(zip(*each("train", lambda record: [_number(record[key]) for key in keys]), strict=True))
        tokens = list(columns[0])
        curves = {key: Curve(tokens, list(column)) for key, column in zip(keys[1:], columns[1:], strict=True)}

        def place(kind: str) -> list[float]:
            """Such records know only their step."""
            places = [int(record["step"]) for record in found.get(kind, [])]
            return [float(x) for x in np.interp(places, steps, tokens)]

        validation = Curve(place("evaluation"), each("evaluation", lambda record: _number(record["validation_loss"])))
        by_layer: dict[str, ByLayer] = {}
        for kind, names in (("layers", _LAYERS), ("scores", _SCORES)):
            for key in names:
                by_layer |= _by_layer(key, place(kind), each(kind, lambda record, key=key: _numbers(record[key])))  # type: ignore[misc]
        if learned := each("d_s", lambda record: _numbers(record["d_s"])):
            by_layer |= _learned(found["d_s"][0]["layers"], place("d_s"), learned)
        if loads := each("experts", _loads):
            by_layer |= _experts(found["experts"][0]["layers"], place("experts"), loads)
        positions = (each("positions", _positions) or [[]])[-1]
        grids = (each("retrieval", _grids) or [[]])[-1]
    results: dict[str, float] = {}
    evaluated = _evaluated(folder)
    if evaluated is not None:
        path, at, tree = evaluated
        with reading(path):
            results = _results(tree)
            if "positions" in tree and all(at >= table.step for table in positions):
                positions = _positions(tree["positions"] | {"step": at})
            if "retrieval" in tree and all(at >= grid.step for grid in grids):
                grids = _grids(tree["retrieval"] | {"step": at})
            grids = grids + _niah(tree)
    config: dict[str, Any] = {}
    if (folder / "config.yaml").is_file():
        configured = load_run(folder / "config.yaml")
        config = _dotted(configured)
        by_layer = _configured_d_s(configured, tokens) | by_layer
    results_step = evaluated[1] if evaluated is not None else steps[-1]
    return Run(name, folder, steps, curves, validation, by_layer, positions, grids, results, results_step, config)


def _evaluated(folder: Path) -> tuple[Path, int, dict[str, Any]] | None:
    """The newest evaluation that was asked for: path, step, what it holds. The second file is a sweep's."""
    found = []
    for path in (folder / "evaluation.json", folder / "final.json"):
        if path.is_file():
            with reading(path):
                tree = read_json(path)
                found.append((path, int(tree["step"]), tree))
    return max(found, key=lambda each: each[1], default=None)


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


def _numbers(values: Sequence[Any]) -> list[float]:
    return [_number(value) for value in values]


def _last(values: Sequence[float]) -> float:
    return next((value for value in reversed(values) if not math.isnan(value)), math.nan)


def _by_layer(key: str, x: list[float], rows: Sequence[Sequence[float]]) -> dict[str, ByLayer]:
    """`rows`: a record's values, one a layer. A layer of another kind has none in any."""
    columns = [list(column) for column in zip(*rows, strict=True)]
    have = [layer for layer, column in enumerate(columns) if not all(map(math.isnan, column))]
    return {key: ByLayer(have, [Curve(x, columns[layer]) for layer in have])} if have else {}


def _learned(layers: Sequence[Any], x: list[float], rows: Sequence[Sequence[float]]) -> dict[str, ByLayer]:
    columns = zip(layers, zip(*rows, strict=True), strict=True)
    found = {int(layer): Curve(x, list(column)) for layer, column in columns}
    return {"d_s": ByLayer(list(found), list(found.values()))} if found else {}


def _loads(record: Mapping[str, Any]) -> list[tuple[float, float]]:
    """The busiest and the idlest expert of each layer, as multiples of a fair share."""
    found = []
    for counts in record["counts"]:
        each = _numbers(counts)
        fair = sum(each) / len(each)
        found.append((max(each) / fair, min(each) / fair) if fair else (math.nan, math.nan))
    return found


def _experts(
    layers: Sequence[Any], x: list[float], rows: Sequence[Sequence[tuple[float, float]]]
) -> dict[str, ByLayer]:
    columns = list(zip(layers, zip(*rows, strict=True), strict=True))
    names = [int(layer) for layer, _ in columns]
    found = {
        key: ByLayer(names, [Curve(x, [pair[which] for pair in column]) for _, column in columns])
        for which, key in enumerate(("load_max", "load_min"))
    }
    return found if names else {}


def _configured_d_s(run: ConfiguredRun, tokens: list[float]) -> dict[str, ByLayer]:
    d_s = run.stages[-1].config.model.layer_d_s
    layers = [layer for layer, channels in enumerate(d_s) if channels]
    ends = [tokens[0], tokens[-1]]
    return {"d_s": ByLayer(layers, [Curve(ends, [float(d_s[layer])] * 2) for layer in layers])} if layers else {}


def _positions(found: Mapping[str, Any]) -> list[Positions]:
    tables = []
    for source, table in found.get("sources", {"": found}).items():
        edges, losses = _numbers([*table["from"], table["seq_len"]]), _numbers(table["loss_by_position"])
        if len(edges) != len(losses) + 1:
            raise ValueError(f"{len(losses)} losses of {len(edges) - 1} stretches of the window")
        tables.append(Positions(int(found["step"]), str(source), edges, losses))
    return tables


def _grids(found: Mapping[str, Any]) -> list[Grid]:
    lengths, depths = [str(length) for length in found["lengths"]], [f"{_number(depth):g}" for depth in found["depths"]]
    grids = []
    for name, task in found["tasks"].items():
        title = f"{name}: effective length {task['effective_length'] or 'none'}"
        by_depth = "score" in task
        rows = [list(row) for row in zip(*task["score"], strict=True)] if by_depth else [task["score_by_length"]]
        if len(rows) != (len(depths) if by_depth else 1) or any(len(row) != len(lengths) for row in rows):
            raise ValueError(f"{name}: scores are not of {len(lengths)} lengths and {len(depths)} depths")
        shown = depths if by_depth else ["all"]
        grids.append(Grid(int(found["step"]), title, lengths, shown, [_numbers(row) for row in rows]))
    return grids


def _niah(evaluated: Mapping[str, Any]) -> list[Grid]:
    if "niah" not in evaluated:
        return []
    found = evaluated["niah"]
    rows = [[_number(value)] for value in found["accuracy_by_depth"]]
    depths = [f"{(row + 0.5) / len(rows):g}" for row in range(len(rows))]
    return [Grid(int(evaluated["step"]), "needle of the SISA paper", [str(found["context"])], depths, rows)]


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
