"""What a YAML file may say about text, tokenizer and shards: the `data:` block, checked without looking at any file.

It holds no path logic and reads nothing; what needs the data itself is checked by data_pipeline.
"""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic import model_validator as _model_validator

from sisa_dist.config.passes import PassesConfig
from sisa_dist.config.section import Section


class TokenizerConfig(Section):
    path: str | None = None  # an existing tokenizer.model or tokenizer.json; None: one is trained on the data
    eos: str | None = None  # the token that ends a document, where a tokenizer.json does not say
    model_type: Literal["bpe", "unigram"] = "bpe"
    sample_bytes: PositiveInt = 32_000_000  # text the trainer sees at most

    @_model_validator(mode="after")
    def _consistent(self) -> TokenizerConfig:
        if self.eos is not None and self.path is None:
            raise ValueError("eos is for a tokenizer that exists: remove it, or set path")
        for key in ("model_type", "sample_bytes"):
            # A resolved config names the defaults too, and must load again.
            if self.path is not None and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key} has no effect on a tokenizer that exists: remove it, or set path to null")
        return self


class SourceConfig(Section):
    """One source of a mixture: its share is its weight, or its tokens, over the sum of all."""

    folder: str  # prepared by `sisa prepare` with a config of its own; also http(s):// or s3://
    weight: NonNegativeFloat | None = None  # 0: known, but not read
    tokens: PositiveInt | None = None  # the most this stage of the run may read of it
    max_epochs: PositiveFloat | None = None  # a run that would read it more often is refused at its start

    @_model_validator(mode="after")
    def _consistent(self) -> SourceConfig:
        if (self.weight is None) == (self.tokens is None):
            raise ValueError("a source has a weight or a number of tokens: set one of the two")
        return self


class DataConfig(Section):
    # Files, folders, globs, URLs, hf://NAME?split=train; python-stdlib: the sources of Python itself
    input: str | list[str] = "python-stdlib"
    text_key: str = "text"
    on_bad: Literal["stop", "skip"] = "stop"  # what is damaged or no text; skip: it is counted in prepared.json
    folder: str | None = None  # where the shards are, also http(s):// or s3://; None: data/ in the run folder
    mixture: dict[str, SourceConfig] | None = None  # several prepared folders by name; None: one, data.folder
    tokenizer: TokenizerConfig = TokenizerConfig()
    member_tokens: PositiveInt = 16_384  # tokens of one tar member; training.seq_len or more: a window is one read
    shard_members: PositiveInt = 256  # members of one tar
    validation_fraction: float = Field(default=0.01, ge=0.0, lt=1.0)  # of the documents, chosen by hash of their text
    shuffle_seed: int = Field(default=0, ge=0, lt=2**64)  # documents are shuffled before members are cut
    workers: PositiveInt | None = None  # processes of `sisa prepare`; None: a core each, or none where there is little
    lanes: PositiveInt = 8  # reading locality only: contiguous stretches of the epoch read side by side
    document_mask: bool = False  # true: no token sees another document
    packing: Literal["concat", "best_fit"] = "concat"  # best_fit: whole documents, cut only where longer than seq_len
    prefetch: NonNegativeInt = 4  # batches read ahead
    passes: PassesConfig = PassesConfig()  # what is taken out of the documents; nothing by default
    read_threads: PositiveInt = 2  # that read them, at most one a batch

    # A shard that is not there; skip: training goes on and what lies in it counts for nothing (missing_shards.json)
    on_missing: Literal["stop", "skip"] = "stop"
    cache_folder: str | None = None  # for shards at URLs, shared by the processes of a host; None: nothing is kept
    cache_gb: PositiveFloat = 20.0  # most that cache_folder may hold, in 10⁹ bytes
    retries: NonNegativeInt = 5  # of a request that fails in a way that may pass, with growing pauses
    timeout: PositiveFloat = 60.0  # seconds a request may take
    connections: PositiveInt = 8  # requests of one process at a time

    @property
    def shares(self) -> dict[str, float] | None:
        """Of each source of the mixture, as given: not normalised."""
        if self.mixture is None:
            return None
        return {name: float(source.tokens or source.weight or 0) for name, source in self.mixture.items()}

    @_model_validator(mode="after")
    def _cache_consistent(self) -> DataConfig:
        if self.cache_folder is None and self.cache_gb != type(self).model_fields["cache_gb"].default:
            raise ValueError("cache_gb has no effect without cache_folder: name one, or remove cache_gb")
        return self

    @_model_validator(mode="after")
    def _mixture_consistent(self) -> DataConfig:
        if self.mixture is None:
            return self
        prepares = (
            *("text_key", "on_bad", "tokenizer", "member_tokens", "shard_members", "validation_fraction"),
            *("shuffle_seed", "workers", "passes"),
        )
        for key in ("input", "folder", *prepares):
            if getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key} has no effect beside mixture, whose folders are prepared already: remove it")
        for name in self.mixture:
            if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
                raise ValueError(f"mixture.{name}: a source's name is of letters, digits, _ and -: rename it")
        if len({source.tokens is None for source in self.mixture.values()}) == 2:
            raise ValueError("mixture: some sources have weights and some tokens: give all of them the same of the two")
        if not any((self.shares or {}).values()):
            raise ValueError("mixture: no source has a weight above 0: name a folder and give it one")
        return self
