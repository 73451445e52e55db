"""The systems that tools/compare.py compares: every registered mixer, variants of some, and how they are made equal.

A system is a few keys laid over the `model:` block of a task's config. To add one, add a line to VARIANTS; a mixer that
is registered needs none. It trains nothing. No mixture of experts is among them: at equal parameters it would have less
work a token than the others, at equal work more parameters, so it belongs in no table of equals.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from equal_parameters import parameters, solve_d_ff

from sisa_dist.config import ModelConfig, RunConfig, UserError, parse_config
from sisa_dist.config.mixers import MIXER_NAMES, WITH_SSM_HEADS

CORE = ("attention", "mamba3", "fox", "sisa")
TOLERANCE = 0.005  # of the parameters

# Beside one plain system for every mixer. `pattern`: mixers that take turns from layer to layer. `ssmax: True`: at the
# task's own length. Keys that this version has no section for are no error: the variant is then not offered.
VARIANTS: dict[str, dict[str, Any]] = {
    "fox_pro": {"mixer": "fox", "fox": {"pro": True}},
    "mamba3_mimo": {"mixer": "mamba3", "mamba3": {"rank": 2}},
    "mamba3_rational": {"mixer": "mamba3", "mamba3": {"decay": "rational"}},
    "mamba3_no_mlp": {"mixer": "mamba3", "mlp": "none"},
    "attention_ssmax": {"mixer": "attention", "ssmax": True},
    "sisa_ssmax": {"mixer": "sisa", "ssmax": True},
    "sisa_no_decay": {"mixer": "sisa", "sisa": {"decay": False}},
    "sisa_no_rotation": {"mixer": "sisa", "sisa": {"rotation": False}},
    "sisa_bilinear": {"mixer": "sisa", "sisa": {"decay": False, "rotation": False}},
    # d_s found by layer, against every uniform one of equal size: --systems sisa,sisa_ds8,…,sisa_learned
    "sisa_ds8": {"mixer": "sisa", "d_s": 8},
    "sisa_ds24": {"mixer": "sisa", "d_s": 24},
    "sisa_ds32": {"mixer": "sisa", "d_s": 32},
    "sisa_learned": {"mixer": "sisa", "d_s": {"learned": True, "max": 32, "budget": 16.0}},
    "mamba2_attention": {"pattern": ["mamba2", "attention"]},
    "mamba3_attention": {"pattern": ["mamba3", "attention"]},
    "mamba3_sisa": {"pattern": ["mamba3", "sisa"]},
    # Jamba's layers without its experts; one in two is attention, not one in eight, of which there are too few here.
    "jamba": {"pattern": ["mamba", "attention"], "rotary_fraction": 0.0, "mamba": {"norms": True}},
}


@dataclass(frozen=True)
class Matched:
    """A system's config at the common size."""

    config: RunConfig
    parameters: int
    target: int  # of the task's own model, which all are to meet

    @property
    def excess(self) -> float:
        return self.parameters / self.target - 1


def systems() -> dict[str, dict[str, Any]]:
    """All that this version can build, by name."""
    plain = {name: {"mixer": name} for name in MIXER_NAMES}
    offered = {name: keys for name, keys in VARIANTS.items() if not missing(keys)}
    return plain | offered


def missing(keys: dict[str, Any]) -> list[str]:
    """Mixers and keys of `model:` that a system needs and this version has not."""
    mixers = [mixer for mixer in mixers_of(keys) if mixer not in MIXER_NAMES]
    return mixers + [key for key in keys if key != "pattern" and key not in ModelConfig.model_fields]


def choose(names: list[str] | None, *, everything: bool) -> list[str]:
    """Names in the order of the table; the core without those that are not there. Raises UserError for unknown ones."""
    known = systems()
    if everything:
        return list(known)
    if names is None:
        return [name for name in CORE if name in known]
    for name in names:
        if name not in known:
            why = f" (it needs {', '.join(missing(VARIANTS[name]))})" if name in VARIANTS else ""
            raise UserError(f"--systems: there is no {name}{why}: choose of {', '.join(known)}")
    return list(dict.fromkeys(names))


def match(base: RunConfig, name: str) -> Matched:
    """`base` with the system laid over its model, as large as base's own model within TOLERANCE.

    d_ff is solved for: parameters are linear in it. A system without MLPs has no d_ff; its depth is the one whose total
    comes nearest, and what is left of the difference stands in `parameters`. Raises UserError where the mixer alone
    is too large.
    """
    target = parameters(base)
    keys = dict(systems()[name])
    if keys.get("mlp") == "none":
        depths = [lay_over(base, keys, n_layers=n) for n in range(1, 8 * base.model.n_layers)]
        best = min(depths, key=lambda config: abs(parameters(config) - target))
        return Matched(best, parameters(best), target)
    d_ff = solve_d_ff(lambda d_ff: lay_over(base, keys, d_ff=d_ff), target)
    if d_ff is None:
        raise UserError(
            f"{base.name}: no layer of it has an MLP, whose width makes systems equal: leave model.mlp as it is"
        )
    if d_ff < 1:
        least = parameters(lay_over(base, keys, d_ff=1))
        raise UserError(
            f"{name}: with next to no MLP it has {least:,} parameters and {base.name} wants {target:,}: raise "
            "model.d_ff of the task's config (--set TASK.model.d_ff=…)"
        )
    config = lay_over(base, keys, d_ff=d_ff)
    found = Matched(config, parameters(config), target)
    if abs(found.excess) > TOLERANCE:
        raise UserError(
            f"{name}: {found.parameters:,} parameters at d_ff {d_ff} and {base.name} wants {target:,} ± "
            f"{TOLERANCE:.1%}: one column of the MLPs is too coarse at this size: raise model.d_ff or model.d_model"
        )
    return found


def lay_over(base: RunConfig, keys: dict[str, Any], **size: int) -> RunConfig:
    """`base` with a system's keys over its model, and sizes that its mixers need and the keys do not give."""
    tree = base.model_dump()
    model, seq_len = tree["model"], base.training.seq_len
    mixers = mixers_of(keys)
    model |= {key: value for key, value in keys.items() if key != "pattern"} | size
    if keys.get("ssmax"):
        model["ssmax"] = seq_len
    if "pattern" in keys:
        model["mixer"] = [mixers[layer % len(mixers)] for layer in range(model["n_layers"])]
    layers = [model["mixer"]] * model["n_layers"] if "mixer" in keys else model["mixer"]
    model |= {key: value for key, value in _proportions(base, mixers, layers).items() if key not in keys}
    return parse_config(tree, source=f"{base.name}, system {'/'.join(mixers)}")


def _proportions(base: RunConfig, mixers: list[str], layers: list[str]) -> dict[str, Any]:
    """The sizes of the mixers' own parts, each as its paper has them to the width, a head or the training length."""
    head, seq_len = base.model.width_per_head, base.training.seq_len
    found: dict[str, Any] = {}
    has_d_s = ["d_s" in MIXER_NAMES[mixer] for mixer in layers]
    if any(has_d_s):
        found["d_s"] = [head // 2 if has else 0 for has in has_d_s]  # SISA: 32 at heads of 64
    if any(mixer in WITH_SSM_HEADS for mixer in mixers):
        # Mamba-2 and 3: d_state 128 at heads of 64, expand 2. Falcon-H1, whose attention stands beside it: 1.5.
        expand = 1.5 if "falcon_h1" in mixers else 2.0
        # A chunk as long as a head is wide: 5 % less time than 64 in Mamba-3 at heads of 32, and the same result.
        found["ssm"] = {"head_dim": head, "d_state": 2 * head, "expand": expand, "chunk": head}
    elif any("ssm" in MIXER_NAMES[mixer] for mixer in mixers):
        found["ssm"] = {"d_state": 16, "expand": 2.0}  # Mamba, Jamba, Hymba: a channel has no head to go by
    if "hymba" in mixers:
        # Trained at 2048 with windows of 1024 and 128 meta tokens. Of its 32 layers the first, the middle and the last
        # see everything; of so few as here the middle one alone, or no window would be left.
        found["hymba"] = {
            "window": max(1, seq_len // 2),
            "global_layers": [base.model.n_layers // 2],
            "meta_tokens": max(1, seq_len // 16),
        }
    return found


def mixers_of(keys: dict[str, Any]) -> list[str]:
    return list(keys["pattern"]) if "pattern" in keys else [keys["mixer"]]
