"""`sisa report`: reads runs, or a sweep with its runs, and writes the page."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape
from pathlib import Path

from sisa_dist.config import UserError, replace_file
from sisa_dist.report import sections, sweep_sections
from sisa_dist.report.read import Run, read_run
from sisa_dist.report.style import CSS
from sisa_dist.report.sweep import Sweep, is_sweep, read_sweep
from sisa_dist.training.metrics_file import names_apart, read_metrics

# No script, no other file, no network, whatever the text in the page says.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def write_report(folders: Sequence[Path], out: Path | None = None) -> Path:
    """The page's path: `out`, else report.html in the run's or the sweep's folder, of several runs in this one.

    Raises UserError where a folder has no training step, a file is malformed, or the page cannot be written. Of a sweep
    a run whose files are malformed is left out, and named on the page.
    """
    folders = list(dict.fromkeys(folders))
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder: name the folder of a run or a sweep")
    sweeps = [folder for folder in folders if is_sweep(folder)]
    if sweeps and len(folders) > 1:
        raise UserError(f"{sweeps[0]} is a sweep, with its runs: name it alone")
    out = out or (folders[0] if len(folders) == 1 else Path()) / "report.html"
    if not out.parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {out.parent}: make it, or name another file")
    left_out: list[str] = []
    if sweeps:
        sweep = read_sweep(sweeps[0])
        runs = []
        for folder in sorted((sweep.folder / "runs").glob("*")):
            try:
                if _has_a_step(folder):
                    runs.append(read_run(folder, folder.name))
            except UserError as error:  # one of fifty is no reason to see none
                left_out.append(f"{folder.name} is left out. {error}")
        title = f"Sweep {sweep.folder.resolve().name}"
    else:
        sweep = None
        runs = [read_run(folder, name) for folder, name in zip(folders, names_apart(folders), strict=True)]
        title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    replace_file(out, render(title, runs, sweep, left_out))
    return out


def render(title: str, runs: Sequence[Run], sweep: Sweep | None = None, left_out: Sequence[str] = ()) -> str:
    """The page as text; the same for the same files. `left_out`: what is said of a sweep's runs that cannot be read."""
    found = [sweep_sections.results(sweep, left_out), sweep_sections.fits(sweep)] if sweep is not None else []
    if runs:
        parts = (
            sections.summary,
            sections.curves,
            sections.speed,
            sections.layers,
            sections.experts,
            sections.positions,
            sections.retrieval,
            sections.differences,
        )
        found += [part(runs) for part in parts]
    body = "".join(found)
    anchors = re.findall(r'<section id="(\w+)"><h2>([^<]*)</h2>', body)
    contents = "".join(f'<a href="#{name}">{heading}</a>' for name, heading in anchors)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f"<title>{escape(title)}</title><style>{CSS}</style></head><body>"
        f"<header><h1>{escape(title)}</h1><nav>{contents}</nav></header><main>{body}</main></body></html>\n"
    )


def _has_a_step(folder: Path) -> bool:
    return (folder / "metrics.jsonl").is_file() and bool(read_metrics(folder).get("train"))
