"""The sections of runs: what they reached, their curves, speed, layers, experts, positions, retrieval, config keys."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from statistics import median

import numpy as np

from sisa_dist.report.chart import Line, heat_map, line_chart, tidy
from sisa_dist.report.parts import (
    budget,
    charts,
    folded,
    legend,
    legend_of_runs,
    lines_of,
    section,
    style_of,
    style_of_layer,
    table,
)
from sisa_dist.report.read import ByLayer, Curve, Run
from sisa_dist.training.metrics_file import smooth

_TOKENS = "training tokens"
_RAW = 4  # runs: with more, only smoothed curves
_UNFOLDED = 3  # runs: with more, curves of single layers and heat maps are folded
_COLUMNS = 4  # runs that stand side by side in the table of keys; more stand one below the other
_HIDDEN_KEYS = ("output_dir", "name")
_OF_LAYERS = {
    "lambda": "λ, mean over heads",
    "half_life": "Half-life of the decay (tokens)",
    "moved": "Attention mass that importance moves (share)",
    "content_max": "Largest |q·k/√d| sampled",
    "importance_max": "Largest |importance term| sampled",
    "d_s": "d_s (channels per head)",
}


def summary(runs: Sequence[Run]) -> str:
    results = list(dict.fromkeys(name for run in runs for name in run.results))
    header = ["run", "steps", "tokens", "training loss", "validation loss", *results, "tokens/s", "MFU", "peak memory"]
    rows = []
    for run in runs:
        last = run.train["loss"].y[-1]
        if math.isfinite(last):  # one batch alone says little
            last = smoothed(run.train["loss"]).y[-1]
        checked = run.validation.y[-1] if run.validation.y else math.nan
        row = [run.name, str(run.steps[-1]), tidy(run.train["loss"].x[-1]), _digits(last), _digits(checked)]
        row += [_result(name, run.results.get(name, math.nan)) for name in results]
        speed, mfu = _median(run.train["tokens_per_second"]), _median(run.train["mfu"])
        row += [tidy(speed) if math.isfinite(speed) else "", f"{100 * mfu:.1f}%" if math.isfinite(mfu) else ""]
        rows.append([*row, gigabytes(max(run.train["memory_bytes"].y))])
    older = _older({run.name: {run.results_step} for run in runs}, runs)
    note = f'<p class="soft">The training loss is smoothed, as its curve is.{escape(older)}</p>'
    key = legend_of_runs(runs) if len(runs) > 1 else ""
    return section("summary", "Runs", table(header, rows), note, key)


def curves(runs: Sequence[Run]) -> str:
    most, loss = budget(runs), []
    for number, run in enumerate(runs):
        raw = run.train["loss"]
        if len(runs) <= _RAW:
            loss.append(Line(f"{run.name}, each step", raw.x, raw.y, style_of(number), faint=True, dots=False))
        loss.append(Line(run.name, raw.x, smoothed(raw).y, style_of(number)))
    common = {"x_label": _TOKENS, "most_points": most}
    return section(
        "curves",
        "Loss, learning rate, gradient norm",
        charts(
            line_chart("Training loss (nats per token)", loss, **common),  # type: ignore[arg-type]
            line_chart("Validation loss (nats per token)", lines_of(runs, lambda run: run.validation), **common),  # type: ignore[arg-type]
            line_chart("Learning rate", lines_of(runs, lambda run: run.train["lr"]), from_zero=True, **common),  # type: ignore[arg-type]
            line_chart(
                "Gradient norm before clipping",
                lines_of(runs, lambda run: smoothed(run.train["grad_norm"])),
                log_y=None,
                **common,  # type: ignore[arg-type]
            ),
            large=True,
        ),
    )


def speed(runs: Sequence[Run]) -> str:
    common = {"x_label": _TOKENS, "most_points": budget(runs, most=300), "from_zero": True}

    def of(key: str, factor: float = 1.0) -> list[Line]:
        lines = lines_of(runs, lambda run: smoothed(run.train[key]))
        return [Line(line.name, line.x, [factor * y for y in line.y], line.style) for line in lines]

    return section(
        "speed",
        "Speed and memory",
        charts(
            line_chart("Tokens per second", of("tokens_per_second"), **common),  # type: ignore[arg-type]
            line_chart("MFU (%)", of("mfu", 100), **common),  # type: ignore[arg-type]
            line_chart("Peak memory of the main process (GiB)", of("memory_bytes", 2.0**-30), **common),  # type: ignore[arg-type]
        ),
    )


def layers(runs: Sequence[Run]) -> str:
    ends = charts(
        *(
            line_chart(
                title,
                lines_of(runs, lambda run, key=key: run.by_layer[key].last if key in run.by_layer else None),
                x_label="layer",
                whole_x=True,
                log_y=None if key == "half_life" else False,
                from_zero=key not in ("lambda", "half_life"),
            )
            for key, title in _OF_LAYERS.items()
        )
    )
    if not ends:
        return ""
    found = []
    for run in runs:
        drawn = charts(*(_over_training(title, run.by_layer.get(key), key) for key, title in _OF_LAYERS.items()))
        found.append(folded(f"{run.name}: each layer over training", drawn, is_open=len(runs) <= _UNFOLDED))
    note = (
        '<p class="soft">The newest values, over layers; below them each layer over training. The score’s terms and '
        "the share of mass are of a few queries of the first held-out window (of a mixture: of its first source’s), "
        "drawn anew at each evaluation.</p>"
    )
    return section("layers", "Layers", note, ends, *found)


def _over_training(title: str, found: ByLayer | None, key: str) -> str:
    if found is None or not found.layers or (key == "d_s" and all(len(set(curve.y)) == 1 for curve in found.curves)):
        return ""  # a d_s that is not learned stands still
    depth = max(found.layers) + 1
    lines = [
        Line(f"layer {layer}", curve.x, curve.y, style_of_layer(layer, depth))
        for layer, curve in zip(found.layers, found.curves, strict=True)
    ]
    chart = line_chart(title, lines, x_label=_TOKENS, most_points=120, log_y=None if key == "half_life" else False)
    shown = [found.layers[0], found.layers[-1]] if len(found.layers) > 1 else found.layers
    named = [("first layer", "last layer")[i] if len(shown) > 1 else f"layer {n}" for i, n in enumerate(shown)]
    key_to_it = legend([(name, style_of_layer(n, depth)) for name, n in zip(named, shown, strict=True)])
    return chart.replace("</figure>", f"{key_to_it}</figure>")


def experts(runs: Sequence[Run]) -> str:
    pictures = []
    for key, title in (("load_max", "Busiest expert"), ("load_min", "Idlest expert")):
        for run in runs:
            if key in run.by_layer:
                pictures.append(
                    _over_training(f"{run.name}: {title.lower()} (1 is a fair share)", run.by_layer[key], key)
                )
    return section("experts", "Experts’ load", charts(*pictures))


def positions(runs: Sequence[Run]) -> str:
    lines = [
        Line(
            f"{run.name}{f', {table.source}' if table.source else ''}",
            table.edges,
            table.losses,
            style_of(number),
            steps=True,
        )
        for number, run in enumerate(runs)
        for table in run.positions
    ]
    chart = line_chart("Held-out loss (nats per token)", lines, x_label="position in the window")
    older = _older({run.name: {table.step for table in run.positions} for run in runs}, runs)
    note = f'<p class="soft">{escape(older)}</p>' if chart and older else ""
    return section("positions", "Loss by position", charts(chart), note)


def retrieval(runs: Sequence[Run]) -> str:
    found = []
    for run in runs:
        maps = charts(*(heat_map(grid.title, grid.lengths, grid.depths, grid.rows) for grid in run.grids))
        found.append(folded(f"{run.name}: retrieval", maps, is_open=len(runs) <= _UNFOLDED))
    older = _older({run.name: {grid.step for grid in run.grids} for run in runs}, runs)
    note = f'<p class="soft">{escape(older)}</p>' if older else ""
    return section("retrieval", "Retrieval (answers found, %)", *found, note)


def differences(runs: Sequence[Run]) -> str:
    """The keys in which the runs' configs differ; of one run, or of equal ones, nothing."""
    keys = dict.fromkeys(key for run in runs for key in run.config)
    differing = [
        key
        for key in keys
        if key not in _HIDDEN_KEYS and len({repr(run.config.get(key)) for run in runs if run.config}) > 1
    ]
    if not differing:
        return ""
    rows = [[key, *(_value(run.config.get(key)) for run in runs)] for key in differing]
    header = ["key", *(run.name for run in runs)]
    if len(runs) > _COLUMNS:
        header, *rows = ([row[i] for row in [header, *rows]] for i in range(len(header)))
        header = ["run", *header[1:]]
    shown = table(header, rows)
    return section("config", "Config keys that differ", shown)


def smoothed(curve: Curve) -> Curve:
    return Curve(curve.x, smooth(np.array(curve.y)).tolist())


def _older(steps: Mapping[str, set[int]], runs: Sequence[Run]) -> str:
    """Says of what a run was evaluated at, where that is not its last step."""
    found = ""
    for run in runs:
        for step in sorted(steps[run.name] - {run.steps[-1]}):
            found += f" {run.name}: evaluated at step {step} of {run.steps[-1]}."
    return found


def _result(name: str, value: float) -> str:
    return f"{value:.0f}" if name == "effective length" and math.isfinite(value) else _digits(value)


def gigabytes(value: float) -> str:
    return f"{value / 2**30:.2f} GiB" if math.isfinite(value) else ""


def _digits(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.4f}" if abs(value) < 1000 else tidy(value)


def _median(curve: Curve) -> float:
    finite = [value for value in curve.y if math.isfinite(value)]
    return median(finite) if finite else math.nan


def _value(value: object) -> str:
    return "" if value is None else str(value)
