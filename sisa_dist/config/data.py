"""What a YAML file may say about text, tokenizer and shards: the `data:` block, checked without looking at any file.

It holds no path logic and reads nothing; what needs the data itself is checked by data_pipeline.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveInt
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


class DataConfig(Section):
    # Files, folders, globs, URLs, hf://NAME?split=train; python-stdlib: the sources of Python itself
    input: str | list[str] = "python-stdlib"
    text_key: str = "text"
    on_bad: Literal["stop", "skip"] = "stop"  # what is damaged or no text; skip: it is counted in prepared.json
    folder: str | None = None  # where the shards are; None: data/ in the run folder
    tokenizer: TokenizerConfig = TokenizerConfig()
    member_tokens: PositiveInt = 16_384  # tokens of one tar member
    shard_members: PositiveInt = 256  # members of one tar
    validation_fraction: float = Field(default=0.01, ge=0.0, lt=1.0)  # of the documents, chosen by hash of their text
    shuffle_seed: int = Field(default=0, ge=0, lt=2**64)  # documents are shuffled before members are cut
    workers: PositiveInt | None = None  # processes of `sisa prepare`; None: a core each, or none where there is little
    lanes: PositiveInt = 8  # reading locality only: contiguous stretches of the epoch read side by side
    document_mask: bool = False  # true: no token sees another document
    prefetch: NonNegativeInt = 4  # batches read ahead
    passes: PassesConfig = PassesConfig()  # what is taken out of the documents; nothing by default
