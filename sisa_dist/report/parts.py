"""Pieces of HTML that every section is made of. All text goes through `escape` here or in chart.py."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from sisa_dist.report.chart import Line
from sisa_dist.report.read import Run
from sisa_dist.report.style import DASHES, LIGHT

_LAYERS = ((86, 104, 222), (26, 158, 140), (224, 150, 32))
_OPEN = 12  # runs: a longer legend is folded


def section(name: str, title: str, *content: str) -> str:
    """Nothing where there is no content; `name` is its anchor."""
    inner = "".join(content)
    return f'<section id="{name}"><h2>{escape(title)}</h2>{inner}</section>' if inner else ""


def charts(*found: str, large: bool = False) -> str:
    """Side by side as many as fit: three on a wide screen, two that are `large`."""
    inner = "".join(found)
    return f'<div class="charts{" large" if large else ""}">{inner}</div>' if inner else ""


def folded(title: str, content: str, *, is_open: bool = False) -> str:
    opened = " open" if is_open else ""
    return f"<details{opened}><summary>{escape(title)}</summary>{content}</details>" if content else ""


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns of numbers stand to the right; long text breaks."""
    numeric = [all(_is_number(row[i]) for row in rows) for i in range(len(header))]

    def cell(tag: str, i: int, value: str) -> str:
        kind = ' class="number"' if numeric[i] else ' class="long"' if len(value) > 30 else ""
        return f"<{tag}{kind}>{escape(value)}</{tag}>"

    head = "".join(cell("th", i, value) for i, value in enumerate(header))
    body = "".join(f"<tr>{''.join(cell('td', i, value) for i, value in enumerate(row))}</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def style_of(number: int) -> str:
    """One colour a run on the whole page; with more runs than colours they differ by their dashes."""
    dash = DASHES[number // len(LIGHT) % len(DASHES)]
    return f"--c:var(--c{number % len(LIGHT)})" + ("" if dash == "none" else f";--d:{dash}")


def style_of_layer(layer: int, layers: int) -> str:
    """From blue by green to amber, all seen on a light and on a dark page."""
    place = 2 * layer / max(1, layers - 1)
    first, second = _LAYERS[int(place) :][:2] if place < 2 else (_LAYERS[2], _LAYERS[2])
    share = place - int(place)
    mixed = (round(a + (b - a) * share) for a, b in zip(first, second, strict=True))
    return "--c:#" + "".join(f"{channel:02x}" for channel in mixed)


def legend(entries: Sequence[tuple[str, str]]) -> str:
    """`entries`: name and style."""
    items = "".join(
        f'<li><svg viewBox="0 0 28 10" aria-hidden="true"><g class="line" style="{escape(style)}">'
        f'<polyline points="0,5 28,5" style="stroke-width:3"/></g></svg>{escape(name)}</li>'
        for name, style in entries
    )
    return f'<ul class="legend">{items}</ul>'


def legend_of_runs(runs: Sequence[Run]) -> str:
    found = legend([(run.name, style_of(number)) for number, run in enumerate(runs)])
    return found if len(runs) <= _OPEN else folded(f"{len(runs)} runs: which line is which", found)


def budget(runs: Sequence[Run], *, most: int = 600) -> int:
    """Points of one line, so that fifty runs still make a small page."""
    return min(most, max(30, 8000 // len(runs)))


def lines_of(runs: Sequence[Run], pick: object) -> list[Line]:
    """A line a run, in its colour; `pick(run)` is a Curve or None."""
    found = []
    for number, run in enumerate(runs):
        curve = pick(run)  # type: ignore[operator]
        if curve is not None:
            found.append(Line(run.name, curve.x, curve.y, style_of(number)))
    return found


def _is_number(value: str) -> bool:
    if not value:
        return True
    try:
        float(value.rstrip("kMGT%"))
    except ValueError:
        return False
    return True
