"""Small corpora and splits made on the spot, so that no test of the data needs a download."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.index import Index
from data_pipeline.shards import ShardWriter
from sisa_dist.config import RunConfig, parse_config

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


@pytest.fixture
def corpus_folder(tmp_path: Path) -> Path:
    """120 .txt files with different texts."""
    folder = tmp_path / "text"
    folder.mkdir()
    for i in range(120):
        (folder / f"{i:03d}.txt").write_text(make_text(i), encoding="utf-8")
    return folder


@pytest.fixture
def make_config(tmp_path: Path) -> Callable[..., RunConfig]:
    """make_config(input, folder=…, **data keys): a config of a tiny model over `input`."""

    def make(source: str | list[str], *, folder: str = "data", vocab_size: int = 420, **data: Any) -> RunConfig:
        tree = {
            "model": {"vocab_size": vocab_size, "d_model": 16, "n_layers": 1, "n_heads": 2, "d_ff": 32, "d_s": 2},
            "schedule": {"warmup_steps": 0},
            "training": {"steps": 1, "seq_len": 16, "global_batch_tokens": 64},
            "data": {
                "input": source,
                "folder": str(tmp_path / folder),
                "member_tokens": 512,
                "shard_members": 8,
                "validation_fraction": 0.1,
            }
            | data,
        }
        return parse_config(tree, source="test")

    return make


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
