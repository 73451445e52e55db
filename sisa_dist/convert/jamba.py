"""Jamba models of Hugging Face (`JambaForCausalLM`): our `mamba` and `attention` in a pattern, experts in another, and
back.

Their attention has no positions; RMSNorms stand on the dt, B and C of their Mamba layers. Their fused projection is x
and z, in this order of rows. Their experts are a matrix each, [out, in], ours one tensor [experts, in, out].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sisa_dist.config import ModelConfig, UserError
from sisa_dist.convert.families import Fields, parameter_shapes, refuse, renamed, translated
from sisa_dist.convert.fused import cut, joined
from sisa_dist.convert.recipe import Recipe

MODEL_TYPES = ("jamba",)
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"  # a tied one may be stored too

_WHOLE = {"embed.weight": EMBEDDING, "norm.weight": "model.final_layernorm.weight", "head.weight": HEAD}
_BLOCK = {
    "norm1.weight": "input_layernorm.weight",
    "norm2.weight": "pre_ff_layernorm.weight",
    **{f"mlp.{name}.weight": f"feed_forward.{name}_proj.weight" for name in ("gate", "up", "down")},
    **{f"mixer.w{name}.weight": f"self_attn.{name}_proj.weight" for name in "qkvo"},
    "mlp.router.weight": "feed_forward.router.weight",
    "mixer.wselect.weight": "mamba.x_proj.weight",
    "mixer.wdt.weight": "mamba.dt_proj.weight",
    "mixer.rates.dt_bias": "mamba.dt_proj.bias",
    "mixer.rates.A_log": "mamba.A_log",
    "mixer.skip.D": "mamba.D",
    "mixer.conv_x.weight": "mamba.conv1d.weight",
    "mixer.conv_x.bias": "mamba.conv1d.bias",
    "mixer.dt_norm.weight": "mamba.dt_layernorm.weight",
    "mixer.B_norm.weight": "mamba.b_layernorm.weight",
    "mixer.C_norm.weight": "mamba.c_layernorm.weight",
    "mixer.wout.weight": "mamba.out_proj.weight",
}
_EXPERTS = {f"mlp.experts.{name}": f"feed_forward.experts.%d.{name}_proj.weight" for name in ("gate", "up", "down")}
_FUSED, _PARTS = "mamba.in_proj.weight", ("mixer.wx.weight", "mixer.wz.weight")


def read_config(hf_config: Mapping[str, Any]) -> ModelConfig:
    """Our model of a config.json. Raises UserError naming what ours cannot be."""
    fields = Fields(hf_config)
    if fields.family not in MODEL_TYPES:
        raise UserError(f"config.json: model_type {fields.family!r} is not one of {', '.join(MODEL_TYPES)}")
    fields.only("hidden_act", "silu", "swish")
    fields.only("mamba_conv_bias", True)
    fields.only("mamba_proj_bias", False)
    fields.only("quantization_config")
    layers = fields.need("num_hidden_layers")
    width, heads = fields.need("hidden_size"), fields.need("num_attention_heads")
    mlps = _mlps(fields, layers)
    period, offset = fields.get("attn_layer_period", 8), fields.get("attn_layer_offset", 4)
    rank = None if hf_config.get("mamba_dt_rank", "auto") == "auto" else fields.need("mamba_dt_rank")
    mixers = ["attention" if layer % period == offset else "mamba" for layer in range(layers)]
    with_mamba = dict(
        ssm=dict(
            d_state=fields.get("mamba_d_state", 16),
            expand=fields.get("mamba_expand", 2),
            conv=fields.get("mamba_d_conv", 4),
        ),
        mamba=dict(norms=True, dt_rank=rank),
    )
    kv_heads = fields.get("num_key_value_heads", heads if "num_key_value_heads" in fields else 8)
    return fields.model(
        vocab_size=fields.need("vocab_size"),
        d_model=width,
        n_layers=layers,
        n_heads=heads,
        n_kv_heads=None if kv_heads == heads else kv_heads,
        d_ff=fields.need("intermediate_size"),
        mixer=mixers,
        rotary_fraction=0.0,
        norm_eps=fields.get("rms_norm_eps", 1e-6),
        tie_embeddings=fields.get("tie_word_embeddings", False),
        init_std=fields.get("initializer_range", 0.02),
        mlp=mlps,
        moe=_experts(fields) if "moe" in mlps else None,
        **(with_mamba if "mamba" in mixers else {}),
    )


def _mlps(fields: Fields, layers: int) -> str | list[str]:
    if fields.get("num_experts", 16) == 1:
        return "swiglu"
    period, offset = fields.get("expert_layer_period", 2), fields.get("expert_layer_offset", 1)
    return ["moe" if layer % period == offset else "swiglu" for layer in range(layers)]


def _experts(fields: Fields) -> dict[str, Any]:
    weight = fields.get("router_aux_loss_coef", 0.001)
    return {
        "experts": fields.get("num_experts", 16),
        "top_k": fields.get("num_experts_per_tok", 2),
        "normalise_top_k": False,
        "balance": "loss" if weight else "none",
        "balance_weight": weight or None,
    }


def write_config(model: ModelConfig) -> dict[str, Any]:
    """A config.json for transformers. Raises UserError where no Jamba model is `model`."""
    if set(model.layer_mixers) != {"mamba", "attention"} or not model.mamba_options.norms:
        raise UserError("model.mixer: a Jamba model has mamba layers with mamba.norms, and attention: no such export")
    same = dict(norm="rmsnorm", rotary_fraction=0.0, qk_norm=False, attention_bias="none", parallel_residual=False)
    refuse("Jamba", model, **same, mlp_bias=False)
    if not set(model.layer_mlps) <= {"swiglu", "moe"}:
        raise UserError("model.mlp: a Jamba model has swiglu or moe in every layer: no such export")
    if model.ssm_width % model.d_model or model.width_per_head * model.n_heads != model.d_model:
        raise UserError(
            f"model.ssm and model.head_dim: {model.ssm_width} channels and heads of {model.width_per_head} are no "
            "multiple and no part of d_model: transformers has no such Jamba"
        )
    period, offset = _pattern([mixer == "attention" for mixer in model.layer_mixers], "model.mixer: attention")
    return {
        "architectures": ["JambaForCausalLM"],
        "model_type": "jamba",
        "vocab_size": model.vocab_size,
        "hidden_size": model.d_model,
        "intermediate_size": model.d_ff,
        "num_hidden_layers": model.n_layers,
        "num_attention_heads": model.n_heads,
        "num_key_value_heads": model.kv_heads,
        "attn_layer_period": period,
        "attn_layer_offset": offset,
        **_expert_keys(model),
        "mamba_d_state": model.state_space.d_state,
        "mamba_d_conv": model.state_space.conv,
        "mamba_expand": model.ssm_width // model.d_model,
        "mamba_dt_rank": model.dt_rank,
        "mamba_conv_bias": True,
        "mamba_proj_bias": False,
        "hidden_act": "silu",
        "rms_norm_eps": model.norm_eps,
        "attention_dropout": 0.0,
        "tie_word_embeddings": model.tie_embeddings,
        "initializer_range": model.init_std,
    }


def _expert_keys(model: ModelConfig) -> dict[str, Any]:
    if model.moe is None:
        return {"num_experts": 1, "num_experts_per_tok": 1}
    if model.experts == 1:
        raise UserError("model.moe.experts is 1, and a Jamba model then has a plain MLP: no such export")
    for key, wanted in (("shared", 0), ("scores", "softmax"), ("normalise_top_k", False)):
        if getattr(model.moe, key) != wanted:
            raise UserError(
                f"model.moe.{key} is {getattr(model.moe, key)!r} and a Jamba model has {wanted!r}: no such export"
            )
    if model.moe.balance == "bias" or model.expert_d_ff != model.d_ff:
        raise UserError(
            "model.moe: a Jamba model has experts as wide as its MLPs and no bias on the choice: no such export"
        )
    period, offset = _pattern([mlp == "moe" for mlp in model.layer_mlps], "model.mlp: moe")
    return {
        "num_experts": model.experts,
        "num_experts_per_tok": model.moe.top_k,
        "expert_layer_period": period,
        "expert_layer_offset": offset,
        "router_aux_loss_coef": model.moe.loss_weights[0],
    }


def imports(model: ModelConfig) -> dict[str, Recipe]:
    """Our tensors from theirs, for a model that `read_config` made."""
    recipes = {}
    for ours in parameter_shapes(model):
        inside = ours.split(".", 2)[-1]
        if inside in _PARTS:
            theirs = _theirs(ours)
            rows = dict.fromkeys(_PARTS, model.ssm_width)
            recipes[ours] = Recipe((theirs,), cut(theirs, rows, inside))
        elif inside == "mixer.conv_x.weight":
            recipes[ours] = Recipe((_theirs(ours),), lambda weight: weight.squeeze(1))
        elif inside == "mixer.rates.A_log":
            recipes[ours] = Recipe((_theirs(ours),), Tensor.flatten)
        elif inside in _EXPERTS:
            names = tuple(_theirs(ours) % expert for expert in range(model.experts))
            recipes[ours] = Recipe(names, lambda *experts: torch.stack([weight.mT for weight in experts]))
        else:
            recipes[ours] = renamed(ours, _theirs(ours), model, export=False)
    return recipes


def exports(model: ModelConfig) -> dict[str, Recipe]:
    """Their tensors from ours, for a model that `write_config` takes."""
    recipes, d_state = {}, model.state_space.d_state
    for ours in parameter_shapes(model):
        inside = ours.split(".", 2)[-1]
        if inside == _PARTS[0]:
            block = ours.removesuffix(inside)
            recipes[_theirs(ours)] = Recipe(tuple(block + part for part in _PARTS), joined())
        elif inside == "mixer.conv_x.weight":
            recipes[_theirs(ours)] = Recipe((ours,), joined(convolution=True))
        elif inside == "mixer.rates.A_log":
            recipes[_theirs(ours)] = Recipe((ours,), lambda vector: vector.unflatten(0, (-1, d_state)))
        elif inside in _EXPERTS:
            for expert in range(model.experts):
                recipes[_theirs(ours) % expert] = Recipe((ours,), lambda tensor, expert=expert: tensor[expert].mT)
        elif inside not in _PARTS:
            recipes[_theirs(ours)] = renamed(ours, _theirs(ours), model, export=True)
    return recipes


def dropped(model: ModelConfig) -> frozenset[str]:
    """Names that may stand in a checkpoint and are no parameters: a tied head."""
    return frozenset({HEAD} if model.tie_embeddings else ())


def _theirs(ours: str) -> str:
    return translated(
        ours, whole=_WHOLE, blocks="model.layers", block=_BLOCK | _EXPERTS | dict.fromkeys(_PARTS, _FUSED)
    )


def _pattern(chosen: list[bool], what: str) -> tuple[int, int]:
    """(period, offset) of the chosen layers, as a Jamba says where they are."""
    found = [layer for layer, here in enumerate(chosen) if here]
    for period in range(1, len(chosen) + 2):
        for offset in range(period):
            if found == list(range(offset, len(chosen), period)):
                return period, offset
    raise UserError(f"{what} at layers {found} is no Jamba pattern, which repeats: no such export")
