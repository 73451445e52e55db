"""How tensor parallelism splits the model: a table of data. `apply.py` carries it out; a new mixer adds lines here.

`PLAN` gives every parameter, by a pattern of its full name, one of eight kinds:

    column      tp_dim 0: rows of a projection, or of a per-head parameter, are dealt out
    row         tp_dim 1: columns are dealt out, and the module's output is a partial sum
    part        tp_dim 1, as row, but the partial sum is added to others, which leave the region together (EXITS)
    inner       tp_dim 1, as row, but inside a region: the sum over ranks is what each goes on with
    vocab       tp_dim 0: rows of the embedding or the head
    replicated  whole on every rank, used on the residual stream: under sequence parallelism each rank sees only its
                part of the sequence, so gradients are then partial
    added       whole on every rank: the bias of a row layer, added once to the sum of the ranks' parts; it acts on the
                residual stream, as what is replicated does
    shared      whole on every rank and used by each with its own heads: gradients are always partial

The gain of an RMSNorm over all heads together is `column`: the mean of squares is then taken over all ranks' channels.

`over` is what is dealt out, a property of ModelConfig; tp must divide it. Only for what several heads share, kv heads
and an SSM's groups of B and C, may tp be the larger: what belongs to them is then held whole, each rank uses the rows
of its own kv head or group, and gradients are partial.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from sisa_dist.config import ModelConfig, UserError

Kind = Literal["column", "row", "inner", "vocab", "replicated", "added", "shared", "part"]


@dataclass(frozen=True)
class Split:
    kind: Kind
    over: str = ""


PLAN: dict[str, Split] = {
    "embed.weight": Split("vocab", "padded_vocab_size"),
    "head.weight": Split("vocab", "padded_vocab_size"),
    "norm.weight": Split("replicated"),
    "norm.bias": Split("replicated"),
    "gates.log_alpha": Split("shared"),  # of a learned d_s: alike for all heads
    "blocks.*.norm?.weight": Split("replicated"),
    "blocks.*.norm?.bias": Split("replicated"),
    # attention, alone or inside another mixer, and what sisa has in common with it
    "blocks.*.mixer*.wq.weight": Split("column", "n_heads"),
    "blocks.*.mixer*.wq.bias": Split("column", "n_heads"),
    "blocks.*.mixer*.wk.weight": Split("column", "kv_heads"),
    "blocks.*.mixer*.wk.bias": Split("column", "kv_heads"),
    "blocks.*.mixer*.wv.weight": Split("column", "kv_heads"),
    "blocks.*.mixer*.wv.bias": Split("column", "kv_heads"),
    "blocks.*.mixer*.wo.weight": Split("row", "n_heads"),
    "blocks.*.mixer*.wo.bias": Split("added"),
    "blocks.*.mixer*.?_norm.weight": Split("shared"),
    "blocks.*.mixer.ssmax.scale": Split("column", "n_heads"),
    # sisa: C and λ belong to the query head; B, θ and α to the kv head
    "blocks.*.mixer.wc.weight": Split("column", "n_heads"),
    "blocks.*.mixer.wb.weight": Split("column", "kv_heads"),
    "blocks.*.mixer.wtheta.weight": Split("column", "kv_heads"),
    "blocks.*.mixer.decay.weight": Split("column", "kv_heads"),
    "blocks.*.mixer.decay.bias": Split("column", "kv_heads"),
    "blocks.*.mixer.importance.lambda_raw": Split("column", "n_heads"),
    # fox: the forget gate, and pro's output gate and norm, belong to the query head; pro's shifts to the kv head
    "blocks.*.mixer.forget.weight": Split("column", "n_heads"),
    "blocks.*.mixer.forget.bias": Split("column", "n_heads"),
    "blocks.*.mixer.output_gate.weight": Split("column", "n_heads"),
    "blocks.*.mixer.?_shift.weight": Split("column", "kv_heads"),
    "blocks.*.mixer.output_norm.weight": Split("column", "n_heads"),
    # mamba, mamba2 and mamba3, alone or inside another mixer; heads here are those of the state-space model, and
    # mamba's channels
    "blocks.*.mixer*.wz.weight": Split("column", "ssm_heads"),
    "blocks.*.mixer*.wx.weight": Split("column", "ssm_heads"),
    "blocks.*.mixer*.wB.weight": Split("column", "ssm_groups"),
    "blocks.*.mixer*.wC.weight": Split("column", "ssm_groups"),
    "blocks.*.mixer*.wdt.weight": Split("column", "ssm_heads"),
    "blocks.*.mixer*.wout.weight": Split("row", "ssm_heads"),
    "blocks.*.mixer.attention_norm.weight": Split("column", "n_heads"),
    "blocks.*.mixer.ssm_norm.weight": Split("column", "ssm_heads"),
    "blocks.*.mixer*.wselect.weight": Split("inner", "ssm_heads"),
    "blocks.*.mixer*.dt_norm.weight": Split("shared"),
    "blocks.*.mixer*.conv_x.*": Split("column", "ssm_heads"),
    "blocks.*.mixer*.conv_B.*": Split("column", "ssm_groups"),
    "blocks.*.mixer*.conv_C.*": Split("column", "ssm_groups"),
    "blocks.*.mixer*.rates.*": Split("column", "ssm_heads"),
    "blocks.*.mixer*.skip.D": Split("column", "ssm_heads"),
    "blocks.*.mixer*.gated_norm.weight": Split("column", "ssm_heads"),
    "blocks.*.mixer*.wA.weight": Split("column", "ssm_heads"),
    "blocks.*.mixer*.wtrap.weight": Split("column", "ssm_heads"),
    "blocks.*.mixer*.wangle.weight": Split("shared"),
    "blocks.*.mixer*.[BC]_bias.bias": Split("column", "ssm_heads"),
    "blocks.*.mixer*.mimo.*": Split("column", "ssm_heads"),
    # feed-forward
    "blocks.*.mlp.gate.weight": Split("column", "d_ff"),
    "blocks.*.mlp.gate.bias": Split("column", "d_ff"),
    "blocks.*.mlp.up.weight": Split("column", "d_ff"),
    "blocks.*.mlp.up.bias": Split("column", "d_ff"),
    "blocks.*.mlp.down.weight": Split("row", "d_ff"),
    "blocks.*.mlp.down.bias": Split("added"),
    # mixture of experts: every rank routes every token, and computes what its own experts give
    "blocks.*.mlp.router.weight": Split("shared"),
    "blocks.*.mlp.experts.gate": Split("column", "experts"),
    "blocks.*.mlp.experts.up": Split("column", "experts"),
    "blocks.*.mlp.experts.down": Split("column", "experts"),
    "blocks.*.mlp.shared.gate.weight": Split("column", "shared_d_ff"),
    "blocks.*.mlp.shared.up.weight": Split("column", "shared_d_ff"),
    "blocks.*.mlp.shared.down.weight": Split("part", "shared_d_ff"),
    # ssm_gated: the map from a head's C to its slice of the gate; config/model.py sees to it that slices are whole
    "blocks.*.mlp.ssm_gate.weight": Split("column", "n_heads"),
}

SHARED_BY_HEADS = ("kv_heads", "ssm_groups")

# Modules whose input enters the tp region once, for all the column layers inside; their row layer leaves it.
REGIONS = ("blocks.*.mixer", "blocks.*.mlp", "head")
# Modules whose input is the sum of a rank's parts: where it leaves the region, if no row layer of it does.
EXITS = ("blocks.*.mlp.total",)


def split_of(name: str, plan: dict[str, Split] = PLAN) -> Split:
    """The plan's line for the parameter `name`. None, or more than one, is a mistake in the plan."""
    lines = [pattern for pattern in plan if fnmatchcase(name, pattern)]
    if len(lines) != 1:
        raise AssertionError(f"{name}: {len(lines)} lines of parallel/plan.py match it {lines}: exactly one must")
    return plan[lines[0]]


def check_tp(model: ModelConfig, tp: int) -> None:
    """Raises UserError, naming the values that would work, where tp does not divide what the plan deals out."""
    misfit = _misfit(model, tp)
    if misfit is not None:
        size = model.dealt[misfit]
        name = _SETTINGS.get(misfit, misfit)
        good = [n for n in range(1, max(model.n_heads, model.ssm_heads) + 1) if _misfit(model, n) is None]
        remedy = f"set parallel.tp to one of {good}" if good != [1] else "set parallel.tp to 1"
        if misfit == "padded_vocab_size":
            remedy += f", or model.vocab_multiple to a multiple of {tp}, such as 128"
        elif misfit in SHARED_BY_HEADS:
            remedy += f", or model.{name} to a divisor or a multiple of it"
        elif misfit == "ssm_heads":
            remedy += f", or model.ssm.head_dim so that there are a multiple of {tp}"
        elif misfit == "d_ff":
            remedy += f", or model.d_ff to {size // tp * tp} or {(size // tp + 1) * tp}"
        elif misfit in ("experts", "shared_d_ff"):
            remedy += f", or model.moe.{'experts' if misfit == 'experts' else 'd_ff'} to a multiple of {tp}"
        else:
            remedy += f", or model.{name} to a multiple of {tp}"
        raise UserError(f"parallel.tp {tp} does not divide {name} {size}: {remedy}")


_SETTINGS = {
    "kv_heads": "n_kv_heads",
    "padded_vocab_size": "the padded vocabulary",
    "ssm_heads": "the heads of ssm,",
    "ssm_groups": "ssm.n_groups",
    "meta_tokens": "hymba.meta_tokens",  # under sequence parallelism each rank holds as much of the longer rows
}


def _misfit(model: ModelConfig, tp: int) -> str | None:
    for over, size in model.dealt.items():
        if size % tp and not (over in SHARED_BY_HEADS and tp % size == 0):
            return over
    return None
