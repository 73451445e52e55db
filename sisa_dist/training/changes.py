"""A config with some settings changed, and the `--set` arguments that change them."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

import yaml

from sisa_dist.config import EngineConfig, RunConfig, UserError
from sisa_dist.config.load import parse_config

# Keys of `engine:` that only one kind of engine reads.
_ONLY = {
    "fsdp2": ("prefetch", "reshard_after_forward", "overlap", "compile"),
    "deepspeed": ("zero_stage", "deepspeed_config"),
}
_OF_ONE_STAGE = ("stage3_", "offload_", "zero_hpz_", "zero_quantized_")  # how DeepSpeed's keys begin


def changed(config: RunConfig, changes: Mapping[str, Any]) -> RunConfig:
    """`config` with {dotted key: value} laid over it; what they leave without effect goes back to its default.

    Raises UserError where the result cannot be.
    """
    tree = config.model_dump()
    for dotted, value in changes.items():
        *parents, leaf = dotted.split(".")
        section = tree
        for parent in parents:
            section = section[parent]
        section[leaf] = value
    parallel, engine = tree["parallel"], tree["engine"]
    if parallel["tp"] == 1:
        parallel["sequence_parallel"] = False
    if parallel["cp"] == 1:
        parallel["cp_kind"] = "all_gather"
    for key in _ONLY["deepspeed" if engine["kind"] == "fsdp2" else "fsdp2"]:
        if f"engine.{key}" not in changes:
            engine[key] = EngineConfig.model_fields[key].get_default(call_default_factory=True)
    if engine["zero_stage"] != config.engine.zero_stage and "engine.deepspeed_config" not in changes:
        engine["deepspeed_config"] = _without_a_stage(engine["deepspeed_config"])
    if not engine["activation_checkpointing"]:
        engine["activation_offload"] = False
    try:
        return parse_config(tree, source="")
    except UserError as error:
        raise UserError(str(error).removeprefix(": ")) from None


def _without_a_stage(settings: dict[str, Any]) -> dict[str, Any]:
    """DeepSpeed's own keys that hold of any stage."""
    zero = settings.get("zero_optimization", {})
    kept = {key: value for key, value in zero.items() if not key.startswith(_OF_ONE_STAGE)}
    others = {key: value for key, value in settings.items() if key != "zero_optimization"}
    return others | ({"zero_optimization": kept} if kept else {})


def differences(before: RunConfig, after: RunConfig) -> dict[str, Any]:
    """{dotted key: value} of `after`, of the settings that differ: what the command line would have to say."""
    return dict(_differences(before.model_dump(), after.model_dump(), ""))


def arguments(settings: Mapping[str, Any], *, prefix: str = "") -> str:
    """As `--set` arguments for a shell; `prefix` goes before each key. Nothing to set: `as it is`."""
    told = [f"--set {shlex.quote(prefix + setting)}" for setting in assignments(settings)]
    return " ".join(told) or "as it is"


def assignments(settings: Mapping[str, Any], *, between: str = "=") -> list[str]:
    """KEY=VALUE, with values as YAML writes them."""
    return [f"{key}{between}{_text(value)}" for key, value in settings.items()]


def _differences(before: Any, after: Any, prefix: str) -> list[tuple[str, Any]]:
    if not (isinstance(before, dict) and isinstance(after, dict)) or prefix == "engine.deepspeed_config.":
        return [] if before == after else [(prefix[:-1], after)]
    return [found for key in after for found in _differences(before.get(key), after[key], f"{prefix}{key}.")]


def _text(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True).strip().removesuffix("\n...")
