"""The picture of one group of runs and its laws: fits, parabolas, optima, errors, d_s. It fits nothing."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from fit_d_s import DsLaw
from fit_envelope import Envelope
from fit_forms import law, optimum
from fit_isoflop import IsoFlop
from fit_optimise import Array
from fit_parametric import INTERVAL, Fit
from fit_repeated import RepeatedFit
from fit_table import Points, clusters
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.ticker import EngFormatter, NullFormatter
from plot_run import _COLOURS, _STYLE

from sisa_dist.config import UserError


@dataclass
class Found:
    """All that was fitted to a group's points. held_out: runs that were only predicted."""

    points: Points
    held_out: Points | None
    budgets: list[float]
    factor: float
    fits: list[Fit] = field(default_factory=list)
    repeated: RepeatedFit | None = None
    isoflop: IsoFlop | None = None
    envelope: Envelope | None = None
    d_s: DsLaw | None = None


def draw(found: Found, title: str, out: Path) -> None:
    """Raises UserError where `out` cannot be written."""
    panels = [_loss] if found.fits else []
    panels += [_parabolas] if found.isoflop else []
    panels += [_optima] if found.fits or found.isoflop or found.envelope else []
    panels += [_errors] if found.fits or found.repeated else []
    panels += [_d_s_slices, _d_s_best] if found.d_s else []
    with plt.rc_context(_STYLE):
        rows = -(-len(panels) // 2)
        figure, grid = plt.subplots(rows, 2, figsize=(12, 4.2 * rows), squeeze=False)
        figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.1)
        figure.suptitle(title, x=0.01, ha="left", fontsize=11)
        try:
            for panel, axis in zip(panels, grid.flat, strict=False):
                panel(axis, found)
            for axis in grid.flat[len(panels) :]:
                axis.axis("off")
            figure.savefig(out, dpi=150)
        except (OSError, ValueError) as error:
            raise UserError(f"{out}: the picture cannot be written ({error}): name another --out FOLDER") from None
        finally:
            plt.close(figure)


def _loss(axis: Axes, found: Found) -> None:
    """Loss by FLOPs: runs, the first law for some sizes, and the least loss it promises at each budget."""
    fit, points = found.fits[0], found.points
    norm = LogNorm(points.parameters.min() * 0.99, points.parameters.max() * 1.01)
    colours = plt.get_cmap("viridis_r")
    marks = axis.scatter(points.flops, points.loss, c=points.parameters, norm=norm, cmap=colours, s=18, zorder=3)
    axis.figure.colorbar(marks, ax=axis, label="parameters", format=EngFormatter(sep=""))
    alike = clusters(points.parameters)
    sizes = np.array([points.parameters[alike == i].mean() for i in range(alike.max() + 1)])
    for size in sizes[np.unique(np.linspace(0, len(sizes) - 1, 7).round().astype(int))]:
        tokens = np.geomspace(points.tokens.min(), points.tokens.max(), 60)
        line = fit.loss(np.full(60, size), tokens)
        axis.plot(found.factor * size * tokens, line, color=colours(norm(size)), linewidth=1, alpha=0.8)
    flops = _flops(found)
    frontier = np.array([optimum(fit.form, fit.theta[None], fit.centre, c, found.factor)[2][0] for c in flops])
    axis.plot(flops, frontier, color="#222222", linewidth=1.6, label=f"{fit.form.name}: least loss at C")
    if len(fit.draws):
        drawn = np.stack([optimum(fit.form, fit.draws, fit.centre, c, found.factor)[2] for c in flops], 1)
        _band(axis, flops, drawn, "#222222")
    axis.set(xscale="log", yscale="log", xlabel="FLOPs of training", ylabel="loss", title="Loss")
    low, high = points.loss.min(), points.loss.max()
    axis.set_ylim(0.93 * min(low, np.nanmin(frontier)), 1.04 * high)
    axis.yaxis.set_major_formatter("{x:.3g}")
    axis.yaxis.set_minor_formatter("{x:.3g}" if high < 5 * low else NullFormatter())
    axis.legend(loc="upper right")


def _parabolas(axis: Axes, found: Found) -> None:
    assert found.isoflop is not None
    slices = found.isoflop.slices
    for number, part in enumerate(slices):
        colour = plt.get_cmap("viridis_r")(number / max(1, len(slices) - 1))
        n = np.linspace(*np.log([part.points.parameters.min(), part.points.parameters.max()]), 60)
        axis.plot(part.points.parameters, part.points.loss, "o", color=colour, markersize=4)
        curve = np.polynomial.polynomial.polyval(n - part.middle, part.curve)
        axis.plot(np.exp(n), curve, color=colour, linewidth=1.2, label=f"{part.flops:.2g} FLOPs")
        if part.inside:
            axis.plot(np.exp(part.lowest), part.loss, "*", color="#b8433f", markersize=10, zorder=4)
    axis.set(xscale="log", xlabel="parameters", ylabel="loss", title="IsoFLOP slices (star: lowest point)")
    axis.legend(loc="best", fontsize=8, ncols=2)


def _optima(axis: Axes, found: Found) -> None:
    """N*(C) of every approach with its interval."""
    flops = _flops(found)
    lines: list[tuple[str, Array, Array]] = []
    for fit in found.fits:
        coefficient, exponent = law(fit.form, fit.theta[None], fit.centre, found.factor)
        drawn = law(fit.form, fit.draws, fit.centre, found.factor)
        lines.append((fit.form.name, *_power(flops, coefficient, exponent, *drawn)))
    for name, part in (("IsoFLOP", found.isoflop), ("minimum over curves", found.envelope)):
        if part is not None:
            one = np.array([part.coefficient]), np.array([part.exponent])
            lines.append((name, *_power(flops, *one, np.exp(part.draws[:, 0]), part.draws[:, 1])))
    for number, (name, line, drawn) in enumerate(lines):
        colour = _COLOURS[number % len(_COLOURS)]
        slope = np.log(line[-1] / line[0]) / np.log(flops[-1] / flops[0])
        axis.plot(flops, line, color=colour, linewidth=1.6, label=f"{name}: C^{slope:.3f}")
        _band(axis, flops, drawn, colour)
    axis.plot(found.points.flops, found.points.parameters, ".", color="#999999", markersize=4, zorder=1)
    for budget in found.budgets:
        axis.axvline(budget, color="#bbbbbb", linewidth=0.8, linestyle="--")
    axis.set(xscale="log", yscale="log", xlabel="FLOPs of training", ylabel="parameters", title="Compute-optimal size")
    axis.legend(loc="upper left")


def _errors(axis: Axes, found: Found) -> None:
    for number, fit in enumerate([*found.fits, *([found.repeated] if found.repeated else [])]):
        colour = _COLOURS[number % len(_COLOURS)]
        seen = [(found.points, "o", colour)] + ([(found.held_out, "D", "none")] if found.held_out else [])
        for points, mark, inside in seen:
            if isinstance(fit, Fit):
                name, loss = fit.form.name, fit.loss(points.parameters, points.tokens)
            else:
                name, loss = "repeated", fit.loss(points)
            label = name if mark == "o" else f"{name}: held out"
            axis.plot(
                points.flops,
                100 * (loss / points.loss - 1),
                mark,
                color=colour,
                markerfacecolor=inside,
                markersize=4.5,
                label=label,
            )
    axis.axhline(0, color="#888888", linewidth=0.8)
    axis.set(xscale="log", xlabel="FLOPs of training", ylabel="predicted / measured − 1 (%)", title="Errors")
    axis.legend(loc="best", fontsize=8)


def _d_s_slices(axis: Axes, found: Found) -> None:
    """Loss by d_s over the law's loss without d_s, a colour a size."""
    part = found.d_s
    assert part is not None
    points, chosen = part.points, part.chosen if part.chosen != "none" else "constant"
    bare = part.loss("none", points.parameters, points.tokens, points.d_s)
    d_s = np.geomspace(*part.tried, 60)
    for number, size in enumerate(part.sizes):
        colour = plt.get_cmap("viridis_r")(number / max(1, len(part.sizes) - 1))
        mine = np.abs(np.log(points.parameters / size)) < 0.05
        axis.plot(points.d_s[mine], 100 * (points.loss / bare - 1)[mine], "o", color=colour, markersize=4)
        tokens = np.exp(np.log(points.tokens[mine]).mean()) * np.ones(60)
        sizes = np.full(60, size)
        line = part.loss(chosen, sizes, tokens, d_s) / part.loss("none", sizes, tokens, d_s) - 1
        style = "-" if part.chosen != "none" else ":"
        axis.plot(d_s, 100 * line, style, color=colour, linewidth=1.2, label=f"N = {size:.3g}")
    dotted = "" if part.chosen != "none" else "; dotted: not better than no law"
    axis.set(xlabel="d_s", ylabel="loss against the law without d_s (%)", title=f"d_s by size{dotted}")
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter("{x:.0f}")
    axis.legend(loc="best", fontsize=8)


def _d_s_best(axis: Axes, found: Found) -> None:
    part = found.d_s
    assert part is not None
    for number, name in enumerate(("constant", "power")):
        value, drawn = part.best(name, part.sizes)
        label = f"{name}{' (chosen)' if name == part.chosen else ''}"
        axis.plot(part.sizes, value, "o-", color=_COLOURS[number], linewidth=1.4, label=label)
        _band(axis, part.sizes, drawn, _COLOURS[number])
    for edge in part.tried:
        axis.axhline(edge, color="#888888", linewidth=0.8, linestyle="--")
    axis.set(xscale="log", xlabel="parameters", ylabel="best d_s", title="Best d_s by size (dashed: the values tried)")
    axis.set_yscale("log", base=2)
    axis.set_ylim(part.tried[0] / 4, part.tried[1] * 4)
    axis.yaxis.set_major_formatter("{x:g}")
    axis.legend(loc="best")


def _flops(found: Found) -> Array:
    return np.geomspace(found.points.flops.min(), max([found.points.flops.max(), *found.budgets]), 60)


def _power(flops: Array, coefficient: Array, exponent: Array, many: Array, exponents: Array) -> tuple[Array, Array]:
    return coefficient[0] * flops ** exponent[0], many[:, None] * flops ** exponents[:, None]


def _band(axis: Axes, x: Array, draws: Array, colour: str) -> None:
    """95 % of the draws [B, m]."""
    have = draws[np.isfinite(draws).all(1)]
    if len(have) > 10:
        axis.fill_between(x, *np.percentile(have, INTERVAL, axis=0), color=colour, alpha=0.15, linewidth=0)
