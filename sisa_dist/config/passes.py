"""The keys of data.passes: what is taken out of the documents before they are split and tokenised. Nothing by default.

A pass runs where its block is given, even an empty one (`--set data.passes.exact_dedup={}`), in the order below. What
each does is said in data_pipeline/passes/.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from sisa_dist.config.section import Section

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class LengthConfig(Section):
    min_characters: PositiveInt = 1
    max_characters: PositiveInt | None = None

    @model_validator(mode="after")
    def _consistent(self) -> LengthConfig:
        if self.max_characters is not None and self.max_characters < self.min_characters:
            raise ValueError(f"max_characters {self.max_characters} is below min_characters: no text would be left")
        return self


class LanguageConfig(Section):
    """By py3langid."""

    keep: list[str] = Field(min_length=1)  # ISO 639-1 codes
    min_probability: Fraction = 0.5
    characters: PositiveInt = 4_000  # looked at, from the beginning


class QualityConfig(Section):
    """Rae et al. 2021 (Gopher), A.1.1, made for English web pages; words are what whitespace separates."""

    min_words: NonNegativeInt = 50
    max_words: PositiveInt = 100_000  # most novels have more
    min_mean_word_length: float = Field(default=3.0, ge=0.0)
    max_mean_word_length: PositiveFloat = 10.0
    max_hashes_per_word: float = Field(default=0.1, ge=0.0)
    max_ellipses_per_word: float = Field(default=0.1, ge=0.0)
    max_bullet_lines: Fraction = 0.9
    max_ellipsis_lines: Fraction = 0.3
    min_alphabetic_words: Fraction = 0.8  # words with at least one letter
    min_stop_words: NonNegativeInt = 2  # different ones; 0 for other languages than the list's
    stop_words: list[str] = Field(default=["the", "be", "to", "of", "and", "that", "have", "with"])


class RepetitionConfig(Section):
    """Rae et al. 2021 (Gopher), table A1: a document with more than any of these fractions goes; 1.0 turns one off."""

    duplicate_lines: Fraction = 0.30
    duplicate_paragraphs: Fraction = 0.30
    duplicate_line_characters: Fraction = 0.20
    duplicate_paragraph_characters: Fraction = 0.20
    top_2gram_characters: Fraction = 0.20
    top_3gram_characters: Fraction = 0.18
    top_4gram_characters: Fraction = 0.16
    duplicate_5gram_characters: Fraction = 0.15
    duplicate_6gram_characters: Fraction = 0.14
    duplicate_7gram_characters: Fraction = 0.13
    duplicate_8gram_characters: Fraction = 0.12
    duplicate_9gram_characters: Fraction = 0.11
    duplicate_10gram_characters: Fraction = 0.10


class DecontaminateConfig(Section):
    against: str | list[str] | None = None  # evaluation files; None: the file of evaluation.lambada
    text_key: str = "text"  # of .jsonl files
    ngram: PositiveInt = 13  # words in a row that tell a text
    min_ngram: PositiveInt = 8  # an evaluation text of at least so many words, but fewer than ngram, is told by all
    min_matches: PositiveInt = 1  # different ngrams of one file that a document must hold to go

    @model_validator(mode="after")
    def _consistent(self) -> DecontaminateConfig:
        if self.min_ngram > self.ngram:
            raise ValueError(f"min_ngram {self.min_ngram} is above ngram {self.ngram}: lower it")
        return self


class ExactDedupConfig(Section):
    memory_gb: PositiveFloat = 2.0  # beyond it the table lies in a file of the folder that is being built


class NearDedupConfig(Section):
    threshold: float = Field(default=0.8, gt=0.0, lt=1.0)  # least Jaccard similarity of two documents' ngrams
    ngram: PositiveInt = 5  # words
    num_perm: int = Field(default=128, ge=16, le=1024)  # hashes: the estimate's error is sqrt(s (1 - s) / num_perm)
    seed: NonNegativeInt = 0
    memory_gb: PositiveFloat = 4.0  # beyond it the table lies in a file of the folder that is being built


class PassesConfig(Section):
    length: LengthConfig | None = None
    language: LanguageConfig | None = None
    quality: QualityConfig | None = None
    repetition: RepetitionConfig | None = None
    decontaminate: DecontaminateConfig | None = None
    exact_dedup: ExactDedupConfig | None = None
    near_dedup: NearDedupConfig | None = None
