"""A small model of every mixer and of every variant of it that has parameters or paths of its own.

tests/model/test_mixers.py and test_document_isolation.py take every case, the grid of
tests/distributed/test_grid_rivals.py those of the rivals. A mixer of MIXERS without a case fails test_mixers.py.
"""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch

from sisa_dist.config import AttentionConfig, ModelConfig
from sisa_dist.engine.compute_dtype import compute_in
from sisa_dist.model import LM, build_model

BASE: dict[str, Any] = {
    "vocab_size": 61,
    "vocab_multiple": 16,
    "d_model": 32,
    "n_layers": 2,
    "n_heads": 4,
    "d_ff": 48,
    "init_std": 0.1,
}

# The mixers that are not sisa and attention, which have grids of their own, and what may be done to those two.
RIVALS: dict[str, dict[str, Any]] = {
    "sisa_ssmax": {"mixer": "sisa", "d_s": 8, "ssmax": 40, "n_kv_heads": 2},
    "attention_ssmax": {"mixer": "attention", "ssmax": 40},
    "no_decay": {"mixer": "sisa", "d_s": 8, "sisa": {"decay": False}},
    "no_rotation": {"mixer": "sisa", "d_s": 8, "sisa": {"rotation": False}, "n_kv_heads": 2},
    "bilinear": {"mixer": "sisa", "d_s": 8, "sisa": {"decay": False, "rotation": False}},
    "sigmoid_sisa": {"mixer": "sigmoid_sisa", "d_s": 8, "n_kv_heads": 2},
    "fox_pro": {"mixer": "fox", "fox": {"pro": True}, "n_kv_heads": 2},
    "fox": {"mixer": "fox"},
    "ssm_gated": {"mixer": "sisa", "d_s": 8, "ffn": "ssm_gated", "n_kv_heads": 2},
}
CASES: dict[str, dict[str, Any]] = {"sisa": {"mixer": "sisa", "d_s": 8}, "attention": {"mixer": "attention"}, **RIVALS}

# What sets how fast a mixer forgets, by the end of its name: the values for 1e-4, 0.7 and 3 nats a token.
STRENGTHS = ("weak", "medium", "strong")
DECAY_BIASES = {"decay.bias": (-9.0, 0.0, 3.0), "forget.bias": (9.0, 0.0, -3.0)}
LEAF = 8  # several levels of the bisection within a short sequence

Strength = Literal["initial", "weak", "medium", "strong"]


def mixer_of(name: str) -> str:
    return CASES[name]["mixer"]


def config_of(name: str, **changes: Any) -> ModelConfig:
    return ModelConfig(**(BASE | CASES[name] | changes))


def model_of(
    name: str,
    strength: Strength = "initial",
    *,
    path: Any = "auto",
    dtype: torch.dtype = torch.float64,
    **changes: Any,
) -> LM:
    """The case's model; bf16 as the engines have it, what they keep in fp32 kept so. `changes` to its config."""
    model = build_model(config_of(name, **changes), attention=AttentionConfig(path=path, leaf=LEAF), seed=1)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            # Gains, biases, scalars and what starts at 0 are all alike in a new model, which hides mistakes.
            if parameter.ndim < 2 or not parameter.any():
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
            for end, values in DECAY_BIASES.items():
                if parameter_name.endswith(end) and strength != "initial":
                    parameter.fill_(values[STRENGTHS.index(strength)])
    if dtype == torch.bfloat16:
        compute_in(model, dtype)
        return model
    return model.to(dtype)


def forgets(name: str) -> bool:
    """Whether it has a decay whose strength can be set."""
    with torch.device("meta"):
        parameters = dict(build_model(config_of(name)).named_parameters())
    return any(path.endswith(tuple(DECAY_BIASES)) for path in parameters)


every_mixer = pytest.mark.parametrize("name", CASES)
every_mixer_and_decay = pytest.mark.parametrize(
    ("name", "strength"),
    [(name, s) for name in CASES for s in (("weak", "initial", "strong") if forgets(name) else ("initial",))],
)
