"""Texts, documents and splits made on the spot for tests. Not in a conftest: those share one module name."""

from __future__ import annotations

import io
import random
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data_pipeline.index import Index
from data_pipeline.shards import ShardWriter
from data_pipeline.tokenizer import Tokenizer

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


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below `folder`."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def documents_of(folder: Path, split: str) -> list[str]:
    """The texts of a prepared split, in the order they stand in."""
    tokenizer = Tokenizer.load(folder / "tokenizer.model")
    index = Index.load(folder / split)
    assert index.tokenizer_sha256 == tokenizer.sha256 and index.vocab_size == tokenizer.vocab_size
    stream = np.concatenate([index.read_member(member) for member in range(len(index.members))])
    ends = np.flatnonzero(stream == tokenizer.eos_id)
    assert ends[-1] == len(stream) - 1
    return [tokenizer.decode(part[:-1]) for part in np.split(stream, ends + 1)[:-1]]


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


def write_tar(path: Path, entries: Sequence[tuple[str, bytes | None]]) -> Path:
    """A tar of files by name; of None a symbolic link out of the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in entries:
            entry = tarfile.TarInfo(name)
            if content is None:
                entry.type, entry.linkname = tarfile.SYMTYPE, "/etc/passwd"
            entry.size = len(content or b"")
            tar.addfile(entry, io.BytesIO(content or b""))
    return path


def npy(ids: np.ndarray) -> bytes:
    """A .npy file."""
    stream = io.BytesIO()
    np.save(stream, ids)
    return stream.getvalue()
