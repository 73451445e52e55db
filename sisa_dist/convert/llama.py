"""Llama-style Transformers of Hugging Face, to our `attention` mixer and back: Llama, Mistral, Qwen2, Qwen3.

One block, four names: RMSNorm, RoPE on whole heads, grouped-query heads, SwiGLU. Qwen2 has biases on q, k and v; Qwen3
a norm on q and k. Tensors keep their shapes and bits: we pair RoPE's channels as transformers does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sisa_dist.config import ModelConfig, UserError
from sisa_dist.convert.families import Fields, parameter_shapes, refuse, refuse_mixers, renamed, translated
from sisa_dist.convert.recipe import Recipe
from sisa_dist.convert.rope import read_rope, write_rope

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
HEAD, EMBEDDING = (
    "lm_head.weight",
    "model.embed_tokens.weight",
)  # a tied one may be stored too

_WHOLE = {
    "embed.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
_BLOCK = {
    "norm1.weight": "input_layernorm.weight",
    "norm2.weight": "post_attention_layernorm.weight",
    "mixer.q_norm.weight": "self_attn.q_norm.weight",
    "mixer.k_norm.weight": "self_attn.k_norm.weight",
}
for _ours, _theirs in (
    ("mixer.wq", "self_attn.q_proj"),
    ("mixer.wk", "self_attn.k_proj"),
    ("mixer.wv", "self_attn.v_proj"),
    ("mixer.wo", "self_attn.o_proj"),
    ("mlp.gate", "mlp.gate_proj"),
    ("mlp.up", "mlp.up_proj"),
    ("mlp.down", "mlp.down_proj"),
):
    _BLOCK |= {f"{_ours}.{kind}": f"{_theirs}.{kind}" for kind in ("weight", "bias")}


def read_config(hf_config: Mapping[str, Any]) -> ModelConfig:
    """Our model of a config.json of transformers 4 or 5. Raises UserError naming what ours cannot be."""
    fields = Fields(hf_config)
    family = fields.family
    if family not in MODEL_TYPES:
        raise UserError(f"config.json: model_type {family!r} is not one of {', '.join(MODEL_TYPES)}")
    fields.only("hidden_act", "silu", "swish")
    fields.only("attention_dropout", 0, 0.0)
    fields.only("quantization_config")
    _refuse_window(fields)
    rope = read_rope(fields, theta_key="rope_theta", fraction_key="partial_rotary_factor", fraction=1.0)
    if rope.fraction != 1.0:
        raise UserError(f"config.json: partial_rotary_factor {rope.fraction} in a {family} model, whose RoPE is whole")
    width, heads = fields.need("hidden_size"), fields.need("num_attention_heads")
    # What transformers takes where the key is absent; the oldest Llama configs have neither.
    kv_heads = fields.get("num_key_value_heads", heads) if family == "llama" else fields.need("num_key_value_heads")
    head_dim = fields.need("head_dim") if family == "qwen3" else fields.get("head_dim", None, int)
    everywhere = family in ("llama", "qwen3") and fields.get("attention_bias", False)
    return fields.model(
        vocab_size=fields.need("vocab_size"),
        d_model=width,
        n_layers=fields.need("num_hidden_layers"),
        n_heads=heads,
        n_kv_heads=None if kv_heads == heads else kv_heads,
        head_dim=None if head_dim is None or head_dim * heads == width else head_dim,
        d_ff=fields.need("intermediate_size"),
        mixer="attention",
        rope_theta=rope.theta,
        rope_scaling=rope.scaling,
        norm_eps=fields.get("rms_norm_eps", 1e-6),
        qk_norm=family == "qwen3",
        attention_bias="all" if everywhere else "qkv" if family == "qwen2" else "none",
        mlp_bias=family == "llama" and fields.get("mlp_bias", False),
        tie_embeddings=fields.get("tie_word_embeddings", False),
        init_std=fields.get("initializer_range", 0.02),
    )


def write_config(model: ModelConfig, *, max_positions: int = 2048) -> dict[str, Any]:
    """A config.json for transformers 4 and 5. Raises UserError where no model of this family is `model`.

    `max_positions`: the context it is said to have. The function of the model depends on it in dynamic RoPE scaling
    alone, which has its own.
    """
    refuse_mixers("Llama-style", model)
    same = dict(norm="rmsnorm", mlp="swiglu", ffn="sequential", parallel_residual=False, rotary_fraction=1.0)
    refuse("Llama-style", model, **same)
    if model.d_model % model.n_heads:
        raise UserError(
            f"model.n_heads {model.n_heads} does not divide d_model {model.d_model}: transformers refuses it"
        )
    family, name, biases = (
        "llama",
        "LlamaForCausalLM",
        {"attention_bias": model.output_bias, "mlp_bias": model.mlp_bias},
    )
    if model.qk_norm:
        refuse("Qwen3", model, mlp_bias=False)
        refuse("Qwen3", model, attention_bias="all" if model.output_bias else "none")
        family, name, biases = "qwen3", "Qwen3ForCausalLM", {"attention_bias": model.output_bias}
    elif model.attention_bias == "qkv":
        refuse("Qwen2", model, mlp_bias=False)
        family, name, biases = "qwen2", "Qwen2ForCausalLM", {}
    return {
        "architectures": [name],
        "model_type": family,
        "vocab_size": model.vocab_size,
        "hidden_size": model.d_model,
        "intermediate_size": model.d_ff,
        "num_hidden_layers": model.n_layers,
        "num_attention_heads": model.n_heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.width_per_head,
        "hidden_act": "silu",
        "max_position_embeddings": max_positions,
        "rms_norm_eps": model.norm_eps,
        **write_rope(model),
        "attention_dropout": 0.0,
        "tie_word_embeddings": model.tie_embeddings,
        "initializer_range": model.init_std,
        **biases,
    }


def imports(model: ModelConfig) -> dict[str, Recipe]:
    """Our tensors from theirs, for a model that `read_config` made."""
    return {ours: renamed(ours, theirs, model, export=False) for ours, theirs in _names(model).items()}


def exports(model: ModelConfig) -> dict[str, Recipe]:
    """Their tensors from ours, for a model that `write_config` takes."""
    return {theirs: renamed(ours, theirs, model, export=True) for ours, theirs in _names(model).items()}


def dropped(model: ModelConfig) -> frozenset[str]:
    """Names that may stand in a checkpoint and are no parameters: RoPE's frequencies in old ones, a tied head."""
    frequencies = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq" for layer in range(model.n_layers)}
    return frozenset(frequencies | ({"lm_head.weight"} if model.tie_embeddings else set()))


def _names(model: ModelConfig) -> dict[str, str]:
    return {
        name: translated(name, whole=_WHOLE, blocks="model.layers", block=_BLOCK) for name in parameter_shapes(model)
    }


def _refuse_window(fields: Fields) -> None:
    """Attention to the last `sliding_window` tokens alone; one as long as the context leaves out nothing."""
    if fields.family == "mistral":
        window = (
            fields.get("sliding_window", None, int) if "sliding_window" in fields else 4096
        )  # transformers' default
    else:
        window = fields.get("sliding_window", None, int) if fields.get("use_sliding_window", False) else None
    if window is not None and window < fields.need("max_position_embeddings"):
        raise UserError(
            f"config.json: sliding_window {window} is shorter than max_position_embeddings "
            f"{fields.need('max_position_embeddings')}, and our attention has no window: where no sequence will be "
            f"longer than {window}, set sliding_window to null in config.json"
        )
    if window is None and "sliding_attention" in fields.get("layer_types", []):
        raise UserError("config.json: layer_types has sliding_attention, and our attention has no window")
