"""Reading metrics.jsonl, and cutting it back to a step. Light to import (no torch), for plots and reports.

Writing it is metrics.py's.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sisa_dist.config import UserError


def read_metrics(run_folder: str | Path) -> dict[str, list[dict[str, Any]]]:
    """Records by kind ("train", "evaluation", "layers"), sorted by step.

    A step that stands twice was done again after a resume: the last one counts. A last line cut by a kill is ignored;
    a broken line elsewhere is a UserError naming file and line, as is a file that cannot be read.
    """
    path = Path(run_folder) / "metrics.jsonl"
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): name the folder of a trained run") from None
    found: dict[str, dict[int, dict[str, Any]]] = {}
    last = len(lines) - 1  # what follows the final newline: empty, or a line cut short
    for number, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            found.setdefault(record["kind"], {})[int(record["step"])] = record
        except (ValueError, KeyError, TypeError):  # UnicodeDecodeError is a ValueError
            if number == last:
                continue
            raise UserError(f"{path}:{number + 1}: not a metrics record: remove the line") from None
    return {kind: [records[step] for step in sorted(records)] for kind, records in found.items()}


def keep_until(path: Path, step: int) -> list[dict[str, Any]]:
    """Drop the records after `step` and a last line cut by a kill, if there are any; a kill in here changes nothing.

    Returns the records dropped. A broken line elsewhere stays, for read_metrics to name.
    """
    if not path.exists():
        return []
    lines = path.read_bytes().splitlines(keepends=True)
    dropped = [line.endswith(b"\n") and _step_of(line) > step for line in lines]
    kept = [line for line, drop in zip(lines, dropped, strict=True) if line.endswith(b"\n") and not drop]
    if kept != lines:
        beside = path.with_name(path.name + ".tmp")
        beside.write_bytes(b"".join(kept))
        os.replace(beside, path)
    return [json.loads(line) for line, drop in zip(lines, dropped, strict=True) if drop]


def _step_of(line: bytes) -> int:
    """-1 where the line holds none."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return -1


def names_apart(run_folders: Sequence[Path]) -> list[str]:
    """The shortest endings of the paths that tell them apart. Raises UserError where one stands twice."""
    parts = [folder.resolve().parts for folder in run_folders]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(path[-length:]) for path in parts]
        if len(set(names)) == len(names):
            return names
    raise UserError("the same run folder is named twice: name it once")


def smooth(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Mean over up to a twenty-fifth of the run, half of it to each side, so that the curve does not lag.

    Narrower at the start, where the loss falls steeply. Values that are not finite (a step that diverged) are left out.
    """
    place = np.arange(len(values))
    half = np.minimum(place // 4, len(values) // 50)
    start, stop = place - half, np.minimum(place + half + 1, len(values))
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    found = counts[stop] - counts[start]
    return np.where(found > 0, (sums[stop] - sums[start]) / np.maximum(found, 1), np.nan)
