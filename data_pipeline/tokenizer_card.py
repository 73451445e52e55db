"""tokenizer_card.json: what a tokenizer was made from and how it does on held-out text, domain by domain.

Written beside the tokenizer by `sisa prepare`. Fertility is measured on texts that the tokenizer was not trained on;
without held-out text there are settings alone. It judges nothing: what is unusable is refused before
(tokenizer_base.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.tokenizer_base import Tokenizer
from sisa_dist.config import UserError

CARD = "tokenizer_card.json"
CARD_VERSION = 1


@dataclass
class _Sums:
    documents: int = 0
    bytes: int = 0
    words: int = 0
    tokens: int = 0
    fallback: int = 0


_NAMES = tuple(field.name for field in fields(_Sums))


class Fertility:
    """Sums over held-out texts, in any order, and over the sums of several."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._fallback = np.zeros(tokenizer.vocab_size, bool)
        self._fallback[list(tokenizer.fallback_ids())] = True
        self._domains: dict[str, _Sums] = {}

    def add(self, domain: str, ids: Sequence[int] | NDArray[Any], *, num_bytes: int, words: int) -> None:
        """`ids`: of one text, without eos; bytes and words of it as UTF-8 and by whitespace. `domain`: what is to be
        compared, an entry of data.input."""
        sums = self._domains.setdefault(domain, _Sums())
        by_bytes = int(np.count_nonzero(self._fallback[np.asarray(ids, np.int64)]))
        for name, number in zip(_NAMES, (1, num_bytes, words, len(ids), by_bytes), strict=True):
            setattr(sums, name, getattr(sums, name) + number)

    def sums(self) -> dict[str, list[int]]:
        """To be kept, and merged later."""
        return {domain: [getattr(sums, name) for name in _NAMES] for domain, sums in self._domains.items()}

    def merge(self, others: Mapping[str, Sequence[int]]) -> None:
        """Adds another's `sums()`."""
        for domain, numbers in others.items():
            sums = self._domains.setdefault(domain, _Sums())
            for name, number in zip(_NAMES, numbers, strict=True):
                setattr(sums, name, getattr(sums, name) + number)

    def as_dict(self) -> dict[str, dict[str, Any]]:
        return {
            domain: {
                "documents": sums.documents,
                "bytes": sums.bytes,
                "tokens": sums.tokens,
                "bytes_per_token": sums.bytes / max(1, sums.tokens),
                "tokens_per_word": sums.tokens / max(1, sums.words),
                "fallback_share": sums.fallback / max(1, sums.tokens),
            }
            for domain, sums in self._domains.items()
        }


def write_card(folder: Path, tokenizer: Tokenizer, fertility: Fertility, *, settings: Mapping[str, Any]) -> None:
    """`settings`: how it was trained, or from which file it was taken."""
    card = {
        "version": CARD_VERSION,
        "file": tokenizer.path.name,
        "sha256": tokenizer.sha256,
        "vocab_size": tokenizer.vocab_size,
        "eos": tokenizer.piece(tokenizer.eos_id),
        "settings": dict(settings),
        "held_out": fertility.as_dict(),
    }
    (folder / CARD).write_text(json.dumps(card, indent=1, ensure_ascii=False), encoding="utf-8")


def read_card(folder: Path) -> dict[str, Any] | None:
    """None where there is none: data prepared before there were cards. Raises UserError where it is damaged."""
    path = folder / CARD
    if not path.is_file():
        return None
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
        version = card["version"]
        if version != CARD_VERSION:
            raise UserError(f"{path}: version {version}, this version reads {CARD_VERSION}: prepare the data anew")
        describe_card(card)
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: cannot be read ({type(error).__name__}), it is damaged: remove it") from None
    assert isinstance(card, dict)
    return card


def describe_card(card: Mapping[str, Any]) -> str:
    """The card in a few lines, for `sisa data info`."""
    settings = ", ".join(f"{key} {value}" for key, value in card["settings"].items())
    lines = [
        f"tokenizer: {card['file']}, {card['vocab_size']:,} ids, eos {card['eos']!r}, sha256 {card['sha256'][:12]}",
        f"made: {settings}",
    ]
    if not card["held_out"]:
        return "\n".join([*lines, "held-out text: none to measure it on"])
    width = max(len(domain) for domain in [*card["held_out"], "held-out text"])
    lines.append(f"{'held-out text':{width}}  bytes/token  tokens/word  by bytes  documents")
    for domain, sums in card["held_out"].items():
        lines.append(
            f"{domain:{width}}  {sums['bytes_per_token']:11.2f}  {sums['tokens_per_word']:11.2f}  "
            f"{sums['fallback_share']:8.2%}  {sums['documents']:9,}"
        )
    return "\n".join(lines)
