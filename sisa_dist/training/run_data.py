"""The prepared data of a run, opened and checked against its config. It makes none: see data_pipeline.prepare."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from data_pipeline.index import Index
from data_pipeline.loader import Batch, validation_batches
from data_pipeline.manifest import check_settings
from data_pipeline.tokenizer import Tokenizer
from sisa_dist.config import RunConfig, UserError
from sisa_dist.evaluation.scorer import Scorer


@dataclass(frozen=True)
class RunData:
    train: Index
    validation: Index | None
    tokenizer: Tokenizer


def open_data(config: RunConfig) -> RunData:
    """Raises UserError where the data is not prepared, or otherwise than the config says, or does not fit the model."""
    folder = config.data_folder
    check_settings(folder, config)
    tokenizer = Tokenizer.load(folder)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise UserError(
            f"model.vocab_size {config.model.vocab_size} is smaller than the tokenizer's {tokenizer.vocab_size} in "
            f"{folder}: set model.vocab_size to {tokenizer.vocab_size}"
        )
    train = Index.load(folder / "train")
    if train.tokenizer_sha256 != tokenizer.sha256:
        raise UserError(f"{folder}: its shards have another {tokenizer.path.name}: run `sisa prepare --force`")
    validation = folder / "validation"
    return RunData(train, Index.load(validation) if (validation / "index.json").is_file() else None, tokenizer)


def held_out_batches(
    config: RunConfig, validation: Index, scorer: Scorer, *, batch_size: int, max_windows: int | None
) -> Iterator[Batch]:
    """This rank's share of the validation windows, as the run's config cuts and masks them."""
    return validation_batches(
        validation,
        seq_len=config.training.seq_len,
        batch_size=batch_size,
        max_windows=max_windows,
        dp_rank=scorer.dp_rank,
        dp_size=scorer.dp_size,
        document_mask=config.data.document_mask,
    )
