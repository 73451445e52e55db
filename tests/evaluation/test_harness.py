"""The harness runs what the config asks for, no more, and its results survive JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from evaluation_fakes import FakeScorer, WordTokenizer, hashed, on_ranks

from data_pipeline.loader import Batch
from sisa_dist.config import EvaluationConfig, ModelConfig, RunConfig, TrainingConfig
from sisa_dist.evaluation.harness import evaluate, write_results


def config(**evaluation: object) -> RunConfig:
    return RunConfig(
        model=ModelConfig(vocab_size=64, d_model=16, n_layers=1, n_heads=2, d_ff=16, d_s=4),
        training=TrainingConfig(steps=1000, seq_len=16, global_batch_tokens=16),
        evaluation=EvaluationConfig(batch_size=2, **evaluation),  # type: ignore[arg-type]
    )


def batches(scorer: FakeScorer, count: int = 3) -> Iterator[Batch]:
    for i in range(-(-count // scorer.dp_size)):
        number = i * scorer.dp_size + scorer.dp_rank
        tokens_BT = torch.arange(6)[None] + number
        yield Batch(tokens_BT, tokens_BT + 1 if number < count else torch.full_like(tokens_BT, -100), None)


@pytest.fixture
def tasks(tmp_path: Path) -> RunConfig:
    path = tmp_path / "lambada.jsonl"
    path.write_text("".join(json.dumps({"text": f"a b c w{i % 2}"}) + "\n" for i in range(5)), encoding="utf-8")
    return config(lambada=str(path), niah=True, niah_items=7, niah_context=64)


def test_runs_what_is_asked(words: WordTokenizer, tasks: RunConfig) -> None:
    words.encode(" ".join("abcdefghijklmnop"))  # ids that the batches hold decode
    scorer = FakeScorer(hashed)
    results = evaluate(tasks, scorer, words, batches(scorer), quiet=True)  # type: ignore[arg-type]
    assert list(results) == ["perplexity", "lambada", "niah"]
    assert results["perplexity"]["tokens"] == 18 and results["perplexity"]["bytes"] > 0
    assert results["lambada"]["passages"] == 5
    assert (results["niah"]["items"], results["niah"]["placement"]) == (7, "paper")
    assert json.loads(json.dumps(results)) == results


def test_runs_nothing_that_is_not_asked(words: WordTokenizer) -> None:
    scorer = FakeScorer(hashed)
    assert evaluate(config(), scorer, words, None, quiet=True) == {}  # type: ignore[arg-type]
    assert scorer.shapes == []


@pytest.mark.parametrize("dp_size", [2, 3])
def test_the_same_on_any_number_of_ranks(words: WordTokenizer, tasks: RunConfig, dp_size: int) -> None:
    words.encode(" ".join("abcdefghijklmnop"))

    def run(scorer: FakeScorer) -> dict:
        return evaluate(tasks, scorer, words, batches(scorer), quiet=True)  # type: ignore[arg-type]

    alone = run(FakeScorer(hashed))
    results, scorers = on_ranks(dp_size, hashed, run)
    assert results == [alone] * dp_size
    assert len({len(scorer.shapes) for scorer in scorers}) == 1


def test_prints_nothing_where_there_is_no_terminal(
    words: WordTokenizer, tasks: RunConfig, capfd: pytest.CaptureFixture[str]
) -> None:
    words.encode(" ".join("abcdefghijklmnop"))
    scorer = FakeScorer(hashed)
    evaluate(tasks, scorer, words, batches(scorer))  # type: ignore[arg-type]
    assert capfd.readouterr() == ("", "")


def test_results_are_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "evaluation.json"
    write_results(path, {"a": {"perplexity": math.inf, "bins": [0.5, math.nan, None]}, "n": 3})
    assert json.loads(path.read_text()) == {"a": {"perplexity": None, "bins": [0.5, None, None]}, "n": 3}
    before = path.read_text()
    with pytest.raises(TypeError):
        write_results(path, {"a": object()})
    assert path.read_text() == before and list(tmp_path.iterdir()) == [path]
