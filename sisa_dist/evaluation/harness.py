"""Runs what a config's evaluation block asks for and keeps the results as JSON; opens no engine, model or data."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data_pipeline.loader import Batch
from data_pipeline.tokenizer import Tokenizer
from sisa_dist.config import RunConfig, replace_file
from sisa_dist.evaluation.lambada import lambada
from sisa_dist.evaluation.niah import niah
from sisa_dist.evaluation.perplexity import perplexity
from sisa_dist.evaluation.scorer import Scorer


def evaluate(
    config: RunConfig,
    scorer: Scorer,
    tokenizer: Tokenizer,
    validation: Iterable[Batch] | None,
    *,
    quiet: bool = False,
) -> dict[str, Any]:
    """Results by task name: perplexity, lambada, niah, those that are asked for. Collective; the same on every rank.

    `validation`: this rank's batches, equally many on every rank; None skips perplexity. Progress bars stand on the
    first rank's terminal unless `quiet`. Raises UserError where a file or a length cannot serve.
    """
    asked = config.evaluation
    results: dict[str, Any] = {}
    if validation is not None:
        results["perplexity"] = asdict(perplexity(scorer, validation, tokenizer=tokenizer, quiet=quiet))
    if asked.lambada is not None:
        results["lambada"] = lambada(
            scorer,
            tokenizer,
            asked.lambada,
            seq_len=config.training.seq_len,
            batch_size=asked.batch_size,
            quiet=quiet,
        )
    if asked.niah:
        results["niah"] = niah(
            scorer,
            tokenizer,
            items=asked.niah_items,
            context=asked.niah_context,
            batch_size=asked.batch_size,
            seed=config.seed,
            placement=asked.niah_placement,
            quiet=quiet,
        )
    return results


def write_results(path: Path, results: dict[str, Any]) -> None:
    """JSON, written beside and renamed: a reader sees the old file or the new one. inf and nan become null."""
    replace_file(path, json.dumps(_finite(results), indent=1, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
