"""SISA models as Hugging Face folders: the config and the names, both ways.

`modeling_sisa.py`, which travels with the weights, knows the mixers sisa and attention and one block. What else a
ModelConfig can say it cannot compute, so anything but the fields of `_KNOWN` must stand at its default.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from sisa_dist.config import ModelConfig, UserError
from sisa_dist.convert import hf_folder
from sisa_dist.convert.families import Fields, check_rows
from sisa_dist.convert.hf_folder import reference_logits
from sisa_dist.convert.recipe import Recipe
from sisa_dist.convert.rope import read_rope, write_rope

__all__ = ["MODEL_TYPES", "exports", "files", "imports", "read_config", "reference_logits", "write_config"]

MODEL_TYPES = ("sisa",)

# our field → theirs, where the value is the same on both sides
_SAME = {
    "vocab_size": "vocab_size",
    "vocab_multiple": "vocab_multiple",  # of no use there; kept so that an import pads as before
    "d_model": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "d_ff": "intermediate_size",
    "log_alpha_min": "log_alpha_min",
    "norm_eps": "rms_norm_eps",
    "qk_norm": "qk_norm",
    "tie_embeddings": "tie_word_embeddings",
    "init_std": "initializer_range",
}
_REALS = ("log_alpha_min", "norm_eps", "init_std")
_FLAGS = ("qk_norm", "tie_embeddings")
_OPTIONAL = ("vocab_multiple", "log_alpha_min")  # may be absent, or null
_KNOWN = {*_SAME, "rope_theta", "rope_scaling", "n_kv_heads", "head_dim", "mixer", "d_s"}
_MIXERS = {"sisa", "attention"}

_BLOCK = {
    "norm1.weight": "input_layernorm.weight",
    "norm2.weight": "post_attention_layernorm.weight",
    "mixer.wq.weight": "self_attn.q_proj.weight",
    "mixer.wk.weight": "self_attn.k_proj.weight",
    "mixer.wv.weight": "self_attn.v_proj.weight",
    "mixer.wo.weight": "self_attn.o_proj.weight",
    "mlp.gate.weight": "mlp.gate_proj.weight",
    "mlp.up.weight": "mlp.up_proj.weight",
    "mlp.down.weight": "mlp.down_proj.weight",
}
_QK_NORM = {"mixer.q_norm.weight": "self_attn.q_norm.weight", "mixer.k_norm.weight": "self_attn.k_norm.weight"}
_SISA = {
    "mixer.wc.weight": "self_attn.ssm_c_proj.weight",
    "mixer.wb.weight": "self_attn.ssm_b_proj.weight",
    "mixer.wtheta.weight": "self_attn.ssm_theta_proj.weight",
    "mixer.decay.weight": "self_attn.decay_proj.weight",
    "mixer.decay.bias": "self_attn.decay_proj.bias",
    "mixer.importance.lambda_raw": "self_attn.lambda_raw",
}


def write_config(model: ModelConfig) -> dict[str, Any]:
    """The config.json of `model`. Raises UserError naming the first setting that modeling_sisa.py does not know."""
    if model.learned_d_s:
        raise UserError("model.d_s is learned: make it a model of fixed d_s first, by tools/materialize_ds.py")
    for name, field in type(model).model_fields.items():
        value = getattr(model, name)
        if name not in _KNOWN and (field.is_required() or value != field.get_default(call_default_factory=True)):
            raise UserError(
                f"model.{name} is {value!r}, which the exported modeling_sisa.py cannot compute: export to another "
                "format, such as consolidated safetensors"
            )
    unknown = sorted(set(model.layer_mixers) - _MIXERS)
    if unknown:
        raise UserError(
            f"model.mixer {unknown[0]} is not one that the exported modeling_sisa.py can compute: export to another "
            "format, such as consolidated safetensors"
        )
    return {
        "model_type": "sisa",
        "architectures": ["SisaForCausalLM"],
        "auto_map": {
            "AutoConfig": "modeling_sisa.SisaConfig",
            "AutoModel": "modeling_sisa.SisaModel",
            "AutoModelForCausalLM": "modeling_sisa.SisaForCausalLM",
        },
        "dtype": "float32",
        **{theirs: getattr(model, ours) for ours, theirs in _SAME.items()},
        **write_rope(model),
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.width_per_head,
        "layer_d_s": model.layer_d_s,
    }


def read_config(hf_config: dict[str, Any]) -> ModelConfig:
    """The ModelConfig of a SISA config.json. Raises UserError where it says something else than one.

    Values that repeat a default (n_kv_heads = n_heads, one d_s for all layers) come back in their short form.
    """
    fields = Fields(hf_config)
    kinds = dict.fromkeys(_SAME, int) | dict.fromkeys(_REALS, float) | dict.fromkeys(_FLAGS, bool)
    given = {ours: fields.need(_SAME[ours], kind) for ours, kind in kinds.items() if ours not in _OPTIONAL}
    # vocab_multiple is ours alone: a model born in transformers has none, and takes the default.
    optional = {ours: fields.get(_SAME[ours], None, kinds[ours]) for ours in _OPTIONAL}
    given |= {ours: value for ours, value in optional.items() if value is not None}
    if "log_alpha_min" not in fields:  # null says that nothing is clamped, silence says nothing
        raise UserError("config.json: log_alpha_min is missing: export the model again")
    d_s = fields.need("layer_d_s", list)
    n_heads, width = given["n_heads"], given["d_model"]
    kv_heads, head_dim = fields.get("num_key_value_heads", None, int), fields.get("head_dim", None, int)
    if len(d_s) != given["n_layers"] or not all(type(n) is int for n in d_s):
        raise UserError(
            f"config.json: layer_d_s is {d_s} and must be {given['n_layers']} whole numbers, one for each of "
            "num_hidden_layers: export the model again"
        )
    mixers = ["sisa" if n else "attention" for n in d_s]
    if len(set(d_s)) == 1:
        shape: dict[str, Any] = {"mixer": mixers[0], "d_s": d_s[0] or None}
    elif len(set(mixers)) == 1:
        shape = {"mixer": mixers[0], "d_s": d_s}
    else:
        sizes = set(d_s) - {0}
        shape = {"mixer": mixers, "d_s": sizes.pop() if len(sizes) == 1 else d_s}
    fields.need("rope_theta", float)
    rope = read_rope(fields, theta_key="rope_theta", fraction_key="partial_rotary_factor", fraction=1.0)
    if rope.fraction != 1.0:
        raise UserError(f"config.json: partial_rotary_factor {rope.fraction} in a sisa model, whose RoPE is whole")
    return fields.model(
        **given,
        **shape,
        rope_theta=rope.theta,
        rope_scaling=rope.scaling,
        n_kv_heads=None if kv_heads in (None, 0, n_heads) else kv_heads,
        head_dim=None if head_dim in (None, 0) or head_dim * n_heads == width else head_dim,
    )


def exports(model: ModelConfig) -> dict[str, Recipe]:
    """Their tensors from ours. Rows of the vocabulary's padding are cut."""

    def cut(weight: Tensor) -> Tensor:
        return weight[: model.vocab_size]

    return {
        theirs: Recipe((ours,), cut) if ours in ("embed.weight", "head.weight") else Recipe((ours,))
        for ours, theirs in _names(model).items()
    }


def imports(model: ModelConfig) -> dict[str, Recipe]:
    """Our tensors from theirs. Rows of the vocabulary's padding are zero."""

    def pad(weight: Tensor) -> Tensor:
        check_rows(weight, model)
        return F.pad(weight, (0, 0, 0, model.padded_vocab_size - model.vocab_size))

    return {
        ours: Recipe((theirs,), pad) if ours in ("embed.weight", "head.weight") else Recipe((theirs,))
        for ours, theirs in _names(model).items()
    }


def files() -> dict[str, bytes]:
    """What lies beside weights, config.json and the tokenizer: the code."""
    return {hf_folder.MODELING: hf_folder.modeling_source()}


def _names(model: ModelConfig) -> dict[str, str]:
    names = {"embed.weight": "model.embed_tokens.weight"}
    for layer, mixer in enumerate(model.layer_mixers):
        block = {**_BLOCK, **(_QK_NORM if model.qk_norm else {}), **(_SISA if mixer == "sisa" else {})}
        names |= {f"blocks.{layer}.{ours}": f"model.layers.{layer}.{theirs}" for ours, theirs in block.items()}
    names["norm.weight"] = "model.norm.weight"
    if not model.tie_embeddings:
        names["head.weight"] = "lm_head.weight"
    return names
