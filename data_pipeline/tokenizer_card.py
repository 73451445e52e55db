"""tokenizer_card.json: what a tokenizer was made from and how it does on held-out text, domain by domain.

Written beside the tokenizer by `sisa prepare`. Fertility is measured on texts that the tokenizer was not trained on;
without held-out text there are settings alone. It judges nothing: what is unusable is refused before
(tokenizer_base.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.tokenizer_base import Tokenizer
from sisa_dist.config import UserError

CARD = "tokenizer_card.json"
CARD_VERSION = 1
_DOMAIN_BYTES = 4_000_000  # measured of a domain at most: splitting words costs more than encoding
_DOMAINS = 100  # listed at most; the later ones are counted together
_OTHERS = "others"


@dataclass
class _Sums:
    documents: int = 0
    bytes: int = 0
    words: int = 0
    tokens: int = 0
    fallback: int = 0


class Fertility:
    """Sums over held-out texts, in any order up to 4 MB a domain; two of the same texts in the same order are equal."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._fallback = np.zeros(tokenizer.vocab_size, bool)
        self._fallback[list(tokenizer.fallback_ids())] = True
        self.domains: dict[str, _Sums] = {}

    def add(self, domain: str, text: str, ids: list[int]) -> None:
        """`ids`: of `text`, without eos. `domain`: what the reader is to compare, a source or a file."""
        if domain not in self.domains and len(self.domains) >= _DOMAINS:
            domain = _OTHERS
        sums = self.domains.setdefault(domain, _Sums())
        if sums.bytes >= _DOMAIN_BYTES:
            return
        sums.documents += 1
        sums.bytes += len(text.encode())
        sums.words += len(text.split())
        sums.tokens += len(ids)
        sums.fallback += int(np.count_nonzero(self._fallback[ids])) if ids else 0

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
            for domain, sums in self.domains.items()
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
