"""What a pass over documents is: a pure part for each document, and a decision in the documents' order where needed.

The pure part (`Pass.signature`) may run in any process, in any order; what it returns is all that the decision sees.
The decisions (`Decider`) are taken one document after the other in canonical order, each pass seeing what the passes
before it kept. So the outcome depends on the documents and their order alone, never on how many workers there were.
This module knows no particular pass and starts no process: see runner.py.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from data_pipeline.sources import Document


@dataclass(frozen=True)
class Drop:
    """A document goes. `reason` is one of few: removals are counted by it."""

    reason: str


class Pass(Protocol):
    """Settings only, so that it can be pickled and sent to workers."""

    @property
    def name(self) -> str:
        """As data.passes spells it."""

    def signature(self, document: Document) -> bytes | Drop:
        """All that `decide` needs of the document (b"" where there is no decision). Pure: the same everywhere."""

    def decide(self, scratch: Path, stack: ExitStack) -> Callable[[bytes], Drop | None] | None:
        """The decision, called with the signatures in canonical order; None where the pass takes none.

        What it holds beyond its stated memory goes into files in `scratch`; `stack` closes them.
        """


@dataclass(frozen=True)
class Verdict:
    """What the pure parts of all passes say of one document. Plain data: send it, keep it, replay it."""

    characters: int
    signatures: tuple[bytes, ...]  # of the passes before the one that drops it, of all where none does
    drop: Drop | None = None


def examine(document: Document, passes: Sequence[Pass]) -> Verdict:
    """The pure parts in order, up to the first that drops the document."""
    signatures: list[bytes] = []
    for each in passes:
        found = each.signature(document)
        if isinstance(found, Drop):
            return Verdict(len(document.text), tuple(signatures), found)
        signatures.append(found)
    return Verdict(len(document.text), tuple(signatures))


@dataclass
class Counts:
    """What went, by pass and reason: (documents, characters)."""

    documents: int = 0
    characters: int = 0
    removed: dict[str, dict[str, tuple[int, int]]] = field(default_factory=dict)

    @property
    def removed_documents(self) -> int:
        return sum(documents for reasons in self.removed.values() for documents, _ in reasons.values())

    def as_dict(self) -> dict[str, Any]:
        """For prepared.json."""
        removed = {
            name: {why: {"documents": d, "characters": c} for why, (d, c) in sorted(reasons.items())}
            for name, reasons in self.removed.items()
        }
        return {"documents": self.documents, "characters": self.characters, "removed": removed}

    def lines(self) -> list[str]:
        """For the console, one a reason, passes that removed nothing too."""
        total = f"{self.documents:,} documents, {self.characters:,} characters"
        made = [f"passes: {self.documents - self.removed_documents:,} kept of {total}"]
        for name, reasons in self.removed.items():
            made += [f"{name}: {d:,} documents, {c:,} characters: {why}" for why, (d, c) in sorted(reasons.items())]
            made += [] if reasons else [f"{name}: nothing removed"]
        return made


class Decider:
    """Takes verdicts in canonical order and says which documents stay; `counts` holds what went and why.

    A context manager: at the end it closes and removes its files, which lie in a folder of their own in `scratch`
    (None: the system's folder for temporary files).
    """

    def __init__(self, passes: Sequence[Pass], *, scratch: Path | None = None) -> None:
        self.counts = Counts(removed={each.name: {} for each in passes})
        self._stack = ExitStack()
        self._names = [each.name for each in passes]
        folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="passes.", dir=scratch)))
        self._decisions = [each.decide(folder, self._stack) for each in passes]

    def keep(self, verdict: Verdict) -> bool:
        """Whether the document of `verdict` stays; every document's must be given, each once, in order."""
        self.counts.documents += 1
        self.counts.characters += verdict.characters
        for name, decision, signature in zip(self._names, self._decisions, verdict.signatures, strict=False):
            if decision is not None and (drop := decision(signature)) is not None:
                return self._removed(name, drop, verdict)
        if verdict.drop is not None:
            return self._removed(self._names[len(verdict.signatures)], verdict.drop, verdict)
        return True

    def _removed(self, name: str, drop: Drop, verdict: Verdict) -> bool:
        documents, characters = self.counts.removed[name].get(drop.reason, (0, 0))
        self.counts.removed[name][drop.reason] = documents + 1, characters + verdict.characters
        return False

    def __enter__(self) -> Decider:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()
