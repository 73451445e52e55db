"""The page of tools/extend_context.py: one picture, one JSON file and a table of what came out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sisa_dist.config import replace_file

WHEN = {"before": "read as it stands", "after": "trained on"}


def write_page(found: Mapping[str, Mapping[str, Mapping[str, Any]]], out: Path, *, trained: int) -> str:
    """`found[system][method][before or after]`: results of `sisa eval`. Returns the table."""
    replace_file(out / "extension.json", json.dumps(found, indent=1))
    _draw(found, out / "extension.png", trained=trained)
    return "\n".join(_table(found, trained=trained))


def _text(results: Mapping[str, Any]) -> Mapping[str, Any]:
    return results["positions"]["sources"]["text"]


def _table(found: Mapping[str, Mapping[str, Mapping[str, Any]]], *, trained: int) -> list[str]:
    """Loss on text up to the trained length and in the last eighth; retrieval at each length longer than trained."""
    lines = [
        "| system | method | | loss, trained positions | loss, last eighth | retrieval by length | effective |",
        "|---|---|---|---|---|---|---|",
    ]
    for system, methods in found.items():
        for method, by_time in methods.items():
            for when, results in by_time.items():
                text, again = _text(results), results["retrieval"]
                share = len(text["from"]) // 8
                near = [place for place, start in enumerate(text["from"]) if start < trained]
                ends = range(len(text["from"]) - share, len(text["from"]))
                by_length = zip(again["lengths"], again["score_by_length"], strict=True)
                lines.append(
                    f"| {system} | {method} | {when} | {_mean(text, near):.3f} | {_mean(text, ends):.3f} | "
                    + ", ".join(f"{length}: {100 * score:.0f}" for length, score in by_length)
                    + f" | {again['effective_length'] or 'none'} |"
                )
    return lines


def _mean(table: Mapping[str, Any], places: Sequence[int]) -> float:
    """Of buckets, by their tokens."""
    tokens = [table["tokens_by_position"][place] for place in places]
    sums = [table["loss_by_position"][place] * n for place, n in zip(places, tokens, strict=True) if n]
    return sum(sums) / sum(tokens)


def _draw(found: Mapping[str, Mapping[str, Mapping[str, Any]]], path: Path, *, trained: int) -> None:
    """A row a system; loss by position and retrieval by length, each before and after."""
    figure = Figure(figsize=(16.0, 3.6 * len(found)), layout="constrained")
    rows = figure.subplots(len(found), 4, squeeze=False)
    for row, (system, methods) in zip(rows, found.items(), strict=True):
        for column, when in enumerate(WHEN):
            losses: Axes = row[2 * column]
            scores: Axes = row[2 * column + 1]
            for number, (method, by_time) in enumerate(methods.items()):
                text, again = _text(by_time[when]), by_time[when]["retrieval"]
                style = {"color": f"C{number}", "label": method, "linewidth": 1.4}
                middles = [start + text["seq_len"] / len(text["from"]) / 2 for start in text["from"]]
                losses.plot(middles, text["loss_by_position"], **style)
                scores.plot(again["lengths"], [100 * score for score in again["score_by_length"]], **style, marker=".")
            for axis in (losses, scores):
                axis.axvline(trained, color="#888888", linestyle="--", linewidth=1)
            losses.set(title=f"{system}, {WHEN[when]}", xlabel="position", ylabel="loss (nats per token)")
            scores.set(title=f"{system}, {WHEN[when]}", xlabel="tokens", ylabel="retrieval (%)", ylim=(-3, 103))
            scores.set_xscale("log", base=2)
        top = max(axis.get_ylim()[1] for axis in row[::2])
        low = min(axis.get_ylim()[0] for axis in row[::2])
        for axis in row[::2]:
            axis.set_ylim(low, min(top, low + 4))
    rows[0][0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)
