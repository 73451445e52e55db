"""A small model of every mixer and of every variant of it that has parameters or paths of its own.

tests/model/test_mixers.py and test_document_isolation.py take every case, the grid of
tests/distributed/test_grid_rivals.py those of the rivals. A mixer of MIXERS without a case fails test_mixers.py.
"""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from sisa_dist.config import AttentionConfig, ModelConfig
from sisa_dist.engine.compute_dtype import compute_in
from sisa_dist.model import LM, build_model
from sisa_dist.model.meta import at_tokens, with_meta_tokens

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
_SSM = {"head_dim": 16, "d_state": 12, "chunk": 16}  # 4 heads, of expand 2
_CHANNELS = {"d_state": 6, "chunk": 16}
RIVALS: dict[str, dict[str, Any]] = {
    "sisa_ssmax": {"mixer": "sisa", "d_s": 8, "ssmax": 40, "n_kv_heads": 2},
    "attention_ssmax": {"mixer": "attention", "ssmax": 40},
    "no_decay": {"mixer": "sisa", "d_s": 8, "sisa": {"decay": False}},
    "no_rotation": {"mixer": "sisa", "d_s": 8, "sisa": {"rotation": False}, "n_kv_heads": 2},
    "bilinear": {"mixer": "sisa", "d_s": 8, "sisa": {"decay": False, "rotation": False}},
    "sigmoid_sisa": {"mixer": "sigmoid_sisa", "d_s": 8, "n_kv_heads": 2},
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
    "fox_pro": {"mixer": "fox", "fox": {"pro": True}, "n_kv_heads": 2},
    "fox": {"mixer": "fox"},
    "learned_d_s": {"mixer": "sisa", "d_s": {"learned": True, "max": 8, "budget": 4.0}, "n_kv_heads": 2},
    "ssm_gated": {"mixer": "sisa", "d_s": 8, "ffn": "ssm_gated", "n_kv_heads": 2},
}
CASES: dict[str, dict[str, Any]] = {"sisa": {"mixer": "sisa", "d_s": 8}, "attention": {"mixer": "attention"}, **RIVALS}

# What sets how fast a mixer forgets, by the end of its name: the values for 1e-4, 0.7 and 3 nats a token.
STRENGTHS = ("weak", "medium", "strong")
DECAY_BIASES = {"decay.bias": (-9.0, 0.0, 3.0), "forget.bias": (9.0, 0.0, -3.0), "rates.dt_bias": (-9.0, -1.0, 3.0)}
LEAF = 8  # several levels of the bisection within a short sequence

Strength = Literal["initial", "weak", "medium", "strong"]


def mixers_of(name: str) -> list[str]:
    """In the order of its layers; the first is what the case is of."""
    found = CASES[name]["mixer"]
    return [found] if isinstance(found, str) else found


def mixer_of(name: str) -> str:
    return mixers_of(name)[0]


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
        if model.gates is not None:
            model.gates.share.fill_(0.3)  # before, and without noise, all are open and have no gradient
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


def logits_and_embedding(model: LM, tokens: Tensor, doc_ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Logits, and the embedded tokens [B, T, d_model] as a leaf of their graph; meta tokens are not among them."""
    seen: list[Tensor] = []
    count, first = model.config.meta_tokens, model.config.vocab_size
    prefixed = with_meta_tokens(tokens, doc_ids, count=count, first_id=first) if count else None

    def keep(module: Any, arguments: Any, output: Tensor) -> Tensor:
        output = output.detach()
        seen.append((output if prefixed is None else at_tokens(output, prefixed)).requires_grad_())
        if prefixed is None:
            return seen[0]
        return output.scatter(1, prefixed.places[..., None].expand_as(seen[0]), seen[0])

    handle = model.embed.register_forward_hook(keep)
    logits = model(tokens, doc_ids_BT=doc_ids)
    handle.remove()
    return logits, seen[0]


def forgets(name: str) -> bool:
    """Whether it has a decay whose strength can be set."""
    with torch.device("meta"):
        parameters = dict(build_model(config_of(name)).named_parameters())
    return any(path.endswith(tuple(DECAY_BIASES)) for path in parameters)


# What costs seconds a case runs on these; the further variants are slow.
FIRST = {mixer_of(name): name for name in reversed(CASES)}
every_mixer = pytest.mark.parametrize("name", CASES)
first_of_every_mixer = pytest.mark.parametrize(
    "name", [name if name in FIRST.values() else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
every_mixer_and_decay = pytest.mark.parametrize(
    ("name", "strength"),
    [(name, s) for name in CASES for s in (("weak", "initial", "strong") if forgets(name) else ("initial",))],
)
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
