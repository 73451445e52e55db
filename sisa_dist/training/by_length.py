"""Evaluation by length of one model: on which held-out windows, and which pictures. For `sisa eval` and for runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from data_pipeline.index import Index
from sisa_dist.config import RunConfig
from sisa_dist.evaluation.positions import loss_by_position
from sisa_dist.evaluation.retrieval import Retrieval
from sisa_dist.evaluation.scorer import Scorer
from sisa_dist.training.run_data import held_out_batches


def positions(
    config: RunConfig, held_out: Mapping[str, Index], scorer: Scorer, *, quiet: bool = True
) -> dict[str, dict[str, Any]]:
    """`loss_by_position` of every source by its name; of a run without a mixture under "held-out text". Collective."""
    asked = config.evaluation.positions
    assert asked is not None
    seq_len = asked.seq_len or config.training.seq_len
    rows = max(1, batch_tokens(config) // seq_len)
    found = {}
    for name, index in held_out.items():
        batches = held_out_batches(config, index, scorer, batch_size=rows, max_windows=asked.windows, seq_len=seq_len)
        name = "held-out text" if config.data.mixture is None else name
        found[name] = loss_by_position(scorer, batches, seq_len=seq_len, buckets=asked.buckets, quiet=quiet)
    return found


def as_record(config: RunConfig, tables: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What `positions` found, as JSON has it: of one source the table itself."""
    return next(iter(tables.values())) if config.data.mixture is None else {"sources": tables}


def retrieval(config: RunConfig, made: Retrieval, scorer: Scorer, *, quiet: bool = True) -> dict[str, Any]:
    """`Retrieval.score`. Collective."""
    return made.score(scorer, batch_tokens=batch_tokens(config), quiet=quiet)


def batch_tokens(config: RunConfig) -> int:
    """Of a forward of a longer sequence: as many as in one of evaluation.batch_size training windows."""
    return config.evaluation.batch_size * config.training.seq_len
