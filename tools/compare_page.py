"""The page of a comparison: one HTML file that needs nothing beside it, and comparison.json with its figures.

It says what was measured and how, in tables and curves; what to conclude is the reader's.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import compare_results
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from compare_plan import Comparison
from compare_results import Figure, Row, rows
from plot_run import _COLOURS, _STYLE
from torch import __version__ as torch_version

from sisa_dist.config import dump_config, replace_file
from sisa_dist.evaluation.harness import write_results

_TITLES = {
    "text": "(a) Real text",
    "recall": "(b) Multi-query associative recall",
    "parity": "(c) State tracking: parity",
}
_PERCENT: Callable[[float], str] = lambda value: f"{100 * value:.1f}"  # noqa: E731
_PLAIN: Callable[[float], str] = lambda value: f"{value:.2f}"  # noqa: E731
_COLUMNS = {
    "perplexity": ("held-out perplexity", _PLAIN),
    "niah": ("NIAH, %", _PERCENT),
    "lambada": ("LAMBADA, %", _PERCENT),
    "blimp": ("BLiMP, %", _PERCENT),
    "accuracy": ("accuracy, %", _PERCENT),
    "twice_as_long": ("on twice the length, %", _PERCENT),
    "steps_to_solve": ("steps to solve", lambda value: f"{value:.0f}"),
}
_CURVES = {
    "text": (
        ("validation_loss", "Held-out loss (nats per token)"),
        ("niah", "Needle in a haystack (share right)"),
        ("loss", "Training loss"),
    ),
    "recall": (("accuracy", "Accuracy on held-out sequences"), ("loss", "Training loss")),
    "parity": (("accuracy", "Accuracy on held-out sequences"), ("loss", "Training loss")),
}
_CSS = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
h1 { font-size: 1.5rem } h2 { font-size: 1.2rem; margin-top: 2.2rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; display: block; overflow-x: auto }
th, td { padding: .3rem .8rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap }
th { font-weight: 600; border-bottom: 2px solid #888 } td:nth-child(2), th:nth-child(2) { text-align: left }
small { color: #666 } .undertrained { color: #8a4b00; background: #fff7ec } img { max-width: 100% }
pre { background: #f6f6f6; padding: .8rem; overflow-x: auto; font-size: 13px }
"""


def write_page(comparison: Comparison, at_once: int) -> Path:
    """Of what is done so far. Returns its path."""
    found = {task: rows(comparison, task) for task in comparison.bases}
    parts = [_head(comparison, at_once)]
    colours = {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(comparison.systems)}
    for task, task_rows in found.items():
        parts.append(f"<h2>{_TITLES[task]}</h2>\n<p>{_about(comparison, task)}</p>")
        if not task_rows:
            parts.append("<p>No run is finished yet.</p>")
            continue
        parts += [_table(task, task_rows), _reasons(task_rows), _picture(task, task_rows, colours)]
    parts.append(_recipe(comparison))
    page = comparison.out / "index.html"
    body = "\n".join(parts)
    replace_file(page, f"<!doctype html><meta charset=utf-8><title>Comparison</title><style>{_CSS}</style>\n{body}\n")
    write_results(
        comparison.out / "comparison.json", {task: [asdict(row) for row in found[task]] for task in comparison.bases}
    )
    return page


def _head(comparison: Comparison, at_once: int) -> str:
    names = ", ".join(comparison.systems)
    lrs = ""
    if len(comparison.lr_factors) > 1:
        factors = ", ".join(f"{factor:g}" for factor in comparison.lr_factors)
        lrs = f" Learning rates × {factors} were tried; every system's is the one with the best mean, on the same data."
    return (
        f"<h1>{html.escape(names)}, side by side</h1>\n"
        f"<p>{comparison.seeds} seed(s) of each. One recipe for all: the same tokens in the same order, parameters "
        f"equal within {100 * 0.005:.1f} % by each system's d_ff (one without MLPs has the nearest depth), optimizer, "
        f"schedule and learning rate; seed s sets the initial weights and the order of the data of every system.{lrs} "
        f"Printed: mean over seeds ± standard deviation, and in brackets the 95 % bootstrap interval, in which "
        f"seeds and items are drawn anew; with few seeds such intervals are rather too narrow. "
        f"Speed: median over steps, {at_once} run(s) side by side on this machine (torch {torch_version}); memory: "
        f"live tensors at the peak of a step, weights and moments included. "
        f"<b>Undertrained</b>: some run of the system failed its convergence check, so it is not ranked; it may not be "
        f"worse, only slower to learn.</p>"
    )


def _about(comparison: Comparison, task: str) -> str:
    config = comparison.bases[task]
    training = config.training
    tokens = training.steps * training.global_batch_tokens
    trained = f"{training.steps} steps of {training.global_batch_tokens:,} tokens ({tokens / 1e6:.1f} M)"
    if task == "text":
        source = config.data.input if isinstance(config.data.input, str) else ", ".join(config.data.input)
        skipped = [f"{n}: skipped, no file given" for n, asked in comparison.evaluations.items() if not asked["path"]]
        return html.escape(
            f"{source}: {trained}, sequences of {training.seq_len}. NIAH is the paper's: "
            f"{config.evaluation.niah_items} items of {config.evaluation.niah_context} tokens, five answers, so 20 % "
            "is a guess among them. A run passes when its loss ends below the unigram baseline and fell by at most "
            f"{compare_results.FLAT_LOSS} nats over the last fifth of the steps at full learning rate; more "
            f"steps would help any of them. {'; '.join(skipped)}"
        )
    what = (
        f"{training.seq_len // 6} keys with their values, then keys alone: which value was it? Guessing among the "
        f"values of the sequence gives {100 / (training.seq_len // 6):.0f} %; twice the length has twice the keys."
        if task == "recall"
        else f"Of every prefix of {training.seq_len} bits: is the number of ones even or odd? Scored in the later half."
    )
    apart = ", though its beginnings are" if task == "parity" else ""
    return html.escape(
        f"{what} {trained}, made on the spot; what is scored is set apart and never trained on{apart}. Steps to solve: "
        f"the first evaluation at {compare_results.SOLVED:.0%} or above, every {training.eval_every} steps, where all "
        f"runs get there. A run passes at {compare_results.SOLVED:.0%} accuracy, or when it is above "
        f"chance and moved by at most {compare_results.FLAT_ACCURACY:.0%} over the last fifth of the steps at full "
        "learning rate."
    )


def _table(task: str, task_rows: list[Row]) -> str:
    columns = [key for key in _COLUMNS if any(key in row.figures for row in task_rows)]
    heads = ["", "system", "parameters", *(_COLUMNS[key][0] for key in columns), "tokens/s", "memory, MB", "lr", "runs"]
    lines = ["<table><tr>" + "".join(f"<th>{head}</th>" for head in heads) + "</tr>"]
    for row in task_rows:
        cells = [
            str(row.rank or "undertrained"),
            html.escape(row.system),
            f"{row.parameters:,} <small>{100 * row.excess:+.2f} %</small>",
            *(_cell(row.figures.get(key), _COLUMNS[key][1]) for key in columns),
            f"{row.tokens_per_second:,.0f}",
            f"{row.peak_bytes / 1e6:.0f}",
            f"{row.lr:.1e}",
            str(len(row.seeds)),
        ]
        marked = "" if row.rank else " class=undertrained"
        lines.append(f"<tr{marked}>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return "\n".join([*lines, "</table>"])


def _cell(figure: Figure | None, shown: Callable[[float], str]) -> str:
    if figure is None:
        return "–"
    spread = "" if figure.spread is None else f" ± {shown(figure.spread)}"
    return f"{shown(figure.mean)}{spread} <small>[{shown(figure.low)}, {shown(figure.high)}]</small>"


def _reasons(task_rows: list[Row]) -> str:
    found = [f"<li>{html.escape(f'{row.system}, {why}')}</li>" for row in task_rows for why in row.undertrained]
    return "<ul>" + "".join(found) + "</ul>" if found else ""


def _picture(task: str, task_rows: list[Row], colours: dict[str, str]) -> str:
    """Mean over seeds, and a band from the lowest to the highest of them."""
    with plt.rc_context(_STYLE):
        panels = _CURVES[task]
        figure, axes = plt.subplots(1, len(panels), figsize=(4.6 * len(panels), 3.4), layout="constrained")
        for axis, (key, title) in zip(np.atleast_1d(axes), panels, strict=True):
            for row in task_rows:
                steps, values = row.curves[key]
                shown = min(map(len, values))  # a run with fewer records than the first cuts them all
                stacked = np.array([run[:shown] for run in values], dtype=np.float64)
                if key == "loss":
                    stacked = _smooth(stacked)
                style = "-" if row.rank else "--"
                axis.plot(steps[:shown], stacked.mean(0), style, color=colours[row.system], label=row.system)
                axis.fill_between(
                    steps[:shown], stacked.min(0), stacked.max(0), color=colours[row.system], alpha=0.15, linewidth=0
                )
            axis.set(title=title, xlabel="step")
            if key in ("accuracy", "niah"):
                axis.set_ylim(-0.02, 1.02)
        np.atleast_1d(axes)[0].legend()
        stream = io.BytesIO()
        figure.savefig(stream, format="png", dpi=130)
        plt.close(figure)
    data = base64.b64encode(stream.getvalue()).decode()
    return (
        f'<img alt="curves" src="data:image/png;base64,{data}">'
        "<p><small>Lines: means over seeds, dashed where undertrained; bands: lowest to highest seed.</small></p>"
    )


def _smooth(values_ST: np.ndarray) -> np.ndarray:
    """Means over about a fiftieth of the run."""
    width = max(1, values_ST.shape[1] // 50)
    kernel = np.ones(width)
    weights = np.convolve(np.ones(values_ST.shape[1]), kernel, "same")
    return np.stack([np.convolve(run, kernel, "same") / weights for run in values_ST])


def _recipe(comparison: Comparison) -> str:
    parts = ["<h2>The recipe</h2>"]
    for task, config in comparison.bases.items():
        parts.append(
            f"<details><summary>{task}: the config that every system's keys are laid over</summary>"
            f"<pre>{html.escape(dump_config(config))}</pre></details>"
        )
    return "\n".join(parts)
