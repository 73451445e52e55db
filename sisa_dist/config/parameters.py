"""Which keys of a model decide its parameters, and which only what is computed from them.

A checkpoint goes on into another model of the same parameters; a stage of a run may change the others.
"""

from __future__ import annotations

from typing import Any

from sisa_dist.config.experts import TRAINING_KEYS
from sisa_dist.config.learned import SCHEDULE_KEYS
from sisa_dist.config.mixers import SECTION_DEFAULTS, SECTIONS
from sisa_dist.config.model import ModelConfig, uses

# Keys of ModelConfig that leave names and shapes of parameters alone: a new stage may change them, and it is said.
FUNCTION_KEYS = ("init_std", "log_alpha_min", "norm_eps", "rope_scaling", "rope_theta")


def computed(model: ModelConfig) -> dict[str, Any]:
    """What the model computes from its weights, and which it has: all keys but those that only training reads. A
    section left out is one with its defaults."""
    tree = model.model_dump()
    for key in SECTIONS:
        if key in SECTION_DEFAULTS and uses(model, key):
            tree[key] = tree[key] or SECTION_DEFAULTS[key]().model_dump()
    for section, keys in (("moe", TRAINING_KEYS), ("ssm", ("chunk",)), ("d_s", SCHEDULE_KEYS)):
        if isinstance(tree[section], dict):
            tree[section] = {key: value for key, value in tree[section].items() if key not in keys}
    return tree


def other_parameters(old: ModelConfig, new: ModelConfig) -> str | None:
    """The first key by which `new` has other parameters than `old`; None: they have the same."""
    before, after = computed(old), computed(new)
    return next((key for key in after if key not in FUNCTION_KEYS and before[key] != after[key]), None)


def first_leaf(old: ModelConfig, new: ModelConfig, key: str) -> tuple[str, Any, Any]:
    """The first key inside model.`key` by which they differ, dotted, and both its values."""
    where, there, here = f"model.{key}", computed(old)[key], computed(new)[key]
    while isinstance(there, dict) and isinstance(here, dict):
        name = next(name for name in sorted(there.keys() | here.keys()) if there.get(name) != here.get(name))
        where, there, here = f"{where}.{name}", there.get(name), here.get(name)
    return where, there, here


def other_function(old: ModelConfig, new: ModelConfig) -> list[str]:
    """Keys by which `new` computes something else from the parameters of `old`."""
    return [key for key in FUNCTION_KEYS if key != "init_std" and getattr(old, key) != getattr(new, key)]
