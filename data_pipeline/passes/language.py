"""Documents in other languages than those wanted, by py3langid (139 languages, by letter sequences).

It sees the beginning of a document, and is unsure of short ones, of lists and of code: `min_probability` says how sure
it must be that a document is in a wanted language.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from data_pipeline.passes.base import Drop
from data_pipeline.sources import Document
from sisa_dist.config import UserError
from sisa_dist.config.passes import LanguageConfig


@dataclass(frozen=True)
class Language:
    settings: LanguageConfig
    name: str = "language"

    @classmethod
    def of(cls, settings: LanguageConfig) -> Language:
        """Raises UserError for a code that is no language of the library's."""
        known = {str(code) for code in _identifier().labels}
        for code in settings.keep:
            if code not in known:
                raise UserError(f"data.passes.language.keep: {code!r} is none of {', '.join(sorted(known))}")
        return cls(settings)

    def signature(self, document: Document) -> bytes | Drop:
        language, probability = _identifier().classify(document.text[: self.settings.characters])
        if language not in self.settings.keep:
            return Drop(f"in {language}")
        if probability < self.settings.min_probability:
            return Drop(f"less than {self.settings.min_probability:g} sure of the language")
        return b""

    def decide(self, scratch: Path, stack: ExitStack) -> Callable[[bytes], Drop | None] | None:
        return None


@cache
def _identifier() -> Any:
    """Loaded once a process."""
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError as error:
        raise UserError(f"data.passes.language needs py3langid ({error}): pip install 'sisa-dist[corpus]'") from None
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
