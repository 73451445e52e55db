"""Documents that are too short or too long, in characters."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.passes.base import Drop
from data_pipeline.sources import Document
from sisa_dist.config.passes import LengthConfig


@dataclass(frozen=True)
class Length:
    limits: LengthConfig
    name: str = "length"

    def signature(self, document: Document) -> bytes | Drop:
        size, limits = len(document.text), self.limits
        if size < limits.min_characters:
            return Drop(f"fewer than {limits.min_characters} characters")
        if limits.max_characters is not None and size > limits.max_characters:
            return Drop(f"more than {limits.max_characters} characters")
        return b""

    def decide(self, scratch: Path, stack: ExitStack) -> Callable[[bytes], Drop | None] | None:
        return None
