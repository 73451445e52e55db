"""Gopher's document-wise quality rules: Rae et al. 2021, appendix A.1.1. Made for English web pages.

The paper leaves some words open. Here a word is what whitespace separates, a line what is not blank; an ellipsis is
"..." or "…", a bullet • ‣ ◦ ▪ ● · or a hyphen or star before a space; a stop word is met without its punctuation, in
any case.
"""

from __future__ import annotations

import string
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.passes.base import Drop
from data_pipeline.sources import Document
from sisa_dist.config.passes import QualityConfig

_BULLETS = ("•", "‣", "◦", "▪", "●", "·", "- ", "* ")
_ELLIPSES = ("...", "…")


@dataclass(frozen=True)
class Quality:
    settings: QualityConfig
    name: str = "quality"

    def signature(self, document: Document) -> bytes | Drop:
        reason = self._reason(document.text)
        return b"" if reason is None else Drop(reason)

    def _reason(self, text: str) -> str | None:
        """The first rule that the text breaks, in the paper's order."""
        limits, words = self.settings, text.split()
        if len(words) < max(1, limits.min_words):
            return f"fewer than {max(1, limits.min_words)} words"
        if len(words) > limits.max_words:
            return f"more than {limits.max_words} words"
        mean = sum(map(len, words)) / len(words)
        if mean < limits.min_mean_word_length:
            return f"mean word length below {limits.min_mean_word_length:g}"
        if mean > limits.max_mean_word_length:
            return f"mean word length above {limits.max_mean_word_length:g}"
        if text.count("#") > limits.max_hashes_per_word * len(words):
            return f"more than {limits.max_hashes_per_word:g} hash signs a word"
        if sum(map(text.count, _ELLIPSES)) > limits.max_ellipses_per_word * len(words):
            return f"more than {limits.max_ellipses_per_word:g} ellipses a word"
        lines = [stripped for line in text.splitlines() if (stripped := line.strip())]
        if sum(line.startswith(_BULLETS) for line in lines) > limits.max_bullet_lines * len(lines):
            return f"more than {limits.max_bullet_lines:g} of the lines begin with a bullet"
        if sum(line.endswith(_ELLIPSES) for line in lines) > limits.max_ellipsis_lines * len(lines):
            return f"more than {limits.max_ellipsis_lines:g} of the lines end with an ellipsis"
        if sum(any(map(str.isalpha, word)) for word in words) < limits.min_alphabetic_words * len(words):
            return f"fewer than {limits.min_alphabetic_words:g} of the words have a letter"
        bare = {word.strip(string.punctuation + "“”‘’«»…").lower() for word in words}
        if len(bare.intersection(limits.stop_words)) < limits.min_stop_words:
            return f"fewer than {limits.min_stop_words} different stop words"
        return None

    def decide(self, scratch: Path, stack: ExitStack) -> Callable[[bytes], Drop | None] | None:
        return None
