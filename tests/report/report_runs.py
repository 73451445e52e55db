"""Folders of runs and of sweeps as training, evaluation and the tools write them, for the tests of the report."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import yaml

from runs import QUICKSTART
from sisa_dist.config import load_config

LAYERS = 4
RETRIEVAL: dict[str, Any] = {
    "lengths": [256, 512],
    "depths": [0.0, 0.5, 1.0],
    "items": 2,
    "threshold": 0.85,
    "score_by_length": [0.75, 0.25],
    "effective_length": None,
    "tasks": {
        "niah": {
            "score": [[1.0, 0.5, 1.0], [0.0, 0.25, 0.5]],
            "score_by_length": [0.75, 0.25],
            "effective_length": 256,
            "chance": 0.2,
        },
        "multiquery": {"score_by_length": [0.125, 0.0], "effective_length": None, "chance": 0.0},
    },
}
POSITIONS = {
    "loss": 3.0,
    "tokens": 64,
    "seq_len": 512,
    "from": [0, 256],
    "loss_by_position": [3.5, None],
    "tokens_by_position": [64, 0],
}


def make_run(folder: Path, *overrides: str, steps: int = 100, extras: bool = True, learned: bool = False) -> Path:
    """`extras`: retrieval, positions, experts and evaluation.json too."""
    folder.mkdir(parents=True)
    config = load_config(QUICKSTART, overrides).model_dump(exclude_defaults=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    records = []
    for step in range(1, steps + 1):
        record: dict[str, Any] = dict(kind="train", step=step, tokens=4096 * step, seconds=0.5 * step, lr=1e-3)
        record |= dict(loss=3 + 3 / step, grad_norm=5 / step, tokens_per_second=8000.0, mfu=0.31, memory_bytes=2**30)
        records.append(record)
        if step % 20:
            continue
        records.append(
            {"kind": "layers", "step": step, "lambda": [0.1, 0.2, 0.3, None], "half_life": [9, 99, 999, None]}
        )
        scores = {"content_max": [5.0, 4.0, 3.0, None], "importance_max": [2.0, 1.0, 0.5, None]}
        records.append({"kind": "scores", "step": step, "moved": [0.02 * step / steps, 0.04, 0.06, None], **scores})
        records.append({"kind": "evaluation", "step": step, "validation_loss": 3.1 + 1 / step})
        if extras:
            counts = [[10, 20, 30, 40], [25, 25, 25, 25]]
            experts = dict(layers=[1, 3], counts=counts, balance_loss=[1.0, 1.0], z_loss=[0.0, 0.0])
            records.append({"kind": "experts", "step": step, **experts})
            records.append({"kind": "positions", "step": step, **POSITIONS})
            records.append({"kind": "retrieval", "step": step, **RETRIEVAL})
        if learned:
            of_gates = dict(
                layers=[0, 1, 2], d_s=[32 - step // 5, 16, 8], expected=[20.0, 16.5, 8.0], share=step / steps
            )
            records.append({"kind": "d_s", "step": step, **of_gates})
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "metrics.jsonl").write_text(lines + '{"kind": "tra', encoding="utf-8")  # a run that goes on
    if extras:
        found = {
            "step": steps,
            "perplexity": {"loss": 3.111, "perplexity": 22.4},
            "niah": {"accuracy": 0.5, "accuracy_by_depth": [0.5, None], "context": 256},
            "positions": POSITIONS,
            "retrieval": RETRIEVAL,
        }
        (folder / "evaluation.json").write_text(json.dumps(found), encoding="utf-8")
    return folder


SWEEP_COLUMNS = ("run", "status", "mixer", "d_model", "d_s", "parameters", "tokens", "flops", "loss")


def make_sweep(folder: Path, *, runs: int = 4, steps: int = 40) -> Path:
    """Half of its runs finished, half going on."""
    folder.mkdir(parents=True)
    rows: list[list[Any]] = []
    curves: list[list[Any]] = []
    for number in range(runs):
        done, mixer = number % 2 == 0, "attention" if number % 4 < 2 else "sisa"
        name, tokens = f"size{number}_{mixer}", 1000 * 4 ** (number % 6)
        make_run(folder / "runs" / name, f"model.d_model={64 + 8 * number}", steps=steps, extras=False)
        row = [name, "finished" if done else "running", mixer, 64, "" if mixer == "attention" else 16, 10_000, tokens]
        rows.append([*row, 6e4 * tokens, 4 - 0.1 * math.log(tokens) if done else ""])
        curves += [[name, tokens * part / 2, 3e4 * tokens * part, 5 - 0.1 * math.log(tokens * part)] for part in (1, 2)]
    for path, header, found in (
        ("results.csv", SWEEP_COLUMNS, rows),
        ("curves.csv", ("run", "tokens", "flops", "loss"), curves),
    ):
        with (folder / path).open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([header, *found])
    return folder


def make_fit(sweep: Path) -> dict[str, Any]:
    """As tools/fit_scaling_law.py's docstring has it: a law, one without a loss, a law of d_s, one that was skipped."""
    best = {"flops": 1e18, "parameters": 8.9e7, "tokens": 1.9e9, "loss": 3.1161}
    of_form = {
        "where": {"mixer": "sisa"},
        "form": "chinchilla",
        "source": "L = E + A/N^alpha + B/D^beta",
        "parameters": {"A": 332.4, "alpha": 0.32775},
        "intervals": {"A": [265.9, 681.1], "alpha": None},
        "objective": 1e-3,
        "points": 20,
        "starts": 4500,
        "draws": 100,
        "held_out_error": 0.0057,
        "held_out": {"rule": "the 4 runs with the most FLOPs"},
        "law": {
            **{"N_coefficient": 0.1, "N_exponent": 0.5296, "N_exponent_interval": [0.485, 0.5464]},
            **{"D_coefficient": 1.0, "D_exponent": 0.4704, "D_exponent_interval": None},
        },
        "optimum": [best | {"intervals": {"parameters": [6.7e7, 1e8], "tokens": None, "loss": [3.0, 3.2]}}],
    }
    no_loss = {"flops": 1e18, "parameters": 9e7, "tokens": 2e9, "loss": None}
    envelope = of_form | {
        **{"form": "envelope", "held_out_error": None, "held_out": None, "law": None},
        "optimum": [no_loss | {"intervals": {"parameters": None, "tokens": None, "loss": None}}],
    }
    d_s = {
        "where": {"mixer": "sisa"},
        "chosen": "constant",
        "verdict": "the best d_s is 24.5 at every size",
        "held_out_error": {"none": 0.003, "constant": 0.0021, "power": 0.0029},
        "laws": {},
        "optimum": [{"parameters": 1e6, "d_s": 24.5, "interval": [20.0, 31.0], "inside": True}],
    }
    skipped = {"where": {"mixer": "attention"}, "form": "isoflop", "reason": "there are 0 slices"}
    found = {"table": "results.csv", "factor": 6.0, "ratio": 6.1, "rows": {"used": 20, "left_out": {}}}
    found |= {"fits": [of_form, envelope], "d_s": [d_s], "skipped": [skipped]}
    (sweep / "fit").mkdir()
    (sweep / "fit" / "fit.json").write_text(json.dumps(found), encoding="utf-8")
    return found
