"""A dense model becomes a mixture of experts that computes the same function (Komatsuzaki et al. 2022).

Every expert is a copy of its layer's MLP, and the weights of a token's experts sum to 1, so whom the router chooses
does not matter at step 0; it starts as in a new model, and the experts part because they see different tokens. A router
of zeros would send all tokens to the same experts.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from sisa_dist.config import ModelConfig, UserError
from sisa_dist.convert.families import model_of
from sisa_dist.convert.recipe import Recipe
from sisa_dist.model import build_model
from sisa_dist.model.init import init_rule, initial_value

_EXPERTS = {"experts.gate": "gate.weight", "experts.up": "up.weight", "experts.down": "down.weight"}


def upcycle_experts(model: ModelConfig, *, experts: int, top_k: int) -> ModelConfig:
    """The mixture that `expert_recipes` fills: every SwiGLU becomes `experts` of the same width.

    Raises UserError where a layer has another MLP, or the numbers do not fit.
    """
    if not set(model.layer_mlps) <= {"swiglu", "none"} or model.mlp_bias or not model.dense_d_ff:
        raise UserError("model.mlp is not SwiGLU without biases in every layer: only that becomes a mixture of experts")
    if top_k == 1 and experts > 1:
        raise UserError(
            "one expert a token has weight 1 whatever the router says, which then would not learn: give at least 2"
        )
    mlps = ["moe" if mlp == "swiglu" else "none" for mlp in model.layer_mlps]
    mixture = {"mlp": mlps if "none" in mlps else "moe", "moe": {"experts": experts, "top_k": top_k}}
    return model_of(model.model_dump() | mixture, source="upcycling")


def expert_recipes(model: ModelConfig, *, experts: int, top_k: int, seed: int = 0) -> dict[str, Recipe]:
    """Every tensor of `upcycle_experts(model, …)`, over the names of `model`."""
    mixture = upcycle_experts(model, experts=experts, top_k=top_k)
    with torch.device("meta"):
        built = build_model(mixture)
    copies = functools.partial(_copies, experts=experts)
    made: dict[str, Recipe] = {}
    for name, tensor in built.state_dict().items():
        owner, _, leaf = name.rpartition(".")
        block, mlp, inside = name.partition(".mlp.")
        if inside in _EXPERTS:
            made[name] = Recipe((f"{block}{mlp}{_EXPERTS[inside]}",), copies)
        elif inside:
            rule = init_rule(built.get_submodule(owner), leaf, std=mixture.init_std)
            made[name] = Recipe((), functools.partial(initial_value, rule, name, tensor.shape, seed=seed))
        else:
            made[name] = Recipe((name,))
    return made


def _copies(weight: Tensor, *, experts: int) -> Tensor:
    """[E, in, out] of a Linear's [out, in]."""
    return weight.t().expand(experts, *weight.t().shape).contiguous()
