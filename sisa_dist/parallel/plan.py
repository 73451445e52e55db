"""How tensor parallelism splits the model: a table of data. `apply.py` carries it out; a new mixer adds lines here.

`PLAN` gives every parameter, by a pattern of its full name, one of seven kinds:

    column      tp_dim 0: rows of a projection, or of a per-head parameter, are dealt out
    row         tp_dim 1: columns are dealt out, and the module's output is a partial sum
    inner       tp_dim 1, as row, but inside a region: the sum over ranks is what each goes on with
    vocab       tp_dim 0: rows of the embedding or the head
    replicated  whole on every rank, used on the residual stream: under sequence parallelism each rank sees only its
                part of the sequence, so gradients are then partial
    added       whole on every rank: the bias of a row layer, added once to the sum of the ranks' parts; it acts on the
                residual stream, as what is replicated does
    shared      whole on every rank and used by each with its own heads: gradients are always partial

The gain of an RMSNorm over all heads together is `column`: the mean of squares is then taken over all ranks' channels.

`over` is what is dealt out, a property of ModelConfig; tp must divide it. Only for kv heads may tp be the larger: what
belongs to them is then held whole, each rank uses the rows of its own kv head, and gradients are partial.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from sisa_dist.config import ModelConfig, UserError

Kind = Literal["column", "row", "inner", "vocab", "replicated", "added", "shared"]


@dataclass(frozen=True)
class Split:
    kind: Kind
    over: str = ""


PLAN: dict[str, Split] = {
    "embed.weight": Split("vocab", "padded_vocab_size"),
    "head.weight": Split("vocab", "padded_vocab_size"),
    "norm.weight": Split("replicated"),
    "norm.bias": Split("replicated"),
    "blocks.*.norm?.weight": Split("replicated"),
    "blocks.*.norm?.bias": Split("replicated"),
    # attention, and what sisa has in common with it
    "blocks.*.mixer.wq.weight": Split("column", "n_heads"),
    "blocks.*.mixer.wq.bias": Split("column", "n_heads"),
    "blocks.*.mixer.wk.weight": Split("column", "kv_heads"),
    "blocks.*.mixer.wk.bias": Split("column", "kv_heads"),
    "blocks.*.mixer.wv.weight": Split("column", "kv_heads"),
    "blocks.*.mixer.wv.bias": Split("column", "kv_heads"),
    "blocks.*.mixer.wo.weight": Split("row", "n_heads"),
    "blocks.*.mixer.wo.bias": Split("added"),
    "blocks.*.mixer.?_norm.weight": Split("shared"),
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
    # feed-forward
    "blocks.*.mlp.gate.weight": Split("column", "d_ff"),
    "blocks.*.mlp.gate.bias": Split("column", "d_ff"),
    "blocks.*.mlp.up.weight": Split("column", "d_ff"),
    "blocks.*.mlp.up.bias": Split("column", "d_ff"),
    "blocks.*.mlp.down.weight": Split("row", "d_ff"),
    "blocks.*.mlp.down.bias": Split("added"),
    # ssm_gated: the map from a head's C to its slice of the gate; config/model.py sees to it that slices are whole
    "blocks.*.mlp.ssm_gate.weight": Split("column", "n_heads"),
}

# Modules whose input enters the tp region once, for all the column layers inside; their row layer leaves it.
REGIONS = ("blocks.*.mixer", "blocks.*.mlp", "head")


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
        size = getattr(model, misfit)
        name = {"kv_heads": "n_kv_heads", "padded_vocab_size": "the padded vocabulary"}.get(misfit, misfit)
        good = [n for n in range(1, model.n_heads + 1) if _misfit(model, n) is None]
        remedy = f"set parallel.tp to one of {good}" if good != [1] else "set parallel.tp to 1"
        if misfit == "padded_vocab_size":
            remedy += f", or model.vocab_multiple to a multiple of {tp}, such as 128"
        elif misfit == "kv_heads":
            remedy += ", or model.n_kv_heads to a divisor or a multiple of it"
        elif misfit == "d_ff":
            remedy += f", or model.d_ff to {size // tp * tp} or {(size // tp + 1) * tp}"
        else:
            remedy += f", or model.{misfit} to a multiple of {tp}"
        raise UserError(f"parallel.tp {tp} does not divide {name} {size}: {remedy}")


def _misfit(model: ModelConfig, tp: int) -> str | None:
    for over in ("n_heads", "kv_heads", "d_ff", "padded_vocab_size", "ssm_heads"):
        size = getattr(model, over)  # 0 where the model has none
        if size % tp and not (over == "kv_heads" and tp % size == 0):
            return over
    return None
