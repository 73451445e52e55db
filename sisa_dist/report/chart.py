"""Line charts and heat maps as SVG whose colours are the page's, so that they follow its theme."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

_WIDTH, _HEIGHT = 420, 250
_RIGHT, _TOP, _BOTTOM = 12, 10, 38
_LETTER = 7.2  # width of a digit of the axes, at most
_MARKED = 40  # points: no more are drawn as dots too
_LOG_SPAN = 4.0  # a scale that is to choose is logarithmic over more than this
_MOST = 1e280  # what is farther from 0 stands there, so that no difference or margin of a scale overflows
_VIRIDIS = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))


@dataclass(frozen=True)
class Line:
    """nan in y is a gap. style: what a browser makes of it, such as `--c:var(--c3)`, the line's colour."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    style: str
    faint: bool = False
    dots: bool | None = None  # None: where there are few points; True: dots without a line
    steps: bool = False  # x has one more than y: their edges


def line_chart(
    title: str,
    lines: Sequence[Line],
    *,
    x_label: str,
    most_points: int = 600,
    from_zero: bool = False,
    log_x: bool = False,
    log_y: bool | None = False,
    whole_x: bool = False,
    x_unit: Callable[[float], str] | None = None,
) -> str:
    """A figure, or nothing where no line has a value. `log_y` None: where the values span more than a factor of 4.

    Of a line with more than `most_points` those are kept that are least and most of their stretch.
    """
    drawn = [line for line in lines if any(map(math.isfinite, line.y))]
    if not drawn:
        return ""
    xs = [x for line in drawn for x in line.x if math.isfinite(x) and (x > 0 or not log_x)]
    ys = [y for line in drawn for y in line.y if math.isfinite(y)]
    if log_y is None:
        log_y = min(ys) > 0 and max(ys) > _LOG_SPAN * min(ys)
    if not xs:
        return ""
    if from_zero:
        ys.append(0.0)
    upward = Scale(ys, (_HEIGHT - _BOTTOM, _TOP), log=log_y, margin=0.04, floor=0.0 if from_zero else None)
    marks = upward.ticks()
    said = dict(zip(marks, labels(marks), strict=True))
    left = 12 + _LETTER * max((len(label) for label in said.values()), default=0)
    across = Scale(xs, (left, _WIDTH - _RIGHT), log=log_x, margin=0.0)
    parts = [
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">',
        *_grid(across, upward, said, x_label, x_unit or tidy, whole_x),
    ]
    for line in drawn:
        parts += _line(line, across, upward, most_points)
    return f"<figure><figcaption>{escape(title)}</figcaption>{''.join(parts)}</svg></figure>"


class Scale:
    """From values to places; a little wider than the values, and of one value alone too."""

    def __init__(
        self,
        values: Sequence[float],
        places: tuple[float, float],
        *,
        log: bool,
        margin: float,
        floor: float | None = None,
    ) -> None:
        self.log, self.places = log, places
        low, high = self._of(min(values)), self._of(max(values))
        if high == low:
            more = 0.15 if log else max(abs(low) * 0.1, 1e-9 if low else 1.0)
            low, high = low - more, high + more
        else:
            low, high = low - margin * (high - low), high + margin * (high - low)
        if floor is not None and not log:
            low = floor
        self.low, self.high = low, high

    def _of(self, value: float) -> float:
        return math.log10(min(max(value, 1 / _MOST), _MOST)) if self.log else min(max(value, -_MOST), _MOST)

    def __call__(self, value: float) -> float:
        share = (self._of(value) - self.low) / (self.high - self.low)
        return self.places[0] + share * (self.places[1] - self.places[0])

    def has(self, value: float) -> bool:
        return math.isfinite(value) and (value > 0 or not self.log)

    def ticks(self, *, most: int = 6, whole: bool = False) -> list[float]:
        low, high = self.low, self.high
        if self.log:
            decades = range(math.floor(low), math.ceil(high) + 1)
            for steps in ((1, 2, 5), (1, 3), (1,)):
                found = [m * 10.0**k for k in decades for m in steps if low <= math.log10(m * 10.0**k) <= high]
                if len(found) <= most + 1:
                    break
            found = found[:: max(1, -(-len(found) // (most + 1)))]
            if len(found) >= 4:
                return found
            low, high = 10**low, 10**high  # too short for decades: as of a plain scale
        rough = (high - low) / most
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
        if whole:
            step = max(1.0, math.ceil(step))
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        return [n * step for n in range(first, last + 1) if n or not self.log]


def _grid(
    across: Scale,
    upward: Scale,
    said: Mapping[float, str],
    x_label: str,
    x_unit: Callable[[float], str],
    whole_x: bool,
) -> list[str]:
    left, right, bottom = across.places[0], _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    parts = []
    for value, label in said.items():
        y = upward(value)
        parts.append(f'<path class="grid" d="M{left:.1f} {y:.1f}H{right}"/>')
        parts.append(f'<text x="{left - 6:.1f}" y="{y + 4:.1f}" text-anchor="end">{escape(label)}</text>')
    for value in across.ticks(whole=whole_x):
        x = across(value)
        parts.append(f'<path class="tick" d="M{x:.1f} {bottom}v4"/>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 17}" text-anchor="middle">{escape(x_unit(value))}</text>')
    parts.append(f'<path class="axis" d="M{left:.1f} {bottom}H{right}"/>')
    middle = (left + right) / 2
    parts.append(
        f'<text class="label" x="{middle:.1f}" y="{_HEIGHT - 5}" text-anchor="middle">{escape(x_label)}</text>'
    )
    return parts


def _line(line: Line, across: Scale, upward: Scale, most: int) -> list[str]:
    if line.steps:
        x = [edge for pair in zip(line.x, line.x[1:], strict=False) for edge in pair]
        y = [value for value in line.y for _ in range(2)]
    else:
        x, y = list(line.x), list(line.y)
    stretches: list[list[tuple[float, float]]] = [[]]
    for point in thin(x, y, most):
        if all(
            math.isfinite(value) and (value > 0 or not scale.log)
            for value, scale in zip(point, (across, upward), strict=True)
        ):
            stretches[-1].append((across(point[0]), upward(point[1])))
        elif stretches[-1]:
            stretches.append([])
    last = next(value for value in reversed(line.y) if math.isfinite(value))
    parts = [
        f'<g class="line{" faint" if line.faint else ""}" style="{escape(line.style)}">'
        f"<title>{escape(line.name)}: {escape(tidy(last))}</title>"
    ]
    points = [point for stretch in stretches for point in stretch]
    if line.dots is not True:
        for stretch in stretches:
            if len(stretch) > 1:
                parts.append(f'<polyline points="{" ".join(f"{px:.1f},{py:.1f}" for px, py in stretch)}"/>')
    if line.dots or len(points) == 1 or (line.dots is None and not line.steps and len(points) <= _MARKED):
        radius = 3.5 if line.dots else 2.2
        parts += [f'<circle cx="{px:.1f}" cy="{py:.1f}" r="{radius}"/>' for px, py in points]
    return [*parts, "</g>"]


def thin(x: Sequence[float], y: Sequence[float], most: int) -> list[tuple[float, float]]:
    """No more than `most` points: the least and the largest finite ones of each stretch, in their order, and both ends.
    A gap stays where a stretch has none."""
    points = list(zip(x, y, strict=True))
    if len(points) <= most:
        return points
    inner, kept = points[1:-1], [points[0]]
    stretches = max(1, (most - 2) // 2)
    for number in range(stretches):
        part = inner[number * len(inner) // stretches : (number + 1) * len(inner) // stretches]
        finite = [i for i, (_, value) in enumerate(part) if math.isfinite(value)]
        ends = {min(finite, key=lambda i: part[i][1]), max(finite, key=lambda i: part[i][1])} if finite else {0}
        kept += [part[i] for i in sorted(ends)]
    return [*kept, points[-1]]


def heat_map(title: str, columns: Sequence[str], rows: Sequence[str], values: Sequence[Sequence[float]]) -> str:
    """Scores from 0 to 1, in per cent: lengths to the right, depths downward. nan is an empty cell."""
    left, top, cell_width, cell_height = 46, 4, 46, 26
    width, height = left + cell_width * len(columns) + 4, top + cell_height * len(rows) + 40
    parts = [f'<svg viewBox="0 0 {width} {height}" style="max-width:{width * 1.3:.0f}px" role="img" ']
    parts.append(f'aria-label="{escape(title)}">')
    for r, (row, scores) in enumerate(zip(rows, values, strict=True)):
        y = top + r * cell_height
        parts.append(f'<text x="{left - 6}" y="{y + 17}" text-anchor="end">{escape(row)}</text>')
        for c, score in enumerate(scores):
            if not math.isfinite(score):
                continue
            x, ink = left + c * cell_width, "#000" if score > 0.6 else "#fff"
            parts.append(
                f"<g><title>{escape(columns[c])} tokens, depth {escape(row)}: {100 * score:.1f} %</title>"
                f'<rect x="{x}" y="{y}" width="{cell_width - 1}" height="{cell_height - 1}" fill="{viridis(score)}"/>'
                f'<text x="{x + cell_width / 2 - 0.5}" y="{y + 17}" text-anchor="middle" style="fill:{ink}">'
                f"{100 * score:.0f}</text></g>"
            )
    below = top + cell_height * len(rows)
    for c, column in enumerate(columns):
        centre = left + (c + 0.5) * cell_width
        parts.append(f'<text x="{centre}" y="{below + 15}" text-anchor="middle">{escape(column)}</text>')
    middle = left + cell_width * len(columns) / 2
    parts.append(f'<text class="label" x="{middle}" y="{below + 34}" text-anchor="middle">tokens</text>')
    parts.append(f'<text class="label" x="{left - 6}" y="{below + 15}" text-anchor="end">depth</text>')
    return f"<figure><figcaption>{escape(title)}</figcaption>{''.join(parts)}</svg></figure>"


def viridis(share: float) -> str:
    """#rrggbb, dark at 0 and bright at 1."""
    place = min(max(share, 0.0), 1.0) * (len(_VIRIDIS) - 1)
    i = min(int(place), len(_VIRIDIS) - 2)
    mixed = (round(a + (b - a) * (place - i)) for a, b in zip(_VIRIDIS[i], _VIRIDIS[i + 1], strict=True))
    return "#" + "".join(f"{channel:02x}" for channel in mixed)


def labels(values: Sequence[float]) -> list[str]:
    """Of evenly spaced ticks: with the digits that tell half a space apart."""
    gap = min((abs(b - a) for a, b in pairwise(values)), default=0.0)
    for digits in range(3, 12):
        found = [tidy(value, digits) for value in values]
        if len({tidy(value + gap / 2, digits) for value in values} | set(found)) == 2 * len(values) or not gap:
            break
    return found


def tidy(value: float, digits: int = 4) -> str:
    """1.5M rather than 1500000, without noise of binary fractions."""
    size = abs(value)
    if 0 < size < 1e-3:
        return f"{value:.{min(digits, 2)}g}"
    for limit, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= limit * 0.9999:
            return f"{value / limit:.{digits}g}{letter}" if size < 1e15 else f"{value:.3g}"
    return f"{value:.{digits}g}"
