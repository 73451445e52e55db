"""GPT-NeoX-style Transformers of Hugging Face (Pythia, GPT-NeoX-20B), to our `attention` mixer and back.

LayerNorm, biases everywhere, exact GELU, RoPE on the first channels of a head, and the parallel residual. Their q, k
and v are one matrix, interleaved by head ([H, 3, d_h] rows); ours are three, because a fused one is cut wrongly by tp.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from sisa_dist.config import ModelConfig, UserError
from sisa_dist.convert.families import Fields, parameter_shapes, refuse, refuse_mixers, renamed, translated
from sisa_dist.convert.recipe import Recipe
from sisa_dist.convert.rope import read_rope, write_rope

MODEL_TYPES = ("gpt_neox",)
HEAD, EMBEDDING = (
    "embed_out.weight",
    "gpt_neox.embed_in.weight",
)  # a tied one may be stored too

_WHOLE = {
    "embed.weight": "gpt_neox.embed_in.weight",
    "norm.weight": "gpt_neox.final_layer_norm.weight",
    "norm.bias": "gpt_neox.final_layer_norm.bias",
    "head.weight": "embed_out.weight",
}
_BLOCK = {
    f"{ours}.{kind}": f"{theirs}.{kind}"
    for ours, theirs in (
        ("norm1", "input_layernorm"),
        ("norm2", "post_attention_layernorm"),
        ("mixer.wo", "attention.dense"),
        ("mlp.up", "mlp.dense_h_to_4h"),
        ("mlp.down", "mlp.dense_4h_to_h"),
    )
    for kind in ("weight", "bias")
}
_FUSED = ("mixer.wq", "mixer.wk", "mixer.wv")


def read_config(hf_config: Mapping[str, Any]) -> ModelConfig:
    """Our model of a config.json of transformers 4 or 5. Raises UserError naming what ours cannot be."""
    fields = Fields(hf_config)
    if fields.family not in MODEL_TYPES:
        raise UserError(f"config.json: model_type {fields.family!r} is not gpt_neox")
    fields.only("hidden_act", "gelu")
    for key in ("attention_dropout", "hidden_dropout"):
        fields.only(key, 0, 0.0)
    fields.only("quantization_config")
    rope = read_rope(fields, theta_key="rotary_emb_base", fraction_key="rotary_pct", fraction=0.25)
    return fields.model(
        vocab_size=fields.need("vocab_size"),
        d_model=fields.need("hidden_size"),
        n_layers=fields.need("num_hidden_layers"),
        n_heads=fields.need("num_attention_heads"),
        d_ff=fields.need("intermediate_size"),
        mixer="attention",
        rope_theta=rope.theta,
        rope_scaling=rope.scaling,
        rotary_fraction=rope.fraction,
        norm="layernorm",
        norm_eps=fields.get("layer_norm_eps", 1e-5),
        attention_bias="all" if fields.get("attention_bias", True) else "none",
        mlp="gelu",
        mlp_bias=True,
        parallel_residual=fields.get("use_parallel_residual", True),
        tie_embeddings=fields.get("tie_word_embeddings", False),
        init_std=fields.get("initializer_range", 0.02),
    )


def write_config(model: ModelConfig, *, max_positions: int = 2048) -> dict[str, Any]:
    """A config.json for transformers 4 and 5. Raises UserError where no GPT-NeoX model is `model`.

    `max_positions`: the context it is said to have. The function of the model depends on it in dynamic RoPE scaling
    alone, which has its own.
    """
    refuse_mixers("GPT-NeoX", model)
    refuse("GPT-NeoX", model, norm="layernorm", mlp="gelu", mlp_bias=True, qk_norm=False, kv_heads=model.n_heads)
    refuse("GPT-NeoX", model, attention_bias="all" if model.output_bias else "none")
    if model.width_per_head * model.n_heads != model.d_model:
        raise UserError(f"model.head_dim {model.head_dim} × n_heads {model.n_heads} is not d_model {model.d_model}")
    return {
        "architectures": ["GPTNeoXForCausalLM"],
        "model_type": "gpt_neox",
        "vocab_size": model.vocab_size,
        "hidden_size": model.d_model,
        "intermediate_size": model.d_ff,
        "num_hidden_layers": model.n_layers,
        "num_attention_heads": model.n_heads,
        "hidden_act": "gelu",
        "max_position_embeddings": max_positions,
        "layer_norm_eps": model.norm_eps,
        "rotary_pct": model.rotary_fraction,
        **write_rope(model, theta_key="rotary_emb_base", whole=False),
        "attention_bias": model.output_bias,
        "use_parallel_residual": model.parallel_residual,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "tie_word_embeddings": model.tie_embeddings,
        "initializer_range": model.init_std,
    }


def imports(model: ModelConfig) -> dict[str, Recipe]:
    """Our tensors from theirs, for a model that `read_config` made."""
    recipes = {}
    for ours in parameter_shapes(model):
        place = _fused_place(ours)
        if place is None:
            recipes[ours] = renamed(ours, _theirs(ours), model, export=False)
        else:
            recipes[ours] = Recipe((_fused_name(ours),), _unfuse(model.n_heads, place))
    return recipes


def exports(model: ModelConfig) -> dict[str, Recipe]:
    """Their tensors from ours, for a model that `write_config` takes."""
    recipes = {}
    for ours in parameter_shapes(model):
        place = _fused_place(ours)
        if place is None:
            recipes[_theirs(ours)] = renamed(ours, _theirs(ours), model, export=True)
        elif place == 0:
            sources = tuple(ours.replace(_FUSED[0], part) for part in _FUSED)
            recipes[_fused_name(ours)] = Recipe(sources, _fuse(model.n_heads))
    return recipes


def dropped(model: ModelConfig) -> frozenset[str]:
    """Names that may stand in a checkpoint and are no parameters: masks and frequencies in old ones, a tied head."""
    buffers = ("bias", "masked_bias", "rotary_emb.inv_freq")
    names = {f"gpt_neox.layers.{layer}.attention.{name}" for layer in range(model.n_layers) for name in buffers}
    return frozenset(names | ({"embed_out.weight"} if model.tie_embeddings else set()))


def _theirs(ours: str) -> str:
    return translated(ours, whole=_WHOLE, blocks="gpt_neox.layers", block=_BLOCK)


def _fused_place(ours: str) -> int | None:
    return next((place for place, part in enumerate(_FUSED) if f".{part}." in ours), None)


def _fused_name(ours: str) -> str:
    _, layer, _, _, kind = ours.split(".")
    return f"gpt_neox.layers.{layer}.attention.query_key_value.{kind}"


def _unfuse(n_heads: int, place: int) -> Callable[[Tensor], Tensor]:
    """[3·H·d_h, …] → [H·d_h, …] of q (0), k (1) or v (2)."""
    return lambda fused: fused.unflatten(0, (n_heads, 3, -1))[:, place].flatten(0, 1)


def _fuse(n_heads: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return lambda *qkv: torch.stack([part.unflatten(0, (n_heads, -1)) for part in qkv], 1).flatten(0, 2)
