"""A sweep of models of ten thousand parameters on data that is prepared, for the tests of tools/run_sweep.py."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

SIZES = {"a": {"d_model": 32, "n_layers": 2, "n_heads": 2, "d_ff": 80}}


def tree(out: Path, data: str = "nowhere", **over: Any) -> dict[str, Any]:
    """A grid: attention and sisa of one size, 8 steps each."""
    base = {
        "model": {"vocab_size": 512},
        "data": {"folder": data, "validation_fraction": 0.2, "member_tokens": 256, "shard_members": 4, "lanes": 3},
        "training": {"seq_len": 64, "micro_batch_size": 2, "eval_windows": 2},
        "evaluation": {"perplexity_windows": 6},
    }
    block = {"name": "all", "mixers": ["attention", "sisa"], "d_s": [8], "tokens": [2048]}
    found = {"name": "tiny", "output_dir": str(out), "sizes": SIZES, "lr": 1e-3, "batch": 256, "base": base}
    return found | {"grids": [block], "evaluations": 2, "checkpoints": 2} | over


def until(what: str, holds: Callable[[], bool], *, seconds: float = 600.0) -> None:
    """Returns when it holds; the test fails when it does not in time."""
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            pytest.fail(f"waited {seconds:.0f} s in vain: {what}")
        time.sleep(0.02)


def write(folder: Path, content: dict[str, Any]) -> Path:
    path = folder / "grid.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path
