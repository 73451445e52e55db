"""Which documents are held out: decided by each text alone, so that copies fall on one side, whatever the order."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from itertools import chain

from data_pipeline.sources import Document


def split_value(text: str) -> float:
    """In [0, 1), uniform, from a hash of the text; held out where below the fraction."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=6).digest(), "big") / 2**48


def split_documents(documents: Iterable[Document], fraction: float) -> Iterator[tuple[bool, Document]]:
    """(held out, document) for each. Of a lone document the last `fraction` of its text is held out, cut at a line.

    A corpus of one file (one long .txt) would otherwise have no held-out text at all, or nothing else.
    """
    iterator = iter(documents)
    first = next(iterator, None)
    if first is None:
        return
    second = next(iterator, None)
    if second is None and fraction > 0:
        yield from _cut(first, fraction)
        return
    for document in chain([first], [second] if second else [], iterator):
        yield split_value(document.text) < fraction, document


def split_document(document: Document, fraction: float, *, lone: bool) -> Iterator[tuple[bool, Document]]:
    """What split_documents gives of one document; `lone`: whether it is the only one."""
    if lone and fraction > 0:
        yield from _cut(document, fraction)
    else:
        yield split_value(document.text) < fraction, document


def _cut(document: Document, fraction: float) -> Iterator[tuple[bool, Document]]:
    text = document.text
    at = int(len(text) * (1 - fraction))
    line = text.rfind("\n", 0, at) + 1
    if line > len(text) * (1 - 2 * fraction):  # else its lines are too long to be kept whole
        at = line
    for held_out, part, name in ((False, text[:at], "train"), (True, text[at:], "held-out")):
        if part:
            yield held_out, Document(f"{document.id}#{name}", part)
