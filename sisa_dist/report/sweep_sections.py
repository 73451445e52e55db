"""The sections of a sweep: its losses against FLOPs, its table, and what was fitted to it."""

from __future__ import annotations

import math
from html import escape

from sisa_dist.report.chart import Line, line_chart
from sisa_dist.report.parts import charts, folded, legend, section, style_of, table
from sisa_dist.report.sweep import Law, Sweep, number

_FLOPS = "training FLOPs"
_SHORT = 16  # rows: a longer table is folded


def results(sweep: Sweep) -> str:
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
    while_training = line_chart("Validation loss while training", curves, x_label=_FLOPS, log_x=True)
    at_the_end = line_chart("Held-out loss of finished runs", ends, x_label=_FLOPS, log_x=True)
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
    return section("sweep", "Sweep", note, key, charts(while_training, at_the_end), shown)


def fits(sweep: Sweep) -> str:
    found = []
    for law in sweep.laws:
        found.append(_law(law, ["FLOPs", "parameters N*", "tokens D*", "loss"]))
    for law in sweep.d_s:
        found.append(_law(law, ["parameters", "best d_s", "among those tried"]))
    for reason in sweep.skipped:
        found.append(f'<p class="soft">{escape(reason)}</p>')
    note = '<p class="soft">In brackets: intervals of 95 %.</p>' if sweep.laws or sweep.d_s else ""
    return section("fits", "Fits", note, *found)


def _law(law: Law, header: list[str]) -> str:
    facts = table(["", ""], [list(fact) for fact in law.facts]) if law.facts else ""
    optima = table(header, law.optima) if law.optima else ""
    return f"<h3>{escape(law.title)}</h3><p>{escape(law.note)}</p>{facts}{optima}"


def _short(value: str) -> str:
    """Numbers with many digits as numbers of few."""
    try:
        found = float(value)
    except ValueError:
        return value
    return number(found) if math.isfinite(found) and len(value) > 8 else value
