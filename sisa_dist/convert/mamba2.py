"""Mamba-2 models of Hugging Face (`Mamba2ForCausalLM`), to our `mamba2` mixer without MLPs and back.

One fused matrix there is z, x, B, C and dt here, in this order of rows, and one convolution is those of x, B and C. So
is Mamba-Codestral. The checkpoints of state-spaces' own library have no config.json that transformers reads, nor we.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sisa_dist.config import ModelConfig, UserError
from sisa_dist.convert.families import Fields, parameter_shapes, refuse, renamed, translated
from sisa_dist.convert.fused import cut, joined
from sisa_dist.convert.recipe import Recipe

MODEL_TYPES = ("mamba2",)
HEAD, EMBEDDING = "lm_head.weight", "backbone.embeddings.weight"  # a tied one may be stored too

_WHOLE = {"embed.weight": EMBEDDING, "norm.weight": "backbone.norm_f.weight", "head.weight": HEAD}
_BLOCK = {
    "norm1.weight": "norm.weight",
    "mixer.rates.dt_bias": "mixer.dt_bias",
    "mixer.rates.A_log": "mixer.A_log",
    "mixer.skip.D": "mixer.D",
    "mixer.gated_norm.weight": "mixer.norm.weight",
    "mixer.wout.weight": "mixer.out_proj.weight",
}
# Their fused tensor, and ours in the order of its rows.
_FUSED = {
    "mixer.in_proj.weight": tuple(f"mixer.{name}.weight" for name in ("wz", "wx", "wB", "wC", "wdt")),
    "mixer.conv1d.weight": tuple(f"mixer.{name}.weight" for name in ("conv_x", "conv_B", "conv_C")),
    "mixer.conv1d.bias": tuple(f"mixer.{name}.bias" for name in ("conv_x", "conv_B", "conv_C")),
}
_HOME = {ours: theirs for theirs, parts in _FUSED.items() for ours in parts}


def read_config(hf_config: Mapping[str, Any]) -> ModelConfig:
    """Our model of a config.json. Raises UserError naming what ours cannot be."""
    fields = Fields(hf_config)
    if fields.family not in MODEL_TYPES:
        raise UserError(f"config.json: model_type {fields.family!r} is not one of {', '.join(MODEL_TYPES)}")
    fields.only("hidden_act", "silu", "swish")
    fields.only("use_bias", False)
    fields.only("use_conv_bias", True)
    fields.only("quantization_config")
    refuse_limit(fields)
    heads, head_dim, width = fields.get("num_heads", 128), fields.get("head_dim", 64), fields.need("hidden_size")
    if heads * head_dim != width * fields.get("expand", 2):
        raise UserError(
            f"config.json: num_heads {heads} × head_dim {head_dim} is not expand × hidden_size {width}: fetch the file "
            "again"
        )
    return fields.model(
        vocab_size=fields.need("vocab_size"),
        d_model=width,
        n_layers=fields.need("num_hidden_layers"),
        n_heads=1,  # of attention, of which there is none
        head_dim=2,
        mixer="mamba2",
        mlp="none",
        norm_eps=fields.get("layer_norm_epsilon", 1e-5),
        tie_embeddings=fields.get("tie_word_embeddings", False),
        init_std=fields.get("initializer_range", 0.1),
        ssm=dict(
            d_state=fields.get("state_size", 128),
            expand=fields.get("expand", 2),
            head_dim=head_dim,
            n_groups=fields.get("n_groups", 8),
            conv=fields.get("conv_kernel", 4),
        ),
    )


def write_config(model: ModelConfig) -> dict[str, Any]:
    """A config.json for transformers. Raises UserError where no Mamba-2 model is `model`."""
    if set(model.layer_mixers) != {"mamba2"} or set(model.layer_mlps) != {"none"}:
        raise UserError("model.mixer and model.mlp: a Mamba-2 model has mamba2 and none in every layer: no such export")
    refuse("Mamba-2", model, norm="rmsnorm")
    ssm = model.state_space
    if model.ssm_width % model.d_model:
        raise UserError(f"model.ssm: {model.ssm_width} channels are no multiple of d_model: transformers refuses it")
    return {
        "architectures": ["Mamba2ForCausalLM"],
        "model_type": "mamba2",
        "vocab_size": model.vocab_size,
        "hidden_size": model.d_model,
        "num_hidden_layers": model.n_layers,
        "num_heads": model.ssm_heads,
        "head_dim": ssm.head_dim,
        "state_size": ssm.d_state,
        "expand": model.ssm_width // model.d_model,
        "n_groups": ssm.n_groups,
        "conv_kernel": ssm.conv,
        "hidden_act": "silu",
        "use_bias": False,
        "use_conv_bias": True,
        "residual_in_fp32": True,
        "chunk_size": ssm.chunk,
        "layer_norm_epsilon": model.norm_eps,
        "tie_word_embeddings": model.tie_embeddings,
        "initializer_range": model.init_std,
    }


def imports(model: ModelConfig) -> dict[str, Recipe]:
    """Our tensors from theirs, for a model that `read_config` made."""
    shapes, recipes = parameter_shapes(model), {}
    for ours in shapes:
        block, inside = _place(ours)
        if inside in _HOME:
            theirs = _name(block, _HOME[inside])
            rows = {part: shapes[f"{block}.{part}"][0] for part in _FUSED[_HOME[inside]]}
            recipes[ours] = Recipe((theirs,), cut(theirs, rows, inside))
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
            parts = tuple(f"{block}.{part}" for part in _FUSED[_HOME[inside]])
            recipes[_name(block, _HOME[inside])] = Recipe(parts, joined(convolution=inside == "mixer.conv_x.weight"))
    return recipes


def dropped(model: ModelConfig) -> frozenset[str]:
    """Names that may stand in a checkpoint and are no parameters: a tied head."""
    return frozenset({HEAD} if model.tie_embeddings else ())


def _place(ours: str) -> tuple[str, str]:
    """("blocks.N", the rest) of a parameter of a block; ("", the name) of another."""
    parts = ours.split(".", 2)
    return (".".join(parts[:2]), parts[2]) if parts[0] == "blocks" else ("", ours)


def _name(block: str, inside: str) -> str:
    return f"backbone.layers.{block.split('.')[1]}.{inside}"


def _theirs(ours: str) -> str:
    return translated(ours, whole=_WHOLE, blocks="backbone.layers", block=_BLOCK)


def refuse_limit(fields: Fields) -> None:
    """Δ clamped to less than all it can be."""
    limit = fields.get("time_step_limit", [], list)
    # Infinity as Python's json writes it, or as transformers 5 does.
    if limit and limit not in ([0, float("inf")], [0, {"__float__": "Infinity"}]):
        raise UserError(f"config.json: time_step_limit {limit} clamps the time step, and ours is not: no such import")
