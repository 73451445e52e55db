"""Texts, documents and splits made on the spot, for tests of the data. Not in a conftest: those share one module name."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data_pipeline.index import Index
from data_pipeline.shards import ShardWriter

EOS = 2
WORDS = [
    "def",
    "return",
    "import",
    "self",
    "value",
    "for",
    "in",
    "range",
    "print",
    "None",
    "the",
    "of",
    "a",
    "shard",
    "token",
    "window",
    "lane",
    "epoch",
    "λ",
    "naïve",
    "東京",
    "😀",
]


def make_text(seed: int, words: int = 120) -> str:
    rng = random.Random(seed)
    lines, left = [], words
    while left > 0:
        take = min(left, rng.randint(1, 9))
        lines.append(
            rng.choice(["", "    ", "\t", "        "]) + " ".join(rng.choices(WORDS, k=take)) + f" {rng.random()}"
        )
        left -= take
    return f"# document {seed}\n" + rng.choice(["\n", "\n\n"]).join(lines)


def write_split(
    folder: Path,
    documents: Sequence[Sequence[int]],
    *,
    member_tokens: int = 10,
    shard_members: int = 3,
    vocab: int = 97,
) -> Index:
    """A split of hand-made ids (3 … vocab-1; 2 is the eos)."""
    writer = ShardWriter(
        folder,
        dtype=np.dtype("<u2"),
        vocab_size=vocab,
        eos_id=EOS,
        tokenizer_sha256="0" * 64,
        member_tokens=member_tokens,
        shard_members=shard_members,
    )
    for document in documents:
        writer.add(document)
    writer.close()
    return Index.load(folder)


def random_documents(seed: int, number: int, *, longest: int = 30, vocab: int = 97) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(3, vocab, size=int(rng.integers(1, longest + 1))).tolist() for _ in range(number)]
