"""The prepared data of a run, opened and checked against its config. It makes none: see data_pipeline.prepare."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from data_pipeline.index import Index
from data_pipeline.loader import Batch, Loader, validation_batches
from data_pipeline.manifest import check_settings
from data_pipeline.mixture import PERIOD
from data_pipeline.places import data_place
from data_pipeline.prepared import open_split, remote_settings, small_files
from data_pipeline.tokenizer import Tokenizer
from sisa_dist.config import RunConfig, UserError
from sisa_dist.evaluation.scorer import Scorer

ONLY = "train"  # what the one source of a run without a mixture is called


@dataclass(frozen=True)
class RunData:
    """By source; held-out text of those that are read and have any."""

    sources: dict[str, Index]
    validation: dict[str, Index]
    tokenizer: Tokenizer

    @property
    def train(self) -> Index:
        """Of a run without a mixture."""
        return self.sources[ONLY]


def open_data(config: RunConfig) -> RunData:
    """Raises UserError where the data is not prepared, or otherwise than the config says, or does not fit the model."""
    mixture, remote = config.data.mixture, remote_settings(config.data)
    places = {ONLY: config.data_place} if mixture is None else {n: data_place(s.folder) for n, s in mixture.items()}
    with small_files(config.data_place, remote=remote) as local:
        if mixture is None:
            check_settings(local, config)
        tokenizer = Tokenizer.load(local)
    sources, validation = {}, {}
    for name, place in places.items():
        train = open_split(place, "train", remote=remote, absent_ok=config.data.on_missing == "skip")
        if train is None:
            key = "data.folder" if mixture is None else f"data.mixture.{name}"
            raise UserError(f"{key}: {place}: no prepared data here: run `sisa prepare` for it first")
        sources[name] = train
        held_out = None
        if mixture is None or (config.data.shares or {})[name]:
            held_out = open_split(place, "validation", remote=remote)
        if held_out is not None:
            validation[name] = held_out
    if tokenizer.vocab_size > config.model.vocab_size:
        raise UserError(
            f"model.vocab_size {config.model.vocab_size} is smaller than the tokenizer's {tokenizer.vocab_size} in "
            f"{config.data_place}: set model.vocab_size to {tokenizer.vocab_size}"
        )
    differ = [name for name, index in sources.items() if index.tokenizer_sha256 != tokenizer.sha256]
    if differ and mixture is None:
        raise UserError(
            f"{config.data_place}: its shards have another {tokenizer.path.name}: run `sisa prepare --force`"
        )
    if differ:
        raise UserError(
            f"data.mixture: {', '.join(differ)}: made with another tokenizer than {config.data_place}: prepare with "
            f"data.tokenizer.path={config.data_place}/{tokenizer.path.name}, or leave out"
        )
    read: dict[str, str] = {}
    for name in [name for name, share in (config.data.shares or {}).items() if share]:
        if (twin := read.setdefault(sources[name].fingerprint, name)) != name:
            raise UserError(
                f"data.mixture: {twin} and {name} hold the same data, which would be read twice an epoch: leave one "
                "out and give the other both weights"
            )
    return RunData(sources, validation, tokenizer)


def open_loader(config: RunConfig, data: RunData, *, dp_rank: int = 0, dp_size: int = 1) -> Loader:
    """Of a run's first stage; see Loader.begin. Raises UserError where the batch cannot be dealt to dp_size ranks."""
    return Loader(
        data.train if config.data.mixture is None else data.sources,
        seq_len=config.training.seq_len,
        seed=config.seed,
        global_batch_windows=config.training.global_batch_windows,
        micro_batch_size=config.training.micro_batch_size,
        dp_rank=dp_rank,
        dp_size=dp_size,
        lanes=config.data.lanes,
        document_mask=config.data.document_mask,
        packing=config.data.packing,
        shares=config.data.shares,
        prefetch=config.data.prefetch,
        read_threads=config.data.read_threads,
        on_missing=config.data.on_missing,
    )


def check_limits(config: RunConfig, loader: Loader, *, windows: int) -> None:
    """Raises UserError where a stage of so many windows reads more of a source than the mixture allows."""
    mixture = config.data.mixture or {}
    planned, budget = windows * config.training.seq_len, sum(source.tokens or 0 for source in mixture.values())
    if budget and planned > budget:
        raise UserError(
            f"data.mixture: {planned:,} tokens are planned (training.steps) and the sources' tokens sum to {budget:,}: "
            f"lower training.steps by {-(-(planned - budget) // config.training.global_batch_tokens)}, or raise tokens"
        )
    for name, served in loader.stage.counts(windows).items():
        most = mixture[name].tokens if name in mixture else None
        planned = served * config.training.seq_len
        if most is not None and planned > 1.01 * most + config.training.seq_len:  # windows are whole, shares rounded
            raise UserError(
                f"data.mixture.{name}: {planned:,} tokens are planned and its tokens are {most:,}: shares are rounded "
                f"to 1 in {PERIOD}, this one by too much; raise its tokens, lower training.steps, or leave it out"
            )
    for name, epochs in loader.stage.epochs(windows).items():
        allowed = mixture[name].max_epochs if name in mixture else None
        if allowed is not None and epochs > allowed:
            source, served = loader.stage.sources[name], loader.stage.counts(windows)[name]
            raise UserError(
                f"data.mixture.{name}: {epochs:.2f} epochs are planned and max_epochs is {allowed:g}: {served:,} "
                f"windows, of {source.windows:,} an epoch; lower its share, lower training.steps, or raise max_epochs"
            )


def held_out_batches(
    config: RunConfig,
    validation: Index,
    scorer: Scorer,
    *,
    batch_size: int,
    max_windows: int | None,
    seq_len: int | None = None,
) -> Iterator[Batch]:
    """This rank's share of the validation windows, of training.seq_len or `seq_len` tokens, masked as in training."""
    return validation_batches(
        validation,
        seq_len=seq_len or config.training.seq_len,
        batch_size=batch_size,
        max_windows=max_windows,
        dp_rank=scorer.dp_rank,
        dp_size=scorer.dp_size,
        document_mask=config.data.document_mask,
    )
