"""Evaluate a checkpoint by its run's config: builds the engine, loads the weights, runs the harness."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_pipeline.baseline import unigram_perplexity
from data_pipeline.loader import validation_batches
from sisa_dist.config import load_config
from sisa_dist.engine import build_engine
from sisa_dist.evaluation.harness import evaluate, write_results
from sisa_dist.parallel.mesh import init_mesh
from sisa_dist.parallel.plan import check_tp
from sisa_dist.training.checkpoint import find_checkpoint, load_checkpoint
from sisa_dist.training.trainer import open_data


def evaluate_checkpoint(
    run: str | Path, overrides: Sequence[str] = (), *, out: Path | None = None, quiet: bool = False
) -> tuple[dict[str, Any], Path]:
    """(results, JSON path). `run` is a run or checkpoint folder; overrides apply to the config stored in it."""
    checkpoint = find_checkpoint(run)
    config = load_config(checkpoint / "config.yaml", overrides)
    check_tp(config.model, config.parallel.tp)
    mesh = init_mesh(config.parallel, device=config.device)
    data = open_data(config)
    engine = build_engine(config, mesh)
    state = load_checkpoint(checkpoint, engine)
    batches = None
    if data.validation is not None:
        batches = validation_batches(
            data.validation,
            seq_len=config.training.seq_len,
            batch_size=config.evaluation.batch_size,
            max_windows=config.evaluation.perplexity_windows,
            dp_rank=mesh.dp_rank,
            dp_size=mesh.dp_size,
            document_mask=config.data.document_mask,
        )
    results: dict[str, Any] = {"checkpoint": str(checkpoint), "step": state.step}
    results |= evaluate(config, engine, data.tokenizer, batches, quiet=quiet or not mesh.is_main)
    if data.validation is not None:
        windows = config.evaluation.perplexity_windows
        most = None if windows is None else windows * config.training.seq_len
        results["perplexity"]["unigram_perplexity"] = unigram_perplexity(
            data.train, data.validation, max_tokens=most, document_mask=config.data.document_mask
        )
    path = out or checkpoint.parent.parent / "evaluation.json"
    if mesh.is_main:
        write_results(path, results)
    return results, path
