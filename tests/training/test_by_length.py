"""Evaluation by length in a run and from `sisa eval`: when it is due, where it is written, what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from runs import losses
from sisa_dist.config import RunConfig, UserError, load_config
from sisa_dist.engine.fsdp import FSDP2Engine
from sisa_dist.training.evaluate import evaluate_checkpoint
from sisa_dist.training.metrics_file import read_metrics
from sisa_dist.training.signals import Requeue, StopRequest
from sisa_dist.training.trainer import train

from runs import QUICKSTART  # isort: skip

ASKED = [
    "evaluation.positions={every: 3, seq_len: 128, windows: 3, buckets: 4}",
    "evaluation.retrieval={every: 5, tasks: [niah], lengths: [160, 256], depths: [0, 1], items: 1}",
]


@pytest.fixture
def asked(tiny_overrides: list[str], tmp_path: Path) -> RunConfig:
    return load_config(QUICKSTART, [*tiny_overrides, *ASKED, f"output_dir={tmp_path / 'run'}"])


def test_each_is_due_at_its_own_interval_and_changes_no_step(asked: RunConfig, tiny: RunConfig, tmp_path: Path) -> None:
    run = train(asked, quiet=True)
    found = read_metrics(run)
    assert [record["step"] for record in found["positions"]] == [3, 6, 8]
    assert [record["step"] for record in found["retrieval"]] == [5, 8]
    assert [record["step"] for record in found["evaluation"]] == [4, 8]
    pictures = sorted(path.name for path in (run / "by_length").iterdir())
    steps = [("positions", 3), ("positions", 6), ("positions", 8), ("retrieval", 5), ("retrieval", 8)]
    assert pictures == [f"{kind}_{step:08d}.png" for kind, step in steps]
    plain = train(tiny.model_copy(update={"output_dir": str(tmp_path / "plain")}), quiet=True)
    assert losses(run) == losses(plain)
    # The same from the checkpoint, to the last digit, with pictures beside the JSON.
    results, path = evaluate_checkpoint(run, quiet=True)
    last = {kind: found[kind][-1] for kind in ("positions", "retrieval")}
    for kind, record in last.items():
        assert {"kind": kind, "step": 8, **results[kind]} == record
        assert path.with_name(f"evaluation_{kind}.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads(path.read_text(encoding="utf-8"))["retrieval"]["lengths"] == [160, 256]
    assert results["positions"]["seq_len"] == 128 and results["positions"]["from"] == [0, 32, 64, 96]


def test_a_request_to_stop_ends_a_retrieval_which_is_done_again(
    asked: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked in its second forward: the checkpoint says that it is due, and the resume does it before any step."""
    real, calls = FSDP2Engine.score, [0]

    def score(self: FSDP2Engine, tokens, labels, doc_ids=None):  # type: ignore[no-untyped-def]
        if tokens.shape[1] == 160:
            calls[0] += 1
            stops[0].ask("a test")
        return real(self, tokens, labels, doc_ids)

    stops: list[StopRequest] = []
    enter = StopRequest.__enter__
    monkeypatch.setattr(StopRequest, "__enter__", lambda self: (stops.insert(0, self), enter(self))[1])
    monkeypatch.setattr(FSDP2Engine, "score", score)
    with pytest.raises(Requeue, match="step 5"):
        train(asked, quiet=True)
    run = Path(asked.output_dir)
    assert calls == [1] and "retrieval" not in read_metrics(run)
    monkeypatch.setattr(FSDP2Engine, "score", real)
    train(asked, quiet=True)
    assert [record["step"] for record in read_metrics(run)["retrieval"]] == [5, 8]


def test_bad_input_is_found_before_the_first_step(asked: RunConfig, tiny_overrides: list[str]) -> None:
    absent = [*tiny_overrides, *ASKED, "evaluation.retrieval.filler=/absent.txt", f"output_dir={asked.output_dir}"]
    with pytest.raises(UserError, match=r"evaluation\.retrieval\.filler: /absent\.txt cannot be read"):
        train(load_config(QUICKSTART, absent), quiet=True)
    assert not read_metrics(asked.output_dir).get("train")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["evaluation.retrieval={}"], r"evaluation\.retrieval\.lengths: missing; set it"),
        (["evaluation.retrieval={lengths: [64, 64]}"], "lengths names 64 twice"),
        (["evaluation.retrieval={lengths: [64], depths: [1.5]}"], "less than or equal to 1"),
        (["evaluation.retrieval={lengths: [64], tasks: [haystack]}"], r"evaluation\.retrieval\.tasks"),
        (["evaluation.retrieval={lengths: [64], filler: []}"], "filler names no file"),
        (["evaluation.positions={buckets: 65}"], "buckets 65 exceed the 64 positions"),
        (["evaluation.positions={every: 2}", "data.validation_fraction=0", "training.eval_every=null"], "held-out"),
        (["engine.mlp_chunk=64"], "mlp_chunk 64 has no effect at training.seq_len 64: "),
        (["engine.mlp_chunk=32", "parallel.cp=2"], "at training.seq_len 64, of which a rank holds 32 tokens: lower it"),
        (["engine.mlp_chunk=16", "parallel.tp=4", "parallel.sequence_parallel=true"], "a rank holds 16 tokens"),
        (["engine.mlp_chunk=8", "model.mlp=none", "model.d_ff=0"], "no layer has a dense mlp"),
        (["engine.activation_offload=true"], "set that to true"),
    ],
)
def test_settings_that_cannot_serve_are_refused(tiny_overrides: list[str], overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_config(QUICKSTART, [*tiny_overrides, *overrides])
    assert "\n" not in str(caught.value)
