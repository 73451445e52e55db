"""SentencePiece, trained so that text → ids → text gives back every character, and loaded with its checks.

No normalisation, no dummy prefix, byte fallback: code keeps its tabs, newlines and indentation. It knows nothing of
documents' order or of shards.
"""

from __future__ import annotations

import hashlib
import heapq
import io
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import sentencepiece

from data_pipeline.tokenizer_base import (
    JSON,
    JSON_CONFIG,
    SENTENCEPIECE,
    TOKENIZER_FILES,
    Tokenizer,
    check_text_returns,
    find_tokenizer,
    token_dtype,
)
from sisa_dist.config import UserError

__all__ = [
    "JSON",
    "JSON_CONFIG",
    "SENTENCEPIECE",
    "TOKENIZER_FILES",
    "SentencePieceTokenizer",
    "Tokenizer",
    "check_text_returns",
    "draw_sample",
    "find_tokenizer",
    "token_dtype",
    "train_tokenizer",
]

# Whole pieces, never merged further: SentencePiece trains on lines, so a newline must be a piece of its own.
_WHITESPACE = ["\n", "\n\n", "\n\n\n", "\t", "\t\t", "\t\t\t", "\t\t\t\t"]
_SPACE_MARK = "\u2581"  # SentencePiece writes a space as this character, and so reads a literal one back as a space
_LINE_BYTES = 4000  # longest line the trainer is given
_TRAINER_THREADS = 2  # a constant: SentencePiece stores it in the model, and the same text must give the same bytes


def train_tokenizer(
    texts: Iterable[str],
    model_path: str | Path,
    *,
    vocab_size: int,
    model_type: Literal["bpe", "unigram"] = "bpe",
    sample_bytes: int = 32_000_000,
    seed: int = 0,
) -> SentencePieceTokenizer:
    """Trains on at most `sample_bytes` of UTF-8 drawn by hash of (seed, text), writes `model_path` whole or not at all.

    The draw depends on the set of texts only, not on their order; it takes one pass over them and holds
    `sample_bytes` in memory. Ids: unk 0, bos 1, eos 2, 256 bytes, whitespace, then learned pieces; exactly
    `vocab_size` of them. Same texts, same settings, same SentencePiece: the same bytes.
    Raises UserError where the text is too little for the vocabulary, or the vocabulary for its characters.
    """
    sample = draw_sample(texts, sample_bytes, seed)
    if not any(text.strip() for text in sample):
        raise UserError("there is no text to train a tokenizer on: name more in data.input, or set data.tokenizer.path")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_lines(sample, sample_bytes),
            model_writer=model,
            model_type=model_type,
            vocab_size=vocab_size,
            byte_fallback=True,
            split_digits=True,
            character_coverage=0.9999,  # rarer characters are spelt in bytes
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            user_defined_symbols=_WHITESPACE,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            max_sentence_length=2 * _LINE_BYTES,
            num_threads=_TRAINER_THREADS,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise UserError(_explain(str(error), vocab_size, sum(len(text.encode()) for text in sample))) from None
    path = Path(model_path)
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(model.getvalue())
    os.replace(partial, path)
    return SentencePieceTokenizer(model.getvalue(), path)


class SentencePieceTokenizer(Tokenizer):
    """`sha256` is of the model's bytes."""

    def __init__(self, model: bytes, path: Path) -> None:
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise UserError(
                f"{path}: not a SentencePiece model ({error}): name another in data.tokenizer.path"
            ) from None
        self.path, self.model = path, model
        self.sha256 = hashlib.sha256(model).hexdigest()
        self.vocab_size = self._model.get_piece_size()
        self.eos_id = self._model.eos_id()
        self.bos_id = self._model.bos_id()
        if self.eos_id < 0:
            raise UserError(f"{path}: the SentencePiece model has no eos, which joins documents: train one with eos_id")
        self._mark = self._mark_ids()

    @property
    def files(self) -> dict[str, bytes]:
        return {SENTENCEPIECE: self.model}

    def piece(self, token_id: int) -> str:
        return str(self._model.id_to_piece(token_id))

    def encode_batch(self, texts: Sequence[str], *, num_threads: int = -1) -> list[list[int]]:
        if self._mark is None or not any(_SPACE_MARK in text for text in texts):
            return self._model.encode(list(texts), out_type=int, num_threads=num_threads)
        return [self._encode_marked(text) for text in texts]

    def _decode(self, ids: list[int]) -> str:
        return str(self._model.decode(ids))

    def fallback_ids(self) -> set[int]:
        return {i for i in range(self.vocab_size) if self._model.is_byte(i) or self._model.is_unknown(i)}

    def unknown_id(self) -> int:
        return int(self._model.unk_id())

    def _encode_marked(self, text: str) -> list[int]:
        """`text` with its literal space marks spelt in bytes, which decode to themselves."""
        assert self._mark is not None
        first, *rest = self._model.encode(text.split(_SPACE_MARK), out_type=int)
        return first + [i for part in rest for i in (*self._mark, *part)]

    def _mark_ids(self) -> list[int] | None:
        """Byte pieces of the space mark; None for a foreign model that has none, or that would add a dummy prefix."""
        ids = [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE_MARK.encode()]
        exact = all(self._model.is_byte(i) for i in ids) and self._model.decode(self._model.encode("a")) == "a"
        prefixed = self._model.encode("a", out_type=str)[0].startswith(_SPACE_MARK)
        return ids if exact and not prefixed else None


def sample_hash(content: bytes, seed: int) -> int:
    """By which texts are drawn: 64 bits of the UTF-8 and the seed."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8, salt=seed.to_bytes(16, "little")).digest(), "little")


def draw_sample(texts: Iterable[str], sample_bytes: int, seed: int) -> list[str]:
    """The texts of smallest hash that together hold at least `sample_bytes` (or all there are), in order of hash."""
    heap: list[tuple[int, str, int]] = []  # (-hash, text, bytes): the largest hash on top
    total = 0
    for text in texts:
        content = text.encode()
        heapq.heappush(heap, (-sample_hash(content, seed), text, len(content)))
        total += len(content)
        while total - heap[0][2] >= sample_bytes:
            total -= heapq.heappop(heap)[2]
    return [text for _, text, _ in sorted(heap, reverse=True)]


def _lines(texts: Iterable[str], sample_bytes: int) -> Iterator[str]:
    """The lines of `texts` up to `sample_bytes`, longer ones cut: SentencePiece skips a sentence over its limit."""
    left = sample_bytes
    for text in texts:
        for line in text.split("\n"):
            for start in range(0, len(line), _LINE_BYTES // 4):  # a character is at most 4 bytes
                piece = line[start : start + _LINE_BYTES // 4]
                if piece.strip():
                    yield piece
            left -= len(line.encode()) + 1
            if left <= 0:
                return


def _explain(message: str, vocab_size: int, num_bytes: int) -> str:
    if most := re.search(r"set it to a value <= (\d+)", message):
        return (
            f"model.vocab_size {vocab_size} is too large for {num_bytes} bytes of text: set model.vocab_size to at "
            f"most {most[1]}, or name more text in data.input"
        )
    if least := re.search(r"required_chars. \d+ vs (\d+)", message):
        return f"model.vocab_size {vocab_size} is too small for this text's characters: set it to at least {least[1]}"
    return f"SentencePiece could not train on {num_bytes} bytes of text ({' '.join(message.split())}): name more text"
