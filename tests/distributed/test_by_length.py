"""Evaluation by length under tp, sequence parallelism, cp, dp and both engines is that of one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from data_pipeline.loader import Batch
from distributed.grid import Case, batch
from distributed.pool import run_job
from sisa_dist.config import RetrievalConfig
from sisa_dist.engine import build_engine
from sisa_dist.evaluation.positions import loss_by_position
from sisa_dist.evaluation.retrieval import Retrieval
from sisa_dist.parallel.mesh import init_mesh

SEVEN = 7


class Sevens:
    """Every character is one id, so a model that has learned it answers everything."""

    eos_id, vocab_size = 0, 61

    def encode(self, text: str) -> list[int]:
        return [SEVEN] * len(text)

    def decode(self, ids: list[int]) -> str:
        return "a" * len(ids)


@pytest.mark.parametrize(
    ("layout", "mixer", "options"),
    [
        ("tp2_dp2_sp", "sisa", {}),
        ("dp2", "sisa", {"kind": "deepspeed"}),
        ("cp2", "mamba3_sisa", {}),
        pytest.param("cp2_dp2_ring", "sisa", {}, marks=pytest.mark.slow),
        pytest.param("tp2_dp2", "sisa", {"kind": "deepspeed", "zero_stage": 1}, marks=pytest.mark.slow),
    ],
)
def test_the_same_under_every_engine_and_layout(layout: str, mixer: str, options: dict[str, Any]) -> None:
    case = Case(layout, mixer, 4, "uniform", "fp32", documents=True, engine=tuple(options.items()))
    ((before, table, after),) = run_job(1, _evaluate, case.reference())
    assert before["score_by_length"] == [0.0] and after["score_by_length"] == [1.0]
    assert len({round(loss, 3) for loss in table["loss_by_position"]}) > 2
    for found in run_job(case.world_size, _evaluate, case):
        assert (found[0], found[2]) == (before, after)
        assert found[1] == {key: pytest.approx(value, rel=1e-5) for key, value in table.items()}


def _evaluate(case: Case) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Retrieval before and after the model learned to say SEVEN, and the loss by position before."""
    config = case.config()
    mesh = init_mesh(config.parallel, device="cpu")
    engine = build_engine(config, mesh)
    # Three prompts a length: over two data ranks one of them has none in the last batch.
    asked = RetrievalConfig(lengths=[521], depths=[0.0, 0.5, 1.0], items=1, tasks=["multiquery"])
    made = Retrieval(asked, Sevens(), seed=0)  # type: ignore[arg-type]
    before = made.score(engine, batch_tokens=1)
    whole = batch(case, 0)
    assert whole.doc_ids is not None
    mine = range(engine.dp_rank, len(whole.tokens), engine.dp_size)
    held_out = [Batch(whole.tokens[i : i + 1], whole.labels[i : i + 1], whole.doc_ids[i : i + 1]) for i in mine]
    table = loss_by_position(engine, held_out, seq_len=whole.tokens.shape[1], buckets=5)
    sevens = torch.full((1, whole.tokens.shape[1]), SEVEN)
    for _ in range(8):
        engine.train_step([Batch(sevens, sevens, None)], 3e-2)
    return before, table, made.score(engine, batch_tokens=1)
