"""The `evaluation:` block: what `sisa eval` runs, and what of it a run repeats while it trains."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from sisa_dist.config.section import Section

TaskName = Literal["niah", "pairs", "passkey", "multikey", "multiquery", "variable_tracking"]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class PositionsConfig(Section):
    """Loss by position in the window, on held-out text."""

    every: PositiveInt | None = None  # steps, and after the last; None: in `sisa eval` alone
    seq_len: PositiveInt | None = None  # tokens of a window, also more than in training; None: training.seq_len
    windows: PositiveInt = 32
    buckets: PositiveInt = 16  # of equal width


class RetrievalConfig(Section):
    """What a model finds again over lengths and depths (evaluation/retrieval_tasks.py)."""

    every: PositiveInt | None = None  # steps, and after the last; None: in `sisa eval` alone
    tasks: list[TaskName] = Field(
        default=["niah", "pairs", "passkey", "multikey", "multiquery", "variable_tracking"], min_length=1
    )
    lengths: list[PositiveInt] = Field(min_length=1)  # tokens that the model reads
    depths: list[Fraction] = Field(default=[0.0, 0.25, 0.5, 0.75, 1.0], min_length=1)  # 0: the text's beginning
    items: PositiveInt = 10  # of each task, length and depth
    filler: str | list[str] | None = None  # text files to hide needles in; None: a few sentences over and over
    threshold: Fraction = 0.85  # the effective length is the longest with at least this score

    @model_validator(mode="after")
    def _consistent(self) -> RetrievalConfig:
        for key in ("tasks", "lengths", "depths"):
            values = getattr(self, key)
            twice = [value for value in values if values.count(value) > 1]
            if twice:
                raise ValueError(f"{key} names {twice[0]} twice: remove one")
        if self.filler == []:
            raise ValueError("filler names no file: name one, or set it to null")
        return self


class EvaluationConfig(Section):
    batch_size: PositiveInt = 8
    perplexity_windows: PositiveInt | None = None  # None: the whole validation split
    lambada: str | None = None  # a LAMBADA .jsonl with a text field; None: skipped
    niah: bool = False
    niah_items: PositiveInt = 200
    niah_context: PositiveInt = 512  # tokens
    niah_placement: Literal["paper", "uniform"] = "paper"  # of the needle: in the first half, or anywhere
    positions: PositionsConfig | None = None  # None: skipped
    retrieval: RetrievalConfig | None = None  # None: skipped
