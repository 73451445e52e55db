"""Documents much like an earlier one: MinHash signatures of their word n-grams, banded (LSH), by datasketch.

Two documents whose signatures agree in all rows of some band are compared; the later one goes where the estimated
Jaccard similarity of their n-gram sets is at least the threshold. Compared is with documents that were kept, so of
a ~ b ~ c with a unlike c, a and c stay. Bands and rows are chosen so that few pairs above the threshold are missed
(README has the measured recall); pairs below it are found out by the estimate. A document shorter than an n-gram is one
n-gram; one without any word is never a near duplicate.

Memory per kept document: the table (table.py), an entry a band; on disk 4 × num_perm bytes.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.passes.base import Drop
from data_pipeline.passes.table import Table
from data_pipeline.passes.words import ngram_hashes, word_hashes
from data_pipeline.sources import Document
from sisa_dist.config import UserError
from sisa_dist.config.passes import NearDedupConfig

_AT_ONCE = 1 << 14  # n-grams hashed in one go: 8 MB at 128 hashes
# Of missing a pair against looking at one for nothing: looking is cheap, for the estimate decides.
_WEIGHTS = (0.1, 0.9)
_CANDIDATES = 16  # kept documents remembered of one band: more would make boilerplate slow


@dataclass(frozen=True)
class NearDedup:
    settings: NearDedupConfig
    bands: int
    rows: int
    name: str = "near_dedup"

    @classmethod
    def of(cls, settings: NearDedupConfig) -> NearDedup:
        lsh = _datasketch().MinHashLSH(settings.threshold, settings.num_perm, weights=_WEIGHTS)
        return cls(settings, lsh.b, lsh.r)

    def signature(self, document: Document) -> bytes | Drop:
        """A 64-bit key for each band, then the hashes as little-endian uint32; empty for a text without words."""
        words = word_hashes(document.text)
        if len(words) == 0:
            return b""
        hashes = minhash(ngram_hashes(words, min(self.settings.ngram, len(words))), self.settings)
        rows = hashes[: self.bands * self.rows].reshape(self.bands, self.rows)
        keys = [
            hashlib.blake2b(row.tobytes(), digest_size=8, salt=band.to_bytes(16, "little")).digest()
            for band, row in enumerate(rows)
        ]
        return b"".join(keys) + hashes.tobytes()

    def decide(self, scratch: Path, stack: ExitStack) -> Callable[[bytes], Drop | None] | None:
        table = Table(memory_bytes=int(self.settings.memory_gb * 1e9), file=scratch / "near")
        stack.callback(table.close)
        file = stack.enter_context((scratch / "near.signatures").open("w+b", buffering=0))
        size, split = 4 * self.settings.num_perm, 8 * self.bands
        kept = 0

        def decision(signature: bytes) -> Drop | None:
            nonlocal kept
            if not signature:
                return None
            found = [(key, table.find(key)) for key in np.frombuffer(signature[:split], "<u8").tolist()]
            hashes = np.frombuffer(signature[split:], "<u4")
            for other in sorted({number for _, numbers in found for number in numbers}):
                theirs = np.frombuffer(os.pread(file.fileno(), size, other * size), "<u4")
                if np.count_nonzero(hashes == theirs) >= self.settings.threshold * len(hashes):
                    return Drop("much like an earlier document")
            file.write(signature[split:])
            for key, numbers in found:
                if len(numbers) < _CANDIDATES:
                    table.add(key, kept)
            kept += 1
            return None

        return decision


def minhash(ngrams: NDArray[np.uint64], settings: NearDedupConfig) -> NDArray[np.uint32]:
    """[num_perm], little-endian, of a set of n-gram hashes."""
    made = _datasketch().MinHash(
        num_perm=settings.num_perm,
        seed=settings.seed,
        hashfunc=int,
        permutations=_permutations(settings.num_perm, settings.seed),
        scheme="affine32",
    )
    distinct = np.unique(ngrams >> np.uint64(32))
    for start in range(0, len(distinct), _AT_ONCE):
        made.update_batch(distinct[start : start + _AT_ONCE].tolist())
    return made.hashvalues.astype("<u4")


@cache
def _permutations(num_perm: int, seed: int) -> Any:
    return _datasketch().MinHash(num_perm=num_perm, seed=seed, scheme="affine32").permutations


def _datasketch() -> Any:
    try:
        import datasketch
    except ImportError as error:
        raise UserError(f"data.passes.near_dedup needs datasketch ({error}): pip install 'sisa-dist[corpus]'") from None
    return datasketch
