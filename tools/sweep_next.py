"""The next runs of a sweep, from a fit of those before: the best size at each budget beyond the grid's largest.

FIT.json is that of tools/fit_scaling_law.py, with N counted as the grid's `count` says. A new size keeps
the head width, the width to depth and the d_ff to width of the grid's largest, and meets N by d_ff. What a `run` chose
stays in SWEEP/next.json, which every later command reads as more of the grid.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from equal_parameters import parameters, solve_d_ff
from sweep_grid import Block, Grid
from sweep_rules import base_config, embedding_parameters, make_runs, short

from sisa_dist.config import RunConfig, UserError, parse_config, parse_section, replace_file

_MOST_HEADS = 512


def with_next(grid: Grid, fit: Path | None, *, keep: bool) -> Grid:
    """The grid with what was chosen before, and by `fit`. `keep`: for later commands too."""
    stored = Path(grid.output_dir) / "next.json"
    if stored.is_file():
        grid = _extended(grid, json.loads(stored.read_text(encoding="utf-8")), str(stored))
    if fit is None:
        return grid
    chosen = choose_next(grid, fit)
    extended = _extended(grid, chosen, str(fit))
    make_runs(extended)  # raises where they cannot be: what is kept is read by every later command
    if keep:
        before = json.loads(stored.read_text(encoding="utf-8")) if stored.is_file() else {"sizes": {}, "grids": []}
        both = {"sizes": before["sizes"] | chosen["sizes"], "grids": before["grids"] + chosen["grids"]}
        stored.parent.mkdir(parents=True, exist_ok=True)
        replace_file(stored, json.dumps(both, indent=1))
    return extended


def choose_next(grid: Grid, fit: Path) -> dict[str, Any]:
    """{"sizes": {name: keys of a model}, "grids": [blocks]}. Raises UserError where the fit names nothing to run."""
    largest = max(run.flops for run in make_runs(grid))
    sizes: dict[str, dict[str, Any]] = {}
    blocks: list[dict[str, Any]] = []
    for entry in _fits(fit, grid.count):
        where = entry["where"]
        mixers = [where["mixer"]] if "mixer" in where else grid.grids[0].mixers
        d_s = [round(where["d_s"])] if where.get("d_s") is not None else grid.grids[0].d_s
        for best in entry["optimum"]:
            if best["flops"] <= 1.01 * largest:
                continue
            name = f"n{short(best['parameters'])}"
            sizes[name] = size_of(grid, best["parameters"])
            block = {"sizes": [name], "mixers": mixers, "flops": [float(best["flops"])]}
            if d_s and any(mixer.startswith("sisa") for mixer in mixers):
                block["d_s"] = d_s
            blocks.append(block)
    if not blocks:
        raise UserError(
            f"{fit}: names no optimum beyond the grid's largest run, {largest:.3g} FLOPs: fit again with a larger "
            "--budget"
        )
    return {"sizes": sizes, "grids": blocks}


def size_of(grid: Grid, wanted: float) -> dict[str, Any]:
    """Keys of `model:` of a Transformer with `wanted` parameters, counted as the grid does."""
    model = max((base_config(grid, name) for name in grid.sizes), key=parameters).model
    head, depth, widening = model.width_per_head, model.d_model / model.n_layers, model.d_ff / model.d_model

    def keys(heads: int, d_ff: int | None = None) -> dict[str, Any]:
        d_model = heads * head
        sizes = {"d_model": d_model, "n_layers": max(1, round(d_model / depth)), "n_heads": heads}
        return sizes | {"d_ff": d_ff or max(8, round(widening * d_model))}

    def config(**sizes: Any) -> RunConfig:
        tree = base_config(grid, next(iter(grid.sizes))).model_dump()
        tree["model"] |= sizes
        return parse_config(tree, source="next")

    def counted(found: RunConfig) -> int:
        return parameters(found) - (embedding_parameters(found.model) if grid.count == "non_embedding" else 0)

    heads = 1
    while heads < _MOST_HEADS and counted(config(**keys(heads))) < wanted:
        heads += 1
    near = [heads - 1, heads] if heads > 1 else [heads]
    heads = min(near, key=lambda n: abs(counted(config(**keys(n))) / wanted - 1))
    chosen = config(**keys(heads))
    beyond = parameters(chosen) - counted(chosen)
    d_ff = solve_d_ff(lambda d_ff: config(**keys(heads, d_ff)), round(wanted + beyond))
    if d_ff is None or d_ff < 1 or abs(counted(config(**keys(heads, d_ff))) / wanted - 1) > 0.05:
        raise UserError(f"no size of the grid's proportions has {wanted:,.0f} parameters: add one to sizes by hand")
    return keys(heads, d_ff)


# The column of a sweep's table that holds N by each count of the grid.
_COUNTED = {"total": "parameters", "non_embedding": "parameters_non_embedding"}


def _fits(path: Path, count: str) -> list[dict[str, Any]]:
    """One of each group that has an optimum: the parametric one where there is one."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        entries, column = found["fits"], found.get("columns", {}).get("parameters")
        for entry in entries:
            entry["optimum"] = [best for best in entry.get("optimum") or [] if best["parameters"] is not None]
        entries = [entry for entry in entries if entry["optimum"]]
        groups: dict[str, dict[str, Any]] = {}
        for entry in sorted(entries, key=lambda entry: entry["form"] != "chinchilla"):
            groups.setdefault(json.dumps(entry["where"], sort_keys=True), entry)
            for best in entry["optimum"]:
                float(best["flops"]), float(best["parameters"])
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): name the fit.json of fit_scaling_law.py") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path}: is no fit: name the fit.json of tools/fit_scaling_law.py") from None
    if column != _COUNTED[count] and column in _COUNTED.values():
        raise UserError(
            f"{path}: its N is the column {column}, and the grid counts by `count: {count}`: fit again with "
            f"--params-column {_COUNTED[count]}"
        )
    return list(groups.values())


def _extended(grid: Grid, more: dict[str, Any], source: str) -> Grid:
    blocks = [parse_section(Block, block, source=source) for block in more["grids"]]
    # A block of all sizes means those that the file names.
    own = [block.model_copy(update={"sizes": block.sizes or list(grid.sizes)}) for block in grid.grids]
    return grid.model_copy(update={"sizes": grid.sizes | more["sizes"], "grids": [*own, *blocks]})
