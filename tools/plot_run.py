"""Curves of one or more runs from their metrics.jsonl.

python tools/plot_run.py RUN_FOLDER [RUN_FOLDER …] [--out FILE.png] [--x step|tokens|seconds]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, to_rgb
from matplotlib.figure import SubFigure
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from sisa_dist.config import UserError
from sisa_dist.training.metrics_file import names_apart, read_metrics, smooth

Run = dict[str, list[dict[str, Any]]]  # what read_metrics returns

_AXES = {"step": "step", "tokens": "training tokens", "seconds": "seconds of training"}
_COLOURS = ("#3b6fb6", "#d1702f", "#3f9b6b", "#9a4f96", "#b8433f", "#7a6a4f", "#5aa7b5", "#8c8c8c")
_STYLE: dict[Any, Any] = {
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "legend.frameon": False,
    "lines.solid_capstyle": "round",
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_FOLDER")
    parser.add_argument("--out", type=Path, help="default: curves.png in the first run folder")
    parser.add_argument("--x", choices=_AXES, default="step", help="the horizontal axis (default: step)")
    arguments = parser.parse_args(argv)
    try:
        folders = dict.fromkeys(arguments.runs)  # the same folder twice is one curve
        runs = dict(zip(names_apart(list(folders)), map(read_metrics, folders), strict=True))
        for folder, run in zip(folders, runs.values(), strict=True):
            if not run.get("train"):
                raise UserError(f"{folder}: metrics.jsonl holds no training step yet: train it first")
        out = arguments.out or arguments.runs[0] / "curves.png"
        plot(runs, out, x=arguments.x)
    except UserError as error:
        print(f"plot_run: {error}", file=sys.stderr)
        return 2
    print(f"plot: {out}")
    return 0


def plot(runs: dict[str, Run], out: Path, *, x: str = "step") -> None:
    """Writes the picture: loss on top, then learning rate, gradient norm and speed, then λ and half-life by layer, and
    d_s by layer where it is learned.

    Raises UserError where a record lacks a value or `out` cannot be written.
    """
    with plt.rc_context(_STYLE):
        layers = any(run.get("layers") for run in runs.values())
        learned = any(run.get("d_s") for run in runs.values())
        figure = plt.figure(figsize=(11, 7.2 + 2.8 * layers + 2.8 * learned))
        figure.set_layout_engine("constrained", w_pad=0.08, h_pad=0.08)
        try:
            heights = [1.5, 1] + [1.1] * (layers + learned)
            parts = np.asarray(figure.subfigures(len(heights), 1, height_ratios=heights))
            _plot_loss(parts[0].subplots(), runs, x)
            _plot_small(parts[1], runs, x)
            if layers:
                _plot_layers(parts[2], runs, x)
            if learned:
                _plot_learned_d_s(parts[-1], runs, x)
            figure.savefig(out, dpi=150)
        except KeyError as error:
            raise UserError(f"metrics.jsonl: a record has no {error}: was it written by another version?") from None
        except (OSError, ValueError) as error:
            raise UserError(f"{out}: the picture cannot be written ({error}): name another --out FILE.png") from None
        finally:
            plt.close(figure)


def _plot_loss(axis: Axes, runs: dict[str, Run], x: str) -> None:
    for colour, (name, run) in _coloured(runs):
        place, values = _column(run["train"], x), _column(run["train"], "loss")
        axis.plot(place, values, color=colour, alpha=0.25, linewidth=0.7)
        axis.plot(place, smooth(values), color=colour, linewidth=1.8, label=f"{name}: training")
        if run.get("evaluation"):
            held_out = _column(run["evaluation"], "validation_loss")
            at = _place(run, run["evaluation"], x)
            label = f"{name}: validation, {held_out[-1]:.3f} at the end"
            axis.plot(at, held_out, "o", color=colour, markersize=5, markeredgecolor="white", label=label)
    axis.set(ylabel="loss (nats per token)", title="Loss")
    axis.legend(loc="upper right", ncols=1 + (len(runs) > 3))
    _horizontal(axis, x)


def _plot_small(part: SubFigure, runs: dict[str, Run], x: str) -> None:
    keys = ("lr", "grad_norm", "tokens_per_second")
    titles = ("Learning rate", "Gradient norm before clipping", "Tokens per second")
    for axis, key, title in zip(part.subplots(1, 3), keys, titles, strict=True):
        for colour, (_, run) in _coloured(runs):
            place, values = _column(run["train"], x), _column(run["train"], key)
            if key == "lr":
                axis.plot(place, values, color=colour, linewidth=1.4)
            else:
                axis.plot(place, values, color=colour, alpha=0.3, linewidth=0.7)
                axis.plot(place, smooth(values), color=colour, linewidth=1.4)
        axis.set_title(title)
        _horizontal(axis, x)
        if key == "grad_norm":
            _log_scale(axis)
        else:
            axis.set_ylim(bottom=0)
        if key == "tokens_per_second":
            axis.yaxis.set_major_formatter(EngFormatter())


def _plot_layers(part: SubFigure, runs: dict[str, Run], x: str) -> None:
    """A line a layer: viridis with a colour bar for one run, shades of the run's colour for several."""
    lam, half_life = part.subplots(1, 2)
    with_layers = {name: run for name, run in runs.items() if run.get("layers")}
    depth = max(len(record["lambda"]) for run in with_layers.values() for record in run["layers"])
    for run_colour, (name, run) in _coloured(runs):
        if name not in with_layers:
            continue
        records = run["layers"]
        place = _place(run, records, x)
        for layer in range(len(records[0]["lambda"])):
            share = layer / max(1, depth - 1)
            colour = plt.get_cmap("viridis")(0.92 * share) if len(with_layers) == 1 else _shade(run_colour, share)
            for axis, key in ((lam, "lambda"), (half_life, "half_life")):
                # A layer without an SSM has null here: a gap, not a zero.
                values = np.array([np.nan if r[key][layer] is None else r[key][layer] for r in records], np.float64)
                if np.isfinite(values).any():
                    axis.plot(place, values, ".-", color=colour, linewidth=1.3, markersize=4)
    lam.set_title("λ by layer (mean over heads)")
    half_life.set_title("Half-life of the decay by layer (tokens)")
    _log_scale(half_life)
    for axis in (lam, half_life):
        _horizontal(axis, x)
    if len(with_layers) == 1 and depth > 1:
        norm = BoundaryNorm(np.arange(-0.5, depth), depth)
        cmap = plt.get_cmap("viridis")
        colours = [cmap(0.92 * layer / (depth - 1)) for layer in range(depth)]
        mappable = ScalarMappable(norm, matplotlib.colors.ListedColormap(colours))
        bar = part.colorbar(mappable, ax=[lam, half_life], label="layer", fraction=0.03, pad=0.01)
        bar.locator = MaxNLocator(min(depth, 12), integer=True)
        bar.minorticks_off()
        bar.update_ticks()
        bar.outline.set_visible(False)
    elif len(with_layers) > 1:
        lam.annotate("dark: first layer, light: last", (0.02, 0.03), xycoords="axes fraction", color="#666666")


def _plot_learned_d_s(part: SubFigure, runs: dict[str, Run], x: str) -> None:
    """Channels per head that evaluation has, a line a layer, dark to light; beside it their means, drawn and open."""
    by_layer, mean = part.subplots(1, 2)
    for colour, (name, run) in _coloured(runs):
        records = run.get("d_s", [])
        if not records:
            continue
        place = _place(run, records, x)
        layers = records[0]["layers"]
        for row in range(len(layers)):
            shade = _shade(colour, row / max(1, len(layers) - 1))
            values = [record["d_s"][row] for record in records]
            by_layer.plot(place, values, ".-", color=shade, linewidth=1.3, markersize=4)
        for key, style, said in (("d_s", "-", "in evaluation"), ("expected", "--", "in training, expected")):
            values = [sum(record[key]) / len(layers) for record in records]
            mean.plot(place, values, style, color=colour, linewidth=1.4, label=f"{name}: {said}, {values[-1]:.1f}")
    by_layer.set_title("d_s by layer (dark: first layer, light: last)")
    mean.set_title("d_s, mean over layers")
    mean.legend(loc="best")
    for axis in (by_layer, mean):
        axis.set_ylim(bottom=0)
        _horizontal(axis, x)


def _horizontal(axis: Axes, x: str) -> None:
    axis.set_xlabel(_AXES[x])
    axis.margins(x=0.01)
    axis.xaxis.set_major_locator(MaxNLocator(6, integer=x == "step"))
    if x != "seconds":
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))


def _log_scale(axis: Axes) -> None:
    """Logarithmic where the curves span more than a factor of 4; ticks 0.2, 0.5, 1 rather than powers of ten."""
    drawn = np.concatenate([np.asarray(line.get_ydata(), np.float64) for line in axis.lines] or [np.zeros(0)])
    drawn = drawn[np.isfinite(drawn) & (drawn > 0)]
    if drawn.size and drawn.max() > 4 * drawn.min():
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.yaxis.set_minor_formatter(NullFormatter())


def _coloured(runs: dict[str, Run]) -> list[tuple[str, tuple[str, Run]]]:
    return [(_COLOURS[number % len(_COLOURS)], item) for number, item in enumerate(runs.items())]


def _shade(colour: str, share: float) -> tuple[float, ...]:
    """From a darkened colour at 0 to a lightened one at 1."""
    base = np.array(to_rgb(colour))
    return tuple(0.55 * base * (1 - share) + (0.45 * base + 0.55) * share)


def _place(run: Run, records: list[dict[str, Any]], x: str) -> np.ndarray:
    """Where `records`, which know only their step, stand on the x axis."""
    return np.interp(_column(records, "step"), _column(run["train"], "step"), _column(run["train"], x))


def _column(records: list[dict[str, Any]], key: str) -> np.ndarray:
    return np.array([np.nan if record[key] is None else record[key] for record in records], dtype=np.float64)


if __name__ == "__main__":
    raise SystemExit(main())
