"""Falcon-H1 models of Hugging Face (`FalconH1ForCausalLM`), to our `falcon_h1` mixer and back.

Every multiplier stays a number of the config: folded into weights it would train otherwise and come back in other bits.
Their fused projection is z, x, B, C and dt, in this order of rows, and one convolution is those of x, B and C.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sisa_dist.config import ModelConfig, UserError
from sisa_dist.convert.families import Fields, parameter_shapes, refuse, renamed, translated
from sisa_dist.convert.fused import cut, joined
from sisa_dist.convert.mamba2 import refuse_limit
from sisa_dist.convert.recipe import Recipe
from sisa_dist.convert.rope import read_rope, write_rope

MODEL_TYPES = ("falcon_h1",)
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"  # a tied one may be stored too

_WHOLE = {"embed.weight": EMBEDDING, "norm.weight": "model.final_layernorm.weight", "head.weight": HEAD}
_MATRICES = {
    **{f"mlp.{name}": f"feed_forward.{name}_proj" for name in ("gate", "up", "down")},
    **{f"mixer.attention.w{name}": f"self_attn.{name}_proj" for name in "qkvo"},
}
_MAMBA = "mixer.mamba."
_FUSED = {
    "mamba.in_proj.weight": tuple(f"{_MAMBA}w{name}.weight" for name in ("z", "x", "B", "C", "dt")),
    "mamba.conv1d.weight": tuple(f"{_MAMBA}conv_{name}.weight" for name in "xBC"),
    "mamba.conv1d.bias": tuple(f"{_MAMBA}conv_{name}.bias" for name in "xBC"),
}
_HOME = {ours: theirs for theirs, parts in _FUSED.items() for ours in parts}
_BLOCK = {
    "norm1.weight": "input_layernorm.weight",
    "norm2.weight": "pre_ff_layernorm.weight",
    **{f"{ours}.{kind}": f"{theirs}.{kind}" for ours, theirs in _MATRICES.items() for kind in ("weight", "bias")},
    _MAMBA + "rates.dt_bias": "mamba.dt_bias",
    _MAMBA + "rates.A_log": "mamba.A_log",
    _MAMBA + "skip.D": "mamba.D",
    _MAMBA + "gated_norm.weight": "mamba.norm.weight",
    _MAMBA + "wout.weight": "mamba.out_proj.weight",
    **_HOME,
}
# Ours, in the order of their lists.
_MLP, _SSM = ("mlp_gate", "mlp_down"), ("ssm_z", "ssm_x", "ssm_B", "ssm_C", "ssm_dt")
_MIXER = {
    "attention_in": "attention_in_multiplier",
    "attention_out": "attention_out_multiplier",
    "key": "key_multiplier",
    "ssm_in": "ssm_in_multiplier",
    "ssm_out": "ssm_out_multiplier",
}


def read_config(hf_config: Mapping[str, Any]) -> ModelConfig:
    """Our model of a config.json. Raises UserError naming what ours cannot be."""
    fields = Fields(hf_config)
    if fields.family not in MODEL_TYPES:
        raise UserError(f"config.json: model_type {fields.family!r} is not one of {', '.join(MODEL_TYPES)}")
    fields.only("hidden_act", "silu", "swish")
    for key, value in (("mamba_proj_bias", False), ("mamba_conv_bias", True), ("projectors_bias", False)):
        fields.only(key, value)
    fields.only("quantization_config")
    refuse_limit(fields)
    width, heads = fields.need("hidden_size"), fields.need("num_attention_heads")
    channels = fields.get("mamba_d_ssm", None if "mamba_d_ssm" in fields else 1024, int)
    channels = fields.get("mamba_expand", 2) * width if channels is None else channels
    ssm_heads = fields.get("mamba_n_heads", 128)
    said = None if hf_config.get("mamba_d_head", "auto") == "auto" else fields.need("mamba_d_head")
    if channels % ssm_heads or said not in (None, channels // ssm_heads):
        raise UserError(
            f"config.json: mamba_n_heads {ssm_heads} × mamba_d_head {said or 'auto'} is not the {channels} channels of "
            "mamba_d_ssm: fetch the file again"
        )
    rope = read_rope(fields, theta_key="rope_theta", fraction_key="partial_rotary_factor", fraction=1.0)
    kv_heads = fields.get("num_key_value_heads", heads if "num_key_value_heads" in fields else 8)
    head_dim = fields.get("head_dim", None, int)
    norm = "before_gate" if fields.get("mamba_norm_before_gate", True) else "after_gate"
    mixer = {ours: float(fields.get(theirs, 1.0, float)) for ours, theirs in _MIXER.items()}
    mixer |= _listed(fields, "ssm_multipliers", _SSM)
    outside = {
        "embedding": float(fields.get("embedding_multiplier", 1.0, float)),
        "head": float(fields.get("lm_head_multiplier", 1.0, float)),
    } | _listed(fields, "mlp_multipliers", _MLP)
    return fields.model(
        vocab_size=fields.need("vocab_size"),
        d_model=width,
        n_layers=fields.need("num_hidden_layers"),
        n_heads=heads,
        n_kv_heads=None if kv_heads == heads else kv_heads,
        head_dim=None if head_dim is None or head_dim * heads == width else head_dim,
        d_ff=fields.need("intermediate_size"),
        mixer="falcon_h1",
        rope_theta=rope.theta,
        rope_scaling=rope.scaling,
        rotary_fraction=rope.fraction,
        norm_eps=fields.get("rms_norm_eps", 1e-5),
        attention_bias="all" if fields.get("attention_bias", False) else "none",
        mlp_bias=fields.get("mlp_bias", False),
        tie_embeddings=fields.get("tie_word_embeddings", False),
        init_std=fields.get("initializer_range", 0.02),
        ssm=dict(
            d_state=fields.get("mamba_d_state", 256),
            width=channels,
            head_dim=channels // ssm_heads,
            n_groups=fields.get("mamba_n_groups", 1),
            conv=fields.get("mamba_d_conv", 4),
        ),
        falcon_h1=mixer | {"norm": norm if fields.get("mamba_rms_norm", False) else "none"},
        multipliers=outside,
    )


def write_config(model: ModelConfig) -> dict[str, Any]:
    """A config.json for transformers. Raises UserError where no Falcon-H1 model is `model`."""
    if set(model.layer_mixers) != {"falcon_h1"} or set(model.layer_mlps) != {"swiglu"}:
        raise UserError(
            "model.mixer and model.mlp: a Falcon-H1 has falcon_h1 and swiglu in every layer: no such export"
        )
    same = dict(norm="rmsnorm", qk_norm=False, parallel_residual=False, rotary_fraction=1.0)
    biases = "all" if model.output_bias else "none"
    refuse("Falcon-H1", model, **same, attention_bias=biases, multipliers=model.multipliers)
    if model.d_model % model.n_heads:
        raise UserError(
            f"model.n_heads {model.n_heads} does not divide d_model {model.d_model}: transformers refuses it"
        )
    ssm, mixer, outside = model.state_space, model.falcon_h1_options, model.multiplier_options
    return {
        "architectures": ["FalconH1ForCausalLM"],
        "model_type": "falcon_h1",
        "vocab_size": model.vocab_size,
        "hidden_size": model.d_model,
        "intermediate_size": model.d_ff,
        "num_hidden_layers": model.n_layers,
        "num_attention_heads": model.n_heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.width_per_head,
        **write_rope(model),
        "mamba_d_ssm": model.ssm_width,
        "mamba_n_heads": model.ssm_heads,
        "mamba_d_head": ssm.head_dim,
        "mamba_d_state": ssm.d_state,
        "mamba_n_groups": ssm.n_groups,
        "mamba_d_conv": ssm.conv,
        "mamba_chunk_size": ssm.chunk,
        "mamba_conv_bias": True,
        "mamba_proj_bias": False,
        "projectors_bias": False,
        "mamba_rms_norm": mixer.norm != "none",
        "mamba_norm_before_gate": mixer.norm != "after_gate",
        **{theirs: getattr(mixer, ours) for ours, theirs in _MIXER.items()},
        "ssm_multipliers": [getattr(mixer, name) for name in _SSM],
        "mlp_multipliers": [getattr(outside, name) for name in _MLP],
        "embedding_multiplier": outside.embedding,
        "lm_head_multiplier": outside.head,
        "hidden_act": "silu",
        "attention_bias": model.output_bias,
        "mlp_bias": model.mlp_bias,
        "attention_dropout": 0.0,
        "rms_norm_eps": model.norm_eps,
        "tie_word_embeddings": model.tie_embeddings,
        "initializer_range": model.init_std,
    }


def imports(model: ModelConfig) -> dict[str, Recipe]:
    """Our tensors from theirs, for a model that `read_config` made."""
    shapes, recipes = parameter_shapes(model), {}
    for ours in shapes:
        block, inside = _place(ours)
        if inside in _HOME:
            rows = {part: shapes[block + part][0] for part in _FUSED[_HOME[inside]]}
            recipes[ours] = Recipe((_theirs(ours),), cut(_theirs(ours), rows, inside))
        else:
            recipes[ours] = renamed(ours, _theirs(ours), model, export=False)
    return recipes


def exports(model: ModelConfig) -> dict[str, Recipe]:
    """Their tensors from ours, for a model that `write_config` takes."""
    recipes = {}
    for ours in parameter_shapes(model):
        block, inside = _place(ours)
        if inside not in _HOME:
            recipes[_theirs(ours)] = renamed(ours, _theirs(ours), model, export=True)
        elif inside == _FUSED[_HOME[inside]][0]:
            parts = tuple(block + part for part in _FUSED[_HOME[inside]])
            recipes[_theirs(ours)] = Recipe(parts, joined(convolution=inside.endswith("conv_x.weight")))
    return recipes


def dropped(model: ModelConfig) -> frozenset[str]:
    """Names that may stand in a checkpoint and are no parameters: a tied head."""
    return frozenset({HEAD} if model.tie_embeddings else ())


def _place(ours: str) -> tuple[str, str]:
    """("blocks.N.", the rest) of a parameter of a block; ("", the name) of another."""
    parts = ours.split(".", 2)
    return (".".join(parts[:2]) + ".", parts[2]) if parts[0] == "blocks" else ("", ours)


def _theirs(ours: str) -> str:
    return translated(ours, whole=_WHOLE, blocks="model.layers", block=_BLOCK)


def _listed(fields: Fields, key: str, names: tuple[str, ...]) -> dict[str, float]:
    found = fields.get(key, [1.0] * len(names))
    if len(found) != len(names) or not all(type(value) in (int, float) for value in found):
        raise UserError(f"config.json: {key} is {found!r} and must be {len(names)} numbers: fetch the file again")
    return dict(zip(names, map(float, found), strict=True))
