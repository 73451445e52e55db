"""Documents to arrays of ids in little memory, whatever the length of a document.

A tokenizer needs some 60 bytes of working memory for a byte of text, and Python 40 for an id in a list. So a long
document is encoded in pieces, cut where the tokenizer itself cuts: after a line or before a space, at a place where the
text on both sides gives the same ids together as apart. A document with no such place is encoded whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from data_pipeline.tokenizer import Tokenizer

PIECE_CHARACTERS = 1 << 18
_BATCH_CHARACTERS = 1 << 21  # handed to the tokenizer's threads at once; to a lone one, a piece
_CONTEXT = 256  # characters on each side of a cut that must not care about it
_TRIES = 8  # places of each sort looked at

Tag = TypeVar("Tag")


def encode_documents(
    documents: Iterable[tuple[Tag, str]], tokenizer: Tokenizer, dtype: np.dtype[Any], *, num_threads: int
) -> Iterator[tuple[Tag, NDArray[Any]]]:
    """(tag, ids of the text) for each (tag, text), in order. OverflowError for an id that `dtype` cannot hold."""
    batch: list[tuple[Tag, str, bool]] = []
    parts: list[NDArray[Any]] = []
    size, enough = 0, PIECE_CHARACTERS if num_threads == 1 else _BATCH_CHARACTERS

    def encoded() -> Iterator[tuple[Tag, NDArray[Any]]]:
        nonlocal parts
        ids = tokenizer.encode_batch([text for _, text, _ in batch], num_threads=num_threads)
        for (tag, _, last), found in zip(batch, ids, strict=True):
            parts.append(np.array(found, dtype))
            if last:
                yield tag, parts[0] if len(parts) == 1 else np.concatenate(parts)
                parts = []

    for tag, text in documents:
        start = 0
        while start < len(text) or not text:
            stop = _cut(text, start, tokenizer)
            batch.append((tag, text[start:stop], stop == len(text)))
            size += stop - start
            start = stop
            if size >= enough:
                yield from encoded()
                batch, size = [], 0
            if not text:
                break
    if batch:
        yield from encoded()


def _cut(text: str, start: int, tokenizer: Tokenizer) -> int:
    """Where the piece that begins at `start` may end: a place as the module says, or the end of the text."""
    target = start + PIECE_CHARACTERS
    while target < len(text):
        for place in _places(text, target - PIECE_CHARACTERS // 2, target):
            left, right = text[max(start, place - _CONTEXT) : place], text[place : place + _CONTEXT]
            if tokenizer.encode(left) + tokenizer.encode(right) == tokenizer.encode(left + right):
                return place
        target += PIECE_CHARACTERS
    return len(text)


def _places(text: str, low: int, high: int) -> Iterator[int]:
    """Never inside a run of spaces or newlines: how such a run is cut up depends on all of it."""
    for mark, behind in (("\n", 1), (" ", 0)):
        found, tries = high, 0
        while tries < _TRIES and (found := text.rfind(mark, low, found)) >= 0:
            place = found + behind
            if text[place - 1].isspace() != text[place].isspace():
                tries += 1
                yield place
