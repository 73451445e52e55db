"""RoPE's base, share of channels and scaling in a config.json, both ways.

transformers 5 keeps all of them in rope_parameters; 4 beside it, with rope_scaling for what is not the default. What
is read is what transformers computes, its fallbacks resolved, so that nothing depends on max_position_embeddings but
`dynamic`, to which it is the original length.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from sisa_dist.config import ModelConfig, UserError
from sisa_dist.config.rope import ROPE_TYPES
from sisa_dist.convert.families import Fields
from sisa_dist.model.rope_scaling import ntk_theta

_ORIGINAL, _CONTEXT = "original_max_position_embeddings", "max_position_embeddings"
_OURS = {key for needed, optional in ROPE_TYPES.values() for key in needed + optional}
_BESIDE = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "finetuned"}  # the last is a remark of YaRN's


class Rope(NamedTuple):
    """What a config.json says of it: the base, the share of a head's channels that turn, model.rope_scaling."""

    theta: float
    fraction: float
    scaling: dict[str, Any] | None


def read_rope(fields: Fields, *, theta_key: str, fraction_key: str, fraction: float) -> Rope:
    """`fraction` is where the config says none. Raises UserError for kinds, keys and values that ours does not know."""
    key = "rope_scaling" if fields.get("rope_scaling", {}) else "rope_parameters"
    said = fields.get(key, {})
    nested = [name for name, value in said.items() if isinstance(value, dict)]
    kind = said.get("rope_type", said.get("type", "default"))
    if nested:
        raise UserError(
            f"config.json: {key} is one per kind of layer ({nested[0]}), and ours is one for all layers: this "
            f"{fields.family} checkpoint cannot be converted"
        )
    if kind not in ("default", *ROPE_TYPES) or kind == "ntk":
        raise UserError(
            f"config.json: {key} is {kind!r}, which our RoPE does not know: this {fields.family} checkpoint cannot be "
            "converted"
        )
    for name in said:
        if name not in _OURS | _BESIDE:
            raise UserError(f"config.json: {key} has {name!r}, which our RoPE does not know: remove it if it is idle")
    theta = said.get("rope_theta")
    turning = said.get("partial_rotary_factor")
    theta = fields.get(theta_key, 10_000.0) if theta is None else theta
    turning = fields.get(fraction_key, fraction) if turning is None else turning
    return Rope(
        float(fields.checked("rope_theta", theta, float)),
        float(fields.checked("partial_rotary_factor", turning, float)),
        None if kind == "default" else _scaling(fields, kind, said),
    )


def _scaling(fields: Fields, kind: str, said: dict[str, Any]) -> dict[str, Any] | None:
    """None where it comes to nothing. Keys that the kind does not read are left out, as transformers does."""
    needed, optional = ROPE_TYPES[kind]
    found = {key: said[key] for key in needed + optional if said.get(key) is not None}
    if "truncate" in said and kind == "yarn":
        found["truncate"] = bool(said["truncate"])  # to transformers null is false
    if kind == "dynamic":
        found[_ORIGINAL] = fields.need(_CONTEXT)
    elif _ORIGINAL in needed:
        inside = found.get(_ORIGINAL, fields.get(_CONTEXT, None, int))
        found[_ORIGINAL] = fields.get(_ORIGINAL, inside, int)
    by_formula = kind == "yarn" or (kind == "longrope" and "attention_factor" not in found)
    if by_formula and "factor" not in found:
        found["factor"] = fields.need(_CONTEXT) / fields.checked(_ORIGINAL, found[_ORIGINAL], int)
    for name in ("beta_fast", "beta_slow"):
        if found.get(name) == 0:  # which transformers takes for none
            del found[name]
    if "attention_factor" in found and kind == "longrope":
        found.pop("factor", None)
    if "attention_factor" in found or not (found.get("mscale") and found.get("mscale_all_dim")):
        found = {key: value for key, value in found.items() if not key.startswith("mscale")}
    if found.get("factor") == 1 and kind in ("linear", "llama3", "yarn") and found.get("attention_factor", 1) == 1:
        return None
    return {"rope_type": kind, **found}


def write_rope(model: ModelConfig, *, theta_key: str = "rope_theta", whole: bool = True) -> dict[str, Any]:
    """The keys of config.json for transformers 4 and 5; `whole`: a family without a share of channels.

    `ntk` is written as the base it comes to, `dynamic` with max_position_embeddings, the length that it stretches.
    """
    theta, scaling = model.rope_theta, model.rope_scaling
    if scaling is not None and scaling.rope_type == "ntk":
        theta, scaling = ntk_theta(theta, scaling.factor or 1.0, model.rotary_channels), None
    parameters: dict[str, Any] = {"rope_type": "default" if scaling is None else scaling.rope_type, "rope_theta": theta}
    if not whole:
        parameters["partial_rotary_factor"] = model.rotary_fraction
    if scaling is None:
        return {theta_key: theta, "rope_parameters": parameters}
    parameters |= scaling.keys
    context = {_CONTEXT: parameters.pop(_ORIGINAL)} if scaling.rope_type == "dynamic" else {}
    return {theta_key: theta, "rope_parameters": parameters, "rope_scaling": dict(parameters), **context}
