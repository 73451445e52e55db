"""Words and n-grams of words as 64-bit hashes, for what compares documents: near duplicates, contamination.

A word is a run of letters and digits after Unicode's NFKC and case folding, so that typography, case and punctuation do
not tell copies apart; in scripts without spaces (Chinese, Japanese, Thai, Lao, Burmese, Khmer) it is one character.
Hashes are the same on every machine and in every Python.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from array import array
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

_ALONE = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_WORD = re.compile(rf"[{_ALONE}]|[^\W_{_ALONE}]+")
_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd: multiplying by it loses nothing of 64 bits


def word_hashes(text: str) -> NDArray[np.uint64]:
    """[words], of the words of `text` in order. Holds 8 bytes a word beside the folded text."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    hashes = array("Q", (_hash(found[0]) for found in _WORD.finditer(folded)))
    return np.frombuffer(hashes, np.uint64) if hashes else np.empty(0, np.uint64)


@lru_cache(1 << 16)  # about 10 MB, and most words of a text are among them
def _hash(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def ngram_hashes(words: NDArray[np.uint64], n: int) -> NDArray[np.uint64]:
    """[max(0, words - n + 1)], of every n words in a row."""
    count = max(0, len(words) - n + 1)
    made = np.zeros(count, np.uint64)
    for i in range(n):
        made = made * _FACTOR + words[i : i + count]
    # A finaliser (MurmurHash3's), so that all bits of a hash depend on all words.
    for shift, factor in ((33, 0xFF51AFD7ED558CCD), (33, 0xC4CEB9FE1A85EC53)):
        made = (made ^ (made >> np.uint64(shift))) * np.uint64(factor)
    return made ^ (made >> np.uint64(33))
