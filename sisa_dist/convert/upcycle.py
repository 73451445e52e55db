"""A trained Transformer becomes a SISA model that computes the same function, ready for continued pretraining.

The score gains λ·e^{g_i − g_j}·C_iᵀR(Φ_j − Φ_i)B_j, which is exactly zero while W_B = 0. Its gradient with respect to
W_B is not, since C, the decay, θ and λ start as in a new model; theirs is zero until B has moved, one step later. The
other way round, a small λ, would hardly move: behind the softplus its gradient is small where λ is. The MLP keeps its
width: the model grows by what the term costs.
"""

from __future__ import annotations

import functools

import torch

from sisa_dist.config import ModelConfig, UserError
from sisa_dist.convert.families import model_of, parameter_shapes
from sisa_dist.convert.recipe import Recipe
from sisa_dist.model import build_model
from sisa_dist.model.init import Constant, init_rule, initial_value


def upcycle(model: ModelConfig, *, d_s: int | list[int]) -> ModelConfig:
    """The SISA model that `recipes` fills. d_s: SSM channels per head, one or one per layer (0: stays as it is).

    Raises UserError where `model` has other layers than attention, or d_s does not fit it.
    """
    for other in sorted(set(model.layer_mixers) - {"attention"}):
        already = " already" if other == "sisa" else ""
        raise UserError(f"model.mixer has {other} layers{already}: only a Transformer is upcycled")
    mixer = ["sisa" if channels else "attention" for channels in d_s] if isinstance(d_s, list) else "sisa"
    return model_of(model.model_dump() | {"mixer": mixer, "d_s": d_s}, source="upcycling")


def recipes(model: ModelConfig, *, d_s: int | list[int], seed: int = 0) -> dict[str, Recipe]:
    """Every tensor of `upcycle(model, d_s=d_s)`, over the names of `model`: what it has is kept, W_B is 0, and the rest
    starts as in a new model of this seed."""
    grown = upcycle(model, d_s=d_s)
    kept = parameter_shapes(model)
    with torch.device("meta"):
        built = build_model(grown)
    made: dict[str, Recipe] = {}
    for name, parameter in built.state_dict().items():
        if name in kept:
            made[name] = Recipe((name,))
            continue
        owner, _, leaf = name.rpartition(".")
        rule = init_rule(built.get_submodule(owner), leaf, std=grown.init_std)
        if owner.endswith("mixer.wb"):
            rule = Constant(0.0)
        made[name] = Recipe((), functools.partial(initial_value, rule, name, parameter.shape, seed=seed))
    return made
