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
RIVALS: dict[str, dict[str, Any]] = {}

# Mixtures of experts, under whatever mixer.
MIXTURES: dict[str, dict[str, Any]] = {
    "moe": {"mixer": "attention", "mlp": "moe", "moe": {"experts": 8, "z_loss": 1e-2, "balance_weight": 0.1}},
    "moe_shared_bias": {
        "mixer": "attention",
        "mlp": ["swiglu", "moe"],
        "moe": {"experts": 4, "d_ff": 24, "top_k": 3, "shared": 2, "scores": "sigmoid", "balance": "bias"},
    },
    "moe_sisa": {
        "mixer": "sisa",
        "d_s": 8,
        "parallel_residual": True,
        "mlp": ["moe", "gelu"],
        "moe": {"experts": 8, "d_ff": 16, "top_k": 1, "normalise_top_k": False, "balance_weight": 0.1},
    },
}
