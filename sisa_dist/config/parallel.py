"""The block `parallel:` of the YAML, and what context parallelism asks of the rest of it."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import PositiveInt
from pydantic import model_validator as _model_validator

from sisa_dist.config.mixers import WITHOUT_HEADS
from sisa_dist.config.model import ModelConfig
from sisa_dist.config.section import Section

WITHOUT_CONTEXT = ("fox", "sigmoid_sisa")  # mixers whose windows cp does not cut


class ParallelConfig(Section):
    """How the processes of a launch are dealt out, tp × cp × dp of them. Changes speed and memory, never the result."""

    tp: PositiveInt = 1  # tensor-parallel ranks: heads, d_ff and the vocabulary are cut into this many slices
    sequence_parallel: bool = False  # norms and residuals of a tp group hold a tp-th of its tokens each
    cp: PositiveInt = 1  # context-parallel ranks: each holds an early and a late stretch of every window
    cp_kind: Literal["all_gather", "ring", "ulysses"] = "all_gather"  # how its score meets keys held elsewhere
    dp: PositiveInt | None = None  # data-parallel ranks; None: every process that tp and cp leave
    dp_replicate: PositiveInt = 1  # of them, groups that hold whole copies (HSDP); weights are sharded inside a group
    ep: PositiveInt = 1  # of the data ranks, how many hold one set of experts together and send each other tokens

    @_model_validator(mode="after")
    def _consistent(self) -> ParallelConfig:
        if self.sequence_parallel and self.tp == 1:
            raise ValueError("sequence_parallel has no effect with tp 1: set tp to 2 or more, or remove it")
        if self.dp is not None and self.dp % self.dp_replicate:
            raise ValueError(f"dp_replicate {self.dp_replicate} does not divide dp {self.dp}: set it to a divisor")
        if self.cp_kind != "all_gather" and self.cp == 1:
            raise ValueError(f"cp_kind {self.cp_kind} has no effect with cp 1: set cp to 2 or more, or remove it")
        for key in ("tp", "cp", "dp_replicate"):
            if self.ep > 1 and getattr(self, key) > 1:
                raise ValueError(
                    f"ep {self.ep} does not go with {key} {getattr(self, key)}: set one of them to 1"
                    + (" (tp deals out experts too)" if key == "tp" else "")
                )
        if self.dp is not None and self.dp % self.ep:
            good = [n for n in range(1, self.dp + 1) if self.dp % n == 0]
            raise ValueError(f"ep {self.ep} does not divide dp {self.dp}: set ep to one of {good}")
        return self


def check_context(parallel: ParallelConfig, model: ModelConfig, *, seq_len: int, path: str) -> None:
    """Raises ValueError where `parallel.cp` does not fit the model, the sequence or attention.path."""
    cp, tp = parallel.cp, parallel.tp
    if cp == 1:
        return
    for layer, mixer in enumerate(model.layer_mixers):
        if mixer in WITHOUT_CONTEXT:
            raise ValueError(
                f"parallel.cp {cp} does not cut windows for the mixers {' and '.join(WITHOUT_CONTEXT)}, and layer "
                f"{layer} has {mixer}: set parallel.cp to 1"
            )
    if model.moe is not None:
        raise ValueError(
            f"parallel.cp {cp} does not go with model.moe, whose routers are balanced over whole windows: set "
            "parallel.cp to 1"
        )
    unit = cp * math.lcm(2, tp if parallel.sequence_parallel else 1)
    if seq_len % unit:
        cut = f"2 × cp = {2 * cp} stretches" + (f", and tp {tp} each rank's two" if unit > 2 * cp else "")
        raise ValueError(
            f"parallel.cp {cp} cuts training.seq_len {seq_len} into {cut}, which does not come out even: set seq_len "
            f"to {max(1, seq_len // unit) * unit} or {(seq_len // unit + 1) * unit}"
        )
    if model.meta_tokens % unit:
        raise ValueError(
            f"parallel.cp {cp} cuts rows that hymba.meta_tokens {model.meta_tokens} lengthen, which {unit} does not "
            f"divide: set it to {model.meta_tokens // unit * unit} or {(model.meta_tokens // unit + 1) * unit}"
        )
    _check_kind(parallel, model, path)


def _check_kind(parallel: ParallelConfig, model: ModelConfig, path: str) -> None:
    cp, tp = parallel.cp, parallel.tp
    if set(model.layer_mixers) <= set(WITHOUT_HEADS):
        if parallel.cp_kind != "all_gather":
            raise ValueError(
                f"parallel.cp_kind {parallel.cp_kind} is of scores, and no layer has any: remove it (states are always "
                "gathered)"
            )
        return
    for layer, mixer in enumerate(model.layer_mixers):
        if mixer == "hymba" and model.window_of(layer) is not None and parallel.cp_kind != "ulysses":
            raise ValueError(
                f"parallel.cp_kind {parallel.cp_kind} meets all keys, and layer {layer} of hymba has a window: set "
                "cp_kind to ulysses"
            )
    if parallel.cp_kind != "ulysses" and path in ("single", "dense"):
        raise ValueError(
            f"attention.path {path} has no effect under parallel.cp_kind {parallel.cp_kind}, which is bisected: set "
            "attention.path to auto, or cp_kind to ulysses"
        )
    heads = {"n_heads": model.n_heads, "n_kv_heads": model.kv_heads} if parallel.cp_kind == "ulysses" else {}
    for name, number in heads.items():
        if number % (tp * cp):
            raise ValueError(
                f"parallel.cp_kind ulysses deals out heads, and tp × cp = {tp * cp} does not divide {name} {number}: "
                "set cp_kind to ring or all_gather, or lower parallel.cp"
            )
