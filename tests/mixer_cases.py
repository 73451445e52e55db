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
_SSM = {"head_dim": 16, "d_state": 12, "chunk": 16}  # 4 heads, of expand 2
_CHANNELS = {"d_state": 6, "chunk": 16}
RIVALS: dict[str, dict[str, Any]] = {
    "mamba": {"mixer": "mamba", "mlp": "none", "ssm": _CHANNELS},
    "jamba": {
        "mixer": ["mamba", "attention"],
        "rotary_fraction": 0.0,
        "n_kv_heads": 2,
        "ssm": _CHANNELS,
        "mamba": {"dt_rank": 3, "norms": True},
    },
    "mamba2": {"mixer": "mamba2", "mlp": "none", "ssm": _SSM},
    "mamba2_groups": {"mixer": "mamba2", "ssm": _SSM | {"n_groups": 2, "conv": 3}},
    "mamba3": {"mixer": "mamba3", "ssm": _SSM},
    "mamba3_mimo": {"mixer": "mamba3", "ssm": _SSM | {"n_groups": 2}, "mamba3": {"rank": 3}},
    "mamba3_rational": {"mixer": "mamba3", "mlp": "none", "ssm": _SSM, "mamba3": {"decay": "rational"}},
    "mamba3_sisa": {"mixer": ["mamba3", "sisa"], "d_s": [0, 8], "ssm": _SSM},
    "falcon_h1": {"mixer": "falcon_h1", "n_kv_heads": 2, "ssm": _SSM},
    "falcon_h1_scaled": {
        "mixer": "falcon_h1",
        "ssm": _SSM | {"n_groups": 2},
        "falcon_h1": {
            **{"attention_in": 1.2, "attention_out": 0.8, "key": 1.4, "ssm_in": 0.7, "ssm_out": 1.3},
            **{"ssm_z": 1.5, "ssm_x": 0.6, "ssm_B": 1.6, "ssm_C": 0.9, "ssm_dt": 0.5, "norm": "before_gate"},
        },
        "multipliers": {"embedding": 2.0, "head": 0.7, "mlp_gate": 1.3, "mlp_down": 0.6},
    },
    "hymba": {
        "mixer": "hymba",
        "n_kv_heads": 2,
        "ssm": _CHANNELS,
        "mamba": {"norms": True},
        "hymba": {"window": 7, "global_layers": [1], "meta_tokens": 4},
    },
    "fox": {"mixer": "fox"},
    "fox_pro": {"mixer": "fox", "fox": {"pro": True}, "n_kv_heads": 2},
}
