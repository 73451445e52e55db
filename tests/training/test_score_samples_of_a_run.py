"""Samples of scores in a run: written at each evaluation, and no step is another for them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from runs import losses, tensors
from sisa_dist.config import RunConfig, load_config
from sisa_dist.engine.fsdp import FSDP2Engine
from sisa_dist.training.metrics_file import read_metrics
from sisa_dist.training.reporter import Reporter
from sisa_dist.training.trainer import train

from runs import QUICKSTART  # isort: skip


def test_each_evaluation_writes_them_and_training_is_the_same_to_the_bit(
    tiny_overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = [*tiny_overrides, "model.mixer=[sisa, attention]", "model.d_s=[8, 0]", "data.document_mask=true"]
    run = train(load_config(QUICKSTART, [*overrides, f"output_dir={tmp_path / 'run'}"]), quiet=True)
    found = read_metrics(run)
    assert [record["step"] for record in found["scores"]] == [4, 8]
    first, last = found["scores"]
    assert first.keys() == {"kind", "step", "content_max", "importance_max", "moved"}
    for key in ("content_max", "importance_max", "moved"):
        assert first[key][0] > 0 and first[key][1] is None
        assert first[key] != last[key]  # other weights, other queries
    assert last["moved"][0] < 1
    monkeypatch.setattr(FSDP2Engine, "sample_scores", lambda self, step: None)
    monkeypatch.setattr(Reporter, "scores", lambda self, state, found: None)
    plain = train(load_config(QUICKSTART, [*overrides, f"output_dir={tmp_path / 'plain'}"]), quiet=True)
    without = read_metrics(plain)
    assert "scores" not in without
    assert losses(run) == losses(plain)
    assert [r["validation_loss"] for r in found["evaluation"]] == [r["validation_loss"] for r in without["evaluation"]]
    trained, again = (tensors(folder / "checkpoints/step_00000008") for folder in (run, plain))
    assert len(trained) > 30 and trained.keys() == again.keys()
    assert [name for name in trained if not torch.equal(trained[name], again[name])] == []


def test_a_run_without_sisa_writes_none(tiny: RunConfig) -> None:
    model = tiny.model.model_copy(update={"mixer": "attention", "d_s": None})
    run = train(tiny.model_copy(update={"model": model}), quiet=True)
    assert "scores" not in (run / "metrics.jsonl").read_text(encoding="utf-8")
