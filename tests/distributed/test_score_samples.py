"""Samples of scores in every layout: those of one process, of the same queries of the same window."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from distributed.grid import LR, Case, batch, constants_with_noise, micro_batches
from distributed.pool import run_job
from sisa_dist.engine import build_engine
from sisa_dist.engine.score_samples import ScoreSamples, rows
from sisa_dist.model.mixers.sisa import SisaScore
from sisa_dist.ops.sampled import sampled_scores
from sisa_dist.parallel.mesh import init_mesh

ZERO = (("kind", "deepspeed"),)
LENGTH = 37  # which sequence parallelism pads
CASES = [
    Case("tp2", "sisa", 4, "heterogeneous", "fp32", documents=True),
    Case("tp2_sp", "sisa", 2, "uniform", "fp32", documents=True),
    Case("dp2", "sisa", 2, "heterogeneous", "fp32"),
    Case("dp2", "sisa", 2, "uniform", "fp32", documents=True, engine=ZERO),
    Case("dp2", "attention", 4, "heterogeneous", "bf16"),
    Case("tp2", "sisa", 1, "uniform", "fp32", engine=ZERO),
    pytest.param(Case("tp2_dp2_sp", "sisa", 1, "uniform", "bf16", documents=True), marks=pytest.mark.slow),
    pytest.param(Case("tp2_sp", "sisa", 2, "uniform", "fp32", engine=(("compile", True),)), marks=pytest.mark.slow),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case}-{dict(case.engine).get('kind', 'fsdp2')}")
def test_they_are_those_of_one_process(case: Case) -> None:
    ((alone, by_hand),) = run_job(1, _samples, dataclasses.replace(case.reference(), precision="fp32"))
    assert by_hand is not None
    tolerance = 1e-5 if case.precision == "fp32" else 0.02
    for found, _ in run_job(case.world_size, _samples, case):
        for key, wanted in dataclasses.asdict(alone).items():
            got = getattr(found, key)
            assert [value is None for value in got] == [value is None for value in wanted]
            assert got == [None if value is None else pytest.approx(value, rel=tolerance) for value in wanted], key
    sampled = [value for value in alone.moved if value is not None]
    assert len(sampled) == (1 if case.mixer == "attention" else 2) and min(sampled) > 0.01
    assert sampled == pytest.approx(by_hand, rel=1e-6)


def test_under_context_parallelism_there_are_none() -> None:
    for found, _ in run_job(2, _samples, Case("cp2", "sisa", 4, "uniform", "fp32")):
        assert found == ScoreSamples([None] * 2, [None] * 2, [None] * 2)


def test_a_model_that_diverged_is_seen_on_every_rank() -> None:
    """And what was taken is not taken again."""
    for found, again in run_job(2, _diverged, Case("tp2", "sisa", 2, "uniform", "fp32")):
        assert found.content_max == found.importance_max == [math.inf] * 2
        assert all(map(math.isnan, found.moved))
        assert again == ScoreSamples([None] * 2, [None] * 2, [None] * 2)


def _diverged(case: Case) -> tuple[ScoreSamples, ScoreSamples]:
    config = case.config()
    mesh = init_mesh(config.parallel, device="cpu")
    engine = build_engine(config, mesh)
    whole = batch(case, 0)
    mine = slice(mesh.dp_rank, None, mesh.dp_size)
    tokens, labels = whole.tokens[mine], whole.labels[mine]
    if mesh.is_main:  # the other rank's heads, and its model, are as they were
        with torch.no_grad():
            for name, parameter in engine.model.named_parameters():  # type: ignore[attr-defined]
                if name.endswith(("wq.weight", "lambda_raw")):
                    parameter.fill_(math.nan)
    engine.sample_scores(7)
    engine.score(tokens, labels, None)
    return engine.score_samples(), engine.score_samples()


def _samples(case: Case) -> tuple[ScoreSamples, list[float] | None]:
    """What the engine saw, and of one process what the first window's scores say at the same queries."""
    config = case.config()
    mesh = init_mesh(config.parallel, device="cpu")
    with constants_with_noise():
        engine = build_engine(config, mesh)
    engine.train_step(micro_batches(case, 0, mesh.dp_rank, mesh.dp_size), LR)
    whole = batch(case, 1)
    mine = slice(mesh.dp_rank, None, mesh.dp_size)
    tokens, labels = whole.tokens[mine, :LENGTH], whole.labels[mine, :LENGTH]
    doc_ids = None if whole.doc_ids is None else whole.doc_ids[mine, :LENGTH]
    plain = engine.score(tokens, labels, doc_ids)
    by_hand = None if mesh.world_size > 1 else []
    hooks = []
    if by_hand is not None:
        hooks = [
            module.register_forward_pre_hook(_by_hand(by_hand, rows(config.seed, 7, LENGTH)), with_kwargs=True)
            for module in engine.model.modules()  # type: ignore[attr-defined]
            if isinstance(module, SisaScore)
        ]
    engine.sample_scores(7)
    scored = engine.score(tokens, labels, doc_ids)
    for hook in hooks:
        hook.remove()
    if not dict(case.engine).get("compile"):
        assert all(torch.equal(a, b) for a, b in zip(scored, plain, strict=True))
    engine.score(tokens.flip(0), labels.flip(0), doc_ids)  # is not sampled
    return engine.score_samples(), by_hand


def _by_hand(found: list[float], sampled: Tensor):  # type: ignore[no-untyped-def]
    def look(_module, inputs, options) -> None:  # type: ignore[no-untyped-def]
        q, k, _, C, B, log_alpha, theta, lam = inputs
        doc_ids = options["doc_ids"]
        each = [
            sampled_scores(
                *(x[:1] for x in (q, k, C, B, log_alpha, theta)),
                lam,
                rows=sampled[i : i + 1],
                doc_ids=None if doc_ids is None else doc_ids[:1],
            ).moved.item()
            for i in range(len(sampled))
        ]
        found.append(sum(each) / len(each))

    return look


def test_queries_are_one_in_each_stretch_and_others_at_each_step() -> None:
    drawn = [rows(3, step, 512) for step in range(20)]
    for found in drawn:
        assert (found // 32).tolist() == list(range(16))
    assert len({tuple(found.tolist()) for found in drawn}) == 20
    assert torch.equal(rows(3, 5, 512), drawn[5]) and not torch.equal(rows(4, 5, 512), drawn[5])
    assert rows(3, 5, 7).tolist() == list(range(7))
