"""A small model of every mixer and of every variant of it that has parameters or paths of its own.

Each is laid over a model of d_model 32 and 4 heads, in tests/model/test_mixers.py and in the grid of
tests/distributed/test_grid_rivals.py, both of which take every entry.
"""

from __future__ import annotations

from typing import Any

BASE: dict[str, Any] = {
    "vocab_size": 61,
    "vocab_multiple": 16,
    "d_model": 32,
    "n_layers": 2,
    "n_heads": 4,
    "d_ff": 48,
    "init_std": 0.1,
}

# The mixers that are not sisa and attention; those have grids of their own.
RIVALS: dict[str, dict[str, Any]] = {
    "sisa_ssmax": {"mixer": "sisa", "d_s": 8, "ssmax": 40, "n_kv_heads": 2},
    "attention_ssmax": {"mixer": "attention", "ssmax": 40},
    "no_decay": {"mixer": "sisa", "d_s": 8, "sisa": {"decay": False}},
    "no_rotation": {"mixer": "sisa", "d_s": 8, "sisa": {"rotation": False}, "n_kv_heads": 2},
    "bilinear": {"mixer": "sisa", "d_s": 8, "sisa": {"decay": False, "rotation": False}},
    "sigmoid_sisa": {"mixer": "sigmoid_sisa", "d_s": 8, "n_kv_heads": 2},
    "fox_pro": {"mixer": "fox", "fox": {"pro": True}, "n_kv_heads": 2},
    "fox": {"mixer": "fox"},
}
