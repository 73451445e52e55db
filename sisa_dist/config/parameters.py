"""Which keys of a model decide its parameters, and which only what is computed from them.

A checkpoint goes on into another model of the same parameters; a stage of a run may change the others.
"""

from __future__ import annotations

from typing import Any

from sisa_dist.config.experts import TRAINING_KEYS
from sisa_dist.config.model import ModelConfig

# Keys of ModelConfig that leave names and shapes of parameters alone: a new stage may change them, and it is said.
FUNCTION_KEYS = ("init_std", "log_alpha_min", "norm_eps", "rope_theta")


def computed(model: ModelConfig) -> dict[str, Any]:
    """What the model computes from its weights, and which it has: all keys but those that only training reads."""
    return model.model_dump(exclude={"moe": set(TRAINING_KEYS)} if model.moe is not None else None)


def other_parameters(old: ModelConfig, new: ModelConfig) -> str | None:
    """The first key by which `new` has other parameters than `old`; None: they have the same."""
    before, after = computed(old), computed(new)
    return next((key for key in after if key not in FUNCTION_KEYS and before[key] != after[key]), None)


def other_function(old: ModelConfig, new: ModelConfig) -> list[str]:
    """Keys by which `new` computes something else from the parameters of `old`."""
    return [key for key in FUNCTION_KEYS if key != "init_std" and getattr(old, key) != getattr(new, key)]
