"""Pictures of evaluation by length: a heat-map of what was found again, a curve of the loss by position."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sisa_dist.config import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw_retrieval(found: Mapping[str, Any], path: Path, *, title: str) -> None:
    """Of what `Retrieval.score` returns: a panel a task, lengths to the right, depths downward where it has any.

    Raises UserError where the picture cannot be written.
    """
    lengths, tasks = found["lengths"], found["tasks"]
    width = max(3.0, 0.8 * len(lengths) + 1.4)
    figure = _figure(figsize=(width * len(tasks), 0.42 * len(found["depths"]) + 2.0))
    figure.suptitle(f"{title} · effective length {found['effective_length'] or 'none'}", x=0.01, ha="left")
    panels = figure.subplots(1, len(tasks), squeeze=False)[0]
    image = None
    for axis, (name, task) in zip(panels, tasks.items(), strict=True):
        by_depth = "score" in task
        rows = [list(row) for row in zip(*task["score"], strict=True)] if by_depth else [task["score_by_length"]]
        image = axis.imshow(rows, vmin=0.0, vmax=1.0, cmap="viridis", aspect="auto")
        for y, row in enumerate(rows):
            for x, score in enumerate(row):
                colour = "black" if score > 0.6 else "white"
                axis.text(x, y, f"{100 * score:.0f}", ha="center", va="center", color=colour, fontsize=8)
        axis.set_title(f"{name}: {task['effective_length'] or 'none'}", loc="left", fontsize=10)
        axis.set_xticks(range(len(lengths)), [str(length) for length in lengths], rotation=45)
        axis.set_yticks(range(len(rows)), [f"{depth:g}" for depth in found["depths"]] if by_depth else ["all"])
        axis.set_xlabel("tokens")
    panels[0].set_ylabel("depth")
    figure.colorbar(image, ax=panels, label="score")  # type: ignore[arg-type]
    _save(figure, path)


def draw_positions(tables: Mapping[str, Mapping[str, Any]], path: Path, *, title: str, seq_len: int) -> None:
    """Of what `loss_by_position` returns, a curve for each source; a line where training sequences end.

    Raises UserError where the picture cannot be written.
    """
    figure = _figure(figsize=(7.0, 4.0))
    axis: Axes = figure.subplots()
    longest = 0
    for name, table in tables.items():
        stops = [*table["from"][1:], table["seq_len"]]
        losses = [float("nan") if loss is None else loss for loss in table["loss_by_position"]]
        axis.stairs(losses, [*table["from"], table["seq_len"]], baseline=None, linewidth=1.6, label=name)
        longest = max(longest, stops[-1])
    if seq_len < longest:
        axis.axvline(seq_len, color="#888888", linestyle="--", linewidth=1, label=f"training: {seq_len} tokens")
    axis.set(xlabel="position", ylabel="loss (nats per token)")
    axis.set_title(title, loc="left")
    axis.legend(frameon=False)
    _save(figure, path)


def _figure(**options: Any) -> Figure:
    """Matplotlib takes half a second to import, of every rank of every run: only those that draw do."""
    from matplotlib.figure import Figure

    return Figure(layout="constrained", **options)


def _save(figure: Figure, path: Path) -> None:
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise UserError(f"{path}: the picture cannot be written ({error.strerror}): make room there") from None
