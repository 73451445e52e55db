"""The sections of a sweep: its losses against FLOPs, its table, and what was fitted to it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from sisa_dist.report.chart import Line, line_chart
from sisa_dist.report.parts import charts, folded, legend, section, style_of, table
from sisa_dist.report.sweep import LAW, OPTIMUM, Sweep, number

_FLOPS = "training FLOPs"
_SHORT = 16  # rows: a longer table is folded


def results(sweep: Sweep, left_out: Sequence[str]) -> str:
    groups = list(dict.fromkeys(sweep.groups.values()))
    styles = {group: style_of(i) for i, group in enumerate(groups)}
    curves = [
        Line(run, [x for x, _ in points], [y for _, y in points], styles[sweep.groups[run]], dots=False)
        for run, points in sorted(sweep.curves.items())
        if run in sweep.groups
    ]
    ends = []
    for group in groups:
        found = sorted(end for run, end in sweep.ends.items() if sweep.groups[run] == group)
        if found:
            ends.append(Line(group, [x for x, _ in found], [y for _, y in found], styles[group], dots=True))
    common = {"x_label": _FLOPS, "log_x": True, "log_y": None, "x_unit": number}
    while_training = line_chart("Validation loss while training", curves, **common)  # type: ignore[arg-type]
    at_the_end = line_chart("Held-out loss of finished runs", ends, **common)  # type: ignore[arg-type]
    key = legend([(group, styles[group]) for group in groups]) if while_training or at_the_end else ""
    rows = [[_short(value) for value in row] for row in sweep.rows]
    shown = table(sweep.header, rows)
    if len(rows) > _SHORT:
        shown = folded(f"Table of {len(rows)} runs", shown)
    status = sweep.header.index("status") if "status" in sweep.header else None
    said = f"{len(rows)} runs"
    if status is not None:
        states = [row[status] for row in sweep.rows]
        said += ": " + ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    note = f'<p class="soft">{escape(said)}. Colours of this section are of mixers, those of the others of runs.</p>'
    note += "".join(f'<p class="soft">{escape(said)}</p>' for said in left_out)
    return section("sweep", "Sweep", note, key, charts(while_training, at_the_end, large=True), shown)


def fits(sweep: Sweep) -> str:
    found = []
    if sweep.laws:
        found.append('<p class="soft">In brackets: intervals of 95 %.</p>')
        found.append(table(LAW, [law.cells for law in sweep.laws]))
    optima = [row for law in sweep.laws for row in law.optima]
    if optima:
        found += ["<h3>Compute-optimal models</h3>", table(OPTIMUM, optima)]
    for law in sweep.d_s:
        found.append(f"<h3>{escape(law.name)}</h3><p>{escape(law.verdict)}</p>")
        found.append(table(["law", "held-out error of log loss"], law.errors))
        found.append(table(["parameters", "best d_s", "among those tried"], law.optima) if law.optima else "")
    skipped = "".join(f'<p class="soft">{escape(reason)}</p>' for reason in sweep.skipped)
    return section("fits", "Fits", *found, folded("What was not fitted, and why", skipped))


def _short(value: str) -> str:
    """Numbers with many digits as numbers of few."""
    try:
        found = float(value)
    except ValueError:
        return value
    return number(found) if math.isfinite(found) and len(value) > 8 else value
